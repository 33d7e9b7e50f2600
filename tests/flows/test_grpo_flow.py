"""The GRPO flow as a person runs it: from any folder, with overrides, with mistakes, and resumed."""

import base64
import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from nbclient import NotebookClient

from faulty_s3 import Fault
from posttrain import storage
from runs import ROOT, SMALL, TWO_RANKS
from terminal import line_of

FLOW = str(ROOT / "flows" / "grpo_flow.py")
TRAIN_ALONE = {"warmup": None}
"""For what happens to the step train alone; tests/faults does more of it, to two ranks, without a flow around it."""
GANG = TWO_RANKS | {"parallel.nodes": 2}


def flow(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the flow in `folder` with a Metaflow of its own, as a user whose name is unset."""
    environment = {k: v for k, v in os.environ.items() if k not in ("USER", "USERNAME", "METAFLOW_USER", "SUDO_USER")}
    environment |= {
        "METAFLOW_HOME": str(folder / "metaflow_home"),
        "METAFLOW_CLIENT_CACHE_PATH": str(folder / "client_cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        **env,
    }
    command = [sys.executable, FLOW, *arguments]
    try:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"the flow hangs; it printed\n{(error.stdout or b'').decode()[-6000:]}") from None


def overrides(**changes: object) -> list[str]:
    return ["--config-value", "config", json.dumps(SMALL | changes)]


def words_of(page: str, words: str) -> list[str]:
    """What a page has a person type after the name of the flow."""
    python, script, *rest = shlex.split(line_of(page, words))
    assert (python, ROOT / script) == ("python", Path(FLOW))
    return rest


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    (folder / "my.yaml").write_text(json.dumps(SMALL))
    done = flow(folder, *words_of("README.md", "--config my.yaml"), "--run-id-file", "run_id")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (folder / "log").write_text(done.stdout + done.stderr)
    return folder


@pytest.fixture(scope="module")
def run(finished: Path):
    os.environ["METAFLOW_CLIENT_CACHE_PATH"] = str(finished / "client_cache")
    from metaflow import Run, metadata, namespace

    metadata(f"local@{finished}")
    namespace(None)
    return Run(f"GRPOFlow/{(finished / 'run_id').read_text()}")


def test_the_notebook_reads_a_finished_run(finished: Path, run, monkeypatch):
    monkeypatch.chdir(finished)  # whose metadata Metaflow's client then reads
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "lib"), str(ROOT)]))
    notebook = nbformat.read(ROOT / "notebooks" / "inspect_run.ipynb", 4)
    NotebookClient(notebook, timeout=120).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert run.pathspec in printed and run.data.trained["ledger"]["digest"] in printed
    assert "warmup {'steps':" in printed and "reward 0.0, weights" in printed
    titles = [o["data"]["text/plain"] for o in outputs if "application/vnd.vegalite.v5+json" in o.get("data", {})]
    assert "Reward" in titles


def test_the_lines_of_the_readme_read_a_finished_run(finished: Path, run, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    text = (ROOT / "README.md").read_text()
    (block,) = [each for each in re.findall(r"```python\n(.*?)```", text, re.S) if "latest_successful_run" in each]
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert run.data.exported["uri"] in printed and str(run.data.evaluation["after"]["sampled_reward"]) in printed


def test_the_flow_ends_with_a_table_and_the_export_path(finished: Path):
    log = (finished / "log").read_text()
    assert "grpo 6/6" in log and "ETA 0:00" in log
    assert "before" in log and "after" in log and "exported model: " in log
    assert "Traceback" not in log and "warning" not in log.lower()


def test_every_step_ran_and_left_plain_small_artifacts(run):
    steps = {step.id for step in run}
    assert steps == {"start", "prepare", "tokenize", "merge_tokens", "warmup", "train", "evaluate", "export", "end"}
    for step in run:
        for artifact in step.task:
            value = artifact.data
            assert json.loads(json.dumps(value)) == value, f"{artifact} is not plain"
            assert len(json.dumps(value)) < 4096, f"{artifact} is too large for the Metaflow UI to show"


def test_artifacts_tell_the_story(run):
    data = run.data
    assert data.warmed_up["loss_last"] < data.warmed_up["loss_first"]
    assert data.trained["ledger"]["trained"] == 6 * 4 and data.trained["ledger"]["dropped"] == {}
    assert set(data.evaluation) == {"before", "after"}
    assert data.exported["max_abs_diff"] <= 1e-4
    assert data.provenance["versions"]["torch"] == torch.__version__


def test_a_run_is_found_by_its_recipe_its_model_and_its_rows(run):
    from metaflow import Flow

    assert run.data.labels == {"recipe": "grpo", "model": "fresh", "data": run.data.data["fingerprint"][:8]}
    for name, value in run.data.labels.items():
        assert run.id in [found.id for found in Flow("GRPOFlow").runs(f"{name}:{value}")], name
    assert list(Flow("GRPOFlow").runs("data:00000000")) == []


def test_transformers_opens_the_export(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    uri = run.data.exported["uri"]
    tokenizer = AutoTokenizer.from_pretrained(uri)
    model = AutoModelForCausalLM.from_pretrained(uri)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "sort 312"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model(**ids).logits.shape[-1] == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id, "generate() stops where training stopped"
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert Path(uri, "model.safetensors").stat().st_mode == Path(uri, "config.json").stat().st_mode
    assert "Lineage" in Path(uri, "README.md").read_text()
    facts = json.loads(Path(uri, "manifest.json").read_text())
    assert facts["tokenizer_sha256"] == run.data.exported["tokenizer_sha256"] and facts["vocab_size"] == len(tokenizer)
    assert all(len(facts[name]) == 64 for name in ("architecture_sha256", "weights_sha256"))


def test_cards_show_what_they_should(run):
    from metaflow.cards import get_cards

    shows = {
        "merge_tokens": ["Sources", "Lengths of units", "The first packs", "token by token", "sha256 of its file"],
        "warmup": ["Warm-up", "Loss"],
        "train": ["Training reward", "KL to the starting policy", "Where a step's time goes", "filter by text"],
        "evaluate": ["held-out rows", "greedy"],
        "export": ["Exported model", "Lineage", "model.safetensors"],
    }
    for step, texts in shows.items():
        (card,) = get_cards(run[step].task)
        content = card_content(card.get())
        for text in texts:
            assert text in content, f"{step}: {text}"


def card_content(html: str) -> str:
    """The JSON of a card's components, which its page carries in base64."""
    blocks = re.findall(r"[A-Za-z0-9+/]{200,}={0,2}", html)
    decoded = [base64.b64decode(block + "=" * (-len(block) % 4)) for block in blocks]
    return next(json.dumps(json.loads(d), ensure_ascii=False) for d in decoded if d.startswith(b'{"metadata"'))


@pytest.mark.slow
@pytest.mark.parametrize("step", ["prepare", "evaluate"])  # the first, from which all others run too, and the page's
def test_resume_from_a_step_keeps_what_came_before(finished: Path, run, step: str):
    origin = (finished / "run_id").read_text()
    told = {"RUN_ID": origin, "evaluate": step}
    again = flow(finished, *(told.get(word, word) for word in words_of("README.md", "--origin-run-id RUN_ID")))
    assert again.returncode == 0, again.stdout[-3000:]
    assert "exported model: " in again.stdout
    assert "grpo 6/6" not in again.stdout, "the last checkpoint holds all six steps; none is trained twice"
    from metaflow import Flow

    resumed = Flow("GRPOFlow").latest_run
    assert resumed.id != run.id and resumed.user_tags >= run.user_tags


@pytest.mark.slow
def test_a_sigterm_to_another_node_of_a_gang_makes_a_save_and_the_retry_goes_on(tmp_path: Path):
    # Metaflow runs the two nodes of a @parallel step as two processes of this machine, each with a Ray daemon.
    # The environment is not activated: `python` on the path is another one, without Metaflow.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    words = overrides(**GANG, **{"optim.num_steps": 30, "checkpoint.every_steps": 100})
    env = os.environ | {"METAFLOW_HOME": str(tmp_path), "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    env["PATH"] = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    with open(tmp_path / "log", "w") as log:
        running = subprocess.Popen([sys.executable, FLOW, *words, "run"], cwd=tmp_path, env=env, stdout=log, stderr=log)
        deadline = time.monotonic() + 240
        while "grpo  3/30" not in (tmp_path / "log").read_text():
            assert running.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.2)  # polls the log of a process that has no other channel; no outcome depends on it
        tasks = [child for child in psutil.Process(running.pid).children(recursive=True) if node_of(child) == "1"]
        assert len(tasks) == 1, tasks
        tasks[0].send_signal(signal.SIGTERM)
        running.wait(timeout=300)
    said = " ".join((tmp_path / "log").read_text().split())
    assert running.returncode == 0, said[-4000:]
    assert "train_nodes" in said and "gather" in said and "grpo 30/30" in said and "exported model: " in said
    assert "telling node 0, which saves and stops" in said and "the node at 127.0.0.1 is about to be taken away" in said
    saved = re.search(r"PreemptedError: stopped by SIGTERM after step (\d+), which is saved", said)
    assert saved and f"continuing after step {saved[1]} of 30" in said, said[-4000:]


def node_of(process: psutil.Process) -> str | None:
    """Which node of a gang a process is the task of: Metaflow says it to each in its environment."""
    try:
        if process.name().startswith("python") and "train_nodes" in process.cmdline() and "step" in process.cmdline():
            return process.environ().get("MF_PARALLEL_NODE_INDEX")
    except psutil.NoSuchProcess:  # it has ended since it was listed; a zombie is one of these too
        return None
    return None


@pytest.mark.slow
def test_a_gang_without_a_shared_token_is_stopped(tmp_path: Path):
    done = flow(tmp_path, *overrides(**GANG, **TRAIN_ALONE), "run")
    assert done.returncode != 0
    assert "several nodes need one RAY_AUTH_TOKEN in the environment of all" in done.stdout


def on_s3(bucket: str) -> dict[str, str]:
    """Environment with Metaflow's datastore on S3, as the run's own files are."""
    where = {"METAFLOW_DEFAULT_DATASTORE": "s3", "METAFLOW_DATASTORE_SYSROOT_S3": f"{bucket}/metaflow"}
    return {**where, "METAFLOW_S3_WORKER_COUNT": "2", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.mark.slow
def test_a_store_that_fails_now_and_then_costs_a_run_nothing_but_time(tmp_path: Path, run, proxy, s3_bucket: str):
    proxy.kinds = (Fault.SLOW_DOWN, Fault.LATE, Fault.RESET_BEFORE_HEADERS, Fault.LOST_ANSWER)
    proxy.rate = 0.05
    words = [*overrides(**{"checkpoint.root": f"{s3_bucket}/runs"}), "run", "--run-id-file", "run_id"]
    # Every attempt of the step train is killed at its third training step, after a commit; the third has two to go.
    done = flow(tmp_path, *words, POSTTRAIN_FAULT="controller.before_train@3", **on_s3(s3_bucket))
    proxy.rate = 0.0
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "continuing after step 2 of 6" in done.stdout and "continuing after step 4 of 6" in done.stdout
    assert done.stdout.count("(retry)") == 2, "the store's failures cost no attempt of a step"
    assert f"exported model: {s3_bucket}/runs/GRPOFlow/" in done.stdout.replace("\n", "")
    there = f"{s3_bucket}/runs/GRPOFlow/{(tmp_path / 'run_id').read_text()}"
    here = str(Path(run.data.exported["uri"]).parent)  # the same run on a disk, left alone
    for name in ("export/model.safetensors", "trained_model/model.safetensors", "ledger/grpo.jsonl"):
        assert storage.read_bytes(f"{there}/{name}") == storage.read_bytes(f"{here}/{name}"), name
    assert not (tmp_path / "runs").exists() and proxy.broken > 20, proxy.broken


@pytest.mark.slow
def test_a_store_that_goes_away_in_training_is_a_named_stop_in_bounded_time(tmp_path: Path, proxy, s3_bucket: str):
    changes = {"checkpoint.root": f"{s3_bucket}/runs", "optim.num_steps": 40, "warmup": None}
    words = overrides(**changes, **{"tracking.custom": "small_task:Impatient"})
    env = os.environ | {"METAFLOW_HOME": str(tmp_path)}  # Metaflow's own store is on the disk: it would fail first
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    with open(tmp_path / "log", "w") as log:
        command = [sys.executable, FLOW, *words, "run"]
        running = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 240
        while "grpo  2/40" not in (tmp_path / "log").read_text():
            assert running.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.2)  # polls the log of a process that has no other channel; no outcome depends on it
        proxy.kinds, proxy.rate = (Fault.SLOW_DOWN,), 1.0
        deadline = time.monotonic() + 400
        while "Task failed." not in (tmp_path / "log").read_text():
            assert running.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.2)
        os.killpg(running.pid, signal.SIGKILL)  # a retry would look for five minutes, and so on
        running.wait()
    said = " ".join((tmp_path / "log").read_text().split())
    assert re.search(
        r"StorageError: \w+ing s3://\S+: given up after \d+ attempts and \d s; the last: .*SlowDown", said
    ), said


