"""A task of lm-eval with rows of its own, which needs no network, and whether the package is there to run it."""

import importlib.util
import json
from pathlib import Path

INSTALLED = importlib.util.find_spec("lm_eval") is not None

TASK = """
task: sorting
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: right
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def own_task(folder: Path, *, rows: int) -> str:
    """Write the task `sorting` below `folder`; as a config names it."""
    questions = [{"question": f"sort {n}1", "choices": ["12", "21"], "right": n % 2} for n in range(rows)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "sorting.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return f"{folder}/tasks/sorting"
