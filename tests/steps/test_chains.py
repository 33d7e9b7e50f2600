"""A run starts from what an earlier one exported: by its name, with its lineage, as a model, a judge or a partner."""

import json
from pathlib import Path

import pytest
import torch

from posttrain import storage
from posttrain.config import RunConfig
from posttrain.data.batch import collate
from posttrain.data.encode import Encoder
from posttrain.data.pack import pack
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.errors import ConfigError, ModelError, RewardError
from posttrain.model.export import export_model
from posttrain.model.forward import forward
from posttrain.model.heads import name_outputs
from posttrain.model.load import load_decoder
from posttrain.workflow.reward_model import RewardModel
from runs import metrics, prepared, recipe_config, result_of, run_step, small_config
from steps.chat import chat
from steps.export import export
from steps.origin import LINEAGE, locate
from steps.plan import plan
from tiny import tiny_model


def exported(config: RunConfig, runs: Path | str, flow: str, digest: str) -> str:
    """URI of the export of a run that did not train, as run 1 of its flow, on disk or S3."""
    root = storage.join(str(runs), flow, "1")
    base = prepared(root, config)
    found = export(
        config,
        root=root,
        model_uri=base.model_uri,
        provenance={"flow": flow, "run_id": "1", "config_sha256": "c" * 64, "seed": 0, "versions": {"torch": "2"}},
        evaluation={"before": {"rows": 8, "loss": 2.0}, "after": {"rows": 8, "loss": 1.0}},
        tokenizer_sha256=BaseHFModelTokenizer(storage.fetch(base.model_uri)).fingerprint(),
        trained={"ledger": {"digest": digest}},
    )
    assert found["uri"] == f"{root}/export"
    return found["uri"]


def read(uri: str, name: str) -> bytes:
    """A file of a published folder, verified."""
    return (storage.fetch(uri) / name).read_bytes()


WEIGHTS = "model.safetensors"


def test_a_later_run_starts_from_an_earlier_one_and_keeps_its_lineage(root_uri: str):
    first = exported(recipe_config("sft"), root_uri, "SFTFlow", "d1")
    changes = {"model": {"fresh": None, "path": "run:SFTFlow/1"}, "checkpoint.root": root_uri, "warmup": None}
    config = recipe_config("dpo", **changes)
    assert plan(config, flow="DPOFlow", run_id="7")["root"] == f"{root_uri}/DPOFlow/7"
    second = exported(config, root_uri, "DPOFlow", "d2")
    assert read(second, WEIGHTS) == read(first, WEIGHTS)
    runs = json.loads(read(second, LINEAGE))
    assert [(run["run"], run["method"], run["ledger"]) for run in runs] == [
        ("SFTFlow/1", "sft", "d1"),
        ("DPOFlow/1", "dpo", "d2"),
    ]
    assert runs[1]["started_from"] == "model run:SFTFlow/1"
    card = read(second, "README.md").decode()
    assert "| SFTFlow/1 | sft | model fresh |" in card and "| before | 2.0 |" in card


