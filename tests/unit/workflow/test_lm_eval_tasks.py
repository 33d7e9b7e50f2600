"""lm-eval on an exported folder: refused by name where it is not installed, else a table beside the base model's."""

from pathlib import Path

import pytest

from lm_eval_task import INSTALLED, own_task
from posttrain.errors import ConfigError
from posttrain.workflow.evaluation_tables import evaluation_tables, markdown
from posttrain.workflow.lm_eval_tasks import lm_eval_problems, run_lm_eval
from tiny import tiny_model


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
    task = own_task(tmp_path, rows=5)
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
