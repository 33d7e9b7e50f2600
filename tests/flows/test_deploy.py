"""What would be deployed, read and partly run without a cluster: code package, Argo, Kubernetes, AWS Batch."""

import copy
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import boto3
import pytest
import yaml

from argo import broken_references, embedded_manifest, without_nulls
from pods import (
    ROOT,
    batch_that_runs,
    container_of,
    fake_kubernetes,
    gpus,
    image,
    make_batch_queue,
    overrides,
    requirements,
)
from posttrain.config_file import load_config
from posttrain.data import sort_digits

FLOW = ROOT / "flows" / "grpo_flow.py"
CLUSTER = ROOT / "configs" / "grpo_cluster.yaml"
FIVE_DAYS = 5 * 24 * 3600
SOURCES = [p for folder in ("steps", "lib/posttrain") for p in (ROOT / folder).rglob("*")]
SMALL = [
    "warmup=null",
    "parallel.data=1",
    "parallel.gpus_per_node=1",
    "parallel.cpus_per_node=4",
    "parallel.memory_gib=16",
]
"""Changes to the built-in task; without its warm-up the first GPU step is `train`."""


def flow(*words, cwd, timeout=60):
    """Run the flow's command line."""
    command = [sys.executable, str(FLOW), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def values(*pairs):
    return [word for pair in pairs for word in ("--config-value", pair)]


# The command line


def test_show_describes_every_step_of_both_configs(cloud, home):
    for words in ([], ["--config", CLUSTER]):
        shown = flow(*words, "show", cwd=home)
        text = shown.stdout + shown.stderr
        assert shown.returncode == 0, text
        for step in (
            "start",
            "prepare",
            "tokenize",
            "merge_tokens",
            "warmup",
            "train",
            "gang",
            "train_nodes",
            "gather",
        ):
            assert re.search(rf"Step {step}\n +\S+", text), f"{step} has no docstring"
        assert ("@kubernetes" in text) == bool(words)


def test_a_kubernetes_config_on_a_local_datastore_is_refused_with_the_fix(home):
    refused = flow("--config", CLUSTER, "show", cwd=home)
    assert refused.returncode != 0
    assert "--datastore=s3" in refused.stdout + refused.stderr


def test_an_argument_that_metaflow_does_not_know_is_refused_with_those_that_it_does(home):
    typo = {"training": {"timeout": {"hour": 3}}}
    refused = flow(*values(f"parallel.decorators={json.dumps(typo)}"), "show", cwd=home)
    assert refused.returncode != 0
    said = refused.stdout + refused.stderr
    assert "timeout has no hour; known: seconds, minutes, hours" in " ".join(said.split()) and "Traceback" not in said


# The code package


@pytest.fixture
def package(home):
    """The code package, unpacked as a container unpacks it."""
    saved = flow("package", "save", home / "package.tar", cwd=home)
    assert saved.returncode == 0, saved.stderr
    with tarfile.open(home / "package.tar") as tar:
        tar.extractall(home / "unpacked", filter="data")
    return home / "unpacked"


def test_package_holds_steps_library_templates_and_flows(package):
    for source in [p for p in SOURCES if p.suffix in (".py", ".jinja")]:
        inside = source.relative_to(ROOT / "lib" if ROOT / "lib" in source.parents else ROOT)
        assert (package / ".mf_code" / inside).read_bytes() == source.read_bytes()
    for name in ("base.py", "placement.py", "grpo_flow.py"):
        assert (package / name).is_file()


def test_package_holds_nothing_else(package):
    shipped = [p.relative_to(package) for p in package.rglob("*") if p.is_file()]
    ours = [p for p in shipped if p.parts[:2] != (".mf_code", "metaflow")]
    flows = {p.name for p in (ROOT / "flows").glob("*.py")}
    assert {p.parts[0] for p in ours} - flows == {".mf_code", ".mf_meta", ".mf_install"}
    assert {p.parts[1] for p in ours if p.parts[0] == ".mf_code"} == {"posttrain", "steps", "placement.py"}
    assert {p.suffix for p in ours if p.parts[0] not in (".mf_meta", ".mf_install")} == {".py", ".jinja", ".typed"}


def test_a_step_runs_from_the_package_alone(package, home):
    config = load_config((ROOT / "configs" / "sft_tiny.yaml").read_text()).model_dump(mode="json")
    (home / "prepare.json").write_text(json.dumps({"config": config, "root": str(home / "run")}))
    bare = image(home)
    done = subprocess.run(
        [sys.executable, "-m", "steps.prepare", str(home / "prepare.json")],
        cwd="/",
        env=bare | {"PYTHONPATH": f"{package / '.mf_code'}:{bare['PYTHONPATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert made["parts"] and (Path(made["model"]["uri"]) / "config.json").is_file()


def test_package_is_enough_to_import_everything(package, home):
    modules = [
        ".".join(p.relative_to(package / ".mf_code").with_suffix("").parts).removesuffix(".__init__")
        for folder in ("steps", "posttrain")
        for p in sorted((package / ".mf_code" / folder).rglob("*.py"))
    ]
    program = (
        "import importlib, json, sys; modules = [importlib.import_module(name) for name in sys.argv[1:]]; "
        "print(json.dumps([module.__file__ for module in modules]))"
    )
    bare = image(home)
    nothing = subprocess.run([sys.executable, "-c", "import posttrain"], cwd="/", env=bare, capture_output=True)
    assert b"ModuleNotFoundError" in nothing.stderr, "the isolation of this test does not hold"
    found = subprocess.run(
        [sys.executable, "-c", program, *modules],
        cwd="/",
        env=bare | {"PYTHONPATH": f"{package / '.mf_code'}:{bare['PYTHONPATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert len(modules) > 40
    assert all(Path(file).is_relative_to(package) for file in json.loads(found.stdout))


# Argo


def workflow_template(cwd, *overrides):
    made = flow("--config", CLUSTER, *values(*overrides), "argo-workflows", "create", "--only-json", cwd=cwd)
    assert made.returncode == 0, made.stderr
    return without_nulls(json.loads(made.stdout))


def test_argo_template_of_two_nodes_asks_for_what_the_config_says(cloud, home):
    workflow = workflow_template(home)
    assert broken_references(workflow) == []
    templates = {t["name"]: t for t in workflow["spec"]["templates"]}
    wants = yaml.safe_load(CLUSTER.read_text())["parallel"]
    for name in ("start", "prepare", "tokenize", "merge-tokens", "warmup", "gang", "gather", "export", "end"):
        container = templates[name]["container"]
        assert (container["image"], gpus(container)) == (wants["image"], 0), name
    for name in ("train", "evaluate"):
        assert_trains(templates[name]["container"], templates[name]["volumes"], wants)
    jobset = embedded_manifest(templates["train-nodes"])
    nodes = {job["name"]: job for job in jobset["spec"]["replicatedJobs"]}
    assert jobset["kind"] == "JobSet" and set(nodes) == {"control", "worker"}
    for node in nodes.values():
        pod = node["template"]["spec"]["template"]["spec"]
        assert_trains(pod["containers"][0], pod["volumes"], wants)
        assert pod["activeDeadlineSeconds"] == 48 * 3600


def test_argo_limits_every_step_and_retries_the_long_ones(cloud, home):
    templates = {t["name"]: t for t in workflow_template(home)["spec"]["templates"]}
    steps = {name: t for name, t in templates.items() if "activeDeadlineSeconds" in t}
    for name, template in steps.items():  # five days are Metaflow's default; the config says two for training
        trains = name in ("train", "evaluate", "train-nodes")
        assert template["activeDeadlineSeconds"] == (48 * 3600 if trains else FIVE_DAYS), name
    for name in ("warmup", "train", "train-nodes", "evaluate"):
        assert templates[name]["retryStrategy"]["limit"] == 2


def test_argo_template_of_one_node_keeps_the_graph_and_its_own_config(cloud, home):
    two, one = workflow_template(home), workflow_template(home, "parallel.nodes=1", "parallel.data=6")
    assert broken_references(one) == []
    asked = {t["name"]: gpus(t["container"]) for t in one["spec"]["templates"] if "container" in t}
    assert {name for name, count in asked.items() if count} == {"train", "evaluate"}
    assert {t["name"] for t in one["spec"]["templates"]} == {t["name"] for t in two["spec"]["templates"]}
    assert _code_url(one) != _code_url(two), "the config travels in the code package"


def assert_trains(container, volumes, wants):
    """A training container asks for the config's `parallel`, and for room in /dev/shm."""
    requests = container["resources"]["requests"]
    assert container["image"] == wants["image"]
    assert gpus(container) == wants["gpus_per_node"]
    assert float(requests["cpu"]) == wants["cpus_per_node"]
    assert requests["memory"] == f"{wants['memory_gib'] * 1024:.1f}M"
    mounted = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    shared = next(v for v in volumes if v["name"] == mounted["/dev/shm"])
    assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{wants['memory_gib'] * 512}Mi"}


def test_the_reference_check_finds_what_a_server_would_accept(cloud, home):
    good = workflow_template(home)
    for planted in (
        lambda templates, tasks: tasks["prepare"].update(template="ghost"),
        lambda templates, tasks: tasks["evaluate"].update(depends="gather.Succeeded || trane.Succeeded"),
        lambda templates, tasks: tasks["prepare"]["arguments"].update(parameters=[]),
        lambda templates, tasks: tasks["prepare"]["arguments"]["parameters"].append({"name": "extra", "value": "1"}),
        lambda templates, tasks: tasks["export"].update(when="{{tasks.start.outputs.parameters.ghost}}"),
        lambda templates, tasks: templates["train"]["volumes"].pop(),
        lambda templates, tasks: templates["end"]["container"]["command"].append("{{inputs.parameters.ghost}}"),
    ):
        bad = copy.deepcopy(good)
        templates = {t["name"]: t for t in bad["spec"]["templates"]}
        planted(templates, {t["name"]: t for t in templates["GRPOFlow"]["dag"]["tasks"]})
        assert broken_references(bad)


def _code_url(workflow):
    start = next(t for t in workflow["spec"]["templates"] if t["name"] == "start")
    return next(e["value"] for e in start["container"]["env"] if e["name"] == "METAFLOW_CODE_URL")


# Kubernetes and AWS Batch: CPU steps really run from the code package; the first GPU step is recorded


@pytest.fixture
def small_run(cloud):
    """Options of a run on a few rows in S3: CPU steps up to the first one that wants a GPU."""
    client, bucket = boto3.client("s3"), cloud.removeprefix("s3://")
    for name, rows in {"prompts": sort_digits.prompts(0, 64), "held_out": sort_digits.held_out(0)[:4]}.items():
        client.put_object(Bucket=bucket, Key=f"{name}.jsonl", Body="\n".join(map(json.dumps, rows)))
    data = [f"data.{name}={cloud}/{name}.jsonl" for name in ("prompts", "held_out")]
    return values(*SMALL, *data, f"checkpoint.root={cloud}/runs")


@pytest.mark.slow
def test_with_kubernetes_runs_cpu_steps_in_pods_and_asks_for_a_gang(small_run, cloud, home, monkeypatch):
    words = ["run", "--with", "kubernetes:image=posttrain:test", *small_run, *values("parallel.nodes=2")]
    with fake_kubernetes(home) as (server, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        run = flow(*words, cwd=home, timeout=400)
        submitted = list(server.objects.values())
    step_of = {m["metadata"]["annotations"]["metaflow/step_name"]: m for m in submitted}
    steps = ["start", "prepare", "tokenize", "merge_tokens", "warmup", "gang", "train_nodes"]
    assert list(step_of) == steps, run.stdout + run.stderr
    gang = step_of.pop("train_nodes")
    assert gang["kind"] == "JobSet"
    assert [job["replicas"] for job in gang["spec"]["replicatedJobs"]] == [1, 1]
    for job in gang["spec"]["replicatedJobs"]:
        pod = job["template"]["spec"]["template"]["spec"]
        wants = {"image": "posttrain:test", "gpus_per_node": 1, "cpus_per_node": 4, "memory_gib": 16}
        assert_trains(pod["containers"][0], pod["volumes"], wants)
        assert_bounds_s3(pod["containers"][0]["env"])
    for job in step_of.values():
        container = container_of(job)
        assert (job["status"]["succeeded"], container["image"]) == (1, "posttrain:test")
        assert_bounds_s3(container["env"])
        assert_downloads_code(container["command"], cloud)
    assert run.returncode != 0, "the gang was refused"


def test_with_kubernetes_refuses_a_checkpoint_root_that_pods_cannot_share(cloud, home, monkeypatch):
    with fake_kubernetes(home) as (server, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        run = flow("run", "--with", "kubernetes", *values(*SMALL), cwd=home, timeout=120)
        assert len(server.objects) == 1
    assert run.returncode != 0
    assert "set checkpoint.root to an s3:// prefix" in run.stdout + run.stderr


@pytest.mark.slow
def test_with_batch_runs_cpu_steps_in_jobs_and_asks_for_gpus(small_run, cloud, home, monkeypatch):
    monkeypatch.setenv("METAFLOW_ECS_S3_ACCESS_IAM_ROLE", make_batch_queue("gpus"))
    words = ["run", "--with", "batch:queue=gpus,image=posttrain:test", *small_run]
    with batch_that_runs(home) as submitted:
        run = flow(*words, cwd=home, timeout=400)
    steps = [request["parameters"]["metaflow.step_name"] for request in submitted]
    attempts = ["train"] * 3  # each refused
    assert steps == ["start", "prepare", "tokenize", "merge_tokens", "warmup", *attempts], run.stdout + run.stderr
    for request in submitted:
        assert request["jobQueue"] == "gpus"
        assert request["timeout"] == {"attemptDurationSeconds": FIVE_DAYS}
        assert_downloads_code(request["containerOverrides"]["command"], cloud)
        assert_bounds_s3(request["containerOverrides"]["environment"])
    assert [requirements(r) for r in submitted[:5]] == [{"VCPU": 2, "MEMORY": 8192}] * 5
    assert requirements(submitted[-1]) == {"VCPU": 4, "MEMORY": 16384, "GPU": 1}
    container = submitted[-1]["definition"]["containerProperties"]
    assert (container["image"], container["linuxParameters"]["sharedMemorySize"]) == ("posttrain:test", 8192)
    assert run.returncode != 0, "the GPU job was refused"


@pytest.mark.slow
def test_several_nodes_on_batch_are_one_multi_node_job_in_the_queue_of_training(cloud, home, monkeypatch):
    monkeypatch.setenv("METAFLOW_ECS_S3_ACCESS_IAM_ROLE", make_batch_queue("cheap"))
    make_batch_queue("fast")
    wants = {"backend": "batch", "queue": "cheap", "image": "posttrain:test", "nodes": 4, "data": 2, "gpus_per_node": 1}
    wants |= {"cpus_per_node": 4, "memory_gib": 16}
    wants["decorators"] = {"training": {"batch": {"queue": "fast", "efa": 2}, "timeout": {"hours": 24}}}
    pairs = [f"parallel.{key}={json.dumps(value)}" for key, value in wants.items()]
    shutil.copytree(ROOT / "flows", home / "flows")
    shutil.copy(Path(__file__).parent / "gang_flow.py", home / "flows")
    (home / "configs").symlink_to(ROOT / "configs")
    with batch_that_runs(home) as submitted:
        words = [
            sys.executable,
            str(home / "flows" / "gang_flow.py"),
            "run",
            *values(*pairs, f"checkpoint.root={cloud}/runs"),
        ]
        run = subprocess.run(words, cwd=home, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode != 0, "the GPU job was refused"
    assert [request["jobQueue"] for request in submitted] == ["cheap", "fast"], run.stdout + run.stderr
    start, gang = submitted
    assert (requirements(start), start["timeout"]) == (
        {"VCPU": 2, "MEMORY": 8192},
        {"attemptDurationSeconds": FIVE_DAYS},
    )
    assert gang["timeout"] == {"attemptDurationSeconds": 24 * 3600}
    nodes = gang["definition"]["nodeProperties"]
    assert (gang["definition"]["type"], nodes["numNodes"], nodes["mainNode"]) == ("multinode", 4, 0)
    assert [group["targetNodes"] for group in nodes["nodeRangeProperties"]] == ["0:0", "1:3"]
    for group in nodes["nodeRangeProperties"]:
        container = group["container"]
        assert (container["image"], container["linuxParameters"]["sharedMemorySize"]) == ("posttrain:test", 8192)
        assert [each["hostPath"][-8:] for each in container["linuxParameters"]["devices"]] == ["/uverbs0", "/uverbs1"]
    assert [where for where, _ in overrides(gang)] == ["0:0", "1:3"]
    for _, container in overrides(gang):
        asks = {each["type"]: int(each["value"]) for each in container["resourceRequirements"]}
        assert asks == {"VCPU": 4, "MEMORY": 16384, "GPU": 1}
        assert_bounds_s3(container["environment"])


@pytest.mark.slow
def test_several_nodes_on_batch_are_refused_where_metaflow_would_break_their_command(cloud, home, monkeypatch):
    monkeypatch.setenv("METAFLOW_ECS_S3_ACCESS_IAM_ROLE", make_batch_queue("refusing"))
    changes = values(*SMALL, "parallel.nodes=2", f"checkpoint.root={cloud}/runs")
    with batch_that_runs(home) as submitted:
        run = flow("run", "--with", "batch:queue=refusing,image=posttrain:test", *changes, cwd=home, timeout=120)
    assert run.returncode != 0 and len(submitted) == 1
    assert "Use a metadata service" in run.stdout + run.stderr


def assert_downloads_code(command, bucket):
    """A container's command fetches the code package from the datastore and puts it on the path."""
    assert f'download_file("{bucket.removeprefix("s3://")}", "metaflow/GRPOFlow/' in command[-1]
    assert "export PYTHONPATH=$(pwd)/.mf_code" in command[-1]


def assert_bounds_s3(variables):
    """A container's Metaflow gives a key of its own up after minutes; test_task_environment.py shows how many."""
    given = {each["name"]: each.get("value") for each in variables}
    assert {given["METAFLOW_S3_RETRY_COUNT"], given["METAFLOW_S3_TRANSIENT_RETRY_COUNT"]} == {"6"}
    assert json.loads(given["METAFLOW_S3_CLIENT_RETRY_CONFIG"])["total_max_attempts"] == 2
