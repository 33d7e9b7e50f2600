"""One raw record, in whichever published format, becomes one canonical Row; what was recognised is said aloud.

    conversation  {"messages": [...], "tools"?}                                 ends with an assistant turn
    preference    {"prompt": [...], "chosen": [...], "rejected": [...], "margin"?, "tools"?}
    unpaired      {"messages": [...], "label": bool, "tools"?}
    prompt        {"messages": [...], and every column that was not used}       ends with a user or tool turn
    text          {"text": str}
    events        {"events": [...], and every other column}

A message is {"role", "content": str} and, where given, reasoning_content, tool_calls, name, tool_call_id, weight.
Rows leave here with these shapes; whether they make sense is record_checks.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from posttrain.data.record_checks import Messages, check_row, question_key, row_key
from posttrain.data.record_messages import drop_undeclared_nulls, json_list, read_margin, read_messages, read_tools
from posttrain.data.types import Row
from posttrain.errors import DataError, RowError

__all__ = ["Format", "Reading", "check_row", "convert", "detect", "question_key", "row_key"]


class Format(StrEnum):
    """How a record writes what it holds; a recipe's `format:` is one of these."""

    messages = "messages"
    prompt_completion = "prompt_completion"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    preference = "preference"
    unpaired = "unpaired"
    prompt = "prompt"
    text = "text"
    events = "events"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The format a record was recognised as."""

    format: Format
    why: str
    """For people, as "columns instruction, input, output: alpaca"."""


_ASKED = ("prompt", "question", "problem")
_COLUMNS: dict[Format, tuple[tuple[str, ...], ...]] = {
    Format.messages: (("messages",),),
    Format.prompt_completion: (_ASKED, ("completion",)),
    Format.sharegpt: (("conversations",),),
    Format.alpaca: (("instruction",), ("output",)),
    Format.preference: (("chosen",), ("rejected",)),
    Format.unpaired: (("completion", "messages"), ("label",)),
    Format.prompt: (_ASKED,),
    Format.text: (("text",),),
    Format.events: (("events",),),
}
"""Columns a format needs; where several are named, one of them."""
_MORE_COLUMNS: dict[Format, tuple[str, ...]] = {
    Format.alpaca: ("input", "history"),
    Format.preference: _ASKED,
    Format.unpaired: _ASKED,
}
_SERVES: dict[str, tuple[Format, ...]] = {
    "conversation": (Format.messages, Format.prompt_completion, Format.sharegpt, Format.alpaca),
    "preference": (Format.preference,),
    "prompt": (Format.prompt, Format.messages, Format.prompt_completion, Format.sharegpt, Format.alpaca),
    "text": (Format.text,),
    "unpaired": (Format.unpaired,),
    "events": (Format.events,),
}
"""What a recipe wants -> the formats it is found in without being asked."""


def detect(record: Mapping[str, Any], *, wanted: str) -> Reading:
    """The one format in which `record` can be read as what the recipe wants. A null column counts as missing.

    Args:
        wanted: "conversation", "preference", "prompt", "text", "unpaired" or "events".

    Raises:
        DataError: it fits none, or several; says the columns expected and found, what it resembles, and the fix.
    """
    _check_record(record)
    serves = _formats_for(wanted)
    found = {column for column, value in record.items() if value is not None}
    fits = [format for format in Format if not _missing(format, found)]
    usable = [format for format in fits if format in serves]
    if Format.prompt_completion in usable and Format.prompt in usable:
        usable.remove(Format.prompt)  # the same prompt, and the reader should know of the completion
    if wanted == "conversation" and Format.unpaired in fits and isinstance(record["label"], bool):
        raise DataError(
            f"columns {_names(found)} look like unpaired: `label` says which answers are bad, and a conversation "
            "trains on all of them. Fix: filter the rows, drop `label`, or set format: "
            f"{usable[0] if usable else Format.messages}"
        )
    if len(usable) > 1:
        raise DataError(f"columns {_names(found)} fit {_names(usable)}. Fix: set format: to the one you mean")
    if not usable:
        raise DataError(_explain(found, fits, wanted))
    format = usable[0]
    known = [*(name for names in _COLUMNS[format] for name in names), *_MORE_COLUMNS.get(format, ()), "system", "tools"]
    used = [column for column in dict.fromkeys(known) if column in found]
    return Reading(format=format, why=f"column{'s' if len(used) > 1 else ''} {', '.join(used)}: {format}")


def convert(record: Mapping[str, Any], format: Format, *, wanted: str, role_map: Mapping[str, str] = {}) -> Row:
    """The canonical row of a record; the record is not changed. A canonical row converts to itself.

    Prompt and completion become a conversation whose earlier assistant turns weigh 0: only the completion
    is trained. An alpaca `input` follows its instruction after an empty line. A `system` column opens the
    conversation. Arguments of tool calls become mappings, which every template can render.

    Args:
        format: from detect(), or what the recipe says. `text` makes a conversation of one assistant turn.
        wanted: "conversation", "preference", "prompt", "text", "unpaired" or "events".
        role_map: the record's role -> ours, before the names of ShareGPT are looked up.

    Raises:
        RowError: not_a_record, wrong_schema, null_content, empty_messages, unknown_role, unsupported_content,
            chosen_equals_rejected or different_prompts.
        DataError: no record of this format can be what is wanted.
    """
    _check_record(record)
    serves = _formats_for(wanted)
    if format not in serves and (format, wanted) != (Format.text, "conversation"):
        raise DataError(
            f"format: {format} cannot be read as {wanted}; formats that can: {_names(serves)}. "
            "Fix: set one of them, or leave format: out to have it detected"
        )
    match wanted:
        case "text":
            return {"text": _text(record, "text")}
        case "events":
            return {**record, "events": json_list(_column(record, "events"), "events")}
        case "preference":
            row: Row = _preference(record, role_map) | read_margin(record)
        case "prompt":
            messages, used = _question(record, format, role_map)
            rest = {key: value for key, value in record.items() if key not in used and key not in ("messages", "tools")}
            row = {"messages": messages, **rest}
        case _:
            row = {"messages": _conversation(record, format, role_map)}
            if wanted == "unpaired":
                row["label"] = record.get("label")
    tools = read_tools(record.get("tools"))
    if tools:
        row["tools"] = tools
        drop_undeclared_nulls(row, wanted=wanted)
    return row


def _check_record(record: Any) -> None:
    if not isinstance(record, Mapping):
        raise RowError("not_a_record", f"expected a record (a mapping of columns), got {record!r:.120}")


def _formats_for(wanted: str) -> tuple[Format, ...]:
    if wanted not in _SERVES:
        raise DataError(f"wanted is {wanted!r}; known: {_names(_SERVES)}")
    return _SERVES[wanted]


def _missing(format: Format, found: set[str]) -> list[str]:
    return [" or ".join(names) for names in _COLUMNS[format] if not found.intersection(names)]


def _explain(found: set[str], fits: list[Format], wanted: str) -> str:
    """Why a record can't be what is wanted: expected, found, what it looks like, and the fix."""
    expected = "; ".join(
        f"{format}: {', '.join(' or '.join(names) for names in _COLUMNS[format])}" for format in _SERVES[wanted]
    )
    if Format.text in fits and wanted == "conversation":
        hint = "Fix: set format: text to train on `text` as one assistant turn"
    elif fits == [Format.prompt] and wanted == "conversation":
        hint = "It looks like prompt, a question without its answer. Fix: name the column to learn from `completion`"
    elif fits:
        hint = f"It looks like {_names(fits)}, which is no {wanted}. Fix: change what the recipe trains, or the source"
    else:
        near = {format: _likeness(format, found) for format in Format}
        best = max(near, key=lambda format: near[format])
        missing = "` or `".join(_missing(best, found)) if near[best] else ""
        looks = f"It looks like {best} but has no `{missing}`. " if missing else ""
        hint = f"{looks}Fix: rename the columns, or, where this row only lacks a value, set format: to the other rows'"
    return f"no {wanted} in columns {_names(found)}; expected one of ({expected}). {hint}"


