"""What every flow would deploy to Argo Workflows, made by Metaflow and put so that two of them can be compared.

`make golden` writes it into tests/golden/deploy/, where a change of a flow, of flows/placement.py or of Metaflow shows
as a change of a file.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from argo import without_nulls

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "deploy"
FLOWS = sorted((ROOT / "flows").glob("*_flow.py"))
SPOT = {
    "parallel.backend": "kubernetes",
    "parallel.gpus_per_node": 2,
    "parallel.image": "registry.example.com/posttrain:0.1.0",
    "parallel.decorators": {
        "all": {"kubernetes": {"secrets": ["posttrain"]}},
        "training": {
            "kubernetes": {
                "node_selector": {"karpenter.sh/capacity-type": "spot"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            },
            "retry": {"times": 4},
            "timeout": {"hours": 24},
        },
    },
    "checkpoint.root": "s3://my-bucket/runs",
}
"""Two GPUs of a spot pool: where a flow has no configs/<flow>_cluster.yaml, its own config is moved there."""
MORE = {
    "retrain_flow.py": {
        "retrain.registry": "s3://my-bucket/registry",
        "data.sources": ["s3://my-bucket/inbox/day.jsonl"],
    }
}
"""What else a flow's own config needs there."""

VOLATILE = {"METAFLOW_VERSION", "METAFLOW_CODE_METADATA", "METAFLOW_S3_ENDPOINT_URL"}
"""Variables that hold versions of this machine, or where its test server listens."""


def settings(folder: Path) -> dict[str, str]:
    """Metaflow's environment with all its files in `folder`, whatever this machine's own configuration says."""
    return {
        "METAFLOW_HOME": str(folder / "home"),
        "METAFLOW_USER": "tester",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(folder),
        "METAFLOW_CLIENT_CACHE_PATH": str(folder / "cache"),
        "METAFLOW_S3_WORKER_COUNT": "2",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def foreign(name: str) -> bool:
    """Whether a variable of the environment would let another Metaflow, cloud or cluster in."""
    return name.startswith(("METAFLOW_", "AWS_", "KUBE"))


def workflow_template(flow: Path, cwd: Path) -> dict[str, Any]:
    """The WorkflowTemplate of a flow, without nulls. The environment names an S3 datastore, which gets the package."""
    cluster = ROOT / "configs" / flow.name.replace("_flow.py", "_cluster.yaml")
    words = ["--config", str(cluster)] if cluster.exists() else on_spot(flow)
    return without_nulls(json.loads(printed(flow, [*words, "argo-workflows", "create", "--only-json"], cwd)))


def on_spot(flow: Path) -> list[str]:
    """Words of the command line that move a flow's own config to SPOT."""
    there = SPOT | MORE.get(flow.name, {})
    return [word for key, value in there.items() for word in ("--config-value", f"{key}={json.dumps(value)}")]


def printed(flow: Path, words: list[str], cwd: Path) -> str:
    """What a command of a flow prints."""
    command = [sys.executable, str(flow), *words]
    made = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert made.returncode == 0, made.stderr
    return made.stdout


def comparable(template: dict[str, Any]) -> str:
    """A WorkflowTemplate as YAML without what differs between two machines, and with what all steps share, said
    once: their variables, and the script that fetches the code package."""
    for each in template["spec"]["templates"]:
        if "resource" in each:
            text = re.sub(r": (\{\{=asInt.*\}\})$", r": '\1'", each["resource"]["manifest"], flags=re.M)  # no YAML yet
            each["resource"]["manifest"] = without_nulls(yaml.safe_load(text))
    containers = list(_containers(template))
    variables = [{_name(v): v for v in c["env"] if _name(v) not in VOLATILE} for c in containers]
    of_steps = [each for each in variables if "METAFLOW_STEP_NAME" in each]
    shared = {name: v for name, v in of_steps[0].items() if all(each.get(name) == v for each in of_steps)}
    for container, own in zip(containers, variables, strict=True):
        container["env"] = [f"{name}={_value(v)}" for name, v in sorted(own.items()) if shared.get(name) != v]
        container["command"] = _script(container["command"][-1])
    fetches = {container["command"][1] for container in containers}
    assert len(fetches) == 1, "containers fetch the code package in different ways"
    for container in containers:
        del container["command"][1]
    everywhere = {"env": sorted(f"{name}={_value(v)}" for name, v in shared.items()), "fetch": fetches.pop()}
    document = {"in every step": everywhere} | template
    text = yaml.safe_dump(document, sort_keys=False, width=110)
    drawn = re.search(r"set_parameters ([a-z]{10})", text)  # a file name
    text = text.replace(drawn[1], "DRAWN") if drawn else text
    for pattern, word in (
        (r"metaflow/deployment_timestamp: '.*'", "metaflow/deployment_timestamp: TIME"),
        (r"\bdata/[0-9a-f]{2}/(?=[0-9a-f]{40}\b)", "data/"),
        (r"\b[0-9a-f]{40}\b", "SHA"),
        (r"\bbucket-[0-9a-f]{32}\b", "BUCKET"),
    ):
        text = re.sub(pattern, word, text)
    return text


def _containers(value: Any) -> Iterator[dict[str, Any]]:
    """Every container, at any depth."""
    if isinstance(value, dict) and "command" in value and "env" in value:
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def _script(text: str) -> list[str]:
    """What a container does before, while and after it fetches the code package."""
    head, mark, rest = text.partition("mflog(){ ")
    fetch, start, tail = rest.partition("mflog 'Task is starting.'")
    assert mark and start, f"Metaflow has another script than the one that is compared here: {text[:200]}"
    return [head, mark + fetch, start + tail]


def _name(variable: dict[str, Any]) -> str:
    return variable["name"]


def _value(variable: dict[str, Any]) -> str:
    return variable.get("value") or variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")


def main() -> None:
    """Write every golden file anew."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    bucket = f"bucket-{uuid4().hex}"
    with tempfile.TemporaryDirectory() as folder:
        for name in [name for name in os.environ if foreign(name)]:
            del os.environ[name]
        os.environ |= settings(Path(folder)) | {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "METAFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}",
            "METAFLOW_DEFAULT_DATASTORE": "s3",
            "METAFLOW_DATASTORE_SYSROOT_S3": f"s3://{bucket}/metaflow",
            "NO_PROXY": "127.0.0.1",
        }
        boto3.client("s3", endpoint_url=os.environ["METAFLOW_S3_ENDPOINT_URL"]).create_bucket(Bucket=bucket)
        GOLDEN.mkdir(parents=True, exist_ok=True)
        for flow in FLOWS:
            (GOLDEN / f"{flow.stem}.yaml").write_text(comparable(workflow_template(flow, Path(folder))))
            print(GOLDEN / f"{flow.stem}.yaml")
    server.stop()


if __name__ == "__main__":
    main()
