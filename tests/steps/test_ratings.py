"""A reward model of several ratings: trained where it has them, exported by name, measured by attribute."""

import asyncio
import json
import math
from pathlib import Path

import pytest

from posttrain.compute.mesh import Sizes
from posttrain.model.backend import backend_of
from posttrain.model.losses import count
from posttrain.workflow.evaluation_tables import evaluation_tables
from posttrain.workflow.measure_rows import measure_rows
from posttrain.workflow.policy_rank import PolicyRank
from runs import prepared, recipe_config
from steps.recipes import build_of, loss_of, measure_names, measures_of, training_of
from steps.streams import held_out_units, open_stream
from unit_policy import OneRank

CHANGES = {
    "data.sources": "small_task:rated",
    "data.held_out": "small_task:held_out_rated",
    "method.kind": "ratings",
    "method.attributes": ["right", "long"],
    "optim.lr": 1e-2,
}


def test_ratings_are_learned_where_they_are_known_and_exported_by_their_names(tmp_path: Path):
    config = recipe_config("reward", **CHANGES)
    base = prepared(tmp_path / "run", config)
    facts = {"backend": "posttrain", "training": training_of(config, "reward"), "build": build_of(config, None)}
    rank = PolicyRank(rank=0, sizes=Sizes(data=1), model_uri=base.model_uri, reference=False, **facts)
    rank.address()
    rank.join("", 60.0)
    stream = open_stream(config, tokens_uri=base.tokens_uri, model_uri=base.model_uri)
    packs, loss = stream.window(0).packs[:4], loss_of(config, "reward")
    samples = [sample for each in packs for sample in each.samples]
    known = [sum(not math.isnan(s.fields[name]) for s in samples) / len(samples) for name in ("right", "long")]
    found = [rank.train_step(step, packs, loss, count(loss, packs)) for step in range(6)]
    assert [found[0][f"{name}/labelled"] for name in ("right", "long")] == pytest.approx(known)
    assert 0 < known[0] < 1 > known[1] > 0
    assert found[0]["loss"] == pytest.approx((found[0]["right/loss"] + found[0]["long/loss"]) / 2, rel=1e-5)
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]

    uri = rank.export(str(tmp_path / "trained"))
    assert json.loads(Path(uri, "config.json").read_text())["id2label"] == {"0": "right", "1": "long"}
    backend = backend_of("posttrain")
    backend.export(backend.load(uri), tmp_path / "export", like=uri)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["label2id"] == {"right": 0, "long": 1}
    assert backend.verify(tmp_path / "export", uri)["max_abs_diff"] < 1e-4


def test_held_out_ratings_are_measured_together_and_by_attribute(tmp_path: Path):
    config = recipe_config("reward", **CHANGES)
    base = prepared(tmp_path, config)
    units = held_out_units(base.tokens_uri)
    found = asyncio.run(measure_rows(OneRank(config, base.model_uri), units, measures_of(config)))
    assert measure_names(config) == ["loss", "abs_error"] and set(measure_names(config)) <= set(found)
    right, long = (found["attributes"][name] for name in ("right", "long"))
    assert right["rows"] == long["rows"] == len(units)
    assert found["abs_error"] == pytest.approx((right["abs_error"] + long["abs_error"]) / 2, abs=1e-3)
    assert 2.5 < long["abs_error"] < 3.5, "an untrained head says about 0 where all are rated 3"
    (table,) = evaluation_tables({"before": found})
    assert table.headings == ["attribute", "rows", "abs_error, before"] and [row[0] for row in table.rows] == [
        "long",
        "right",
    ]
