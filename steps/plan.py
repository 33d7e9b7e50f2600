"""Refuse before anything is paid for: every name in the config resolves, every file is there, the root is writable."""

import inspect
import json
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from posttrain import storage
from posttrain.compute.generator.vllm import vllm_is_installed
from posttrain.compute.verl_workers import INSTALL, verl_is_installed
from posttrain.config import GRPO, SFT, Distill, Origin, RunConfig
from posttrain.config_file import RECIPES
from posttrain.data.constraint import KEY, constraint_of
from posttrain.data.source import check_source
from posttrain.errors import ConfigError, ModelError, PosttrainError
from posttrain.manifest import json_sha256
from posttrain.model.families import decoder_config
from posttrain.model.heads import NATIVE, output_names
from posttrain.model.load import read_config
from posttrain.plugin import resolve
from posttrain.workflow.lm_eval_tasks import lm_eval_problems
from posttrain.workflow.measures import gated
from posttrain.workflow.trackers import missing_packages
from steps.origin import RUN, locate
from steps.recipes import features_problem, measure_names, prompt_sets, sliced_names, trains_on_rows

LIBRARIES = ("posttrain", "torch", "transformers", "ray", "metaflow", "pydantic", "numpy", "vllm")


def plan(config: RunConfig, *, flow: str, run_id: str) -> dict[str, Any]:
    """Where the run's files go, and what it is made of; the resolved config is the first of them.

    Returns:
        root: folder or s3:// prefix of this run; a retry or resume keeps it.
        provenance: versions, seed and config hash.

    Raises:
        ConfigError: lists everything that does not resolve.
    """
    problems: list[str] = []
    for check in (
        _check_packages,
        unresolved_plugins,
        _check_sources,
        _check_models,
        _check_split,
        _check_gate,
        _check_devices,
        _check_memory,
    ):
        problems += check(config)
    runs = flow.removesuffix("Flow").lower()
    if runs in RECIPES and runs != config.method.name:
        problems.append(f"method.name: {flow} runs {runs}, the config is for {config.method.name}; start that flow")
    root = storage.join(_absolute(config.checkpoint.root or "runs"), flow, run_id)
    problems += _check_writable(root)
    if problems:
        raise ConfigError("\n".join(problems))
    document = config.model_dump(mode="json")
    storage.write_bytes(storage.join(root, "config.json"), json.dumps(document, indent=2).encode())
    return {
        "root": root,
        "provenance": {
            "flow": flow,
            "run_id": run_id,
            "config_sha256": json_sha256(document),
            "seed": config.seed,
            "versions": _versions(),
        },
    }


def _check_packages(config: RunConfig) -> list[str]:
    problems = missing_packages(config.tracking.model_dump()) + lm_eval_problems(config.eval.lm_eval)
    if config.parallel.orchestrator == "verl" and not verl_is_installed():
        problems.append(f"parallel.orchestrator: verl is not installed. Fix: {INSTALL}")
    if config.rollout.generator == "vllm" and not vllm_is_installed():
        problems.append("rollout.generator: vllm is not installed. Fix: pip install 'posttrain[vllm]', on Linux")
    return problems


def unresolved_plugins(config: RunConfig) -> list[str]:
    """A line for every name of a user's own code that leads to nothing that can be called."""
    scored_by, rollout = config.reward.function if config.reward else None, config.rollout
    plugins = [("reward.function", path) for path in ([scored_by] if isinstance(scored_by, str) else scored_by or ())]
    fresh = config.model.fresh
    named = {
        "rollout.environment": rollout.environment,
        "rollout.generator": rollout.generator if ":" in rollout.generator else None,
        "tracking.custom": config.tracking.custom,
        "model.fresh.tokenizer": fresh.tokenizer if fresh else None,
    }
    rule = None
    with suppress(ConfigError):  # that there is no such environment is told below
        rule = constraint_of(rollout.environment)
    plugins += [(key, path) for key, path in {**named, KEY: rule}.items() if path]
    if isinstance(config.method, SFT):
        side, tasks = config.method.side, config.method.heads.items()
        plugins += [(f"method.heads.{name}.module", task.module) for name, task in tasks if task.module]
        plugins += [("method.side", side)] if side else []
    problems = []
    for key, path in plugins:
        try:
            found = resolve(path, key=key)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if not callable(found):
            problems.append(f"{key}: {path} is a {type(found).__name__}, not something to call")
        elif key == "method.side" and (why := features_problem(found)):
            problems.append(f"{key}: {path} {why}")
        elif key == "rollout.generator" and rule and not _takes(found, "constraint"):
            problems.append(f"{key}: {path} takes no argument `constraint`, and would not obey that of the environment")
    return problems


def _takes(made: Any, name: str) -> bool:
    """Whether what a plug-in makes its object with has an argument of that name."""
    parameters = inspect.signature(made).parameters.values()
    return any(each.name == name or each.kind is each.VAR_KEYWORD for each in parameters)


def _check_sources(config: RunConfig) -> list[str]:
    sources = {key: source for key, source in prompt_sets(config).values()} | {"data.held_out": config.data.held_out}
    if trains_on_rows(config):
        sources |= {f"data.sources[{number}]": source.path for number, source in enumerate(config.data.sources)}
    problems = []
    for key, source in sources.items():
        try:
            check_source(source, key=key)
        except PosttrainError as error:
            problems.append(str(error))
    return problems


