"""The messages and tools of a record, in OpenAI's or ShareGPT's words or as JSON text, in their canonical form."""

import json
import math
from collections.abc import Mapping
from typing import Any

from posttrain.data.record_checks import ROLES, Messages
from posttrain.data.types import Row
from posttrain.errors import RowError

_ROLE_SET = frozenset(ROLES)
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "function_call",
}
"""Who speaks in `from` -> our role; a function_call is an assistant turn whose value is the call as JSON."""


def read_messages(value: Any, column: str, role_map: Mapping[str, str], text_role: str | None = None) -> Messages:
    """Canonical messages of a column that holds a list of them, or JSON text of one.

    Args:
        column: its name, for errors.
        role_map: the record's role -> ours.
        text_role: where given, a text that is not JSON messages is one message of this role.

    Raises:
        RowError: as read_message(), and empty_messages.
    """
    if type(value) is str:
        stored = _stored_messages(value) if text_role else json_list(value, column)
        if stored is None:
            return [{"role": text_role, "content": value}]
        value = stored
    if not isinstance(value, list | tuple):
        kinds = "a list of messages" + (" or a string" if text_role else "")
        raise RowError("wrong_schema", f"`{column}` must be {kinds}, got {value!r:.120}")
    if not value:
        raise RowError("empty_messages", f"`{column}` is an empty list")
    return [read_message(message, column, index, role_map) for index, message in enumerate(value)]


def read_message(raw: Any, column: str, index: int, role_map: Mapping[str, str]) -> dict[str, Any]:
    """The canonical form of one message: a new mapping of role, content and what else it holds that is not null.

    Args:
        column, index: where it stands, for errors.
        role_map: the record's role -> ours.

    Raises:
        RowError: wrong_schema, unknown_role, null_content or unsupported_content.
    """
    if not isinstance(raw, Mapping):
        raise RowError("wrong_schema", f"{column}[{index}] must be a mapping with role and content, got {raw!r:.120}")
    role, content = raw.get("role"), raw.get("content")
    if len(raw) == 2 and type(content) is str and not role_map and type(role) is str and role in _ROLE_SET:
        return {"role": role, "content": content}
    where = f"{column}[{index}]"
    sharegpt = role is None and raw.get("from") is not None
    if sharegpt:
        role, content = raw["from"], raw.get("value")
    role = _role(role, where, role_map, sharegpt=sharegpt)
    message: dict[str, Any] = {"role": role, "content": content}
    spent = ("role", "content", "from", "value") if sharegpt else ("role", "content")
    for key, value in raw.items():
        if value is not None and key not in spent:
            message[key] = value
    if role == "function_call":
        message |= {"role": "assistant", "content": "", "tool_calls": content}
    if "tool_calls" in message:
        calls = read_calls(message.pop("tool_calls"), f"{where}.tool_calls")
        if calls:
            message["tool_calls"] = calls
    message["content"] = _content(message, where)
    return message


def read_margin(record: Mapping[str, Any]) -> dict[str, float]:
    """By how much the chosen answer of a pair is to win, as a part of its row: {"margin": 0.5}, or nothing.

    Raises:
        RowError: wrong_schema.
    """
    value = record.get("margin")
    if value is None:
        return {}
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError("wrong_schema", f"margin must be a finite number, got {value!r:.80}")
    return {"margin": float(value)}