def _likeness(format: Format, found: set[str]) -> int:
    """Columns of a record that speak for a format; those it needs count more than those it may have."""
    needed = sum(bool(found.intersection(names)) for names in _COLUMNS[format])
    return 3 * needed + len(found.intersection(_MORE_COLUMNS.get(format, ())))


def _names(names: Iterable[str]) -> str:
    return (", ".join(sorted(name if name.isprintable() else repr(name) for name in map(str, names))) or "(none)")[:300]


def _column(record: Mapping[str, Any], column: str) -> Any:
    value = record.get(column)
    if value is None:
        raise RowError("wrong_schema", f"`{column}` is missing or null; found columns {_names(record)}")
    return value


def _text(record: Mapping[str, Any], column: str) -> str:
    value = _column(record, column)
    if not isinstance(value, str):
        raise RowError("wrong_schema", f"`{column}` must be a string, got {value!r:.120}")
    return value


def _asked_column(record: Mapping[str, Any]) -> str | None:
    found = [column for column in _ASKED if record.get(column) is not None]
    if len(found) > 1 and found[0] != "prompt":
        raise RowError("wrong_schema", f"columns {_names(found)} could each be the prompt. Fix: name one `prompt`")
    return found[0] if found else None


def _asked(record: Mapping[str, Any], role_map: Mapping[str, str]) -> Messages:
    column = _asked_column(record) or "prompt"
    return read_messages(_column(record, column), column, role_map, "user")


