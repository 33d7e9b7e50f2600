"""Rewards of your own: what a completion of the row's prompt is worth.

A function gets the row with all its fields, so a row may carry an answer, a test or a price. It gives a number, or a
dict of named parts; whatever it raises drops the group and is counted, and is never a reward of 0.
"""


def right_digits(row: dict, completion: str) -> float:
    """The share of places that hold the right digit: more signal than right or wrong."""
    answer = row["answer"]
    return sum(a == b for a, b in zip(answer, completion, strict=False)) / max(len(answer), len(completion), 1)


def short(row: dict, completions: list[str]) -> list[float]:
    """All completions of a prompt at once, by the name `completions`: the shortest of the group gets 1."""
    shortest = min(map(len, completions))
    return [1.0 if len(text) == shortest else 0.0 for text in completions]