@pytest.mark.parametrize("named_by", ["run", "uri"])
def test_every_link_of_a_chain_is_found_by_run_and_by_uri(root_uri: str, judge: Path, named_by: str):
    """SFT -> DPO -> GRPO, reward -> GRPO, teacher -> distillation; on disk and on S3."""
    flows = {"dpo": "DPOFlow", "reward": "RewardFlow", "sft": "SFTFlow"}
    exports = {name: f"{root_uri}/{flow}/1/export" for name, flow in flows.items()}
    at = {name: f"run:{flow}/1" if named_by == "run" else exports[name] for name, flow in flows.items()}
    here = {"checkpoint.root": root_uri}
    exported(recipe_config("sft", warmup=None), root_uri, "SFTFlow", "d-sft")
    of_sft = {"model": {"fresh": None, "path": at["sft"]}, "warmup": None}
    exported(recipe_config("dpo", **here, **of_sft), root_uri, "DPOFlow", "d-dpo")
    storage.publish(judge, exports["reward"])

    started = {"model": {"fresh": None, "path": at["dpo"]}, "reward.function": None, "reward.model": at["reward"]}
    rl = small_config(**here, **started, warmup=None)
    base = prepared(plan(rl, flow="GRPOFlow", run_id="1")["root"], rl)
    assert read(base.model_uri, WEIGHTS) == read(exports["dpo"], WEIGHTS) == read(exports["sft"], WEIGHTS)
    ((score, parts),) = RewardModel(locate(at["reward"], rl)).score(
        {"messages": [{"role": "user", "content": "sort 21"}]}, ["12"]
    )
    assert parts == {"reward": score}
    last = exported(rl, f"{root_uri}/again", "GRPOFlow", "d-grpo")
    runs, card = json.loads(read(last, LINEAGE)), read(last, "README.md").decode()
    assert [(run["run"], run["ledger"]) for run in runs] == [
        ("SFTFlow/1", "d-sft"),
        ("DPOFlow/1", "d-dpo"),
        ("GRPOFlow/1", "d-grpo"),
    ]
    assert runs[1]["started_from"] == f"model {at['sft']}"
    assert runs[2]["started_from"] == f"model {at['dpo']}, judge {at['reward']}"
    assert all(f"| {run['run']} | {run['method']} |" in card for run in runs)

    changes = {"method.teacher": {"fresh": None, "path": at["sft"]}, "warmup": None}
    student = recipe_config("distill", **here, **changes)
    teacher = prepared(plan(student, flow="DistillFlow", run_id="1")["root"], student).teacher_uri
    assert teacher is not None and read(teacher, WEIGHTS) == read(exports["sft"], WEIGHTS)
    folder = exported(student, f"{root_uri}/again", "DistillFlow", "d")
    (entry,) = json.loads(read(folder, LINEAGE))
    assert entry["started_from"] == f"model fresh, teacher {at['sft']}"


@pytest.mark.slow
def test_grpo_is_judged_by_the_ratings_that_a_reward_model_learned(tmp_path: Path):
    rows = {"data.sources": "small_task:rated", "data.held_out": "small_task:held_out_rated"}
    kind = {"method.kind": "ratings", "method.attributes": ["right", "long"], "optim.num_steps": 2}
    config = recipe_config("reward", **rows, **kind)
    root = tmp_path / "RewardFlow" / "1"
    base = prepared(root, config)
    inputs = {"root": str(root), "model_uri": base.model_uri, "tokens_uri": base.tokens_uri, "recipe": True}
    trained = result_of(run_step("train", config, root, **inputs))
    storage.publish(Path(trained["model_uri"]), str(root / "export"))

    judged = {"reward.function": None, "reward.model": "run:RewardFlow/1", "reward.heads": {"right": 1.0, "long": -0.5}}
    rl = small_config(**judged, **{"checkpoint.root": str(tmp_path), "optim.num_steps": 2, "reward.timeout_s": 60})
    root = Path(plan(rl, flow="GRPOFlow", run_id="1")["root"])
    base = prepared(root, rl)
    uris = {"root": str(root), "model_uri": base.model_uri, "tokens_uri": base.tokens_uri}
    result_of(run_step("grpo", rl, root, **uris))
    steps = metrics(root / "metrics" / "grpo.jsonl")
    assert len(steps) == 2
    for step in steps:
        assert step["reward/mean"] == pytest.approx(step["reward/right"] + step["reward/long"], abs=1e-5)
        assert step["reward/right"] != 0 != step["reward/long"]


def test_a_run_that_is_not_there_is_refused(tmp_path: Path):
    changes = {"model": {"fresh": None, "path": "run:SFTFlow/9"}, "checkpoint.root": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"model.path: .*SFTFlow/9/export does not exist"):
        plan(recipe_config("dpo", **changes), flow="DPOFlow", run_id="1")


def test_a_config_of_another_recipe_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"method.name: DPOFlow runs dpo, the config is for sft"):
        plan(recipe_config("sft", **{"checkpoint.root": str(tmp_path)}), flow="DPOFlow", run_id="1")


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    source = tiny_model(tmp_path / "tiny")
    export_model(load_decoder(source, heads={"score": 1}, lm_head=False), tmp_path / "judge", like=source)
    return tmp_path / "judge"


def test_a_reward_model_judges_completions_as_it_was_trained_to(judge: Path):
    asked = [{"role": "user", "content": "sort 21"}]
    texts = ["12", "21", "1 2 1 2 1 2"]
    scores = [score for score, _ in RewardModel(str(judge)).score({"messages": asked}, texts)]
    sides = {"chosen": texts[0], "rejected": texts[1]}
    pair = {"prompt": asked} | {k: [{"role": "assistant", "content": text}] for k, text in sides.items()}
    trained = Encoder(BaseHFModelTokenizer(judge), wanted="preference", pack_tokens=128, scored=True)([pair])[0]
    batch = collate(pack(trained, pack_tokens=128)[0], pack_tokens=128)
    with torch.no_grad():
        expected = forward(load_decoder(judge), batch, with_logprobs=False).scores["score"][:, 0]
    assert scores[:2] == pytest.approx(expected.tolist(), abs=1e-5) and len(set(scores)) == 3


