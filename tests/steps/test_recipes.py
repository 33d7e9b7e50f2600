"""Every recipe on rows through its one training program: it learns, measures itself, and leaves what comes next."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain import storage
from posttrain.compute.mesh import Sizes
from posttrain.config import RunConfig
from posttrain.data.token_files import read_units
from posttrain.errors import DataError
from posttrain.model.load import load_decoder, read_config
from posttrain.model.losses import count
from posttrain.workflow.ledger_file import read_ledger
from posttrain.workflow.policy_rank import PolicyRank
from runs import TWO_RANKS, Prepared, metrics, prepared, recipe_config, result_of, run_step
from steps.audit import audit
from steps.prepare import check_same_tokens, prepare
from steps.recipes import build_of, loss_of, training_of
from steps.streams import HELD_OUT_UNITS
from steps.teach import merge_taught, shares, teach
from steps.train import held_out_packs
from tiny import tiny_model


def two_ranks(name: str, **changes: Any) -> RunConfig:
    return recipe_config(name, **TWO_RANKS, **changes)


def trained(config, base: Prepared, folder: Path, *, fault: str | None = None):
    inputs = {"root": str(folder), "model_uri": base.model_uri, "tokens_uri": base.tokens_uri, "recipe": True}
    return run_step("train", config, folder, fault=fault, teacher_uri=base.teacher_uri, **inputs)


def test_sft_hands_on_its_best_weights_and_counts_every_draw(tmp_path: Path):
    config = two_ranks("sft", **{"eval.deliver": "best", "optim.lr": 1e-2})
    base = prepared(tmp_path, config)
    found = result_of(trained(config, base, tmp_path))
    rows = metrics(tmp_path / "metrics" / "sft.jsonl")
    measured = {int(row["step"]): row["eval/loss"] for row in rows if "eval/loss" in row}
    assert sorted(measured) == [2, 5] and rows[-1]["loss"] < rows[0]["loss"]
    best = min(measured, key=lambda step: measured[step])
    assert found["model_uri"].endswith(f"best_models/step_{best + 1:06d}")
    assert [each.name for each in (tmp_path / "best_models").iterdir()] == [f"step_{best + 1:06d}"]
    stage = audit(str(tmp_path))["stages"]["sft"]
    assert (stage["steps"], stage["replayed"]) == (6, 6)


def test_dpo_scores_its_reference_once_and_starts_with_no_margin(tmp_path: Path):
    config = two_ranks("dpo", **{"warmup": None, "method.sft_coef": 0.0, "optim.lr": 1e-3})
    base = prepared(tmp_path, config)
    found = result_of(trained(config, base, tmp_path))
    rows = metrics(tmp_path / "metrics" / "dpo.jsonl")
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and rows[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["eval/margin"] > 0
    (unit, *_) = read_units(Path(found["tokens_uri"]) / HELD_OUT_UNITS)
    assert len(unit) == 2 and all(sample.fields["ref_logprob"] < 0 for sample in unit)
    assert audit(str(tmp_path))["stages"]["dpo"]["replayed"] == 6


@pytest.mark.slow
def test_a_reward_model_is_a_classifier_of_transformers(tmp_path: Path):
    config = two_ranks("reward", **{"optim.lr": 3e-3, "optim.num_steps": 30, "method.packs_per_step": 4})
    base = prepared(tmp_path, config)
    found = result_of(trained(config, base, tmp_path))
    rows = metrics(tmp_path / "metrics" / "reward.jsonl")
    assert rows[0]["loss"] == pytest.approx(0.69, abs=0.1) and rows[-1]["loss"] < rows[0]["loss"]
    folder = storage.fetch(found["model_uri"])
    assert read_config(folder)["architectures"] == ["Qwen3ForSequenceClassification"]
    assert load_decoder(folder).output_head is None


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher(tmp_path: Path):
    config = two_ranks("distill", **{"optim.lr": 1e-2})
    base = prepared(tmp_path, config)
    assert base.teacher_uri is not None and load_decoder(base.teacher_uri).config.hidden_size == 48
    found = result_of(trained(config, base, tmp_path))
    rows = metrics(tmp_path / "metrics" / "distill.jsonl")
    assert rows[-1]["eval/loss"] < rows[2]["eval/loss"] and found["teacher_uri"] == base.teacher_uri


@pytest.mark.slow
def test_adapters_alone_are_trained_and_delivered_merged_and_apart(tmp_path: Path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = two_ranks("sft", **{"model.lora": {"rank": 4, "alpha": 8.0}, "optim.lr": 1e-2})
    base = prepared(tmp_path, config)
    folder = storage.fetch(result_of(trained(config, base, tmp_path))["model_uri"])
    rows = metrics(tmp_path / "metrics" / "sft.jsonl")
    assert rows[-1]["eval/loss"] < rows[0]["loss"]
    merged = AutoModelForCausalLM.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.model_uri), folder / "adapter")
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "distill"])
def test_a_killed_recipe_resumes_to_the_same_bytes(tmp_path: Path, name: str):
    config = two_ranks(name, **({"warmup": None} if name == "dpo" else {}))
    base = prepared(tmp_path / "inputs", config)
    whole = result_of(trained(config, base, tmp_path / "whole"))
    assert trained(config, base, tmp_path / "killed", fault="loop.before_train@4").returncode == -9
    again = result_of(trained(config, base, tmp_path / "killed"))
    rows = [read_ledger(f"{tmp_path}/{each}/ledger/{name}.jsonl") for each in ("whole", "killed")]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    weights = [Path(each["model_uri"], "model.safetensors").read_bytes() for each in (whole, again)]
    assert weights[0] == weights[1]


def test_labels_of_single_answers_train_a_reward_model_too(tmp_path: Path):
    rows = {"data.sources": "small_task:labelled", "data.held_out": "small_task:held_out_labelled"}
    config = two_ranks("reward", **rows, **{"method.kind": "labels", "optim.lr": 3e-3})
    base = prepared(tmp_path, config)
    facts = {"backend": "posttrain", "training": training_of(config, "reward"), "build": build_of(config, None)}
    rank = PolicyRank(rank=0, sizes=Sizes(data=1), model_uri=base.model_uri, reference=False, **facts)
    rank.address()
    rank.join("", 60.0)
    packs, loss = held_out_packs(config, base.tokens_uri), loss_of(config, "reward")
    assert count(loss, packs) == 16, "an answer is a unit"
    found = [rank.train_step(step, packs, loss, count(loss, packs)) for step in range(6)]
    assert found[0]["label"] == 0.5 and found[0]["loss"] == pytest.approx(0.69, abs=0.1)
    assert found[-1]["loss"] < found[0]["loss"]


@pytest.mark.fault("F41", outcome="REFUSE")
def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path):
    config = two_ranks("distill", **{"method.teacher": {"fresh": None, "path": str(tiny_model(tmp_path / "tiny"))}})
    student = Path(prepared(tmp_path / "other", two_ranks("sft")).model_uri)
    with pytest.raises(DataError, match=r"method.teacher: id \d+ is .* for the student and .* for the teacher"):
        check_same_tokens(student, tmp_path / "tiny")
    # a fresh student has no tokens of its own yet: it writes in its teacher's
    found = prepare(config, root=str(tmp_path / "run"))
    check_same_tokens(Path(found["model"]["uri"]), tmp_path / "tiny")
    assert json.loads(Path(found["teacher_uri"], "config.json").read_text())["hidden_size"] == 32
    # a tokenizer with one token more: its distributions are over something else
    vocabulary = json.loads((tmp_path / "tiny" / "tokenizer.json").read_text())
    vocabulary["added_tokens"].append(vocabulary["added_tokens"][0] | {"content": "<|more|>", "id": 299})
    larger = Path(shutil.copytree(tmp_path / "tiny", tmp_path / "larger"))
    (larger / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(
        DataError, match=r"id \d+ is None for the student and '<\|more\|>' for the teacher \(1 ids differ"
    ):
        check_same_tokens(tmp_path / "tiny", larger)


@pytest.mark.fault("F41", outcome="REFUSE")
def test_a_teacher_may_have_rows_that_are_no_tokens_and_must_not_have_fewer(tmp_path: Path):
    student, padded = tiny_model(tmp_path / "student"), Path(tmp_path / "padded")
    shutil.copytree(student, padded)
    config = json.loads((student / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 64}))
    check_same_tokens(student, padded)
    with pytest.raises(DataError, match=r"method.teacher: it has \d+ rows of tokens, the student \d+; .* last 64"):
        check_same_tokens(padded, student)


def taught(config, base: Prepared) -> str:
    uris = {"root": str(base.root), "tokens_uri": base.tokens_uri}
    parts = shares(config, tokens_uri=base.tokens_uri)
    models = {"model_uri": base.model_uri, "teacher_uri": base.teacher_uri}
    return merge_taught(config, **uris, parts=[teach(config, **uris, **models, part=part) for part in parts])


def losses(config, base: Prepared, packs: list) -> list[float]:
    facts = {"backend": "posttrain", "training": training_of(config, "distill")}
    build = build_of(config, base.teacher_uri)
    rank = PolicyRank(rank=0, sizes=Sizes(data=1), model_uri=base.model_uri, reference=False, build=build, **facts)
    rank.address()
    rank.join("", 60.0)
    assert (rank.teacher is None) == (config.method.top_k is not None), "a teacher that has written needs no memory"
    loss = loss_of(config, "distill")
    return [rank.train_step(step, packs, loss, count(loss, packs))["loss"] for step in range(4)]


def test_a_teacher_that_wrote_down_everything_trains_as_one_that_is_there(tmp_path: Path):
    online = two_ranks("distill", **{"optim.lr": 1e-2, "method.kind": "reverse_kl"})
    base = prepared(tmp_path, online)
    vocab_size = load_decoder(base.model_uri).config.vocab_size
    offline = two_ranks("distill", **{"optim.lr": 1e-2, "method.kind": "reverse_kl", "method.top_k": vocab_size})
    assert merge_taught(online, root=str(tmp_path), tokens_uri=base.tokens_uri, parts=[]) == base.tokens_uri
    packs = held_out_packs(offline, taught(offline, base))
    expected = losses(online, base, held_out_packs(online, base.tokens_uri))
    assert losses(offline, base, packs) == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0]
    beyond = two_ranks("distill", **{"method.top_k": vocab_size + 1})
    with pytest.raises(
        DataError, match=rf"method.top_k = {vocab_size + 1} is more than the student's {vocab_size} tok"
    ):
        teach(
            beyond,
            root=f"{tmp_path}/other",
            tokens_uri=base.tokens_uri,
            model_uri=base.model_uri,
            teacher_uri=base.teacher_uri,
            part=[-1, 0, 1],
        )


@pytest.mark.slow
def test_a_student_learns_from_what_its_teacher_wrote_and_resumes_to_the_same_bytes(tmp_path: Path):
    config = two_ranks("distill", **{"optim.lr": 2e-3, "method.top_k": 8})
    base = prepared(tmp_path, config)
    base = replace(base, tokens_uri=taught(config, base))
    whole = result_of(trained(config, base, tmp_path))
    rows = metrics(tmp_path / "metrics" / "distill.jsonl")
    assert rows[-1]["eval/loss"] < rows[2]["eval/loss"] and 0 < rows[0]["teacher_mass"] < 1
    assert audit(str(tmp_path))["stages"]["distill"]["replayed"] == 6
    assert trained(config, base, tmp_path / "killed", fault="loop.before_train@4").returncode == -9
    again = result_of(trained(config, base, tmp_path / "killed"))
    weights = [Path(each["model_uri"], "model.safetensors").read_bytes() for each in (whole, again)]
    assert weights[0] == weights[1]
