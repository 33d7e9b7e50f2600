"""Held-out rows by slice and margin: each part is what those rows alone would give, and the whole is their mean."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.workflow.evaluation_tables import evaluation_tables, markdown
from posttrain.workflow.measure_rows import margins_of, measure_rows, row_scores
from runs import prepared, recipe_config
from steps.recipes import measure_names, measures_of, sliced_names
from steps.streams import held_out_slices, held_out_units
from unit_policy import OneRank


def measured(name: str, folder: Path, **changes):
    config = recipe_config(name, **{"eval.slice_by": "slice", "data.held_out": f"small_task:sliced_{name}", **changes})
    base = prepared(folder, config)
    units, slices = held_out_units(base.tokens_uri), held_out_slices(config, base.tokens_uri)
    policy = OneRank(config, base.model_uri)
    found = asyncio.run(measure_rows(policy, units, measures_of(config), slices=slices))  # pyright: ignore
    return config, policy, units, slices, found


@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_a_slice_is_measured_as_its_rows_alone(tmp_path: Path, name: str):
    changes = {"method.reference_free": True} if name == "dpo" else {}
    config, policy, units, slices, found = measured(name, tmp_path, warmup=None, **changes)
    assert set(slices) == {"short", "long"} and set(found["slices"]) == {"short", "long"}
    assert set(measure_names(config)) <= set(found), "the gate may name every measure that the run has"
    assert all(set(sliced_names(config)) <= set(part) for part in found["slices"].values()), "and of every slice"
    mine = [unit for unit, where in zip(units, slices, strict=True) if where == "short"]
    alone = asyncio.run(measure_rows(policy, mine, measures_of(config)))  # pyright: ignore[reportArgumentType]
    part = found["slices"]["short"]
    assert part["rows"] == len(mine) and part["loss"] == alone["loss"]
    assert found["slices"]["long"]["loss"] != part["loss"]
    key = {"sft": "perplexity", "dpo": "prefers_chosen", "reward": "accuracy"}[name]
    assert part[key] == alone[key]
    if name != "sft":
        parts = found["slices"].values()
        whole = sum(each[key] * each["rows"] for each in parts) / len(units)
        assert found[key] == pytest.approx(whole, abs=1e-3)


def test_pairs_are_told_by_their_margin_and_by_how_sure_the_model_is(tmp_path: Path):
    *_, units, _, found = measured("reward", tmp_path, warmup=None)
    assert set(found["margins"]) == {"0", "1"}
    assert sum(part["rows"] for part in found["margins"].values()) == len(units)
    assert sum(row["rows"] for row in found["reliability"]) == len(units)
    assert 0 <= found["calibration_error"] <= 1
    tables = {table.title: table for table in evaluation_tables({"before": found, "after": found})}
    sure = [f"How sure and how right: {model}" for model in ("before", "after")]
    assert list(tables) == ["By slice", "By the margin of the pair", *sure]
    assert "| slice | rows | loss, before | loss, after |" in markdown(tables["By slice"])
    json.dumps(found)


def test_many_margins_are_told_by_their_quarters(tmp_path: Path):
    unit = (measured("reward", tmp_path, warmup=None)[2][0][0],)
    units = [(replace(unit[0], fields={"margin": margin / 10}),) for margin in range(12)]
    names = margins_of(units)
    assert names[0] == "1: 0 to 0.3" and names[-1] == "4: 0.8 to 1.1"
    assert max(map(names.count, names)) <= 4, "quarters hold about as many pairs"
    assert margins_of(units[:1]) == []


def test_the_score_of_a_row_is_minus_its_own_loss(tmp_path: Path):
    config, policy, units, *_ = measured("sft", tmp_path, warmup=None)
    scores = asyncio.run(row_scores(policy, units))  # pyright: ignore[reportArgumentType]
    assert list(scores) == [str(number) for number in range(len(units))]
    for number, unit in enumerate(units):
        alone = asyncio.run(measure_rows(policy, [unit], measures_of(config)))  # pyright: ignore[reportArgumentType]
        assert scores[str(number)] == pytest.approx(-alone["loss"], abs=1e-4)


def test_the_score_of_a_pair_is_by_how_much_its_chosen_answer_is_likelier(tmp_path: Path):
    _, policy, units, *_ = measured("dpo", tmp_path, warmup=None, **{"method.reference_free": True})
    scores = asyncio.run(row_scores(policy, units))  # pyright: ignore[reportArgumentType]
    apart = [(each,) for unit in units for each in unit]
    alone = asyncio.run(row_scores(policy, apart))  # pyright: ignore[reportArgumentType]
    for number, unit in enumerate(units):
        sums = [alone[str(2 * number + side)] * float(each.loss_mask.sum()) for side, each in enumerate(unit)]
        assert scores[str(number)] == pytest.approx(sums[0] - sums[1], abs=1e-4)
