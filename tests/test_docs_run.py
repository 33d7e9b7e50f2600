"""The Python of the documentation runs as it stands on the page, and does what the page says.

Each block of docs/ that is Python of ours is named here with the test that runs it; those of examples/ are whole files,
which tests/test_examples.py runs.
"""

import asyncio
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from posttrain import storage
from posttrain.data.environment import EnvironmentHost
from posttrain.data.event_world import World
from posttrain.data.semantic_ids import SemanticIds, fit_semantic_ids
from posttrain.data.tokenizer import BaseHFModelTokenizer, Encoded
from posttrain.data.turn_numbers import Numbers, with_numbers
from posttrain.data.types import Prompt, Rollout
from posttrain.workflow import registry
from posttrain.workflow.rollout_file import RolloutFile
from test_docs_code import OURS, Block
from tiny import tiny_tokenizer

RUN_HERE = {
    "events.md": ["read_events", '"labels"'],
    "from_verl.md": ["def accuracy"],
    "retraining.md": ["registry.champion"],
    "rl.md": ["class Guess", "best_rows"],
    "semantic_ids.md": ["fit_semantic_ids", "class Members"],
}
"""Page -> words of its blocks that a test of this file runs."""
RUN_ELSEWHERE = {
    "README.md": ["latest_successful_run"],  # tests/flows/test_grpo_flow.py
    "reward.md": ["RewardWorker"],  # tests/test_docs_code.py
    "new_family.md": ["_gemma"],  # tests/unit/model/test_new_family.py
}


def block(page: str, words: str) -> str:
    """The one Python block of a page that has these words."""
    (found,) = [b.text for path, b in OURS if path.name == page and b.kind == "python" and words in b.text]
    return found


def run(page: str, words: str, **given: Any) -> dict[str, Any]:
    """What a block defines, with what the page says that a reader has."""
    names = dict(given)
    exec(compile(block(page, words), page, "exec"), names)
    return names


def test_every_block_of_python_is_run_by_a_named_test():
    def is_named(path: Path, each: Block) -> bool:
        return any(words in each.text for where in (RUN_HERE, RUN_ELSEWHERE) for words in where.get(path.name, []))

    left = [(path.name, b.text[:60]) for path, b in OURS if b.kind == "python" and "--8<--" not in b.text]
    unnamed = [
        (p.name, b.text[:60]) for p, b in OURS if b.kind == "python" and "--8<--" not in b.text and not is_named(p, b)
    ]
    assert left and not unnamed


def test_a_page_shows_its_example_and_not_the_words_that_include_it():
    for path, each in OURS:
        assert not re.search(r"-8\s+<|<\s+--\"", each.text), f"{path.name}: a formatter has broken the directive"


def test_the_reward_of_a_verl_run_reads_rows_in_its_layout():
    accuracy = run("from_verl.md", "def accuracy")["accuracy"]
    row = {"prompt": [{"role": "user", "content": "1 + 1"}], "reward_model": {"ground_truth": "2"}}
    assert (accuracy(row, " 2\n"), accuracy(row, "3")) == (1.0, 0.0)


def test_events_of_a_table_become_rows_before_and_after_the_cutoff(tmp_path):
    world = World(0, members=30, items=40)
    pq.write_table(world.events(), tmp_path / "events.parquet")
    names = run("events.md", "read_events")
    names |= {"FILES": str(tmp_path / "*.parquet"), "CUTOFF": world.cutoff}
    assert isinstance(names["CUTOFF"], datetime)
    early, late = list(names["training"](0)), list(names["held_out"](0))
    assert early and late and all(row["messages"] for row in (*early, *late))
    (tmp_path / "tokenizer").mkdir()
    names["tokenizer"](tmp_path / "tokenizer", 0)
    assert BaseHFModelTokenizer(tmp_path / "tokenizer").vocab_size > 40


def test_the_numbers_of_the_page_stand_beside_the_tokens_of_the_answer(tmp_path):
    answer = eval(block("events.md", '"labels"'))
    numbers = Numbers(features=tuple(answer["features"]), labels=tuple(answer["labels"]))
    row = {"messages": [{"role": "user", "content": "hi"}, answer]}
    (found,) = with_numbers(tiny_tokenizer(tmp_path), [row], "last", numbers)
    assert isinstance(found, Encoded) and found.numbers is not None
    gap, *labels = found.numbers[found.loss_mask > 0][-1].tolist()
    assert gap == 12.0 and labels == pytest.approx([1.0, 0.4])


