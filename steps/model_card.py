"""The README of an exported folder: what it was measured to do, from which runs, data and licence it comes."""

import json
from typing import Any

import yaml

from posttrain import storage
from posttrain.config import Distill, Origin, RunConfig
from posttrain.workflow.evaluation_tables import Table, evaluation_tables, markdown
from posttrain.workflow.measures import measured
from steps.data_report import read_report
from steps.origin import RUN, lineage_table

README = "README.md"
LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt")
"""The text that comes with a model's weights, and goes where they go."""

UNKNOWN = "unknown"


def model_card(
    config: RunConfig,
    root: str,
    *,
    provenance: dict[str, Any],
    evaluation: dict[str, dict[str, Any]],
    runs: list[dict[str, Any]],
) -> str:
    """Markdown, with the front matter that Hugging Face reads.

    Args:
        root: of the run, for its base model, teacher and data.
        runs: the lineage, this run last.
    """
    licences = _licences(config, root)
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    parts = [
        _front_matter(config, licences),
        f"# Model trained with posttrain ({config.method.name})",
        f"## Evaluation on held-out rows ({config.data.held_out})",
        *map(markdown, [_measures(evaluation), *evaluation_tables(evaluation)]),
        "## Lineage",
        f"- run: {provenance['flow']}/{provenance['run_id']}\n- config sha256: {provenance['config_sha256']}\n"
        f"- seed: {provenance['seed']}\n- versions: {versions}",
        lineage_table(runs),
        "## Data",
        *map(markdown, _data(config, root)),
        "## Licence",
        "\n".join(f"- {whose}: {licence or _inherited(origin)}" for whose, (origin, licence) in licences.items()),
        f"## Config\n\n```json\n{json.dumps(config.model_dump(mode='json'), indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def licence_of(uri: str) -> str | None:
    """The licence that a model folder names: in its README's front matter, or in config.json; None where neither does.

    A model card that this module wrote says `unknown` where it knew none: that is None too.
    """
    found = _front(_text(uri, README)).get("license")
    if found is None:
        found = json.loads(_text(uri, "config.json")).get("license")
    found = ", ".join(map(str, found)) if isinstance(found, list) else found
    return None if found is None or str(found) == UNKNOWN else str(found)


def _data(config: RunConfig, root: str) -> list[Table]:
    """The run's data manifest: sources by content, and the sets that were kept with the run."""
    report = read_report(storage.join(root, "tokens", "all"))
    sources = [[s["name"], s["path"], s["rows"], s["fingerprint"]] for s in report["sources"]]
    files = storage.manifest_of(storage.join(root, "data"))["files"]
    sets = [[name, entry["sha256"]] for name, entry in sorted(files.items()) if name.endswith(".parquet")]
    tables = [Table("Training rows", ["source", "path", "rows", "fingerprint"], sources)] if sources else []
    return [*tables, Table("Held-out rows and prompts", ["file", "sha256"], sets)]


def _measures(evaluation: dict[str, dict[str, Any]]) -> Table:
    columns = measured(evaluation)
    rows = [[model, *(found[name] for name in columns)] for model, found in evaluation.items()]
    return Table("Before and after", ["model", *columns], rows)


def _licences(config: RunConfig, root: str) -> dict[str, tuple[Origin, str | None]]:
    """Whose weights went into this model -> where they came from, and the licence that came with them."""
    origins: dict[str, tuple[str, Origin]] = {"base model": ("model", config.model)}
    if isinstance(config.method, Distill):
        origins["teacher"] = ("teacher", config.method.teacher)
    return {whose: (origin, licence_of(storage.join(root, folder))) for whose, (folder, origin) in origins.items()}


def _inherited(origin: Origin) -> str:
    if origin.path is None:
        return "none: the weights were drawn at random"
    return f"{UNKNOWN}: inherited from {origin.path}, which names none"


def _front_matter(config: RunConfig, licences: dict[str, tuple[Origin, str | None]]) -> str:
    found: dict[str, Any] = {"license": licences["base model"][1] or UNKNOWN}
    path = config.model.path
    if path is not None and config.model.revision is not None and not path.startswith(RUN):
        found["base_model"] = path  # a hub id; other paths are of this machine or this team
    found["tags"] = ["posttrain", config.method.name]
    return f"---\n{yaml.safe_dump(found, sort_keys=False)}---"


def _front(readme: str) -> dict[str, Any]:
    """What the front matter of a README says; nothing where there is none, or it is no YAML."""
    if not readme.startswith("---\n") or "\n---" not in readme[3:]:
        return {}
    try:
        found = yaml.safe_load(readme[4 : readme.index("\n---", 3)])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _text(uri: str, name: str) -> str:
    """A file of a folder, of which no more is read; empty where it is not there."""
    path = storage.join(uri, name)
    return storage.read_bytes(path).decode(errors="replace") if storage.exists(path) else ""