@pytest.mark.slow
def test_kill_minus_nine_of_the_process_group_then_resume(tmp_path: Path):
    command = [sys.executable, FLOW, *overrides(**TRAIN_ALONE, **{"optim.num_steps": 20}), "run"]
    env = os.environ | {"METAFLOW_HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "tests")}
    with open(tmp_path / "log", "w") as log:
        running = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 240
        while "grpo  5/20" not in (tmp_path / "log").read_text():
            assert running.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.2)  # polls the log of a process that has no other channel; no outcome depends on it
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    resumed = flow(tmp_path, "resume")
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    (continued,) = re.findall(r"continuing after step (\d+) of 20", resumed.stdout)
    assert int(continued) >= 4, "the checkpoint of step 4 was committed before step 5 was printed"
    assert "exported model: " in resumed.stdout


@pytest.mark.slow
@pytest.mark.fault("F3", outcome="RESUME")
def test_a_sigterm_in_train_is_a_retry_that_goes_on_where_it_was(tmp_path: Path):
    # Every attempt of the step gets a SIGTERM in its third training step; the third has none left to do.
    done = flow(tmp_path, *overrides(**TRAIN_ALONE), "run", POSTTRAIN_FAULT="term:controller.before_train@3")
    assert "PreemptedError: stopped by SIGTERM after step 3, which is saved" in done.stdout.replace("\n", " ")
    assert "continuing after step 3 of 6" in done.stdout and "continuing after step 6 of 6" in done.stdout
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--config-value", "optim.lrr=3"], ['optim.lrr: unknown key; did you mean "lr"?']),
        (["--config-value", "optim.num_steps=many"], ["optim.num_steps: input should be a valid integer"]),
        (
            ["--config-value", "method.group_size=1", "--config-value", "rollout.prompts_per_step=63"],
            ["group_size = 1 has no baseline with advantage = centered", "63 is not divisible by parallel.data"],
        ),
        (["--config", "nowhere.yaml"], ["--config nowhere.yaml: no such file"]),
    ],
)
@pytest.mark.fault("F26", outcome="REFUSE")
def test_a_wrong_config_is_refused_before_any_step(tmp_path: Path, arguments: list[str], messages: list[str]):
    refused = flow(tmp_path, *arguments, "run")
    text = refused.stdout + refused.stderr
    assert refused.returncode != 0
    assert all(message in text for message in messages), text
    assert "Traceback" not in text and "Task is starting" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.prompts": "/nowhere/prompts.jsonl"}, "data.prompts: /nowhere/prompts.jsonl does not exist"),
        ({"reward.function": "small_task:rewrad"}, "has no 'rewrad'"),
        ({"rollout.generator": "no_such_package:Generator"}, "No module named 'no_such_package'"),
        ({"data.prompts": "empty.jsonl"}, "empty.jsonl has no rows"),
        ({"data.max_prompt_tokens": 5}, "row 0: the prompt has"),
        ({"model.fresh": None, "model.path": "/nowhere/model"}, "model.path: /nowhere/model does not exist"),
    ],
)
def test_a_wrong_input_is_refused_before_ray_with_one_message(tmp_path: Path, change: dict, message: str):
    (tmp_path / "empty.jsonl").write_text("\n")
    refused = flow(tmp_path, *overrides(**change), "run")
    text = refused.stdout + refused.stderr
    assert refused.returncode != 0
    assert message in text and "posttrain refused to run" in text
    assert "Traceback" not in text and "warmup" not in text