def test_a_champion_is_asked_for_by_one_line(tmp_path, monkeypatch):
    folder = str(tmp_path / "export")
    with storage.staging(folder) as made:
        (made / "config.json").write_text("{}")
        storage.publish(made, folder)
    where = str(tmp_path / "champions")
    registry.promote(where, registry.Candidate(run="Flow/1", parent=None, model_uri=folder, key="1"))
    last = block("retraining.md", "registry.champion").replace("s3://bucket/champions", where).splitlines()[-1]
    assert Path(eval(last, {"registry": registry}), "config.json").read_text() == "{}"


def test_the_environment_of_the_page_plays_until_the_secret_is_said(tmp_path, monkeypatch):
    (tmp_path / "guessing.py").write_text(block("rl.md", "class Guess"))
    monkeypatch.syspath_prepend(str(tmp_path))

    async def played(*guesses: str) -> tuple[float, dict[str, float]]:
        host = EnvironmentHost("guessing:Guess")
        answer = await host.start("e", {"messages": [{"role": "user", "content": "guess"}], "secret": "7"}, seed=0)
        for guess in guesses:
            assert "ask" in answer, answer
            answer = await host.go_on("e", guess)
        return answer["reward"]

    assert asyncio.run(played("3", "7"))[0] == 1.0


def test_rollouts_of_a_run_are_the_rows_of_the_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    row = {"messages": [{"role": "user", "content": "sort 31"}]}
    prompt = Prompt(uid=0, token_ids=tuple(tokenizer.prompt(row["messages"])), row=row)

    def rollout(index: int, text: str, reward: float) -> Rollout:
        ids = (*tokenizer.hf.encode(text, add_special_tokens=False), tokenizer.stop_id)
        told = {"logprobs": (-0.25,) * len(ids), "versions": (0,) * len(ids), "finish_reason": "stop"}
        told |= {"parts": {"exact": reward}, "latency_s": 0.5}
        return Rollout(prompt=prompt, sample_index=index, token_ids=ids, text=text, reward=reward, **told)

    RolloutFile("runs/GRPOFlow/17/rollouts").rollouts(0, [[rollout(0, "13", 1.0), rollout(1, "31", 0.0)]])
    names = run("rl.md", "best_rows")
    (best,), (pair,) = list(names["rows"](0)), list(names["pairs"](0))
    assert best["messages"][-1]["content"] == pair["chosen"][0]["content"] == "13"
    assert pair["rejected"][0]["content"] == "31"


def test_items_are_named_and_later_ones_join_them(tmp_path):
    draws = np.random.default_rng(0)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer").hf
    before = len(tokenizer)
    given = {"items": list(range(300)), "embeddings": draws.normal(size=(300, 4)), "folder": tmp_path}
    given |= {"new_items": [300], "their_embeddings": draws.normal(size=(1, 4)), "tokenizer": tokenizer}
    names = run("semantic_ids.md", "fit_semantic_ids", **given)
    assert len(names["ids"].tokens(17)) == 4 and len(tokenizer) == before + len(names["ids"].vocabulary)
    assert names["later"].tokens(17) == names["ids"].tokens(17) == SemanticIds.load(tmp_path).tokens(17)
    assert len(set(names["later"].items.tolist())) == 301


def test_the_constraint_of_the_page_allows_items_and_nothing_else(tmp_path):
    from posttrain.data.token_trie import Slate, trie_of

    tokenizer = tiny_tokenizer(tmp_path)
    ids = fit_semantic_ids(list(range(8)), np.eye(8), levels=1, codes=4, last_codes=8, seed=0)
    tokenizer.hf.add_tokens(list(ids.vocabulary))
    tokenizer.hf.save_pretrained(tmp_path)
    ids.save(tmp_path)
    given = {
        "BaseHFModelTokenizer": BaseHFModelTokenizer,
        "SemanticIds": SemanticIds,
        "Slate": Slate,
        "trie_of": trie_of,
    }
    names = run("semantic_ids.md", "class Members", **given)
    assert names["Members"].constraint.endswith(":slates")
    first = {tokenizer.hf.convert_tokens_to_ids(ids.tokens(item)[0]) for item in range(8)}
    assert set(names["slates"](tmp_path).allowed([], [])) == first
