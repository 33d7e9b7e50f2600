"""What an evaluation says beyond its measures, as tables for the terminal, the run's card and the model card."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.workflow.measures import in_order

Evaluation = Mapping[str, Mapping[str, Any]]
"""Model -> what was measured of it."""

GROUPS = {"slices": "By slice", "margins": "By the margin of the pair", "attributes": "By attribute"}
"""Key of a model's evaluation -> title of its table; below it each row's name, `rows` and measures."""


@dataclass(frozen=True, slots=True)
class Table:
    """A title, headings, and rows of text and numbers."""

    title: str
    headings: list[str]
    rows: list[list[Any]]


def evaluation_tables(evaluation: Evaluation) -> list[Table]:
    """The tables that the evaluation has something for: every model's numbers stand beside each other's."""
    tables = [*(_grouped(evaluation, key, title) for key, title in GROUPS.items()), _tasks(evaluation)]
    tables += [_reliability(model, found) for model, found in evaluation.items() if "reliability" in found]
    return [table for table in tables if table is not None]


def markdown(table: Table) -> str:
    """A table as Markdown, with its title as a heading."""
    lines = [table.headings, ["---"] * len(table.headings), *table.rows]
    escaped = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return f"### {table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _grouped(evaluation: Evaluation, key: str, title: str) -> Table | None:
    groups = {model: found[key] for model, found in evaluation.items() if key in found}
    parts = list(dict.fromkeys(name for group in groups.values() for name in group))
    if not parts:
        return None
    measures = in_order({name for group in groups.values() for part in group.values() for name in part})
    headings = [title.split()[-1], "rows", *(f"{measure}, {model}" for measure in measures for model in groups)]
    rows = []
    for part in parts:
        held = next(group[part] for group in groups.values() if part in group)
        numbers = [group.get(part, {}).get(measure, "") for measure in measures for group in groups.values()]
        rows.append([part, held["rows"], *numbers])
    return Table(title, headings, rows)


def _tasks(evaluation: Evaluation) -> Table | None:
    """Metrics of lm-eval; which way is better is the task's to say."""
    found = {model: each["lm_eval"] for model, each in evaluation.items() if "lm_eval" in each}
    if not found:
        return None
    first = next(iter(found.values()))
    rows = [
        [task, values["rows"], metric, *(each.get(task, {}).get(metric, "") for each in found.values())]
        for task, values in first.items()
        for metric in values
        if metric != "rows"
    ]
    return Table("lm-eval", ["task", "rows", "metric", *found], rows)


def _reliability(model: str, found: Mapping[str, Any]) -> Table:
    rows = [[each["sure"], each["rows"], each["confidence"], each["accuracy"]] for each in found["reliability"]]
    return Table(f"How sure and how right: {model}", ["sure", "rows", "mean confidence", "share right"], rows)
