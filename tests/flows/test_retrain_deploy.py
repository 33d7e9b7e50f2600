"""When a deployed retraining starts: what `argo-workflows create` sends to Kubernetes, from the config alone."""

import json
import os
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from argo import broken_references, without_nulls
from pods import ROOT, JsonHandler

FLOW = ROOT / "flows" / "retrain_flow.py"
EVENTS = {"METAFLOW_ARGO_EVENTS_EVENT": "metaflow-event", "METAFLOW_ARGO_EVENTS_EVENT_SOURCE": "argo-events-webhook"}
EVENTS |= {"METAFLOW_ARGO_EVENTS_SERVICE_ACCOUNT": "operate-workflow-sa"}


class ApiServer(JsonHandler):
    """Keeps custom objects, as the API server does; nothing here runs them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):  # noqa: N802  (http.server's name)
        found = self.server.objects.get(self.path)
        self.answer(*((200, found) if found else (404, {"message": "not found"})))

    def do_POST(self):  # noqa: N802  (http.server's name)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body["metadata"]["resourceVersion"] = "1"
        self.server.objects[f"{self.path}/{body['metadata']['name']}"] = body
        self.answer(201, body)


@pytest.fixture
def deploy(tmp_path: Path, s3_bucket: str, monkeypatch):
    """Deploys the flow under changes of its config; gives its output and what was sent, by kind."""
    for name in [name for name in os.environ if name.startswith("METAFLOW_") and name != "METAFLOW_S3_ENDPOINT_URL"]:
        monkeypatch.delenv(name)
    settings = {
        "METAFLOW_HOME": tmp_path / "home",
        "METAFLOW_USER": "tester",
        "METAFLOW_DEFAULT_DATASTORE": "s3",
        "METAFLOW_DATASTORE_SYSROOT_S3": f"{s3_bucket}/metaflow",
        "METAFLOW_CLIENT_CACHE_PATH": tmp_path / "cache",
        "METAFLOW_S3_WORKER_COUNT": 2,
        "AWS_ENDPOINT_URL": os.environ["METAFLOW_S3_ENDPOINT_URL"],
        "AWS_EC2_METADATA_DISABLED": "true",
        "KUBECONFIG": tmp_path / "kubeconfig",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    server = ThreadingHTTPServer(("127.0.0.1", 0), ApiServer)
    server.objects = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = {"cluster": {"server": f"http://127.0.0.1:{server.server_port}"}, "name": "here"}
    context = {"context": {"cluster": "here", "user": "me"}, "name": "here"}
    document = {"apiVersion": "v1", "kind": "Config", "clusters": [here], "contexts": [context]}
    document |= {"current-context": "here", "users": [{"name": "me", "user": {}}]}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(document))
    on_cluster = {
        "base": str(ROOT / "configs" / "retrain_tiny.yaml"),
        "parallel": {"backend": "kubernetes", "image": "posttrain:test"},
        "checkpoint.root": f"{s3_bucket}/runs",
        "retrain.registry": f"{s3_bucket}/registry",
    }

    def create(**changes):
        config = json.dumps(on_cluster | changes)
        command = [sys.executable, str(FLOW), "--config-value", "config", config, "argo-workflows", "create"]
        made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return made.stdout + made.stderr, {each["kind"]: without_nulls(each) for each in server.objects.values()}

    yield create
    server.shutdown()
    server.server_close()


def set_events(monkeypatch) -> None:
    """As an operator of Argo Events configures Metaflow."""
    for name, value in EVENTS.items():
        monkeypatch.setenv(name, value)


def waits_for(sensor) -> set[str]:
    """Conditions of its one dependency."""
    (dependency,) = sensor["spec"]["dependencies"]
    return {each["expr"] for each in dependency["filters"]["exprs"]}


def test_a_schedule_is_deployed_in_the_field_that_argo_4_reads_and_a_flow_may_start_it_too(deploy, monkeypatch):
    set_events(monkeypatch)
    said, sent = deploy(**{"retrain.schedule": "0 3 * * *", "retrain.after": "ImportFlow"})
    assert set(sent) == {"WorkflowTemplate", "CronWorkflow", "Sensor"}, said
    spec = sent["CronWorkflow"]["spec"]
    assert spec["schedules"] == ["0 3 * * *"] and "schedule" not in spec and spec["suspend"] is False
    assert waits_for(sent["Sensor"]) >= {"name == 'metaflow.ImportFlow.end'"}
    assert broken_references(sent["WorkflowTemplate"]) == []
    templates = {template["name"]: template for template in sent["WorkflowTemplate"]["spec"]["templates"]}
    assert templates["promote"]["retryStrategy"]["limit"] == 2


def test_an_older_argo_gets_the_field_that_its_operator_asks_for(deploy, monkeypatch):
    monkeypatch.setenv("METAFLOW_ARGO_WORKFLOWS_USE_SCHEDULES", "false")
    said, sent = deploy(**{"retrain.schedule": "0 3 * * *"})
    assert sent["CronWorkflow"]["spec"]["schedule"] == "0 3 * * *", said


def test_an_event_is_deployed_as_a_sensor_and_no_schedule(deploy, monkeypatch):
    set_events(monkeypatch)
    said, sent = deploy(**{"retrain.event": "rows_arrived"})
    assert set(sent) == {"WorkflowTemplate", "Sensor"}, said
    assert waits_for(sent["Sensor"]) == {"name == 'rows_arrived'"}


def test_a_registry_that_pods_cannot_share_is_refused(deploy):
    said, sent = deploy(**{"retrain.registry": "registry"})
    assert not sent and "set an s3:// prefix" in said and "Traceback" not in said
