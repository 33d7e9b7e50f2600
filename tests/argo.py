"""A structural check of an Argo WorkflowTemplate: does everything that it names exist?

The API server accepts a template whose references lead nowhere; the workflow then fails, or
waits for ever, when it gets there.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml


def broken_references(workflow: dict[str, Any]) -> list[str]:
    """Entry point, templates, dependencies, volumes, and parameters in both directions."""
    templates = {t["name"]: t for t in workflow["spec"]["templates"]}
    problems = [] if workflow["spec"]["entrypoint"] in templates else ["the entrypoint is no template"]
    for name, template in templates.items():
        problems += [f"{name}: {problem}" for problem in _in_template(template)]
        tasks = {task["name"]: task for task in template.get("dag", {}).get("tasks", [])}
        for task in tasks.values():
            problems += [f"{name}/{task['name']}: {problem}" for problem in _in_task(task, tasks, templates)]
    return problems


def embedded_manifest(template: dict[str, Any]) -> dict[str, Any]:
    """The object that a resource template creates, with Argo's expressions replaced by numbers and words."""
    text = re.sub(r"\{\{=asInt\(.*?\)\}\}", "1", template["resource"]["manifest"])
    return yaml.safe_load(re.sub(r"\{\{.*?\}\}", "x", text))


def without_nulls(value: Any) -> Any:
    """Metaflow writes null for every field that it leaves open; a server drops them."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _in_template(template: dict[str, Any]) -> Iterator[str]:
    volumes = {volume["name"] for volume in template.get("volumes", [])}
    for mount in template.get("container", {}).get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"mounts {mount['name']}, which is no volume"
    read = re.findall(r"inputs\.parameters(?:\.|\[')([\w-]+)", json.dumps(template))
    for name in sorted(set(read) - set(_parameters(template, "inputs"))):
        yield f"reads {name}, which is no input"


def _in_task(task: dict[str, Any], tasks: dict[str, Any], templates: dict[str, Any]) -> Iterator[str]:
    if task["template"] not in templates:
        yield f"no template {task['template']}"
        return
    for name in re.findall(r"([\w-]+)\.(?:Succeeded|Failed|Skipped|Omitted|Errored)", task.get("depends", "")):
        if name not in tasks:
            yield f"depends on {name}, which is no task here"
    declared, given = _parameters(templates[task["template"]], "inputs"), _parameters(task, "arguments")
    for name, parameter in declared.items():
        if name not in given and not {"value", "default"} & set(parameter):
            yield f"{name} is not given"
    if task["name"] != "start":  # Metaflow hands start an input that it does not declare
        yield from (f"{name} is given and not declared" for name in given if name not in declared)
    for name, output in re.findall(r"tasks\.([\w-]+)\.outputs\.parameters\.([\w-]+)", json.dumps(task)):
        maker = templates.get(tasks.get(name, {}).get("template"), {})
        if output not in _parameters(maker, "outputs"):
            yield f"reads {name}.{output}, which nothing makes"


def _parameters(holder: dict[str, Any], kind: str) -> dict[str, Any]:
    return {p["name"]: p for p in holder.get(kind, {}).get("parameters", [])}
