"""A run config is right, or refused in one message that names every problem, its path and its fix."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from posttrain.config import RunConfig
from posttrain.config_file import load_config
from posttrain.config_retrain import RetrainConfig
from posttrain.errors import ConfigError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "grpo_tiny.yaml"
FLOAT8 = {"optim.precision": "float8", "parallel.gpus_per_node": 2}


def load(changes):
    """The tiny config with changes on top, as a person would write them."""
    return load_config(yaml.safe_dump({"base": str(TINY), **changes}))


def refusal(changes):
    """Lines of the one error."""
    with pytest.raises(ConfigError) as error:
        load(changes)
    return str(error.value).splitlines()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_in_configs_parses(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    schema = RetrainConfig if path.name.startswith("retrain_") else RunConfig
    assert isinstance(load_config(path.read_text(), schema), RunConfig)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optim.weight_decy": 0.1}, 'optim.weight_decy: unknown key; did you mean "weight_decay"?'),
        ({"optm": {"lr": 1}}, 'optm: unknown key; did you mean "optim"?'),
        ({"model.fresh.num_layer": 2}, 'model.fresh.num_layer: unknown key; did you mean "num_layers"?'),
        ({"reward.xyzzy": 2}, "reward.xyzzy: unknown key; known keys: function, model, timeout_s"),
        ({"model.path": "folder"}, "model: set exactly one of path and fresh"),
        ({"model": {"fresh": None}}, "model: set exactly one of path and fresh"),
        ({"data.prompts": None}, "data.prompts: required, and not set; method grpo trains on the answers to them"),
        ({"data.held_out": None}, "data.held_out: input should be a valid string (got null)"),
        ({"reward": None}, "reward: required, and not set; method grpo has completions scored: set reward.function"),
        ({"reward.model": "folder"}, "reward: set exactly one of function and model (both are set)"),
        ({"method": {"name": "dop"}}, 'method.name: no recipe of that name; did you mean "dpo" (got "dop")'),
        ({"method.group_sise": 1}, 'method.group_sise: unknown key; did you mean "group_size"?'),
        ({"eval.prompts": "m:f"}, "eval.prompts: RL is evaluated on data.held_out"),
        ({"reward.function": "pkg.module"}, 'reward.function: write it as package.module:name (got "pkg.module")'),
        ({"warmup.num_steps": 1, "data.sources": None}, "warmup needs data.sources; name one, or set warmup: null"),
        ({"data.sources": [{"path": "a"}, {"path": "b", "wight": 1}]}, "data.sources[1].wight: unknown key; did you"),
        ({"data.sources": {"path": "a", "weight": [[9, 1], [3, 2]]}}, "data.sources[0]: weight [[9, 1.0], [3, 2.0]]"),
        ({"data.sources": {"path": "a", "weight": [[9, 0], [20, 2]]}}, "data.sources: none has a weight above zero"),
        ({"data.sources": {"path": "a", "format": "alpacca"}}, "data.sources[0].format: input should be 'messages',"),
        ({"optim.warmup_steps": 9, "optim.num_steps": 9, "optim.schedule": "linear"}, "leaves none of optim.num_steps"),
        ({"rollout.prompts_per_step": 63}, "rollout.prompts_per_step = 63 is not divisible by parallel.data = 2"),
        ({"data.pack_tokens": 63}, "data.max_prompt_tokens + rollout.max_new_tokens = 64 exceeds data.pack_tokens"),
        ({"parallel.gpus_per_node": 1}, "parallel.data = 2 ranks need as many GPUs; the run asks for 1"),
        ({"parallel.gpus_per_node": 2, "parallel.tensor": 2}, "parallel.data = 2 times parallel.tensor = 2 ranks need"),
        ({"parallel.nodes": 4, "parallel.gpus_per_node": 1, "parallel.tensor": 2}, "must be on one node"),
        ({"parallel.tensor": 2, "model.backend": "transformers"}, "split posttrain's own decoder only"),
        ({"parallel.context": 2, "model.backend": "transformers"}, "split posttrain's own decoder only"),
        ({"parallel.context": 3, "data.pack_tokens": 64}, "data.pack_tokens = 64 is no multiple of 6"),
        ({"parallel.gpus_per_node": 2, "parallel.context": 2}, "times parallel.context = 2 ranks need as many GPUs"),
        ({"optim.precision": "float8"}, "optim.precision: float8 needs GPUs, and the run has none"),
        ({**FLOAT8, "model.backend": "transformers"}, "float8 needs posttrain's own decoder"),
        ({**FLOAT8, "data.pack_tokens": 1000}, "on every rank; choose 1008, or"),
        ({"parallel.expert": 3}, "parallel.expert = 3 does not divide parallel.data = 2"),
        ({"parallel.backend": "kubernetes"}, "set checkpoint.root to an s3:// prefix that all can reach"),
        ({"parallel.backend": "kubernetes", "checkpoint.root": "/disk"}, "set checkpoint.root to an s3:// prefix"),
        ({"parallel.backend": "batch", "checkpoint.root": "s3://b"}, "parallel.backend = batch needs parallel.queue"),
        ({"parallel.decorators": {"train": {}}}, "input should be 'all' or 'training'"),
        ({"parallel.decorators": {"all": {"resources": {}}}}, "input should be 'kubernetes', 'batch', 'environment'"),
        (
            {"parallel.decorators": {"training": {"retry": {"times": 5}}}},
            "parallel.decorators.training.retry.times = 5: Metaflow repeats a task at most 4 times",
        ),
        (
            {"parallel.decorators": {"all": {"environment": {"vars": {"HF_TOKEN": "hf_x", "NCCL_DEBUG": "INFO"}}}}},
            "parallel.decorators.all.environment.vars.HF_TOKEN: a config is kept in the run's artifacts",
        ),
        ({"parallel.decorators": {"all": {"environment": {"vars": "A=1"}}}}, "write it as {NAME: value}"),
    ],
)
@pytest.mark.fault("F26", "F27", outcome="REFUSE")
def test_a_mistake_is_one_line_that_says_the_fix(changes, line):
    (found,) = refusal(changes)
    assert line in found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optim.lr", "fast"),
        ("optim.lr", float("nan")),
        ("seed", -1),
        ("method.group_size", 0),
        ("method.name", "ppo"),
        ("parallel.backend", "slurm"),
        ("checkpoint.keep", 0),
        ("optim.num_steps", 1.5),
        ("data", None),
        ("eval", [1]),
    ],
)
def test_a_wrong_value_is_named_by_its_path_and_shown(path, value):
    (line,) = refusal({path: value})
    assert line.startswith(f"{path}: ")
    assert "(got " in line


def test_a_wrong_generator_is_named_by_the_key_a_person_wrote():
    lines = refusal({"rollout.generator": "sglang"})
    assert lines and all(line.startswith("rollout.generator: ") for line in lines)
    assert any("package.module:name" in line for line in lines)


def test_values_at_their_bounds_are_accepted():
    changes = {"method.group_size": 2, "optim.lr": 0, "data.pack_tokens": 64, "rollout.prompts_per_step": 2}
    config = load({**changes, "rollout.generator": "package.module:Generator"})
    assert (config.method.group_size, config.optim.lr, config.data.pack_tokens) == (2, 0, 64)


@pytest.mark.fault("F26", outcome="REFUSE")
def test_every_problem_is_reported_at_once():
    lines = refusal(
        {
            "optim.weight_decy": 0.1,
            "seed": "x",
            "method.group_size": 0,
            "reward.function": "bad",
            "rollout.prompts_per_step": 63,
            "parallel.backend": "kubernetes",
        }
    )
    starts = ["seed:", "method.group_size:", "optim.weight_decy:", "reward.function:", "rollout.prompts_per_step ="]
    for start in [*starts, "parallel.backend ="]:
        assert sum(line.startswith(start) for line in lines) == 1
    assert len(lines) == 6


@pytest.mark.fault("F26", outcome="REFUSE")
def test_a_broken_section_does_not_hide_an_impossible_combination():
    for broken in ({"model.path": "folder"}, {"model.fresh.num_heads": 3}, {"reward": 1}, {"rollout.generator": "x"}):
        lines = refusal({**broken, "rollout.prompts_per_step": 63})
        assert any(line.startswith("rollout.prompts_per_step = 63 is not divisible") for line in lines), broken


def test_no_line_is_said_twice():
    lines = refusal({"rollout.max_new_tokens": 2000, "rollout.prompts_per_step": 63})
    assert len(lines) == len(set(lines)) == 2


def test_a_missing_section_is_named():
    with pytest.raises(ConfigError) as error:
        load_config("model: {path: folder}")
    data, reward = str(error.value).splitlines()
    assert data == "data: required, and not set" and reward.startswith("reward: required, and not set; method grpo")


def recipe(method, changes):
    """A config of an offline recipe, as small as may be, with changes on top."""
    whole = {"model": {"path": "m"}, "data": {"sources": "a.jsonl", "held_out": "b.jsonl"}, "method": method}
    return load_config(yaml.safe_dump({**whole, **changes}))


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "distill"])
def test_an_offline_recipe_needs_neither_prompts_nor_rollouts_nor_a_reward(name):
    teacher = {"teacher": {"path": "t"}} if name == "distill" else {}
    assert recipe({"name": name, **teacher}, {"rollout.prompts_per_step": 63}).method.name == name


@pytest.mark.parametrize(
    ("method", "changes", "line"),
    [
        ({}, {}, "method.name: required, and not set; one of sft, dpo, reward, distill, grpo"),
        ({"name": "dpo", "beta": 0}, {}, "method.beta: input should be greater than 0 (got 0)"),
        (
            {"name": "dpo", "group_size": 8},
            {},
            "method.group_size: unknown key; known keys: packs_per_step, name, kind",
        ),
        ({"name": "dpo", "bata": 1}, {}, 'method.bata: unknown key; did you mean "beta"?'),
        ({"name": "dpo", "kind": "ipo", "gamma": 1}, {}, "method: kind: ipo has its margin in beta; set gamma to 0"),
        (
            {"name": "dpo", "kind": "hinge", "label_smoothing": 0.1},
            {},
            "method: label_smoothing is defined for kind: s",
        ),
        ({"name": "dpo"}, {"data.over_long": "split"}, "data.over_long = split: pairs cannot be split"),
        ({"name": "sft"}, {"data.sources": None}, "data.sources: required, and not set; method sft trains on"),
        ({"name": "sft"}, {"eval.prompts": "m:f"}, "reward: required, and not set; eval.prompts has completions"),
        ({"name": "reward", "kind": "labels"}, {"warmup": {}}, "warmup: answers with labels are no demonstrations"),
        ({"name": "reward", "kind": "ratings"}, {}, "method: kind: ratings needs attributes"),
        ({"name": "reward", "attributes": ["right"]}, {}, "method: kind: ratings needs attributes"),
        (
            {"name": "reward", "kind": "ratings", "attributes": ["right", "right"]},
            {},
            "method: attributes ['right', 'right'] must differ",
        ),
        ({"name": "reward"}, {"eval.lm_eval": ["arc"]}, "eval.lm_eval: a reward model writes no text"),
        ({"name": "distill"}, {}, "method.teacher: required, and not set"),
        ({"name": "distill", "teacher": {}}, {}, "method.teacher: set exactly one of path and fresh"),
        ({"name": "distill", "teacher": {"fresh": {"layers": 1}}}, {"warmup": {}}, "method.teacher.fresh.layers: unkn"),
        ({"name": "distill", "teacher": {"fresh": {}}}, {}, "method.teacher.fresh knows nothing yet; set warmup"),
        ({"name": "reward"}, {"eval.prompts": "m:f", "reward.function": "m:f"}, "a reward model answers nothing"),
        ({"name": "sft"}, {"model": {"path": "m", "lora": {}, "backend": "transformers"}}, "model: lora needs backend"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_too(method, changes, line):
    with pytest.raises(ConfigError) as error:
        recipe(method, changes)
    (found,) = str(error.value).splitlines()
    assert line in found


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"group_size": 1}, "method: group_size = 1 has no baseline with advantage = centered"),
        ({"advantage": "teacher"}, "method: advantage = teacher and the key teacher go together"),
        ({"teacher": "folder"}, "method: advantage = teacher and the key teacher go together"),
        (
            {"advantage": "gae", "loss": "sequence"},
            "method: advantage = gae is of tokens, loss = sequence of completions",
        ),
        ({"advantage": "gae", "replace_silent": True}, "method: replace_silent is for groups that are their own base"),
        ({"kl_in": "reward", "kl_coef": None}, "method: kl_in = reward: kl_coef says at what price"),
        (
            {"loss": "truncated_sequence", "clip": [0.1, 0.1]},
            "method: clip does nothing with loss = truncated_sequence",
        ),
        ({"gae": [1.0, 1.5]}, "method.gae[1]: input should be less than or equal to 1 (got 1.5)"),
    ],
)
def test_parts_of_an_rl_method_that_do_not_go_together_are_one_line(changes, line):
    (found,) = refusal({f"method.{key}": value for key, value in changes.items()})
    assert line in found


def test_a_critic_or_a_teacher_needs_no_group():
    assert load({"method.advantage": "gae", "method.group_size": 1}).method.gae == (1.0, 0.95)
    changes = {"method.advantage": "teacher", "method.teacher": "run:SFTFlow/1", "method.group_size": 1}
    assert load(changes).method.teacher == "run:SFTFlow/1"
    (line,) = refusal({"method.advantage": "gae", "model.backend": "transformers"})
    assert line == "model.backend = transformers: method.advantage = gae needs posttrain's own decoder"


def test_what_a_teacher_says_is_written_into_token_files_only():
    method = {"name": "distill", "teacher": {"path": "t"}, "top_k": 8}
    assert recipe(method, {}).method.top_k == 8
    with pytest.raises(ConfigError, match="top_k writes into token files: set"):
        recipe(method, {"data.tokenize": "online"})


def test_a_dotted_key_changes_one_value_and_keeps_its_neighbours():
    config, plain = load({"warmup.lr": 0.5}), load({})
    assert plain.warmup.num_steps == 120  # the file's own, not the default: it must survive
    assert config == plain.model_copy(update={"warmup": plain.warmup.model_copy(update={"lr": 0.5})})


def test_a_section_is_merged_into_the_section_of_its_base():
    assert load({"warmup": {"lr": 0.5}}) == load({"warmup.lr": 0.5})
    assert load({"model": {"fresh": {"num_layers": 2}}}) == load({"model.fresh.num_layers": 2})


def test_the_dots_of_a_slice_are_its_own():
    gate = {"loss[site=a.b:c]": 0.5, "loss": 0.0}
    assert load({"eval.gate": {"loss": 0.0}, "eval.gate.loss[site=a.b:c]": 0.5}).eval.gate == gate
    assert load({"eval.gate": gate}).eval.gate == gate


def test_null_removes_what_the_base_set():
    assert load({"warmup": None}).warmup is None


def test_a_number_in_scientific_notation_without_a_point_is_a_number():
    config = load_config(f"base: {TINY}\noptim.lr: 1e-4\n")
    assert config.optim.lr == 1e-4


def test_a_source_may_be_written_as_its_path_alone():
    assert load({"data.sources": "a.jsonl"}) == load({"data.sources": [{"path": "a.jsonl"}]})
    assert load({"data.sources": ["a.jsonl", "b.jsonl"]}).data.sources[1].path == "b.jsonl"


def test_a_weight_may_be_a_schedule_over_draws():
    (one, two) = load({"data.sources": ["a", {"path": "b", "weight": [[0, 0], [1000, 2]]}]}).data.sources
    assert one.schedule == ((0, 1.0),) and two.schedule == ((0, 0.0), (1000, 2.0))


def test_a_dotted_key_below_a_value_is_refused():
    assert refusal({"optim.lr.x": 3}) == ["config: optim.lr.x: lr is a value, not a section"]


def test_a_base_may_have_a_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("middle.yaml").write_text(f"base: {TINY}\nseed: 5\noptim.lr: 0.25\n")
    config = load_config("base: middle.yaml\nseed: 6\n")
    assert (config.seed, config.optim.lr) == (6, 0.25)


def test_a_problem_names_the_file_that_it_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    below = tmp_path / "below"
    below.mkdir()
    Path("mine.yaml").write_text(f"base: {TINY}\noptim: {{lrr: 1}}\ndata.pack_tokens: many\n")
    with pytest.raises(ConfigError) as refused:
        load_config(json.dumps({"base": "mine.yaml", "seed": "x"}))
    assert set(str(refused.value).splitlines()) == {
        'seed: input should be a valid integer, unable to parse string as an integer (got "x")',
        'optim.lrr: unknown key; did you mean "lr"? (in mine.yaml)',
        'data.pack_tokens: input should be a valid integer, unable to parse string as an integer (got "many") '
        "(in mine.yaml)",
    }
    monkeypatch.chdir(below)
    with pytest.raises(ConfigError, match=re.escape(f"(in {tmp_path / 'mine.yaml'})")):
        load_config((tmp_path / "mine.yaml").read_text(), where=str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("key", "ours"), [("optim.learning_rate", "lr"), ("rollout.max_completion_length", "max_new_tokens")]
)
def test_a_key_of_another_framework_is_answered_with_ours(key, ours):
    assert refusal({key: 1}) == [f'{key}: unknown key; did you mean "{ours}"?']


def test_bases_in_a_circle_are_refused(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"base: {two}\n")
    two.write_text(f"base: {one}\n")
    with pytest.raises(ConfigError, match="includes itself"):
        load_config(f"base: {one}")


def test_a_missing_base_is_named_with_the_place_that_was_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_config("base: nowhere.yaml")
    assert str(error.value) == f"config: base nowhere.yaml does not exist (looked for {tmp_path / 'nowhere.yaml'})"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: [", "config is not YAML: "),
        ("- seed", "config must be a YAML mapping of sections, got list"),
        ("", "config must be a YAML mapping of sections, got NoneType"),
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused(text, message):
    with pytest.raises(ConfigError) as error:
        load_config(text)
    assert str(error.value).startswith(message)


def test_rewards_may_be_summed_and_an_override_may_change_one_weight():
    exact, regex = "posttrain.data.verifiers:exact", "posttrain.data.verifiers:regex"
    config = load({"reward.function": {exact: 1, regex: 0.2}})
    assert config.reward.function == {exact: 1.0, regex: 0.2}
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    changed = load({"reward": {"function": {exact: 1, regex: 0.2}}, "reward.function": {regex: 0.5}})
    assert changed.reward.function == {exact: 1.0, regex: 0.5}


def test_a_sum_of_rewards_is_told_by_what_is_wrong_in_it():
    (found,) = refusal({"reward.function": {"posttrain.data.verifiers:exact": "high"}})
    assert found.startswith("reward.function.posttrain.data.verifiers:exact: input should be a valid number")
    (found,) = refusal({"reward.function": {"posttrain.data.verifiers:exact": 0}})
    assert "no weight is other than zero" in found


def test_a_broken_base_is_named(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("optim: [")
    with pytest.raises(ConfigError) as error:
        load_config(f"base: {base}")
    assert str(error.value).startswith(f"{base} is not YAML: ")


def test_a_config_survives_the_trip_through_plain_data():
    config = load({"optim.lr": 0.5})
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "distill", "grpo"])
def test_a_recipe_has_fewer_than_a_hundred_keys(name):
    def keys(section):
        for field in section.model_fields.values():
            options = [field.annotation, *getattr(field.annotation, "__args__", ())]
            below = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
            below = [o for o in below if "name" not in o.model_fields or name in str(o.model_fields["name"].annotation)]
            yield from keys(below[0]) if below else [field]

    assert 20 < len(list(keys(RunConfig))) < 100


def test_reading_a_config_imports_nothing_heavy():
    code = "import sys, posttrain.config_file, posttrain.overrides; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "posttrain.config" in loaded
    assert not {"torch", "numpy", "transformers", "ray", "vllm", "pyarrow", "boto3", "metaflow"} & set(loaded)


def test_data_auto_takes_every_gpu_that_tensor_leaves():
    config = load({"parallel.data": "auto", "parallel.gpus_per_node": 4, "parallel.nodes": 2, "parallel.tensor": 2})
    assert (config.parallel.data_ranks, config.parallel.ranks) == (4, 8)
    assert load({"parallel.data": "auto"}).parallel.ranks == 1
    config = load({"parallel.data": "auto", "parallel.gpus_per_node": 8, "parallel.tensor": 2, "parallel.context": 2})
    assert (config.parallel.data_ranks, config.parallel.ranks) == (2, 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout.tensor": 2}, "rollout.tensor and rollout.sleep are vLLM's"),
        ({"rollout.generator": "vllm", "rollout.sleep": True}, "rollout.sleep: the generator runs on CPUs"),
        (
            {"rollout.generator": "vllm", "rollout.sleep": True, "parallel.gpus_per_node": 3},
            "rollout.sleep: the generator has GPUs of its own",
        ),
        (
            {"rollout.generator": "vllm", "rollout.tensor": 2, "parallel.gpus_per_node": 3},
            "rollout.generators = 1 of rollout.tensor = 2 GPUs do not fit on 3 GPUs with 2 policy ranks",
        ),
        (
            {"rollout.generators": 3, "parallel.gpus_per_node": 2},
            "rollout.generators = 3 of rollout.tensor = 1 GPUs do not fit on 2 GPUs with 2 policy ranks",
        ),
    ],
)
def test_generators_that_gpus_have_no_room_for_are_refused(changes, said):
    assert any(said in line for line in refusal(changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout.tensor": 2, "parallel.gpus_per_node": 4},
        {"parallel.gpus_per_node": 2},
        {"parallel.gpus_per_node": 2, "rollout.generators": 4},
    ],
)
def test_generators_fit_on_gpus_of_their_own_or_beside_ranks(changes):
    load({"rollout.generator": "vllm", **changes})