def test_a_completion_that_cannot_be_read_is_an_error_and_never_a_score(judge: Path):
    row = {"messages": [{"role": "user", "content": "sort 21"}]}
    with pytest.raises(RewardError, match=r"completion 1: .*tokens; a pack holds 128"):
        RewardModel(str(judge)).score(row, ["12", "1 2 " * 200])


def test_a_judge_without_a_score_is_refused_before_anything_runs(judge: Path, tmp_path: Path):
    changes = {"checkpoint.root": str(tmp_path / "runs"), "reward.function": None}
    with pytest.raises(ConfigError, match=r"reward.model: .*/tiny has no head `score`; train one"):
        plan(small_config(**changes, **{"reward.model": str(tmp_path / "tiny")}), flow="GRPOFlow", run_id="1")
    plan(small_config(**changes, **{"reward.model": str(judge)}), flow="GRPOFlow", run_id="1")


@pytest.fixture
def rater(tmp_path: Path) -> Path:
    source = tiny_model(tmp_path / "tiny")
    export_model(load_decoder(source, heads={"score": 2}, lm_head=False), tmp_path / "made", like=source)
    name_outputs(tmp_path / "made", ("helpful", "verbose"))
    export_model(load_decoder(tmp_path / "made"), tmp_path / "rater", like=tmp_path / "made")
    return tmp_path / "rater"


def test_ratings_are_weighed_into_one_reward_and_are_its_parts(rater: Path):
    row, texts = {"messages": [{"role": "user", "content": "sort 21"}]}, ["12", "21"]
    alone = [RewardModel(str(rater), {name: 1.0}).score(row, texts) for name in ("helpful", "verbose")]
    both = RewardModel(str(rater), {"verbose": -0.5, "helpful": 2.0}).score(row, texts)
    for (reward, parts), (helpful, _), (verbose, _) in zip(both, *alone, strict=True):
        assert helpful != verbose and reward == pytest.approx(2 * helpful - verbose / 2)
        assert parts == {"helpful": pytest.approx(2 * helpful), "verbose": pytest.approx(-verbose / 2)}


@pytest.mark.parametrize(
    ("heads", "says"),
    [
        ({}, r"reward.heads: .*/rater rates helpful, verbose; weigh them, as reward.heads: {helpful: 1.0}"),
        ({"polite": 1.0}, r"reward.heads.polite: .* has no such rating; its own: helpful, verbose"),
    ],
)
def test_a_judge_of_several_ratings_is_weighed_or_refused(rater: Path, tmp_path: Path, heads, says):
    changes = {"checkpoint.root": str(tmp_path / "runs"), "reward.function": None, "reward.model": str(rater)}
    with pytest.raises(ConfigError, match=says):
        plan(small_config(**changes, **{"reward.heads": heads}), flow="GRPOFlow", run_id="1")
    plan(small_config(**changes, **{"reward.heads": {"verbose": -1.0}}), flow="GRPOFlow", run_id="1")


def test_chat_answers_every_turn_with_the_turns_before_in_mind(tmp_path: Path):
    folder, said = str(tiny_model(tmp_path / "tiny")), []
    asked = {"temperature": 0.0, "max_new_tokens": 4, "seed": 0}
    chat(folder, ["sort 21", "sort 21"], said.append, **asked)
    alone: list[str] = []
    chat(folder, ["sort 21"], alone.append, **asked)
    assert len(said) == 2 and said[0] == alone[0]


def test_a_reward_model_does_not_chat(judge: Path):
    with pytest.raises(ModelError, match="Qwen3ForSequenceClassification, which writes no text"):
        chat(str(judge), ["sort 21"], print, temperature=1.0, max_new_tokens=4, seed=0)


def test_exports_are_published_whole(tmp_path: Path):
    folder = exported(recipe_config("sft"), tmp_path, "SFTFlow", "d1")
    assert LINEAGE in storage.manifest_of(folder)["files"]
