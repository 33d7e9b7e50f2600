"""Rows of your own: a function of the run's seed, called once, before anything is trained.

Named in config.yaml as my_data:train. What it returns is checked as a file's rows are; any format of docs/data.md does.
"""

import random


def train(seed: int) -> list[dict]:
    """Sums, in the format `messages`."""
    rng = random.Random(seed)
    return [_row(rng.randint(0, 99), rng.randint(0, 99)) for _ in range(500)]


def held_out(seed: int) -> list[dict]:
    """Sums that training never asks: the first number is above 99."""
    rng = random.Random(1)
    return [_row(rng.randint(100, 199), rng.randint(0, 99)) for _ in range(32)]


def _row(a: int, b: int) -> dict:
    question, answer = f"{a}+{b}?", str(a + b)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
