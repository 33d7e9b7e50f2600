"""Stand-ins for Kubernetes and AWS Batch that run a container's command as a local process.

They record what Metaflow submits. A container without GPUs really runs, in an empty folder
and with a Python that cannot see this checkout, so that it lives on the code package alone;
one that asks for GPUs is recorded and refused, which ends the run. Images, limits, networks
and schedulers are not imitated.
"""

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent

HIDE_CHECKOUTS = """import os, sys
def checkout(path):
    return any(os.path.isfile(os.path.join(p, "pyproject.toml")) for p in (path, os.path.dirname(path)))
sys.path[:] = [path for path in sys.path if not checkout(path)]
"""
"""For sitecustomize.py: no folder of a checkout, nor its lib, is on the path, however posttrain was installed."""


def image(folder: Path) -> dict[str, str]:
    """Environment of a container whose Python has every dependency of posttrain, and not posttrain."""
    site = folder / "image"
    site.mkdir(parents=True, exist_ok=True)
    (site / "sitecustomize.py").write_text(HIDE_CHECKOUTS)
    keep = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return {
        **keep,
        "PATH": path,
        "PYTHONPATH": str(site),
        "HOME": str(folder),
        "METAFLOW_SKIP_INSTALL_DEPENDENCIES": "1",
    }


def run_container(folder: Path, command: list[str], environment: dict[str, str]) -> int:
    """Run a container's command to its end; its output goes to folder/log."""
    work = folder / "work"
    work.mkdir(parents=True)
    with open(folder / "log", "wb") as log:
        env = image(folder) | environment
        return subprocess.run(command, cwd=work, env=env, stdout=log, stderr=log, timeout=180, check=False).returncode


ARGO = "/apis/argoproj.io/"


class JsonHandler(BaseHTTPRequestHandler):
    """Answers in JSON, and logs nothing."""

    def answer(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


class FakeKubernetes(JsonHandler):
    """The requests that Metaflow makes, answered from `server.objects`: jobs by name, Argo's objects by plural/name."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        manifest = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if ARGO in self.path:
            plural = self.path.partition("?")[0].rpartition("/")[2]
            name = manifest["metadata"].setdefault("name", f"{manifest['metadata'].get('generateName')}x7k2p")
            self.server.objects[f"{plural}/{name}"] = manifest
            return self.answer(201, manifest)
        name = manifest["metadata"].setdefault("name", f"job-{len(self.server.objects)}")
        manifest["metadata"]["namespace"] = "default"
        self.server.objects[name] = manifest
        if manifest["kind"] != "Job" or gpus(container_of(manifest)):
            return self.answer(403, {"message": "recorded; nothing here has a GPU"})
        container = container_of(manifest)
        environment = {e["name"]: _value(e) for e in container["env"]}
        code = run_container(self.server.folder / name, container["command"], environment)
        manifest["status"] = {"succeeded": int(code == 0), "failed": int(code != 0)}
        manifest["code"] = code
        return self.answer(201, manifest)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path.endswith("/pods"):
            name = query.rpartition("job-name")[2].removeprefix("%3D").removeprefix("=")
            return self.answer(200, {"items": [self.pod(self.server.objects[name])]})
        if ARGO in path:
            kept = self.server.objects.get("/".join(path.split("/")[-2:]))
            return self.answer(200, kept) if kept else self.answer(404, {"message": "not found"})
        return self.answer(200, self.server.objects[path.rpartition("/")[2]])

    def pod(self, job):
        code = job["code"]
        ended = {"exitCode": code, "reason": "Error" if code else "Completed", "finishedAt": "2026-01-01T00:00:00Z"}
        facts = {"name": "c", "image": "i", "imageID": "i", "ready": False, "restartCount": 0}
        status = {"phase": "Failed" if code else "Succeeded"}
        status["containerStatuses"] = [{**facts, "state": {"terminated": ended}}]
        return {"metadata": {"name": f"{job['metadata']['name']}-pod"}, "status": status}


@contextmanager
def fake_kubernetes(folder: Path):
    """Yields the server (`objects`: what was submitted, in order) and a kubeconfig that points at it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeKubernetes)
    server.objects, server.folder = {}, folder
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster = {"server": f"http://127.0.0.1:{server.server_port}"}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": cluster}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "current-context": "here",
        "users": [{"name": "me", "user": {}}],
    }
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(document))
    try:
        yield server, kubeconfig
    finally:
        server.shutdown()
        server.server_close()


