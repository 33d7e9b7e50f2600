"""A run's ledger is proved: every draw trained once, the checkpoints agree, and the data and the seed give it again.

In: the folder or s3:// prefix of a run, finished, running or killed. Out: what was proved, as plain values;
the first fact that does not hold is an error that names file and step.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain import storage
from posttrain.compute.committed import STATE, STEP, read_state
from posttrain.config import RunConfig
from posttrain.config_file import load_config
from posttrain.data.files import list_files
from posttrain.data.loader import loading
from posttrain.data.mixture import WINDOW
from posttrain.data.stream import PackStream
from posttrain.errors import CheckpointError, DataError
from posttrain.manifest import MANIFEST
from posttrain.workflow.ledger import Ledger
from posttrain.workflow.ledger_file import read_ledger

Rows = Sequence[dict[str, Any]]


def audit(root: str, other: str | None = None, *, replay: bool = True) -> dict[str, Any]:
    """Check every ledger of a run; with `other`, compare the two runs step by step.

    Args:
        root: where the run's files are: config.json, data/, model/, tokens/, ledger/, checkpoints/.
        other: another run's root; its ledger is checked as this one's, but not replayed: equal digests say the same.
        replay: make the batches of the streamed stage again from the data, and compare their digests.

    Returns:
        stages: of each its steps, distinct draws trained, drops by reason, the step of its newest checkpoint (None
            without one), and how many steps were replayed.
        equal: whether the two runs trained the same batches; None without `other`.
        differs: of each stage that differs the first step that does, and what is different there: "draws",
            "contents", "dropped", or "length" where one of the two ends before it.

    Raises:
        CheckpointError: the first fact that does not hold, with its file and step.
        DataError: the run's data are no longer what was trained on.
    """
    mine = _ledgers(root)
    stages = _check(root, mine, replay=replay)
    theirs = {} if other is None else _ledgers(other)
    if other is not None:
        _check(other, theirs, replay=False)
    differs = {}
    for stage in sorted(mine.keys() | theirs.keys()) if other is not None else ():
        difference = _difference(mine.get(stage, []), theirs.get(stage, []))
        if difference:
            differs[stage] = difference
    equal = None if other is None else not differs
    return {"root": root, "other": other, "stages": stages, "equal": equal, "differs": differs}


def replay_stream(stream: PackStream, rows: Rows, *, uri: str, packs_per_step: int, max_bad_rows: int) -> None:
    """Draw and pack again what `rows` say was trained.

    Args:
        uri: of the ledger, for errors.

    Raises:
        CheckpointError: the first step whose batch is another than data and seed give.
    """
    ledger = Ledger()
    with loading(stream, max_bad_rows=max_bad_rows) as loader:
        for row in rows:
            packs = loader.take(packs_per_step)
            draws = [number for pack in packs for number in pack.draws]
            ledger.hand_out(len(draws), loader.dropped)
            again = {"step": row["step"], **ledger.commit(packs, draws=draws)}
            difference = _difference([again], [row])
            if difference:
                raise CheckpointError(
                    f"{uri}, step {row['step']}: data and seed give other {difference['what']} than were trained: "
                    f"{_shown(again)}, and the ledger has {_shown(row)}; "
                    "the data, the config or the code that packs them is not what the run had"
                )


def _ledgers(root: str) -> dict[str, Rows]:
    """Stage -> rows."""
    try:
        files = list_files(storage.join(root, "ledger"), suffixes=(".jsonl",))
    except DataError as error:  # nothing there, or a place that cannot be listed
        fault = str(error).partition(". Fix: ")[0]  # that one speaks of files of rows
        raise CheckpointError(
            f"{root} is not the root of a run that has trained: {fault}. Fix: name the folder of a run, as "
            "runs/GRPOFlow/RUN_ID"
        ) from None
    return {file.uri.rsplit("/", 1)[1].removesuffix(".jsonl"): read_ledger(file.uri) for file in files}


def _check(root: str, ledgers: dict[str, Rows], *, replay: bool) -> dict[str, dict[str, Any]]:
    config = _config(root)
    stages = {}
    for stage, rows in ledgers.items():
        uri = storage.join(root, "ledger", f"{stage}.jsonl")
        streamed = stage != "grpo"  # whose batches are sampled; all others are a function of data and seed alone
        split = streamed and config.data.over_long == "split"
        draws = _check_draws(uri, rows, window=WINDOW if streamed else 1, split=split)
        newest = _check_checkpoints(uri, rows, storage.join(root, "checkpoints", stage))
        if replay and streamed:
            _replay(root, config, uri, rows, stage)
        stages[stage] = {
            "steps": len(rows),
            "draws": draws,
            "dropped": rows[-1]["dropped"] if rows else {},
            "checkpoint": newest,
            "replayed": len(rows) if replay and streamed else 0,
        }
    return stages


def _config(root: str) -> RunConfig:
    uri = storage.join(root, "config.json")
    if not storage.exists(uri):
        raise CheckpointError(f"{root} has no config.json; give the root of a run")
    return load_config(storage.read_bytes(uri).decode())


def _replay(root: str, config: RunConfig, uri: str, rows: Rows, stage: str) -> None:
    from steps.annotate import FOLDER
    from steps.recipes import WARMUP, packs_per_step
    from steps.streams import open_stream

    annotated = storage.join(root, "tokens", FOLDER)
    scored = stage != WARMUP and storage.exists(storage.join(annotated, MANIFEST))
    tokens_uri = annotated if scored else storage.join(root, "tokens", "all")
    stream = open_stream(config, tokens_uri=tokens_uri, model_uri=storage.join(root, "model"), stage=stage)
    replay_stream(
        stream,
        rows,
        uri=uri,
        packs_per_step=packs_per_step(config, stage),
        max_bad_rows=config.data.max_bad_rows,
    )


def _check_draws(uri: str, rows: Rows, *, window: int, split: bool) -> int:
    """Every draw is trained once or counted as dropped; return how many were trained.

    What a stream drops is counted when the first pack of its window of draws is handed out. So the count of a step
    is exact for the windows up to that of its highest draw, except in the last window, which may not be trained
    to its end. RL draws one prompt after the other: windows of one draw.
    """
    if not rows:
        return 0
    for row in rows:
        _check_row(uri, row)
    counts = [len(row["draws"]) for row in rows]
    steps = np.repeat(np.arange(len(rows)), counts)
    first, last = np.array([pair for row in rows for pair in row["draws"]], np.int64).T
    order = np.argsort(first, kind="stable")
    reach = np.maximum.accumulate(last[order])
    again = np.flatnonzero(first[order][1:] <= reach[:-1])
    if len(again) and not split:
        a, b = sorted(steps[order][again[0] : again[0] + 2].tolist())
        raise CheckpointError(f"{uri}, step {b}: draw {first[order][again[0] + 1]} was trained before, in step {a}")

    highest = np.maximum.accumulate(np.maximum.reduceat(last, np.cumsum([0, *counts[:-1]])))
    start = highest // window * window
    unfinished = start == start[-1]
    most = _missing(first[order], reach, start + window)
    least = np.where(unfinished, _missing(first[order], reach, start), most)
    dropped = np.array([sum(row["dropped"].values()) for row in rows])
    wrong = np.flatnonzero((dropped < least) | (dropped > most))
    if len(wrong):
        step = int(wrong[0])
        between = f"{least[step]} of draws 0 to {start[step] - 1} and " if least[step] < most[step] else ""
        raise CheckpointError(
            f"{uri}, step {step}: {between}{most[step]} of draws 0 to {start[step] + window - 1} are trained in no "
            f"step, and {dropped[step]} are counted as dropped ({rows[step]['dropped']}): draws are lost or made up"
        )
    return int(reach[-1]) + 1 - int(_missing(first[order], reach, reach[-1:] + 1)[0])


def _check_row(uri: str, row: dict[str, Any]) -> None:
    draws = row["draws"]
    if not draws or any(len(pair) != 2 or not 0 <= pair[0] <= pair[1] for pair in draws):
        raise CheckpointError(f"{uri}, step {row['step']}: draws {draws} are not ascending [first, last] ranges")


def _missing(first: np.ndarray, reach: np.ndarray, below: np.ndarray) -> np.ndarray:
    """How many draws under each of `below` [K] no range holds; ranges sorted by `first` [N], `reach` their ends so far.

    Between two ranges lies a gap where the second begins beyond all that the ranges before it reach.
    """
    starts = np.concatenate([[0], reach + 1])
    ends = np.concatenate([first, [np.iinfo(np.int64).max]])
    gaps = ends > starts
    starts, ends = starts[gaps], ends[gaps]
    before = np.concatenate([[0], np.cumsum(ends[:-1] - starts[:-1])])
    at = np.searchsorted(starts, below, side="right") - 1
    return np.where(at < 0, 0, before[at] + np.minimum(below, ends[at]) - starts[at])


def _check_checkpoints(uri: str, rows: Rows, folder: str) -> int | None:
    """Every committed checkpoint holds the ledger as it was after its step; return the newest one's step."""
    newest = None
    for name in storage.list_folders(folder):
        found = STEP.fullmatch(name)
        if not found or not storage.exists(storage.join(folder, name, MANIFEST)):
            continue
        newest, where = int(found[1]), storage.join(folder, name)
        if newest > len(rows):
            raise CheckpointError(f"{uri} ends with step {len(rows) - 1}, and {where} holds {newest} steps")
        held = read_state(where)["ledger"]
        last = rows[newest - 1]
        trained = sum(b - a + 1 for row in rows[:newest] for a, b in row["draws"])
        for fact, in_file in (("digest", last["digest"]), ("dropped", last["dropped"]), ("trained", trained)):
            if held[fact] != in_file:
                raise CheckpointError(
                    f"{uri}, step {newest - 1}: {fact} is {in_file}, and {held[fact]} in {where}/{STATE}: "
                    "they are of different histories"
                )
    return newest


def _difference(mine: Rows, theirs: Rows) -> dict[str, Any] | None:
    """The first step at which two ledgers differ, and what is different there."""
    for one, two in zip(mine, theirs, strict=False):
        for field, what in (("draws", "draws"), ("digest", "contents"), ("dropped", "dropped")):
            if one[field] != two[field]:
                return {"step": one["step"], "what": what}
    if len(mine) != len(theirs):
        return {"step": min(len(mine), len(theirs)), "what": "length"}
    return None


def _shown(row: dict[str, Any]) -> str:
    few = ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in row["draws"][:4])
    more = ", …" if len(row["draws"]) > 4 else ""
    return f"draws {few}{more}, digest {row['digest'][:12]}, dropped {row['dropped']}"
