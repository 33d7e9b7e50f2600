"""Numbers beside the tokens of a conversation: `features` that a model reads, `labels` that its heads learn.

Both stand on assistant messages, by name: {"role": "assistant", ..., "features": {"gap_hours": 3.5}, "labels":
{"click": 1}}. A feature is known before the answer: all tokens after the answer before have it, up to the end of its
own. A label is known after: it stands on the token that ends the answer, and so at the position that predicts that
token, where the model has read the answer and nothing of what comes of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from posttrain.data.masks import TrainOn, turn_weights
from posttrain.data.tokenizer import BaseHFModelTokenizer, Encoded
from posttrain.data.types import Row
from posttrain.errors import RowError


@dataclass(frozen=True, slots=True)
class Numbers:
    """Names of the numbers that are kept of a row beside its text; what lacks one has NaN."""

    ratings: tuple[str, ...] = ()
    """Of the whole row, in columns of its own (ratings.py)."""
    features: tuple[str, ...] = ()
    """Of every assistant message."""
    labels: tuple[str, ...] = ()
    """Of every assistant message."""

    @property
    def of_turns(self) -> bool:
        """Whether any stand beside tokens."""
        return bool(self.features or self.labels)


NOTHING = Numbers()


def with_numbers(
    tokenizer: BaseHFModelTokenizer, rows: Sequence[Row], train_on: TrainOn, numbers: Numbers
) -> list[Encoded | RowError]:
    """As tokenizer.conversations(), with the features and labels of the answers beside the tokens.

    Returns:
        A RowError bad_number too, where one is no finite number.
    """
    found: list[Encoded | RowError] = []
    # Encoded with the n-th answer's weight n, a mask says whose tokens are whose.
    for row, turns in zip(rows, tokenizer.conversations([_counted(row) for row in rows], "weights"), strict=True):
        try:
            if isinstance(turns, RowError):
                raise turns
            weights = np.array([0.0, *turn_weights(row["messages"], train_on)], np.float32)
            answer = turns.loss_mask.astype(np.int64)
            found.append(Encoded(turns.token_ids, weights[answer], _columns(row, answer, numbers)))
        except RowError as error:
            found.append(error)
    return found


def _counted(row: Row) -> Row:
    messages, count = [], 0
    for message in row["messages"]:
        count += message["role"] == "assistant"
        messages.append({**message, "weight": count} if message["role"] == "assistant" else message)
    return {**row, "messages": messages}


def _columns(row: Row, answer: np.ndarray, numbers: Numbers) -> np.ndarray:
    """[L+1, F + K] float32, of tokens whose `answer` is n, from 1, in the n-th, and 0 outside of all."""
    said = [message for message in row["messages"] if message["role"] == "assistant"]
    ends = np.array([np.flatnonzero(answer == n + 1)[-1] for n in range(len(said))])
    features = [_numbers(each, "features", numbers.features) for each in said]
    features.append([math.nan] * len(numbers.features))  # after the last answer
    labels = np.full((len(answer), len(numbers.labels)), np.nan, np.float32)
    labels[ends] = [_numbers(each, "labels", numbers.labels) for each in said]
    before = np.array(features, np.float32)[np.searchsorted(ends, np.arange(len(answer)))]
    return np.concatenate([before, labels], axis=1)


def _numbers(message: Mapping[str, Any], key: str, names: Sequence[str]) -> list[float]:
    held = message.get(key) or {}
    if not isinstance(held, Mapping):
        raise RowError("bad_number", f"{key} of an answer is {held!r:.80}; give a mapping of names to numbers")
    for name in names:
        value = held.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value)):
            raise RowError("bad_number", f"{key}.{name} is {value!r:.80}; give a finite number, or none")
    return [math.nan if held.get(name) is None else float(held[name]) for name in names]