def test_a_reward_may_lie_in_the_folder_where_the_run_is_started(tmp_path: Path):
    (tmp_path / "my_reward.py").write_text("def score(row, completion):\n    return len(completion)\n")
    wrong_data = {"reward.function": "my_reward:score", "data.prompts": "/nowhere.jsonl"}
    refused = flow(tmp_path, *overrides(**wrong_data), "run")
    assert "data.prompts: /nowhere.jsonl does not exist" in refused.stdout, "the only thing wrong"
    assert "my_reward" not in refused.stdout


@pytest.mark.slow
def test_two_runs_side_by_side_do_not_meet(tmp_path: Path):
    from concurrent.futures import ThreadPoolExecutor

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    one, other = words_of("README.md", "method.group_size=16"), words_of("config.md", "--config configs/grpo_tiny.yaml")
    changes = SMALL | TRAIN_ALONE | {"optim.num_steps": 2}
    del changes["base"], changes["warmup.num_steps"], changes["warmup.packs_per_step"]
    del changes["method.group_size"]  # the page's own
    small = [word for key, value in changes.items() for word in ("--config-value", f"{key}={json.dumps(value)}")]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda words: flow(tmp_path, *words, *small), (one, other)))
    assert [done.returncode for done in both] == [0, 0], both[0].stdout[-2000:] + both[1].stdout[-2000:]
    assert len(list((tmp_path / "runs" / "GRPOFlow").iterdir())) == 2
