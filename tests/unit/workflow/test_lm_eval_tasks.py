"""lm-eval on an exported folder: refused by name where it is not installed, else a table beside the base model's."""

import importlib.util
import json
from pathlib import Path

import pytest

from posttrain.errors import ConfigError
from posttrain.workflow.evaluation_tables import evaluation_tables, markdown
from posttrain.workflow.lm_eval_tasks import lm_eval_problems, run_lm_eval
from tiny import tiny_model

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


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_package_it_is_refused_with_the_fix():
    assert lm_eval_problems([]) == []
    assert lm_eval_problems(["arc_easy"]) == [
        "eval.lm_eval: lm-eval is not installed. Fix: pip install 'posttrain[eval]'"
    ]
    with pytest.raises(ConfigError, match=r"lm-eval is not installed"):
        run_lm_eval("model", ["arc_easy"])


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")
def test_a_task_of_ones_own_is_run_and_an_unknown_one_refused(tmp_path: Path):
    rows = [{"question": f"sort {n}1", "choices": ["12", "21"], "right": n % 2} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sorting.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    task = f"{tmp_path}/tasks/sorting"
    assert lm_eval_problems([task, "xyzzy"]) == ["eval.lm_eval: lm-eval has no task 'xyzzy'"]
    found = run_lm_eval(str(tiny_model(tmp_path / "tiny")), [task])
    assert found["sorting"]["rows"] == 5 and round(5 * found["sorting"]["acc"]) == 5 * found["sorting"]["acc"]


def test_tasks_stand_beside_the_base_models():
    evaluation = {
        "before": {"lm_eval": {"arc": {"rows": 5, "acc": 0.2}}},
        "after": {"lm_eval": {"arc": {"rows": 5, "acc": 0.4}}},
    }
    (table,) = evaluation_tables(evaluation)
    assert "| task | rows | metric | before | after |" in markdown(table)
    assert table.rows == [["arc", 5, "acc", 0.2, 0.4]]
