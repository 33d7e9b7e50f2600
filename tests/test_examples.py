"""The examples run as they stand: what they name is called, and each trains."""

import asyncio
import json
import random
import re
import shlex
import shutil
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from posttrain import storage
from posttrain.compute.generator import Request
from posttrain.config import RunConfig
from posttrain.config_file import load_config
from posttrain.data.environment import EnvironmentHost
from posttrain.data.reward import RewardWorker
from posttrain.model.load import load_decoder
from posttrain.model.weights import hf_tensors
from runs import ROOT, SMALL, SMALL_RECIPE, prepared
from steps.audit import audit
from terminal import clone, lines_of
from tiny import tiny_model

EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.is_dir())
FEW = {
    **{key: SMALL[key] for key in ("rollout.prompts_per_step", "method.group_size", "warmup.num_steps")},
    **SMALL_RECIPE,
    "data.pack_tokens": 256,
    "optim.num_steps": 2,
}
MINI = {"data": ("sft", SMALL_RECIPE, "my_data.held_out"), "environment": ("grpo", FEW, "my_game.held_out")}
"""How an example is made small where it is not as most: its recipe, what of its config is less, its held-out rows."""


@pytest.fixture
def inside(request, monkeypatch):
    """The folder of the example, with its modules in reach, as where a run is started from."""
    folder = ROOT / "examples" / request.param
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def config(**changes) -> RunConfig:
    return load_config(json.dumps({"base": "config.yaml"} | changes))


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_small_and_told_by_the_readme(folder):
    assert f"({folder.name})" in (ROOT / "examples" / "README.md").read_text()
    for path in folder.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60
    with chdir(folder):
        assert not list(folder.glob("*.yaml")) or config()


@pytest.mark.parametrize("inside", ["own_data"], indirect=True)
def test_own_data_become_tokens(inside, tmp_path):
    made = prepared(tmp_path, config(**{"model.fresh": {"hidden_size": 32, "num_layers": 1}}))
    report = json.loads(Path(made.tokens_uri, "report.json").read_text())
    assert [source["rows"] for source in report["sources"]] == [500, 3]


@pytest.mark.parametrize("inside", ["own_reward"], indirect=True)
def test_own_rewards_are_a_weighted_sum_of_their_parts(inside):
    worker = RewardWorker(config().reward.function)
    (right, parts), (wrong, _) = worker.score({"answer": "123"}, ["123", "9"])
    assert parts == {"right_digits": 1.0, "short": 0.0} and right == pytest.approx(1.0)
    assert wrong == pytest.approx(0.1), "the shortest, and no digit in its place"


@pytest.mark.parametrize("inside", ["own_environment"], indirect=True)
def test_own_environment_plays_its_demonstrations_to_a_win(inside):
    import my_game

    async def played(game):
        host = EnvironmentHost(config().rollout.environment)
        answer = await host.start("episode", game, seed=0)
        for digit in sorted(set(game["secret"])):
            assert "ask" in answer, answer
            answer = await host.go_on("episode", digit)
        return answer["reward"]

    for game in random.Random(0).sample(my_game.prompts(0), 5):
        total, parts = asyncio.run(played(game))
        assert parts["found"] == 1.0 and total > 1


@pytest.mark.parametrize("inside", ["own_generator"], indirect=True)
def test_own_generator_holds_the_weights_it_was_sent_and_its_logprobs_are_theirs(inside, tmp_path):
    from my_generator import PlainGenerator

    from posttrain.compute.generator.transformers import TransformersGenerator

    folder = tmp_path / "model"
    storage.ensure_folder(str(folder), lambda target: (tiny_model(target), None)[1])
    weights = dict(hf_tensors(load_decoder(folder)))
    ours, theirs = (
        cls(model_uri=str(folder), stop_ids=(2,), pad_id=0) for cls in (PlainGenerator, TransformersGenerator)
    )
    assert ours.sync(1, weights) == theirs.sync(1, weights)
    greedy = [Request(token_ids=(5, 6, 7), seed=1, temperature=0.0, max_new_tokens=6)]
    (mine,), (other,) = ours.generate(greedy), theirs.generate(greedy)
    assert mine.token_ids == other.token_ids and mine.finish_reason == other.finish_reason
    torch.testing.assert_close(torch.tensor(mine.logprobs), torch.tensor(other.logprobs), atol=1e-5, rtol=1e-4)
    sampled = [Request(token_ids=(5, 6, 7), seed=seed, temperature=1.0, max_new_tokens=6) for seed in (1, 1, 2)]
    first, again, another = ours.generate(sampled)
    assert first == again and first.token_ids != another.token_ids


@pytest.mark.parametrize("inside", ["own_head"], indirect=True)
def test_own_head_learns_and_is_found_in_the_export(inside, tmp_path):
    from head import Moods, train

    losses = train(str(tiny_model(tmp_path / "model")), str(tmp_path / "out"), steps=20)
    assert losses[-1] < 0.8 * losses[0]
    assert isinstance(load_decoder(tmp_path / "out").heads["moods"], Moods)


def test_own_family_is_a_page_that_a_test_runs():
    page = (ROOT / "docs" / "new_family.md").read_text()
    assert "new_family.md" in (ROOT / "examples" / "README.md").read_text()
    assert re.search(r"```python\n.*FAMILIES\[", page, re.S)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reward", "environment", "generator", "data"])
def test_an_example_trains_as_its_page_says(name, tmp_path):
    terminal = clone(tmp_path)
    shutil.copytree(ROOT / "examples" / f"own_{name}", tmp_path / "examples" / f"own_{name}")
    terminal.type(f"cd examples/own_{name}")
    recipe, few, rows = MINI.get(name, ("grpo", FEW, "small_task.held_out"))
    few = few | {"data.held_out": "few:held_out"}  # 8 in the place of 256
    lines = [f"import {rows.partition('.')[0]}", "def held_out(seed):", f"    return {rows}(seed)[:8]"]
    (terminal.folder / "few.py").write_text("\n".join(lines))
    changes = [f"--config-value {key}={shlex.quote(json.dumps(value))}" for key, value in few.items()]
    (line,) = lines_of(f"bring/{name}.md", "run --config config.yaml")
    said = terminal.type(" ".join([line, *changes]))
    assert "exported model: " in said
    (root,) = (terminal.folder / "runs").glob("*/*")
    proved = audit(str(root), replay=False)["stages"][recipe]
    assert proved["steps"] == few["optim.num_steps"] and proved["dropped"] == {}
    assert recipe == "sft" or proved["draws"] == 2 * 4