def _conversation(record: Mapping[str, Any], format: Format, role_map: Mapping[str, str]) -> Messages:
    """All turns of a record, the answer included."""
    if format == Format.text:
        return [{"role": "assistant", "content": _text(record, "text")}]
    if format == Format.alpaca:
        return [*_question(record, format, role_map)[0], {"role": "assistant", "content": _text(record, "output")}]
    if format == Format.prompt_completion or (format == Format.unpaired and record.get("messages") is None):
        messages, _ = _question(record, Format.prompt, role_map)
        for message in messages:
            if message["role"] == "assistant":
                message.setdefault("weight", 0)
        return messages + read_messages(_column(record, "completion"), "completion", role_map, "assistant")
    return _question(record, format, role_map)[0]


def _question(record: Mapping[str, Any], format: Format, role_map: Mapping[str, str]) -> tuple[Messages, set[str]]:
    """What a record asks, and the columns it was made of; a whole conversation where they hold one."""
    if format == Format.alpaca:
        messages, used = _alpaca(record), {"instruction", "input", "history"}
    elif format == Format.sharegpt:
        messages, used = read_messages(_column(record, "conversations"), "conversations", role_map), {"conversations"}
    elif format in (Format.messages, Format.unpaired):
        messages, used = read_messages(_column(record, "messages"), "messages", role_map), {"messages"}
    else:
        messages, used = _asked(record, role_map), {_asked_column(record) or "prompt"}
    return _opening(record) + messages, used | {"system"}


def _opening(record: Mapping[str, Any]) -> Messages:
    system = "" if record.get("system") is None else _text(record, "system")
    return [{"role": "system", "content": system}] if system.strip() else []


def _alpaca(record: Mapping[str, Any]) -> Messages:
    history = record.get("history")
    messages: Messages = []
    for index, pair in enumerate([] if history is None else json_list(history, "history")):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(turn, str) for turn in pair)):
            raise RowError("wrong_schema", f"history[{index}] must be [question, answer], got {pair!r:.120}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    instruction = _text(record, "instruction")
    given = "" if record.get("input") is None else _text(record, "input")
    content = "\n\n".join(part for part in (instruction, given) if part.strip())
    return [*messages, {"role": "user", "content": content}]


def _preference(record: Mapping[str, Any], role_map: Mapping[str, str]) -> Row:
    chosen, rejected = (
        read_messages(_column(record, side), side, role_map, "assistant") for side in ("chosen", "rejected")
    )
    column = _asked_column(record)
    if chosen[0]["role"] == "assistant" == rejected[0]["role"]:
        if column is None:
            raise RowError("wrong_schema", "chosen and rejected hold only answers, and `prompt` is missing or null")
        return {"prompt": _question(record, Format.prompt, role_map)[0], "chosen": chosen, "rejected": rejected}
    if chosen == rejected:
        raise RowError("chosen_equals_rejected", f"both end with {chosen[-1]['content']!r:.120}; drop the row")
    same = (a == b for a, b in zip(chosen, rejected, strict=False))
    end = next((index for index, equal in enumerate(same) if not equal), min(len(chosen), len(rejected)))
    shared, tails = chosen[:end], (chosen[end:], rejected[end:])
    if not shared or not all(tail and tail[0]["role"] == "assistant" for tail in tails):
        raise RowError(
            "different_prompts",
            f"chosen and rejected must share all turns up to one answer, and part at turn {end}; drop the row",
        )
    if column is not None:
        asked = _asked(record, role_map)
        # a text prompt beside whole conversations is their question; a list is everything they share
        if not (asked == shared or (type(record[column]) is str and len(asked) == 1 and asked[0] in shared)):
            raise RowError(
                "different_prompts", f"`{column}` is not what chosen and rejected share: {asked[-1]['content']!r:.120}"
            )
    return {"prompt": _opening(record) + shared, "chosen": tails[0], "rejected": tails[1]}
