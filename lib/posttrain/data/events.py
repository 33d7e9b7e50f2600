"""A table of events becomes conversations, one or several a member: what training, evaluation and RL read as rows.

    user       <session><hour_3><device_tv>             what is known before the event
    assistant  <item_12>                                the item; weight 1 where it is trained, else 0
    user       <action_finish><next><hour_3><device_tv> what came of it, and what is known before the next event

Time decides what is trained: rows(before=cutoff) hold no event of the cutoff or later, and rows(after=cutoff) train
none before it, which they read as history.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from posttrain.data.event_schema import NEXT, OTHER_ITEM, SESSION, EventSchema, Field, places
from posttrain.data.files import list_files, machine_cache, open_file
from posttrain.data.item_tokens import name_of
from posttrain.data.types import Row
from posttrain.errors import DataError


def event_tables(path: str | Sequence[str], schema: EventSchema) -> Iterator[pa.Table]:
    """The checked tables of Parquet files, one a file: a file, a folder, a glob or several; local or s3://.

    For files that hold whole members, whose rows can be made a file at a time; see read_events() for others.

    Raises:
        DataError: names the file, and the row that cannot be written, with what to do.
    """
    for uri in [path] if isinstance(path, str) else path:
        for file in list_files(uri, suffixes=(".parquet",)):
            with open_file(file, cache=machine_cache()) as raw:
                try:
                    found = pq.ParquetFile(pa.PythonFile(raw, mode="r"))
                    missing = [name for name in schema.columns if name not in found.schema_arrow.names]
                    if missing:
                        raise DataError(
                            f"{file.uri} has no column {', '.join(missing)}; it has "
                            f"{', '.join(found.schema_arrow.names)}. Fix: rename or add it, or change the schema"
                        )
                    table = found.read(columns=schema.columns)
                except (pa.ArrowException, OSError) as error:
                    raise DataError(f"{file.uri} is no sound Parquet file: {error}; write it again") from None
            yield check_events(table, schema, where=file.uri)


def read_events(path: str | Sequence[str], schema: EventSchema) -> pa.Table:
    """All events of the files as one table in memory, whatever their order: some 10 bytes a column and event.

    Raises:
        DataError: as event_tables().
    """
    return pa.concat_tables(event_tables(path, schema))


def check_events(table: pa.Table, schema: EventSchema, *, where: str) -> pa.Table:
    """The columns that the schema reads, times in UTC as timestamp[us].

    Raises:
        DataError: a column of another type, or a row that holds a null or a value that has no token.
    """
    columns = {name: table[name] for name in schema.columns}
    kinds = {"time": (pa.types.is_timestamp, "a timestamp"), "item": (pa.types.is_integer, "an integer")}
    for name, (fits, kind) in kinds.items():
        if not fits(columns[name].type):
            raise DataError(f"{where}: column {name} is {columns[name].type}, not {kind}. Fix: cast or number it")
    for name in schema.numbers:
        if not pa.types.is_integer(columns[name].type) and not pa.types.is_floating(columns[name].type):
            raise DataError(f"{where}: the label or feature {name} is {columns[name].type}, no number. Fix: cast it")
    for name, column in columns.items():
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise DataError(f"{where}, row {row}: {name} is null. Fix: fill it, or drop the row")
    for each in (*schema.context, *schema.outcome):
        if each.column in columns:
            _check_field(each, columns[each.column], where)
    columns["time"] = pc.cast(columns["time"], pa.timestamp("us"), safe=False)  # Arrow keeps zoned times in UTC
    return pa.table(columns)


def rows(
    table: pa.Table,
    schema: EventSchema,
    *,
    before: datetime | None = None,
    after: datetime | None = None,
    unnamed: bool = False,
) -> Iterator[Row]:
    """Conversations of every member of a checked table, in the order of members and time.

    Args:
        before: events at this time or later are left out; UTC.
        after: events before this time are read, and not trained; UTC.
        unnamed: rows too in which no item that is asked for has a name: nothing to train on, but to be ranked.

    Yields:
        messages, as above, answers with the schema's features, and labels from the first that is asked for; member;
        items, one for each answer; asked, the answers whose event is to be predicted, those included whose item has
        no name and so no loss; the schema's labels, of the last answer.
    """
    if before is not None:
        table = table.filter(pc.field("time") < pa.scalar(before, pa.timestamp("us")))
    events = _write(table.sort_by([("member", "ascending"), ("time", "ascending")]), schema)
    first = 0 if after is None else np.datetime64(after, "us")
    for low, high in _runs(events.member):
        start = low if after is None else low + int(np.searchsorted(events.time[low:high], first))
        for begin, target, stop in _windows(low, start, high, events.opens, schema.max_events):
            asked = [i for i in range(target, stop) if events.asked[i]]
            if any(unnamed or events.named[i] for i in asked):
                yield events.row(range(begin, asked[-1] + 1), target, asked, train_outcome=schema.train_outcome)


def question(row: Row) -> Row:
    """What a row's last answer answers, as a prompt: messages without it, and the `item` that was taken."""
    return {"messages": row["messages"][:-1], "item": row["items"][-1], "member": row["member"]}


