"""A chat template: messages and tools become text, and the spans of it that its markers enclose.

Rendering is transformers' own (its sandbox, its generation tracker), one conversation at a
time. The clock is the one thing taken away from a template: a text that named today's date
would differ tomorrow, and a resumed run would not read the same bytes.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from posttrain.errors import RowError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None
Spans = list[tuple[int, int]]
"""[start, end) in characters of a rendered text, ascending."""

TODAY = datetime(2024, 7, 26)
"""What strftime_now says in a template: the date that Llama 3's templates fall back to."""

_RAISED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""By a template on a field that it lacks, or that is of another kind than it thinks."""

_TRACKER = threading.Lock()
"""A compiled template tracks the spans of one rendering at a time, and threads share it."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and the variables it is rendered with."""

    text: str
    variables: dict[str, Any]
    """The special tokens by name, as bos_token."""

    @cached_property
    def has_markers(self) -> bool:
        """Whether it says itself what the assistant writes."""
        return re.search(r"\{%[-+]?\s*generation\b", self.text) is not None

    def render(self, messages: Messages, tools: Tools = None, *, prompt: bool = False) -> tuple[str, Spans]:
        """Text of a conversation and the spans inside generation markers.

        Args:
            prompt: append the opening of the assistant's turn.

        Raises:
            RowError: `template_refused`, the template cannot render these messages.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _TRACKER:
                texts, spans = render_jinja_template(  # pyright: ignore[reportAssignmentType]
                    conversations=[list(messages)],  # pyright: ignore[reportArgumentType]
                    tools=list(tools) if tools else None,  # pyright: ignore[reportArgumentType]
                    chat_template=self.text,
                    return_assistant_tokens_mask=self.has_markers,
                    add_generation_prompt=prompt,
                    strftime_now=strftime_now,
                    **self.variables,
                )
        except (TemplateError, *_RAISED) as error:
            detail = f"the chat template cannot render {str(messages)[:200]}: {error}"
            raise RowError("template_refused", detail) from None
        return texts[0], [(int(start), int(end)) for start, end in spans[0]] if self.has_markers else []


def check_messages(messages: Any, tools: Tools, template: str) -> None:
    """Refuse what a template would render without complaint, and wrongly.

    Raises:
        RowError: `template_refused`: not a list of {"role", "content"}, a content that is
            missing (many templates write the word None), or tools that the template ignores.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RowError("template_refused", f"messages are missing or empty: {str(messages)[:80]!r}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowError("template_refused", f"messages[{index}] is no mapping with a role: {str(message)[:80]!r}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise RowError("template_refused", f"messages[{index}] has no content; a template would write None")
    if lost := ignored(messages, tools, template):
        raise RowError(
            "template_refused", f"the chat template ignores {lost}, so they would be lost; use one that knows"
        )


def ignored(messages: Messages, tools: Tools, template: str) -> str:
    """What of a conversation a template never mentions: "tools", "tool_calls" or nothing."""
    if tools and "tools" not in template:
        return "tools"
    return "tool_calls" if "tool_calls" not in template and any(m.get("tool_calls") for m in messages) else ""


def strftime_now(form: str) -> str:
    """The clock that templates see; it stands still."""
    return TODAY.strftime(form)
