"""EleutherAI's lm-eval on a model folder: public benchmarks beside the run's own measures.

The package is an extra and imported late; its few-shot prompts, seeds and metrics are its own.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

from posttrain.errors import ConfigError, DataError

PACKAGE = "lm_eval"


def lm_eval_problems(tasks: Sequence[str]) -> list[str]:
    """A line for everything that would keep the tasks from being run: no package, or no such task."""
    if not tasks:
        return []
    if importlib.util.find_spec(PACKAGE) is None:
        return ["eval.lm_eval: lm-eval is not installed. Fix: pip install 'posttrain[eval]'"]
    known = set(_manager(tasks).all_tasks)
    return [f"eval.lm_eval: lm-eval has no task {task!r}" for task in tasks if _name(task) not in known]


def run_lm_eval(folder: str, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Put the model of a Hugging Face folder to the tasks, on the first GPU where there is one.

    Args:
        tasks: names of lm-eval, or `folder/name` of a task of the user's own.

    Returns:
        task -> `rows`, and every metric by its name, with its filter where it has one.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task.
        DataError: a task could not be run, as where its data set cannot be fetched.
    """
    problems = lm_eval_problems(tasks)
    if problems:
        raise ConfigError("\n".join(problems))
    import torch
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]

    on_gpu = torch.cuda.is_available()
    try:
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": folder, "dtype": "auto"},
            tasks=[_name(task) for task in tasks],
            task_manager=_manager(tasks),
            device="cuda:0" if on_gpu else "cpu",
            batch_size="auto" if on_gpu else 1,
            log_samples=False,
            bootstrap_iters=0,  # standard errors are not shown
        )
    except Exception as error:  # of the package, of a data set's, of a task's own code
        raise DataError(f"eval.lm_eval: {type(error).__name__}: {str(error).strip()[:500]}") from error
    rows = {task: counts["effective"] for task, counts in found["n-samples"].items()}
    return {task: {"rows": rows.get(task, 0), **_metrics(values)} for task, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """ "acc,none" -> acc; "exact_match,strict-match" -> exact_match (strict-match)."""
    found = {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            found[name if kind == "none" else f"{name} ({kind})"] = round(float(value), 4)
    return found


def _manager(tasks: Sequence[str]) -> Any:
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    return TaskManager(include_path=sorted({task.rpartition("/")[0] for task in tasks if "/" in task}))


def _name(task: str) -> str:
    return task.rpartition("/")[2]