def read_tools(value: Any) -> list[Any]:
    """The tools of a record as a list of mappings, given as a list or as JSON text, whole or one by one.

    Nulls inside are left out: Parquet gives every tool the parameters of all the others.

    Raises:
        RowError: wrong_schema.
    """
    if value is None or value == "":
        return []
    tools = [_parsed(tool, f"tools[{index}]") for index, tool in enumerate(json_list(value, "tools"))]
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise RowError("wrong_schema", f"tools[{index}] must be a mapping (a JSON schema), got {tool!r:.120}")
    return [_without_nulls(tool) for tool in tools]


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as a list of mappings whose arguments are mappings; both may come as JSON text.

    Raises:
        RowError: wrong_schema.
    """
    value = _parsed(value, where)
    calls = []
    for index, raw in enumerate([value] if isinstance(value, Mapping) else json_list(value, where)):
        call = _parsed(raw, f"{where}[{index}]")
        if not isinstance(call, Mapping):
            raise RowError("wrong_schema", f"{where}[{index}] must be a mapping, got {call!r:.120}")
        call = {key: item for key, item in call.items() if item is not None}
        inner = call.get("function", call)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise RowError("wrong_schema", f"{where}[{index}] names no function, got {call!r:.120}")
        function = {**inner}
        arguments = function.get("arguments")
        # null and "" are how a call without arguments is written
        arguments = {} if arguments in (None, "") else _parsed(arguments, f"{where}[{index}].arguments")
        if not isinstance(arguments, Mapping):
            raise RowError("wrong_schema", f"{where}[{index}].arguments must be a mapping, got {arguments!r:.120}")
        function["arguments"] = dict(arguments)
        calls.append({**call, "function": function} if "function" in call else function)
    return calls


def drop_undeclared_nulls(row: Row, *, wanted: str) -> None:
    """Leave out, in place, a null argument that its tool does not declare.

    Parquet stores the calls of all tools with one set of arguments; untold, a model would learn to write them.
    """
    declared = {}
    for tool in row["tools"]:
        function = tool.get("function", tool)
        schema = function.get("parameters") if isinstance(function, Mapping) else None
        if isinstance(schema, Mapping) and isinstance(schema.get("properties"), Mapping):
            declared[str(function.get("name"))] = schema["properties"]
    for column in ("prompt", "chosen", "rejected") if wanted == "preference" else ("messages",):
        for message in row[column]:
            for call in message.get("tool_calls", ()):
                function = call.get("function", call)
                known = declared.get(function["name"])
                if known is not None:
                    given = function["arguments"].items()
                    function["arguments"] = {k: v for k, v in given if v is not None or k in known}


def json_list(value: Any, where: str) -> list[Any]:
    """A list, given as one or as JSON text.

    Raises:
        RowError: wrong_schema.
    """
    value = _parsed(value, where)
    if not isinstance(value, list | tuple):
        raise RowError("wrong_schema", f"`{where}` must be a list or JSON text of one, got {value!r:.120}")
    return list(value)


def _stored_messages(text: str) -> list[Any] | None:
    """Messages that a text holds as JSON; None where it is only text."""
    if text[:1] != "[" or not ('"role"' in text or '"from"' in text):
        return None
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return stored if all(isinstance(m, dict) and ("role" in m or "from" in m) for m in stored) else None


def _parsed(value: Any, where: str) -> Any:
    """JSON text parsed; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError("wrong_schema", f"`{where}` is not JSON ({error}): {value!r:.120}") from None


def _role(role: Any, where: str, role_map: Mapping[str, str], *, sharegpt: bool) -> str:
    key = "from" if sharegpt else "role"
    if not isinstance(role, str):
        raise RowError("wrong_schema", f"{where}.{key} must be a string, got {role!r:.80}")
    ours = role_map.get(role, role)
    if sharegpt:
        ours = _SHAREGPT.get(ours, ours)
    if ours not in _ROLE_SET and not (sharegpt and ours == "function_call"):
        known = ", ".join(_SHAREGPT if sharegpt else ROLES)
        meant = _SHAREGPT.get(role.lower(), "assistant")
        quoted = json.dumps(role[:80], ensure_ascii=False)
        raise RowError(
            "unknown_role",
            f"{where}.{key} is {quoted}; known roles: {known}. Fix: role_map: "
            f"{{{role if role.isidentifier() else quoted}: {meant if meant in _ROLE_SET else 'assistant'}}}",
        )
    return ours


def _content(message: Mapping[str, Any], where: str) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    if content is None:
        if message.get("tool_calls"):
            return ""
        raise RowError("null_content", f"{where} has no content, and no tool_calls; drop the row or fill it")
    if not isinstance(content, list | tuple):
        raise RowError("wrong_schema", f"{where}.content must be a string, got {content!r:.120}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) and kind == "text" else None
        if not isinstance(text, str):
            raise RowError("unsupported_content", f"{where}.content[{index}] is {kind!r}; only text parts can be read")
        texts.append(text)
    return "".join(texts)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value
