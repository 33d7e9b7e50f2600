"""Rewards that read the text as it stands."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.data.types import Row


def exact(row: Row, completion: str) -> float:
    """1 where the completion is the row's `answer`, or one of a list of them; blanks around either do not count.

    Raises:
        KeyError, TypeError: the row has no `answer`, or it is no text.
    """
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise TypeError(f"answer is {row['answer']!r:.80}, not a text or a list of them")
    return float(completion.strip() in [answer.strip() for answer in answers])


def regex(row: Row, completion: str) -> float:
    """1 where the row's `pattern` (of Python's re) is found anywhere in the completion; \\A and \\Z tie it to the ends.

    Raises:
        KeyError, re.error: the row has no `pattern`, or it is none.
    """
    return float(re.search(row["pattern"], completion) is not None)
