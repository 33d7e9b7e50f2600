"""Which tokens of a conversation are trained: spans of its text that the assistant wrote, then a weight per token.

Spans come from a template's markers, or from the differences between renderings of ever longer beginnings of
the conversation. What neither can prove is refused row by row: a mask is never guessed.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from posttrain.data.chat_template import ChatTemplate, Messages, Spans, Tools
from posttrain.data.markers import Turn
from posttrain.errors import RowError

TrainOn = Literal["all", "last", "weights"]


def assistant_spans(template: ChatTemplate, turn: Turn, messages: Messages, tools: Tools) -> tuple[str, Spans]:
    """The text of a conversation and one span for each assistant message, in their order.

    Raises:
        RowError: `template_refused`, `no_trained_token` or `mask_not_provable`.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        roles = [message["role"] for message in messages]
        detail = f"no trained token in a conversation with roles {roles}; it needs an assistant message"
        raise RowError("no_trained_token", detail)
    text, spans = template.render(messages, tools)
    if not template.has_markers:
        return text, _prefix_spans(template, turn, messages, tools, text, answers)
    if len(spans) != len(answers) or any(start >= end for start, end in spans):
        raise _unproved(f"the template marks {len(spans)} turns, the messages have {len(answers)} from an assistant")
    return text, spans


def turn_weights(messages: Messages, train_on: TrainOn) -> list[float]:
    """Loss weight of each assistant message.

    Raises:
        RowError: `bad_weight`, a weight that is no finite number >= 0; `no_trained_token`, all are 0.
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    if train_on == "all":
        return [1.0] * len(answers)
    if train_on == "last":
        return [0.0] * (len(answers) - 1) + [1.0] * bool(answers)
    weights: list[Any] = [1.0 if answer.get("weight") is None else answer["weight"] for answer in answers]
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise RowError("bad_weight", f"the weight of an assistant message is {weight!r}; give a number >= 0")
    if not any(weights):
        raise RowError("no_trained_token", "every assistant message has weight 0; give one a weight, or drop the row")
    return [float(weight) for weight in weights]


def token_mask(encoding: Any, text: str, spans: Spans, weights: Sequence[float]) -> np.ndarray:
    """[L+1] float32, the weight of its span on every token inside one.

    Args:
        encoding: a tokenizers.Encoding of `text`, its offsets untrimmed.

    Raises:
        RowError: `mask_not_provable`, a token reaches over the border of a span: it would be half trained.
    """
    count = len(encoding)
    mask = np.zeros(count, np.float32)
    for (start, end), weight in zip(spans, weights, strict=True):
        first = encoding.char_to_token(start)
        after = encoding.char_to_token(end) if end < len(text) else count
        if first is None or after is None or first >= after or _borders(encoding, first, after) != (start, end):
            raise _unproved(f"a token reaches over the border of {text[start:end][:60]!r}; strip the message's content")
        mask[first:after] = weight
    return mask


def _prefix_spans(
    template: ChatTemplate, turn: Turn, messages: Messages, tools: Tools, text: str, answers: list[int]
) -> Spans:
    """For each assistant message: from the end of its generation prompt to the stop token that ends it."""
    spans: Spans = []
    for index in answers:
        try:
            opened = template.render(messages[:index], tools, prompt=True)[0]
            closed = template.render(messages[: index + 1], tools)[0]
        except RowError as error:
            raise _unproved(f"messages[{index}]: {error}") from None
        if not text.startswith(closed) or not closed.startswith(opened):
            raise _unproved(
                f"messages[{index}] renders otherwise once more messages follow; add markers to the template"
            )
        start = len(opened)
        end = max(
            [text.rfind(stop, start, len(closed)) + len(stop) for stop in turn.stops if stop in text[start:]] + [0]
        )
        if end <= start or text[end : len(closed)].strip():
            raise _unproved(f"messages[{index}] does not end in one of the stop tokens {turn.stops}")
        spans.append((start, end))
    return spans


def _borders(encoding: Any, first: int, after: int) -> tuple[int, int]:
    return encoding.token_to_chars(first)[0], encoding.token_to_chars(after - 1)[1]


def _unproved(detail: str) -> RowError:
    return RowError("mask_not_provable", detail)
