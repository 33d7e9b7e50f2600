"""Every rollout of a run as Parquet, one file and one row group a step: for people, and as data of the next run.

A file is written beside its name and renamed, so a kill leaves it whole or absent; its name is its step, so a
resume that repeats a step replaces it. data/rollout_rows.py reads them.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from posttrain import storage
from posttrain.data.types import Rollout
from posttrain.errors import StorageError
from posttrain.workflow.observers import Metrics
from posttrain.workflow.rollouts import DroppedGroup

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("uid", pa.int64()),
        ("sample_index", pa.int32()),
        ("row", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.float32())),
        ("logprobs", pa.list_(pa.float32())),
        ("versions", pa.list_(pa.int32())),
        ("reward", pa.float64()),
        ("parts", pa.map_(pa.string(), pa.float64())),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
        ("turns", pa.string()),
        ("latency_s", pa.float32()),
        ("drop_reason", pa.string()),
        ("drop_cause", pa.string()),
    ]
)
"""A row is a rollout; `row` and `turns` are JSON. `drop_reason` is null where it was trained; a group that was dropped
before it was sampled has one row without a sample."""


class RolloutFile:
    """Observes the groups of every step, and writes them below a folder."""

    def __init__(self, uri: str):
        self.uri, self.failures = uri, 0

    def restore(self, history: Sequence[Metrics]) -> None:
        """Nothing: a step that is repeated replaces its file."""

    def step(self, metrics: Metrics) -> None:
        """Nothing: the numbers are in the metrics."""

    def note(self, text: str) -> None:
        """Nothing, as above."""

    def rollouts(self, step: int, groups: Sequence[Sequence[Rollout]], dropped: Sequence[DroppedGroup] = ()) -> None:
        """Write one step. A disk that is full or a store that is away costs this file, told and counted."""
        rows = [_row(step, rollout) for group in groups for rollout in group]
        rows += _dropped_rows(step, dropped)
        sink = pa.BufferOutputStream()
        pq.write_table(_table(rows), sink, compression="zstd", write_page_checksum=True)
        try:
            storage.write_bytes(file_of(self.uri, step), sink.getvalue().to_pybytes())
        except (OSError, StorageError) as error:
            self.failures += 1
            print(f"WARNING: the rollouts of step {step + 1} are not kept, {self.failures} so far: {error}", flush=True)


def folder_of(root: str) -> str:
    """The rollouts of a run's folder."""
    return storage.join(root, "rollouts")


def file_of(uri: str, step: int) -> str:
    """The file of a step, numbered from 0."""
    return storage.join(uri, f"step_{step:06d}.parquet")


def _table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """As pa.Table.from_pylist(), which takes 0.8 µs for each token of a step; this takes a tenth of it."""
    columns = {field.name: [row.get(field.name) for row in rows] for field in SCHEMA}
    kinds = {field.name: field.type for field in SCHEMA}
    arrays = [
        _lists(values, kinds[name]) if pa.types.is_list(kinds[name]) else pa.array(values, kinds[name])
        for name, values in columns.items()
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _lists(values: Sequence[Sequence[float] | None], kind: Any) -> pa.Array:
    """A column of lists, from all their numbers in one array; null where a row has none."""
    ends = list(accumulate((len(each or ()) for each in values), initial=0))
    starts = [None if each is None else start for each, start in zip(values, ends[:-1], strict=True)]
    numbers = np.fromiter(
        chain.from_iterable(each or () for each in values), kind.value_type.to_pandas_dtype(), ends[-1]
    )
    return pa.ListArray.from_arrays(pa.array([*starts, ends[-1]], pa.int32()), pa.array(numbers, kind.value_type))


def _row(step: int, rollout: Rollout, **dropped: str) -> dict[str, Any]:
    return {
        "step": step,
        "uid": rollout.prompt.uid,
        "sample_index": rollout.sample_index,
        "row": json.dumps(rollout.prompt.row, ensure_ascii=False),
        "prompt_ids": rollout.prompt.token_ids,
        "token_ids": rollout.token_ids,
        "loss_mask": rollout.loss_mask or (1.0,) * len(rollout.token_ids),
        "logprobs": rollout.logprobs,
        "versions": rollout.versions,
        "reward": rollout.reward,
        "parts": list(rollout.parts.items()),
        "finish_reason": rollout.finish_reason,
        "text": rollout.text,
        "turns": json.dumps(rollout.turns or [{"role": "assistant", "content": rollout.text}], ensure_ascii=False),
        "latency_s": rollout.latency_s,
        **dropped,
    }


def _dropped_rows(step: int, dropped: Sequence[DroppedGroup]) -> Iterator[dict[str, Any]]:
    for prompt, each in dropped:
        why = {"drop_reason": each.reason, "drop_cause": str(each.error or "")}
        for rollout in each.rollouts:
            yield _row(step, rollout, **why)
        if not each.rollouts:
            row = json.dumps(prompt.row, ensure_ascii=False)
            yield {"step": step, "uid": prompt.uid, "row": row, "prompt_ids": prompt.token_ids, **why}
