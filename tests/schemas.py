"""Are objects for Kubernetes what Argo Workflows, Argo Events and JobSet define, field by field?

The models are those that hera and kubeflow-trainer-api generate from the projects' own definitions. A field that a
model does not know is lost when the object is read and written again; a server would drop it as silently.
"""

import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from argo import embedded_manifest, without_nulls

ELSEWHERE = re.compile(
    r"\.apiVersion$|\.kind$"  # some models leave these out
    r"|\.spec\.triggers\[\d+\]\.template\.k8s\.source\.resource\."  # any object: read with the model of its own kind
    r"|\.spec\.template\.container\.name$"  # Metaflow writes it into every Sensor; Argo Events drops it, without harm
)
"""Fields that the models need not know."""


def problems(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with an object of the kinds that Metaflow makes, and with those that it holds as text."""
    manifest = without_nulls(manifest)
    kind = manifest["kind"]
    try:
        known = _known(kind, manifest)
    except ValidationError as error:
        return [f"{kind}.{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
    found = [f"{kind}{path}: no such field" for path in _lost(manifest, known) if not ELSEWHERE.match(path)]
    for template in manifest["spec"].get("templates", []):
        if "resource" in template:
            found += [f"{template['name']}: {problem}" for problem in problems(embedded_manifest(template))]
    for trigger in manifest["spec"].get("triggers", []):
        found += problems(trigger["template"]["k8s"]["source"]["resource"])
    return found


def _known(kind: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """The object, read by its model and written again."""
    if kind == "JobSet":
        from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

        return JobsetV1alpha2JobSet.from_dict(manifest).to_dict()
    from hera.events import models as events
    from hera.workflows import models as workflows

    model = getattr(events if kind == "Sensor" else workflows, kind)
    return model(**manifest).model_dump(by_alias=True, exclude_unset=True, mode="json")


def _lost(written: Any, known: Any, path: str = "") -> Iterator[str]:
    """Paths of what is in `written` and not in `known`."""
    if isinstance(written, dict):
        for key, value in written.items():
            if not isinstance(known, dict) or key not in known:
                yield f"{path}.{key}"
            else:
                yield from _lost(value, known[key], f"{path}.{key}")
    elif isinstance(written, list):
        for index, value in enumerate(written):
            yield from _lost(value, known[index] if isinstance(known, list) else None, f"{path}[{index}]")
