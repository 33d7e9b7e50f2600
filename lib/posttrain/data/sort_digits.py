"""The built-in task: sort the digits of a short number, with a reward that can be checked.

Small enough for a laptop CPU and honest: the demonstrations are careless (most have two
neighbouring digits swapped), so imitation alone reaches partial skill, and the verifier
knows what the demonstrations do not. Held-out rows never occur in the other two sets.
"""

from typing import Any

import numpy as np

from posttrain.data.types import Row

MIN_DIGITS, MAX_DIGITS = 4, 8
CARELESS = 0.6
"""Share of demonstrations with two neighbouring, different digits swapped."""
HELD_OUT_SEED = 20260213
"""The held-out rows are the same for every seed of a run."""


def demonstrations(seed: int, count: int = 16384) -> list[Row]:
    """Conversations whose answers are right in about 1 - CARELESS of the rows."""
    rng = np.random.default_rng([seed, 1])
    rows = []
    for digits in _questions(rng, count):
        answer = _swap_neighbours(_sorted(digits), rng) if rng.random() < CARELESS else _sorted(digits)
        rows.append({"messages": [_question(digits), {"role": "assistant", "content": answer}]})
    return rows


def exact_demonstrations(seed: int, count: int = 16384) -> list[Row]:
    """Conversations whose answers are all right."""
    return [_answered(digits) for digits in _questions(np.random.default_rng([seed, 3]), count)]


def pairs(seed: int, count: int = 16384) -> list[Row]:
    """A right answer preferred to one with two neighbouring digits swapped."""
    rng = np.random.default_rng([seed, 4])
    return [_pair(digits, rng) for digits in _questions(rng, count) if len(set(digits)) > 1]


def held_out_demonstrations(seed: int, count: int = 256) -> list[Row]:
    """The evaluation's questions with their right answers."""
    return [_answered(digits) for digits in sorted(_held_out(count))]


def held_out_pairs(seed: int, count: int = 256) -> list[Row]:
    """The evaluation's questions as pairs; they do not depend on the run's seed."""
    rng = np.random.default_rng(HELD_OUT_SEED + 1)
    return [_pair(digits, rng) for digits in sorted(_held_out(count)) if len(set(digits)) > 1]


def prompts(seed: int, count: int = 8192) -> list[Row]:
    """Questions with the right answer for the reward."""
    return [_row(digits) for digits in _questions(np.random.default_rng([seed, 2]), count)]


def held_out(seed: int, count: int = 256) -> list[Row]:
    """The evaluation's questions; they do not depend on the run's seed."""
    return [_row(digits) for digits in sorted(_held_out(count))]


def reward(row: Row, completion: str) -> float:
    """1 when the completion is exactly the sorted digits, else 0."""
    return float(completion == row["answer"])


def _questions(rng: np.random.Generator, count: int) -> list[str]:
    """Digit strings outside the held-out set, lengths uniform."""
    reserved = _held_out(256)
    questions: list[str] = []
    while len(questions) < count:
        digits = _draw(rng)
        if digits not in reserved:
            questions.append(digits)
    return questions


def _held_out(count: int) -> set[str]:
    rng = np.random.default_rng(HELD_OUT_SEED)
    chosen: set[str] = set()
    while len(chosen) < count:
        chosen.add(_draw(rng))
    return chosen


def _draw(rng: np.random.Generator) -> str:
    length = int(rng.integers(MIN_DIGITS, MAX_DIGITS + 1))
    return "".join(str(digit) for digit in rng.integers(0, 10, length))


def _sorted(digits: str) -> str:
    return "".join(sorted(digits))


def _swap_neighbours(answer: str, rng: np.random.Generator) -> str:
    places = [i for i in range(len(answer) - 1) if answer[i] != answer[i + 1]]
    if not places:
        return answer
    i = int(rng.choice(places))
    return answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :]


def _question(digits: str) -> dict[str, str]:
    return {"role": "user", "content": f"sort {digits}"}


def _answered(digits: str) -> dict[str, Any]:
    return {"messages": [_question(digits), {"role": "assistant", "content": _sorted(digits)}]}


def _pair(digits: str, rng: np.random.Generator) -> dict[str, Any]:
    right = _sorted(digits)
    answers = {"chosen": right, "rejected": _swap_neighbours(right, rng)}
    sides = {side: [{"role": "assistant", "content": answer}] for side, answer in answers.items()}
    return {"prompt": [_question(digits)], **sides}


def _row(digits: str) -> dict[str, Any]:
    return {"messages": [_question(digits)], "answer": _sorted(digits)}