@dataclass(frozen=True, kw_only=True)
class _Events:
    """[N] columns of a sorted table, each event's texts written."""

    member: np.ndarray
    time: np.ndarray
    item: list[int]
    context: list[str]
    answer: list[str]
    outcome: list[str]
    opens: np.ndarray
    """bool, the first of a session."""
    asked: np.ndarray
    """bool, of an action that is trained."""
    named: np.ndarray
    """bool, the item has a name."""
    features: dict[str, list[float | None]]
    labels: dict[str, list[float]]

    def row(self, shown: range, target: int, asked: Sequence[int], *, train_outcome: bool) -> Row:
        messages: list[dict[str, Any]] = []
        before, trained = "", {i for i in asked if self.named[i]}
        for i in shown:
            answer = self.answer[i] + (self.outcome[i] if train_outcome else "")
            messages.append({"role": "user", "content": before + self.context[i]})
            numbers: dict[str, Any] = {}
            if self.features:
                numbers["features"] = {name: values[i] for name, values in self.features.items()}
            if self.labels and i >= target:
                numbers["labels"] = {name: values[i] for name, values in self.labels.items()}
            messages.append({"role": "assistant", "content": answer, "weight": int(i in trained), **numbers})
            before = "" if train_outcome else self.outcome[i]
        member = self.member[shown.start]
        return {
            "messages": messages,
            "member": member.item() if isinstance(member, np.generic) else member,
            "items": self.item[shown.start : shown.stop],
            "asked": [i - shown.start for i in asked],
            **{name: values[shown.stop - 1] for name, values in self.labels.items()},
        }


def _write(table: pa.Table, schema: EventSchema) -> _Events:
    member = table["member"].to_numpy()
    time = table["time"].to_numpy().astype("datetime64[us]")
    gaps = np.full(len(time), np.inf)
    gaps[1:] = np.diff(time) / np.timedelta64(60, "s")
    gaps[[low for low, _ in _runs(member)]] = np.inf
    opens = gaps > schema.session_minutes
    day = time.astype("datetime64[D]")
    derived = {
        "hour": (time - day) // np.timedelta64(1, "h"),
        "weekday": (day.astype(np.int64) + 3) % 7,  # 1970-01-01 was a Thursday
        "gap_minutes": gaps,
    }
    item = table["item"].to_pylist()
    names = {number: "".join(name_of(schema.items, number) or (OTHER_ITEM,)) for number in set(item)}
    asked = np.ones(len(time), bool)
    for column, values in schema.trained.items():
        asked &= ~np.isnan(places(table[column], values))

    def texts(fields: Sequence[Field]) -> Iterator[str]:
        codes = [each.codes(pa.array(derived[c]) if (c := each.column) in derived else table[c]) for each in fields]
        tokens = [each.tokens for each in fields]
        for place in range(len(time)):
            yield "".join(names[code[place]] for names, code in zip(tokens, codes, strict=True))

    return _Events(
        member=member,
        time=time,
        item=item,
        context=[(SESSION if o else NEXT) + text for o, text in zip(opens, texts(schema.context), strict=True)],
        answer=[names[number] for number in item],
        outcome=list(texts(schema.outcome)),
        opens=opens,
        asked=asked,
        named=np.array([names[number] != OTHER_ITEM for number in item], bool),
        features=_features(table, schema, derived, member),
        labels={name: table[name].to_pylist() for name in schema.labels},
    )


def _features(
    table: pa.Table, schema: EventSchema, derived: dict[str, np.ndarray], member: np.ndarray
) -> dict[str, list[float | None]]:
    """[N] each; None where there is none, as before a member's first event."""
    found = {name: derived[name] if name in derived else table[name].to_numpy() for name in schema.features}
    for name in schema.last_features:
        last = np.roll(table[name].to_numpy().astype(np.float64), 1)
        last[[low for low, _ in _runs(member)]] = np.nan
        found[f"last_{name}"] = last
    plain = {name: np.asarray(values, np.float64).tolist() for name, values in found.items()}
    return {name: [each if math.isfinite(each) else None for each in values] for name, values in plain.items()}


def _check_field(field: Field, column: pa.ChunkedArray, where: str) -> None:
    try:
        codes = field.codes(column)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: column {field.column}: {error}. Fix: cast it, or change its field") from None
    if len(bad := np.flatnonzero(codes < 0)):
        known = f"is none of {', '.join(field.values)}" if field.values else "is no number"
        raise DataError(
            f"{where}, row {bad[0]}: {field.column} {column[int(bad[0])].as_py()!r} {known}. "
            "Fix: mend or drop the row, or add the value to its field (a model trained without it has no token for it)"
        )


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """Where each run of equal values begins and ends."""
    if not len(values):
        return []
    starts = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return list(pairwise(starts))


def _windows(low: int, start: int, high: int, opens: np.ndarray, most: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first target, stop) of rows that predict events start..high once each, the history from `low` before
    them; a row begins with a session where one begins between the two."""
    while start < high:
        stop = min(high, max(low + most, start + (most + 1) // 2))
        begin = max(low, stop - most)
        if begin > low:
            sessions = np.flatnonzero(opens[begin : start + 1])
            begin += int(sessions[0]) if len(sessions) else 0
        yield begin, start, stop
        start = stop
