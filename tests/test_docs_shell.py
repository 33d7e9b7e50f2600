"""The shell of the documentation is typed as it stands on the page, made small, and does what the page says.

Each block of README.md and docs/ is named here with the tests that type its lines, or with why nobody can.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from pods import fake_kubernetes
from posttrain import cli, storage
from posttrain.workflow import registry
from runs import ROOT
from terminal import Terminal, clone, line_of, lines_of, named
from test_docs_code import OURS
from tiny import tiny_model
from tiny_families import random_config

QUICK = "tests/flows/test_quick_start.py::test_every_line_of_the_quick_start_works_as_it_is_written"
GRPO = "tests/flows/test_grpo_flow.py"
EXAMPLE = "tests/test_examples.py::test_an_example_trains_as_its_page_says"
HERE = "tests/test_docs_shell.py"
FIRST_HOUR = "tests/flows/test_quick_start.py::test_the_first_hour_sees_what_it_says"
DAYS = "test_a_better_model_is_promoted_a_worse_one_is_not_and_a_killed_promotion_is_finished"
RUN_BY = {
    ("README.md", "posttrain doctor"): [
        "tests/flows/test_quick_start.py::test_the_readme_starts_as_the_quick_start_does"
    ],
    ("README.md", "--config my.yaml"): [
        f"{GRPO}::finished",
        f"{GRPO}::test_two_runs_side_by_side_do_not_meet",
        f"{GRPO}::test_resume_from_a_step_keeps_what_came_before",
        QUICK,  # `resume` alone, which index.md has too
    ],
    ("index.md", "posttrain doctor"): [QUICK],
    ("index.md", "posttrain chat"): [QUICK],
    ("index.md", "data/mine.jsonl"): [QUICK],
    ("index.md", "resume"): [QUICK],
    ("first_hour.md", "posttrain doctor"): [FIRST_HOUR],
    ("first_hour.md", "data/mine.jsonl"): [FIRST_HOUR],
    ("first_hour.md", "posttrain audit"): [FIRST_HOUR],
    ("cli.md", ""): [
        "tests/flows/test_quick_start.py::test_every_command_of_the_reference_runs_with_its_words_replaced"
    ],
    ("config.md", "--config configs/grpo_tiny.yaml"): [f"{GRPO}::test_two_runs_side_by_side_do_not_meet"],
    ("bring/data.md", "run --config config.yaml"): [EXAMPLE],
    ("bring/environment.md", "run --config config.yaml"): [EXAMPLE],
    ("bring/generator.md", "run --config config.yaml"): [EXAMPLE],
    ("bring/reward.md", "run --config config.yaml"): [EXAMPLE],
    ("bring/head.md", "head.py"): [f"{HERE}::test_a_head_of_ones_own_is_trained_on_an_export"],
    ("events.md", "events_sft.yaml"): [f"{HERE}::test_events_train"],
    ("events.md", "events_tasks.yaml"): [f"{HERE}::test_events_train"],
    ("models.md", ""): [f"{HERE}::test_a_model_is_verified"],
    ("new_family.md", ""): [f"{HERE}::test_a_model_is_verified"],
    ("operations.md", "argo-workflows create"): [f"{HERE}::test_a_flow_is_handed_to_argo"],
    ("plan.md", "posttrain plan"): [f"{HERE}::test_a_plan_says_what_its_page_lists"],
    ("recipes.md", "run:SFTFlow/RUN_ID"): [
        "tests/flows/test_recipe_flows.py::test_the_chain_of_the_page_leads_from_demonstrations_to_preferences"
    ],
    ("retraining.md", "retrain_flow.py run"): [f"tests/flows/test_retrain_flow.py::{DAYS}"],
    ("retraining.md", "registry rollback"): [f"{HERE}::test_a_champion_on_s3_is_rolled_back"],
    ("retraining.md", "argo-workflows create"): [f"{HERE}::test_a_retraining_is_handed_to_argo"],
}
"""(page, words of a block) -> what types its lines; "" is every block of a page whose test takes all there are."""
CANNOT_RUN = {
    ("README.md", "make run"): "installs packages from a network, and `make test` is what runs this file; "
    "test_make_starts_what_the_readme_says looks at what each would start",
    ("events.md", "benchmarks.next_item"): "five minutes a seed on idle cores, most of them not training; "
    "test_a_benchmark_of_a_page_takes_its_words reads its options",
}
"""(page, words of a block) -> why no test types it."""


def test_every_block_of_shell_is_typed_by_a_named_test_or_has_a_reason():
    found = {(named(page), b.text) for page, b in OURS if b.kind == "bash"}
    names = [*RUN_BY, *CANNOT_RUN]
    matches = {name: [each for each in found if name[0] == each[0] and name[1] in each[1]] for name in names}
    wrong = [name for name, blocks in matches.items() if not blocks or (name[1] and len(blocks) > 1)]
    assert not wrong, "names of blocks that are gone, or of more than one"
    unnamed = found - {each for blocks in matches.values() for each in blocks}
    assert len(found) > 30 and not unnamed, "a block that nothing types: make a test that does, and name it in RUN_BY"


@pytest.mark.parametrize("name", sorted({test for tests in RUN_BY.values() for test in tests}))
def test_what_is_said_to_type_a_block_is_there_and_reads_the_page(name):
    path, _, function = name.partition("::")
    source = (ROOT / path).read_text()
    (found,) = [node for node in ast.parse(source).body if getattr(node, "name", None) == function]
    if path == HERE:
        source = ast.unparse(found)  # this file names every page
    for page, _ in [key for key, tests in RUN_BY.items() if name in tests]:
        folder = page.rpartition("/")[0]
        assert page in source or f"{folder}/{{name}}.md" in source, f"{path} reads {page}"


def typed(line: str, folder, monkeypatch, **words: str) -> str:
    """What a command of ours prints, in this process, which is quicker by the seconds that its imports take."""
    monkeypatch.chdir(folder)
    shown = CliRunner().invoke(cli.app, [words.get(word, word) for word in line.split()[1:]])
    assert shown.exit_code == 0, f"{line}: {shown.output}{shown.exception!r}"
    return shown.stdout


def test_make_starts_what_the_readme_says(tmp_path):
    def would_run(target: str, venv: str) -> str:
        words = ["make", "--no-print-directory", "--dry-run", f"VENV={venv}", target]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    first, _ = lines_of("README.md", "make run")
    fresh = would_run(first.split()[1], ".none")
    assert "-m venv .none" in fresh and "pip install" in fresh, "it makes its environment"
    assert fresh.splitlines()[-1] == ".none/bin/python flows/grpo_flow.py run"
    (tmp_path / ".ready").touch()
    assert would_run("run", str(tmp_path)) == f"{tmp_path}/bin/python flows/grpo_flow.py run\n", "and once only"
    tests = would_run("test", str(tmp_path))
    assert all(word in tests for word in ("ruff check", "ruff format --check", "pyright", "pytest --numprocesses 2 "))


def test_a_benchmark_of_a_page_takes_its_words():
    line = line_of("events.md", "benchmarks.next_item").replace("python", sys.executable, 1)
    done = subprocess.run(f"{line} --help", shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage:" in done.stdout and not done.stderr


def test_a_plan_says_what_its_page_lists(tmp_path, monkeypatch):
    line = line_of("plan.md", "posttrain plan")
    config = str(ROOT / "configs" / "sft_tiny.yaml")
    short = typed(re.sub(r" \[.*?\]", "", line), tmp_path, monkeypatch, CONFIG=config)
    assert all(word in short for word in ("parameters", "trained", "met by a token", "Memory", "a step", "In all: "))
    assert "Disk: " in short and "Host memory: " in short and "cost" not in short
    whole = json.loads(typed(re.sub(r"[\[\]]", "", line), tmp_path, monkeypatch, CONFIG=config))
    assert (whole["gpus"], whole["gpu"], whole["mfu"], whole["fits"]) == (8, "h200", 0.4, True) and whole["cost"] > 0


@pytest.mark.parametrize("page", ["models.md", "new_family.md"])
def test_a_model_is_verified(page, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(random_config("qwen3", 0)))
    folder = str(tiny_model(tmp_path / "model"))
    blocks = [b.text for path, b in OURS if named(path) == page and b.kind == "bash"]
    lines = {re.sub(r"\s+#.*", "", line) for text in blocks for line in text.splitlines()}
    assert len(lines) == 3
    for line in sorted(lines):
        line = line.replace("path/to/model", "FOLDER")
        if "vllm" in line and find_spec("vllm") is None:
            shown = CliRunner().invoke(cli.app, [folder if word == "FOLDER" else word for word in line.split()[1:]])
            assert shown.exit_code == 1 and "vllm is not installed. Fix: pip install" in shown.stderr
            continue
        said = typed(line, tmp_path, monkeypatch, FOLDER=folder)
        assert "Agrees with transformers" in said and ("seeds: 5" in said) == ("--seeds" in line)
        assert ("its own weights" in said) == ("FOLDER" in line)


def test_a_champion_on_s3_is_rolled_back(tmp_path, monkeypatch, s3_bucket):
    where = f"{s3_bucket}/champions"
    for version in range(1, 10):
        folder = str(tmp_path / str(version))
        with storage.staging(folder) as made:
            (made / "config.json").write_text(str(version))
            storage.publish(made, folder)
        made = registry.Candidate(run=f"Flow/{version}", parent=version - 1 or None, model_uri=folder, key=str(version))
        registry.promote(where, made)
    back, further = (line.replace("s3://bucket", s3_bucket) for line in lines_of("retraining.md", "registry rollback"))
    for line, champion, entries in ((back, 8, 10), (further, 7, 11), (further, 7, 11)):
        monkeypatch.chdir(tmp_path)
        shown = CliRunner().invoke(cli.app, shlex.split(line)[1:])
        assert shown.exit_code == 0, shown.output
        found = registry.champion(where)
        assert found is not None and found.version == champion, line
        assert len(registry.history(where)) == entries and registry.versions(where) == list(range(1, 10)), line


@pytest.mark.slow
def test_a_head_of_ones_own_is_trained_on_an_export(tmp_path):
    shutil.copytree(ROOT / "examples" / "own_head", tmp_path / "examples" / "own_head")
    tiny_model(tmp_path / "runs" / "SFTFlow" / "17" / "export")
    terminal = Terminal(tmp_path)
    for line in lines_of("bring/head.md", "head.py"):
        said = terminal.type(line.replace("RUN_ID", "17"))
    first, *_, last = map(float, said.split()[1:])
    assert last < first and (terminal.folder / "moods" / "heads").is_dir()


@pytest.fixture
def argo(tmp_path, s3_bucket):
    """A terminal whose Metaflow has a bucket and an API server; what was sent there, by plural/name; a config."""
    passed = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    passed |= {"METAFLOW_S3_ENDPOINT_URL": os.environ["METAFLOW_S3_ENDPOINT_URL"], "METAFLOW_S3_WORKER_COUNT": "2"}
    passed |= {"AWS_ENDPOINT_URL": passed["METAFLOW_S3_ENDPOINT_URL"], "METAFLOW_DEFAULT_DATASTORE": "s3"}
    terminal = clone(tmp_path)
    terminal.env |= passed | {"METAFLOW_DATASTORE_SYSROOT_S3": f"{s3_bucket}/metaflow"}
    config = {"parallel": {"backend": "kubernetes", "image": "posttrain:test"}, "checkpoint.root": f"{s3_bucket}/runs"}
    with fake_kubernetes(tmp_path) as (server, kubeconfig):
        terminal.env["KUBECONFIG"] = str(kubeconfig)
        yield terminal, server.objects, config


def test_a_flow_is_handed_to_argo(argo):
    terminal, sent, config = argo
    (terminal.folder / "my.yaml").write_text(json.dumps({"base": "configs/sft_tiny.yaml", **config}))
    create, trigger, only_json = lines_of("operations.md", "argo-workflows create")
    terminal.type(create)
    assert [manifest["kind"] for manifest in sent.values()] == ["WorkflowTemplate"]
    terminal.type(trigger)
    assert [manifest["kind"] for manifest in sent.values()] == ["WorkflowTemplate", "Workflow"]
    printed = terminal.type(only_json)
    assert json.loads(printed[printed.index("{") :])["kind"] == "WorkflowTemplate"


def test_a_retraining_is_handed_to_argo(argo):
    terminal, sent, config = argo
    config |= {"retrain.registry": config["checkpoint.root"].replace("runs", "registry")}
    (terminal.folder / "my.yaml").write_text(json.dumps({"base": "configs/retrain_tiny.yaml", **config}))
    (line,) = lines_of("retraining.md", "argo-workflows create")
    terminal.type(line)
    assert [manifest["kind"] for manifest in sent.values()] == ["WorkflowTemplate"]


@pytest.mark.slow
@pytest.mark.parametrize("tasks", ["", "_tasks"], ids=["items", "items and tasks"])
def test_events_train(tasks, tmp_path):
    small = {"model.fresh.tokenizer": "small_events:tokenizer", "data.sources": f"small_events:training{tasks}"}
    small |= {"data.held_out": f"small_events:held_out{tasks}", "optim.num_steps": 2, "optim.warmup_steps": 0}
    small |= {"method.packs_per_step": 2, "eval.every_steps": 2, "parallel.data": 1}
    line = line_of("events.md", "events_tasks.yaml" if tasks else "events_sft.yaml")
    changes = [f"--config-value {key}={value}" for key, value in small.items()]
    said = clone(tmp_path).type(" ".join([line, *changes]))
    assert "sft 2/2" in said and "exported model: " in said
    (run,) = (tmp_path / "runs" / "SFTFlow").iterdir()
    assert ("eval/watch_hours/loss" in (run / "metrics" / "sft.jsonl").read_text()) == bool(tasks)
    assert (run / "export" / "heads").is_dir() == bool(tasks)
