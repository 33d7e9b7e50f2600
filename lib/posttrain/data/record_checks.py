"""What a canonical row must be before it may be tokenised, and the texts by which two rows are the same.

A row comes from records.convert(). Every fault has its own reason, so that a report can count
them; every message says where in the row, the value, and the fix.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.types import Row
from posttrain.errors import RowError

Messages = list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of a canonical message; a template decides how each is rendered."""


MOST_WEIGHT = 2**24
"""Of a message. Losses are summed in float32, whose 24 bits would keep nothing of the others beside a heavier one."""


def check_row(row: Row, *, wanted: str) -> None:
    """Refuse a canonical row that has the wrong shape, or messages in an order no template can mean.

    Args:
        wanted: "conversation", "preference", "prompt", "text", "unpaired" or "events".

    Raises:
        RowError: reason is one of wrong_schema, null_content, empty_messages, no_assistant_turn, empty_assistant,
            empty_prompt, empty_text, empty_events, unknown_role, wrong_role_order, not_text,
            prompt_ends_with_answer, chosen_equals_rejected, different_prompts, bad_label.
    """
    match wanted:
        case "text":
            _check_plain_text(row.get("text"))
        case "events":
            _check_events(row.get("events"))
        case "preference":
            _check_preference(row)
        case _:
            messages = _list(row, "messages", wanted)
            _check_messages(messages, "messages")
            _check_end(messages, wanted)
            if wanted == "unpaired" and not isinstance(row.get("label"), bool):
                raise RowError("bad_label", f"label is {row.get('label')!r:.80}; it must be true or false")
    if wanted not in ("text", "events") and row.get("tools") is not None:
        check_tools(row["tools"])


def check_tools(tools: Any) -> None:
    """Refuse tools that are not a list of mappings of clean text.

    Raises:
        RowError: wrong_schema or not_text.
    """
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("wrong_schema", f"tools must be a list of mappings (JSON schemas), got {tools!r:.120}")
    _check_nested(tools, "tools")


def question_key(row: Row) -> str:
    """What a row asks, as text: everything before a last assistant turn, runs of whitespace made one space.

    Two rows with one key ask the same; hash it to find duplicates and held-out questions in the training data.
    Tools, reasoning and names do not count.

    Raises:
        RowError: wrong_schema, a value of a call or an event that JSON cannot hold.
    """
    messages = row["messages"] if "messages" in row else row.get("prompt")
    # events keep their other columns, which may have these names and hold anything
    if not isinstance(messages, list) or not all(isinstance(each, Mapping) and "role" in each for each in messages):
        return " ".join(row["text"].split()) if "events" not in row else _json(row["events"])
    end = len(messages) - 1 if messages and messages[-1]["role"] == "assistant" else len(messages)
    lines = []
    for message in messages[:end]:
        calls = f" {_json(message['tool_calls'])}" if message.get("tool_calls") else ""
        lines.append(f"{message['role']}: {' '.join((message.get('content') or '').split())}{calls}")
    return "\n".join(lines)


def row_key(row: Row) -> str:
    """The whole row as text, the order of its keys left out; two rows with one key are exact duplicates.

    Raises:
        RowError: wrong_schema, a value that JSON cannot hold.
    """
    return _json(row)


def question_hash(row: Row) -> bytes:
    """16 bytes that stand for question_key(), to look for held-out questions in a training set of any size."""
    return _sha256(question_key(row))[:16]


def row_hash(row: Row) -> int:
    """A number below 2**64 that stands for row_key(); a uint64 array of them counts a source's exact duplicates.

    Raises:
        RowError: as row_key().
    """
    return int.from_bytes(_sha256(row_key(row))[:8], "little")


def check_text(text: str, where: str) -> None:
    """Refuse what no tokenizer can encode or no person typed: NUL characters and halves of a surrogate pair.

    Raises:
        RowError: not_text, with the character's offset and code.
    """
    at = text.find("\0") if "\0" in text else -1
    if at < 0 and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            at = error.start
    if at >= 0:
        kind = "a NUL character" if text[at] == "\0" else "half of a surrogate pair"
        raise RowError(
            "not_text",
            f"{where}, character {at} is {kind} (0x{ord(text[at]):04x}); decode the source as UTF-8 or remove it",
        )


def _list(row: Row, column: str, wanted: str) -> Messages:
    value = row.get(column)
    if not isinstance(value, list):
        raise RowError("wrong_schema", f"{column} of a {wanted} row must be a list of messages, got {value!r:.120}")
    return value