def _check_models(config: RunConfig) -> list[str]:
    problems = _check_origin(config, config.model, "model")
    if isinstance(config.method, Distill):
        problems += _check_origin(config, config.method.teacher, "method.teacher")
    elif isinstance(config.method, GRPO) and config.method.teacher is not None:
        problems += _check_folder(locate(config.method.teacher, config), "method.teacher")
    if config.reward and config.reward.model:
        problems += _check_judge(locate(config.reward.model, config), config.reward.heads)
    return problems


def _check_folder(folder: str, key: str) -> list[str]:
    try:
        decoder_config(read_config(folder))
    except ModelError as error:
        return [f"{key}: {error}"]
    return []


def _check_judge(folder: str, weights: Mapping[str, float]) -> list[str]:
    try:
        document = read_config(folder)
        outputs = decoder_config(document).heads.get(NATIVE)
    except ModelError as error:
        return [f"reward.model: {error}"]
    if not isinstance(outputs, int):
        return [f"reward.model: {folder} has no head `score`; train one with reward_flow"]
    names = output_names(document) if outputs > 1 else ()
    if names and not weights:
        return [f"reward.heads: {folder} rates {', '.join(names)}; weigh them, as reward.heads: {{{names[0]}: 1.0}}"]
    return [
        f"reward.heads.{name}: {folder} has no such rating; its own: {', '.join(names) or 'one score without a name'}"
        for name in weights
        if name not in names
    ]


def _check_origin(config: RunConfig, origin: Origin, key: str) -> list[str]:
    if origin.path is None:
        return []
    path = locate(origin.path, config)
    local = Path(path).expanduser()
    if storage.is_s3(path) or local.is_dir():
        file = storage.join(path, "config.json") if storage.is_s3(path) else str(local / "config.json")
        return [] if storage.exists(file) else [f"{key}.path: {path} has no config.json"]
    if path.startswith((".", "/", "~")) or origin.path.startswith(RUN):
        return [f"{key}.path: {path} does not exist"]
    if not origin.revision:
        return [f"{key}.path: {path} is no local folder; for a hub id set {key}.revision to its commit (40 hex digits)"]
    return []


def _check_gate(config: RunConfig) -> list[str]:
    """Whether every measure is one of this run; whether there is such a slice, the rows will tell in prepare."""
    column, known, of_slices = config.eval.slice_by, measure_names(config), sliced_names(config)
    sliced = f", and of a slice {', '.join(f'{name}[{column}=...]' for name in of_slices)}" if of_slices else ""
    problems = []
    for name in config.eval.gate:
        measure, part = gated(name, column)
        if measure not in (known if part is None else of_slices):
            more = "; a slice needs eval.slice_by" if column is None and "[" in name else ""
            problems.append(f"eval.gate.{name}: no measure of this run; it has {', '.join(known)}{sliced}{more}")
    return problems


def _check_split(config: RunConfig) -> list[str]:
    """Whether the ranks can share the model's matrices, and multiply in float8 where they should; of a hub id that is
    not fetched yet, each rank will tell."""
    tensor, expert, fresh = config.parallel.tensor, config.parallel.expert, config.model.fresh
    in_float8 = config.optim.precision.startswith("float8")
    if tensor == expert == 1 and not in_float8:
        return []
    from posttrain.model import float8
    from posttrain.model.build import fresh_config
    from posttrain.model.families import decoder_config
    from posttrain.model.load import read_config
    from posttrain.model.parallel import unfit

    if fresh is not None:
        shape = fresh_config(**fresh.shape, mlp_size=4 * fresh.hidden_size, max_length=config.data.pack_tokens)
    elif config.model.path and not _check_models(config) and not config.model.revision:
        shape = read_config(str(Path(config.model.path).expanduser()))
    else:
        return []
    decoder = decoder_config(shape)
    problems = unfit(decoder, tensor=tensor, expert=expert)
    return problems + float8.unfit(decoder, tensor=tensor) if in_float8 and not problems else problems


def _check_devices(config: RunConfig) -> list[str]:
    wanted = config.parallel.gpus_per_node
    if config.parallel.backend != "local" or not wanted:
        return []
    import torch

    found = torch.cuda.device_count()
    return [] if found >= wanted else [f"parallel.gpus_per_node: {wanted} wanted, this machine has {found}"]


def _check_memory(config: RunConfig) -> list[str]:
    """Where GPUs are to be seen from here: whether a rank fits the smallest of them."""
    if not config.parallel.gpus_per_node or config.model.backend != "posttrain" or _check_models(config):
        return []
    import torch

    sizes = [torch.cuda.get_device_properties(each).total_memory for each in range(torch.cuda.device_count())]
    if not sizes:
        return []
    from steps.estimate import memory_problem

    try:
        problem = memory_problem(config, min(sizes))
    except PosttrainError as error:
        return [str(error)]
    return [f"memory: {problem}"] if problem else []


def _check_writable(root: str) -> list[str]:
    probe = storage.join(root, f".probe-{uuid.uuid4().hex}")
    try:
        storage.write_bytes(probe, b"")
        storage.remove_file(probe)
        if not storage.is_s3(root):
            Path(root).rmdir()  # a refused run leaves nothing
    except Exception as error:
        return [f"checkpoint.root: cannot write to {root}: {error}"]
    return []


def _absolute(root: str) -> str:
    return root if storage.is_s3(root) else str(Path(root).expanduser().resolve())


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
