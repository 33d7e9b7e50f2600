"""The rollouts of a run become rows to train on: the best of a group, or the best against the worst.

A config names a function of its own as the source, which says which run and which rollouts are good enough:

    def rows(seed):
        return best_rows("runs/GRPOFlow/17/rollouts", min_reward=1.0)
"""

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from posttrain import storage
from posttrain.data.files import list_files
from posttrain.data.types import Row
from posttrain.errors import DataError

COLUMNS = ["uid", "sample_index", "row", "turns", "reward", "finish_reason", "drop_reason"]


def best_rows(uri: str, *, min_reward: float | None = None) -> Iterator[Row]:
    """A conversation for each trained group: its prompt and its best rollout, of equals the first; for SFT.

    Args:
        uri: folder `rollouts` of a run, on disk or s3://.
        min_reward: groups whose best has less are left out; None leaves out those whose rewards are all equal.

    Raises:
        DataError: there are no rollouts, or none is left.
    """
    found = False
    for group in _groups(uri):
        best, worst = max(group, key=_reward), min(group, key=_reward)
        if _reward(best) > _reward(worst) if min_reward is None else _reward(best) >= min_reward:
            found = True
            asked = json.loads(best["row"])
            yield _tools(asked) | {"messages": [*_prompt(asked), *json.loads(best["turns"])]}
    if not found:
        raise DataError(f"{uri}: no group of its rollouts is good enough for min_reward = {min_reward}")


def pair_rows(uri: str, *, min_gap: float = 0.0) -> Iterator[Row]:
    """A preference for each trained group whose best and worst rollout differ by more than `min_gap`; for DPO.

    Only rollouts of one turn: what an environment said differs between two rollouts, and is no answer to prefer.

    Raises:
        DataError: there are no rollouts, or none is left.
    """
    found = False
    for group in _groups(uri):
        single = [each for each in group if len(json.loads(each["turns"])) == 1]
        if not single:
            continue
        best, worst = max(single, key=_reward), min(single, key=_reward)
        if _reward(best) - _reward(worst) > min_gap and best["turns"] != worst["turns"]:
            found = True
            asked = json.loads(best["row"])
            sides = {"chosen": json.loads(best["turns"]), "rejected": json.loads(worst["turns"])}
            yield _tools(asked) | {"prompt": _prompt(asked), **sides}
    if not found:
        raise DataError(f"{uri}: no group of its rollouts has rewards that differ by more than {min_gap:g}")


def _groups(uri: str) -> Iterator[list[dict[str, Any]]]:
    """The trained groups in the order of their steps; rollouts that were cut by a limit of length are left out."""
    for file in list_files(uri, suffixes=(".parquet",)):
        data = storage.read_bytes(file.uri)
        table = pq.read_table(pa.BufferReader(data), columns=COLUMNS, page_checksum_verification=True)
        for _, group in groupby(table.to_pylist(), key=lambda each: each["uid"]):
            kept = [each for each in group if each["drop_reason"] is None and each["finish_reason"] == "stop"]
            if kept:
                yield kept


def _reward(rollout: dict[str, Any]) -> float:
    return rollout["reward"]


def _prompt(asked: Row) -> list[dict[str, Any]]:
    return asked["messages"] if "messages" in asked else [{"role": "user", "content": asked["prompt"]}]


def _tools(asked: Row) -> Row:
    return {"tools": asked["tools"]} if asked.get("tools") else {}
