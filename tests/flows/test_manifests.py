"""What every flow would deploy to a cluster: valid by the models of Argo and JobSet, and what the golden files say."""

import copy
import json
import re
from pathlib import Path

import pytest
import yaml

from argo import broken_references, embedded_manifest
from deploy import FLOWS, GOLDEN, ROOT, comparable, on_spot, printed, workflow_template
from pods import fake_kubernetes
from schemas import problems

SCHEDULED = [Path(__file__).parent / "scheduled_flow.py"]
SCHEDULED += [flow for flow in FLOWS if re.search(r"^@(schedule|trigger)", flow.read_text(), re.M)]


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.stem)
def test_a_flow_deploys_what_its_golden_file_says(cloud, home, flow):
    template = workflow_template(flow, home)
    assert problems(template) == []
    assert broken_references(template) == []
    golden = GOLDEN / f"{flow.stem}.yaml"
    assert golden.exists(), f"run `make golden`: {golden.name} is new"
    assert comparable(template).splitlines() == golden.read_text().splitlines(), "if it is meant, run `make golden`"


@pytest.mark.parametrize("flow", SCHEDULED, ids=lambda flow: flow.stem)
def test_what_starts_a_flow_by_itself_is_valid(cloud, home, monkeypatch, flow):
    monkeypatch.setenv("METAFLOW_ARGO_WORKFLOWS_USE_SCHEDULES", "true")
    deployed = create(flow, home, monkeypatch)
    assert {manifest["kind"] for manifest in deployed} >= {"WorkflowTemplate", "CronWorkflow", "Sensor"}
    for manifest in deployed:
        assert problems(manifest) == []


@pytest.mark.slow
def test_argo_4_would_not_take_the_schedule_that_metaflow_writes_unasked(cloud, home, monkeypatch):
    cron = next(m for m in create(SCHEDULED[0], home, monkeypatch) if m["kind"] == "CronWorkflow")
    assert problems(cron) == ["CronWorkflow.spec.schedules: Field required"]


def create(flow, home, monkeypatch):
    """All objects that `argo-workflows create` puts on a cluster."""
    for name in ("EVENT", "EVENT_SOURCE", "SERVICE_ACCOUNT"):
        monkeypatch.setenv(f"METAFLOW_ARGO_EVENTS_{name}", "metaflow")
    with fake_kubernetes(home) as (server, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        printed(flow, [*on_spot(flow), "argo-workflows", "create"], home)
        return list(server.objects.values())


def test_the_models_know_every_field_that_is_there_and_no_other(cloud, home):
    good = workflow_template(next(flow for flow in FLOWS if flow.stem == "sft_flow"), home)
    for planted, where in (
        (lambda t: t["train"]["container"].update(imagee="x"), "container.imagee"),
        (lambda t: t["train"]["retryStrategy"].update(limit={}), "retryStrategy.limit"),
        (lambda t: t["train"].update(nodeSelectors={}), "nodeSelectors"),
        (lambda t: in_jobset(t, "replicas:", "replica:"), "replica: no such field"),
        (
            lambda t: in_jobset(t, "Seconds: 86400", "Seconds: soon"),
            "activeDeadlineSeconds: Input should be a valid int",
        ),
    ):
        bad = copy.deepcopy(good)
        planted({template["name"]: template for template in bad["spec"]["templates"]})
        found = problems(bad)
        assert found and where in found[0]


def in_jobset(templates, old, new):
    resource = templates["train-nodes"]["resource"]
    assert old in resource["manifest"]
    resource["manifest"] = resource["manifest"].replace(old, new, 1)


def test_what_the_config_says_of_training_steps_reaches_them_alone(cloud, home):
    template = workflow_template(next(flow for flow in FLOWS if flow.stem == "sft_flow"), home)
    steps = {
        t["name"]: t for t in template["spec"]["templates"] if t["name"] not in ("SFTFlow", "error-msg-capture-hook")
    }
    jobset = embedded_manifest(steps["train-nodes"])
    pods = [job["template"]["spec"]["template"]["spec"] for job in jobset["spec"]["replicatedJobs"]]
    spot = {"karpenter.sh/capacity-type": "spot"}
    for name in ("train", "evaluate"):
        assert steps[name]["nodeSelector"] == spot and steps[name]["tolerations"]
        assert steps[name]["retryStrategy"]["limit"] == 4
        assert steps[name]["activeDeadlineSeconds"] == 24 * 3600
    assert [(pod["nodeSelector"], pod["activeDeadlineSeconds"]) for pod in pods] == [(spot, 24 * 3600)] * 2
    for name in ("start", "prepare", "tokenize", "merge-tokens", "warmup", "export", "end"):
        assert not steps[name]["nodeSelector"] and "tolerations" not in steps[name], f"{name} waits for a spot GPU"
        assert steps[name]["container"]["envFrom"] == [{"secretRef": {"name": "posttrain"}}]
    assert all(pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "posttrain"}}] for pod in pods)


@pytest.mark.parametrize("backend", ["kubernetes", "batch"])
def test_metaflow_takes_the_example_of_the_operations_page(cloud, home, backend):
    page = (ROOT / "docs" / "operations.md").read_text()
    (example,) = re.findall(r"^    parallel:\n(?:     .*\n)+", page, re.M)
    document = yaml.safe_load(example) | {"base": str(ROOT / "configs" / "grpo_cluster.yaml")}
    document["parallel"] |= {"backend": backend, "queue": "cpus", "data": 4, "gpus_per_node": 8}
    config = home / "config.yaml"
    config.write_text(yaml.safe_dump(document))
    flow = ROOT / "flows" / "grpo_flow.py"
    if backend == "kubernetes":
        template = json.loads(printed(flow, ["--config", str(config), "argo-workflows", "create", "--only-json"], home))
        train = next(t for t in template["spec"]["templates"] if t["name"] == "train")
        assert problems(template) == []
        assert train["container"]["resources"]["limits"] == {"nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "32"}
    else:
        assert "@batch" in printed(flow, ["--config", str(config), "show"], home)


def test_every_step_on_a_cluster_has_bounded_s3_retries(cloud, home, monkeypatch):
    monkeypatch.setenv("METAFLOW_S3_TRANSIENT_RETRY_COUNT", "3")  # a person's own setting holds
    template = workflow_template(next(flow for flow in FLOWS if flow.stem == "grpo_flow"), home)
    document = yaml.safe_load(comparable(template))
    assert {
        "METAFLOW_S3_RETRY_COUNT=6",
        "METAFLOW_S3_TRANSIENT_RETRY_COUNT=3",
        f"METAFLOW_S3_CLIENT_RETRY_CONFIG={json.dumps({'total_max_attempts': 2, 'mode': 'standard'})}",
    } <= set(document["in every step"]["env"])