def _check_messages(messages: Messages, where: str, before: Messages | None = None) -> None:
    """Each message by itself and after the one before it; `before` is the conversation that these continue."""
    if not messages:
        raise RowError("empty_messages", f"{where} is an empty list")
    previous = before[-1] if before else None
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RowError("wrong_schema", f"{where}[{index}] must be a mapping, got {message!r:.120}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise RowError("unknown_role", f"{where}[{index}].role is {role!r:.80}; known roles: {', '.join(ROLES)}")
        if type(content) is not str:
            _refuse_content(message, f"{where}[{index}]")
        elif "\0" in content or not content.isascii():
            check_text(content, f"{where}[{index}].content")
        if len(message) > 2:
            _check_extras(message, f"{where}[{index}]")
        if role in ("user", "assistant") and (not content or content.isspace()):
            _check_blank(message, f"{where}[{index}]")
        _check_order(role, previous, f"{where}[{index}]")
        previous = message


def _refuse_content(message: Mapping[str, Any], where: str) -> None:
    content = message.get("content")
    if content is not None:
        raise RowError("wrong_schema", f"{where}.content must be a string, got {content!r:.120}")
    if not message.get("tool_calls"):
        raise RowError("null_content", f"{where}.content is null, and there are no tool_calls; drop the row or fill it")


def _check_blank(message: Mapping[str, Any], where: str) -> None:
    if message["role"] == "user":
        raise RowError("empty_prompt", f"{where} is a user turn without text; drop the row or fill it")
    if not message.get("tool_calls"):
        raise RowError("empty_assistant", f"{where} is an assistant turn without text or tool_calls; drop the row")


def _check_order(role: str, previous: Mapping[str, Any] | None, where: str) -> None:
    """Instructions first, no two turns of one speaker, a tool's result only after a call."""
    last = previous["role"] if previous else None
    match role:
        case "system":
            fine = last is None
        case "developer":
            fine = last in (None, "system")
        case "tool":
            # a call may also be written in the model's own syntax, as some tool datasets do
            fine = last == "tool" or (
                last == "assistant"
                and previous is not None
                and bool(previous.get("tool_calls") or "<tool_call>" in (previous.get("content") or ""))
            )
        case _:
            fine = last != role
    if not fine:
        after = "nothing" if last is None else f"a {last} turn"
        rule = {
            "system": "a system turn comes first",
            "developer": "a developer turn comes first, or after a system turn",
            "tool": "a tool's result follows an assistant turn with tool_calls, or another result",
        }.get(role, "join the two turns into one, or drop the row")
        raise RowError("wrong_role_order", f"{where} is a {role} turn after {after}; {rule}")


def _check_extras(message: Mapping[str, Any], where: str) -> None:
    for key in ("reasoning_content", "name", "tool_call_id"):
        value = message.get(key)
        if value is not None and not isinstance(value, str):
            raise RowError("wrong_schema", f"{where}.{key} must be a string, got {value!r:.120}")
    weight = message.get("weight")
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (number and 0 <= weight <= MOST_WEIGHT):
        raise RowError("wrong_schema", f"{where}.weight must be a number from 0 to {MOST_WEIGHT}, got {weight!r:.120}")
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise RowError("wrong_schema", f"{where}.tool_calls must be a list of mappings, got {calls!r:.120}")
        if message["role"] != "assistant":
            raise RowError(
                "wrong_schema", f"{where}.tool_calls stands on a {message['role']} turn; only an assistant calls"
            )
    for key, value in message.items():
        if key not in ("role", "content"):
            _check_nested(value, f"{where}.{key}")


def _check_nested(value: Any, where: str) -> None:
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_nested(key, f"{where}: a key")
            _check_nested(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_nested(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, int | float):
        raise RowError("wrong_schema", f"{where} is {value!r:.80}; keep to strings, numbers, lists and maps")


def _check_end(messages: Messages, wanted: str) -> None:
    """A prompt ends where an assistant is to speak; everything else ends with what it said."""
    last = messages[-1]["role"]
    if wanted == "prompt":
        if last == "assistant":
            raise RowError(
                "prompt_ends_with_answer",
                f"messages[{len(messages) - 1}] is an assistant turn, and a prompt ends with a user or tool turn; "
                "remove the answer, or keep it in a field of its own",
            )
        if last not in ("user", "tool"):
            raise RowError("empty_prompt", f"messages ends with a {last} turn; a prompt ends with a user or tool turn")
    elif last != "assistant":
        roles = ", ".join(message["role"] for message in messages[-6:])
        raise RowError("no_assistant_turn", f"messages must end with an assistant turn; the last roles are {roles}")


def _check_preference(row: Row) -> None:
    prompt = _list(row, "prompt", "preference")
    if not prompt:
        raise RowError("empty_prompt", "prompt is an empty list of messages")
    _check_messages(prompt, "prompt")
    if prompt[-1]["role"] not in ("user", "tool"):
        reason = "prompt_ends_with_answer" if prompt[-1]["role"] == "assistant" else "empty_prompt"
        raise RowError(reason, f"prompt ends with a {prompt[-1]['role']} turn; it must end with a user or tool turn")
    for side in ("chosen", "rejected"):
        answer = _list(row, side, "preference")
        _check_messages(answer, side, prompt)
        if answer[-1]["role"] != "assistant":
            raise RowError("no_assistant_turn", f"{side} ends with a {answer[-1]['role']} turn, not an assistant's")
    if row["chosen"] == row["rejected"]:
        raise RowError(
            "chosen_equals_rejected", f"both answers are {row['chosen'][-1]['content']!r:.120}; drop the row"
        )
    for side in ("chosen", "rejected"):
        if row[side][0]["role"] != "assistant":
            raise RowError("different_prompts", f"{side} begins with a {row[side][0]['role']} turn, not the answer")


def _check_plain_text(text: Any) -> None:
    if not isinstance(text, str):
        raise RowError("wrong_schema", f"text must be a string, got {text!r:.120}")
    if not text or text.isspace():
        raise RowError("empty_text", "text is blank; drop the row")
    check_text(text, "text")


def _check_events(events: Any) -> None:
    if not isinstance(events, list) or not all(isinstance(event, Mapping) for event in events):
        raise RowError("wrong_schema", f"events must be a list of mappings, got {events!r:.120}")
    if not events:
        raise RowError("empty_events", "events is an empty list; drop the row")
    _check_nested(events, "events")


def _json(value: Sequence[Any] | Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError("wrong_schema", f"{error}; keep to strings, numbers, lists and maps") from None


def _sha256(text: str) -> bytes:
    # columns that no check reads may hold halves of surrogate pairs
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