def container_of(manifest: dict) -> dict:
    """The one container of a Job, or of the control node of a JobSet."""
    spec = manifest["spec"]
    if manifest["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    return spec["template"]["spec"]["containers"][0]


def _value(variable: dict) -> str:
    """What a pod sees: the value, or the name of the field that Kubernetes would fill in."""
    return variable.get("value") or (variable.get("valueFrom") or {}).get("fieldRef", {}).get("fieldPath", "")


def gpus(container: dict) -> int:
    """GPUs that a container asks for; Kubernetes reads a limit alone as a request too."""
    resources = container.get("resources") or {}
    limit = (resources.get("limits") or {}).get("nvidia.com/gpu")
    request = (resources.get("requests") or {}).get("nvidia.com/gpu", limit)
    assert request == limit, f"GPU request {request} is not the limit {limit}"
    return int(limit or 0)


@contextmanager
def batch_that_runs(folder: Path):
    """Make moto's AWS Batch run the jobs it accepts; yields the submitted requests, in order, each with the definition
    that was registered for it (moto itself forgets the nodes of a multi-node job)."""
    from moto.batch.exceptions import ClientException
    from moto.batch.responses import BatchResponse
    from moto.batch_simple.models import BatchSimpleBackend
    from moto.core.config import default_user_config

    submitted: list[dict] = []
    definitions: dict[str, dict] = {}
    register, submit = BatchResponse.registerjobdefinition, BatchResponse.submitjob
    finish = BatchSimpleBackend._mark_job_as_finished

    def registerjobdefinition(response):
        request = json.loads(response.body)
        definitions[request["jobDefinitionName"]] = request
        return register(response)

    def submitjob(response):
        request = json.loads(response.body)
        name = request["jobDefinition"].rpartition("/")[2].partition(":")[0]
        submitted.append(request | {"definition": definitions[name]})
        if "GPU" in requirements(request):
            raise ClientException("recorded; nothing here has a GPU")
        return submit(response)

    def start(backend, include_start_attempt, job):
        backend.backend._jobs[job.job_id] = job
        job.log_stream_name = job._stream_name
        job.status = "RUNNING"
        job.job_started_at = job.job_created_at
        job._start_attempt()
        threading.Thread(target=run, args=(job, submitted[-1]), daemon=True).start()

    def run(job, request):
        overrides = request["containerOverrides"]
        environment = {e["name"]: e["value"] for e in overrides["environment"]}
        environment |= {"AWS_BATCH_JOB_ID": job.job_id, "AWS_BATCH_JOB_ATTEMPT": "1", "AWS_BATCH_CE_NAME": "machines"}
        environment |= {"AWS_BATCH_JQ_NAME": request["jobQueue"], "AWS_EXECUTION_ENV": "AWS_ECS_EC2"}
        code = run_container(folder / job.job_id, overrides["command"], environment)
        job._mark_stopped(success=code == 0)

    before = default_user_config["batch"]
    default_user_config["batch"] = {"use_docker": False}
    BatchResponse.registerjobdefinition, BatchResponse.submitjob = registerjobdefinition, submitjob
    BatchSimpleBackend._mark_job_as_finished = start
    try:
        yield submitted
    finally:
        BatchResponse.registerjobdefinition, BatchResponse.submitjob = register, submit
        BatchSimpleBackend._mark_job_as_finished = finish
        default_user_config["batch"] = before


def make_batch_queue(name: str) -> str:
    """A job queue on EC2 machines; returns the role that its jobs get."""
    import boto3

    iam, ec2, batch = boto3.client("iam"), boto3.client("ec2"), boto3.client("batch")
    trust = json.dumps({"Version": "2012-10-17", "Statement": []})
    role = iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust)["Role"]["Arn"]
    profile = iam.create_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Arn"]
    iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    machines = {
        "type": "EC2",
        "minvCpus": 0,
        "maxvCpus": 256,
        "instanceTypes": ["p5.48xlarge"],
        "instanceRole": profile,
        "subnets": [ec2.describe_subnets()["Subnets"][0]["SubnetId"]],
        "securityGroupIds": [ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"]],
    }
    made = batch.create_compute_environment(
        computeEnvironmentName=name, type="MANAGED", computeResources=machines, serviceRole=role
    )
    order = [{"order": 1, "computeEnvironment": made["computeEnvironmentArn"]}]
    batch.create_job_queue(jobQueueName=name, state="ENABLED", priority=1, computeEnvironmentOrder=order)
    return role


def requirements(request: dict) -> dict[str, int]:
    """VCPU, MEMORY (MiB) and, if any, GPU of a submitted Batch job, or of the main node of a multi-node one."""
    (_, first), *_ = overrides(request)
    return {r["type"]: int(r["value"]) for r in first["resourceRequirements"]}


def overrides(request: dict) -> list[tuple[str, dict]]:
    """Nodes ("0:0", "1:3") and what a submitted Batch job says of their containers; "" where there is one container."""
    if "containerOverrides" in request:
        return [("", request["containerOverrides"])]
    nodes = request["nodeOverrides"]["nodePropertyOverrides"]
    return [(each["targetNodes"], each["containerOverrides"]) for each in nodes]
