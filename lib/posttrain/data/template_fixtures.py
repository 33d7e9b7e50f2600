"""Conversations that every chat template is proved on before it is trusted with a mask."""

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.chat_template import Messages, Tools

TOOLS: Sequence[Mapping[str, Any]] = (
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Find a word.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "what to find"}},
                "required": ["word"],
            },
        },
    },
)
"""One tool, as a JSON schema."""

_SYSTEM = {"role": "system", "content": "Rule one."}
_ASK, _MORE = {"role": "user", "content": "Which é?"}, {"role": "user", "content": "And\nthen 2?"}
_SAY, _LAST = {"role": "assistant", "content": "This\n\none."}, {"role": "assistant", "content": "Next, 漢字 🙂."}
_CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "snow"}}}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_FOUND = {"role": "tool", "name": "look_up", "content": "it is white"}

TOOL_TALK: Messages = (_ASK, _CALLING, _FOUND, _SAY)
"""A question, a call, its result, an answer."""

FIXTURES: Sequence[tuple[Messages, Tools]] = (
    ((_ASK, _SAY), None),
    ((_SYSTEM, _ASK, _SAY), None),
    (({"role": "system", "content": ""}, _ASK, _SAY), None),
    ((_ASK, _SAY, _MORE, _LAST), None),
    ((_SYSTEM, _ASK, _SAY, _MORE), None),
    ((_ASK, _SAY, _LAST), None),
    ((_ASK, {**_SAY, "content": ""}), None),
    (TOOL_TALK, TOOLS),
    ((_SYSTEM, *TOOL_TALK[:3]), TOOLS),
    ((*TOOL_TALK, _MORE, {**_CALLING, "content": "I look."}, _FOUND, _FOUND, _LAST), TOOLS),
    ((_ASK, {**_SAY, "reasoning_content": "Let me see."}, _MORE, {**_LAST, "reasoning_content": "Hm.\n\nWell."}), None),
    ((_ASK, {**_SAY, "thinking": "Let me see."}, _MORE, {**_LAST, "thinking": "Hm."}), None),
    ((_ASK, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}, _MORE, _LAST), None),
    ((_ASK, {**_CALLING, "reasoning_content": "I must."}, _FOUND, {**_LAST, "reasoning_content": "So."}), TOOLS),
)
"""Conversations to prove a template on; a question alone is each of them with its generation prompt."""
