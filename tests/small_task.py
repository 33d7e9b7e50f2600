"""The built-in task with few rows, and rewards that fail in every way a reward can."""

import os
import time

from posttrain.data import sort_digits
from posttrain.data.types import Row


def demonstrations(seed: int) -> list[Row]:
    return sort_digits.demonstrations(seed, count=200)


def exact(seed: int) -> list[Row]:
    return sort_digits.exact_demonstrations(seed, count=200)


def held_out_exact(seed: int) -> list[Row]:
    return sort_digits.held_out_demonstrations(seed, count=8)


def pairs(seed: int) -> list[Row]:
    return sort_digits.pairs(seed, count=200)


def held_out_pairs(seed: int) -> list[Row]:
    return sort_digits.held_out_pairs(seed, count=8)


def labelled(seed: int) -> list[Row]:
    """Right answers labelled true, wrong ones false."""
    return [
        {"messages": [*row["prompt"], *row[side]], "label": side == "chosen"}
        for row in sort_digits.pairs(seed, count=100)
        for side in ("chosen", "rejected")
    ]


def held_out_labelled(seed: int) -> list[Row]:
    return [
        {"messages": [*row["prompt"], *row[side]], "label": side == "chosen"}
        for row in held_out_pairs(seed)
        for side in ("chosen", "rejected")
    ]


def _sliced(rows: list[Row]) -> list[Row]:
    """The first three rows are short ones, as far as a slice is concerned."""
    return [row | {"slice": "short" if number < 3 else "long"} for number, row in enumerate(rows)]


def sliced_sft(seed: int) -> list[Row]:
    return _sliced(held_out_exact(seed))


def sliced_dpo(seed: int) -> list[Row]:
    return _sliced(held_out_pairs(seed))


def sliced_reward(seed: int) -> list[Row]:
    return _sliced([row | {"margin": float(number % 2)} for number, row in enumerate(held_out_pairs(seed))])


def rated(seed: int) -> list[Row]:
    """Answers rated for being right and for their length; every third lacks one rating or the other."""
    found = []
    for number, row in enumerate(labelled(seed)):
        ratings = {"right": 4.0 * row["label"], "long": float(len(row["messages"][-1]["content"])) / 2}
        missing = {0: "long", 1: "right"}.get(number % 3)
        found.append({"messages": row["messages"], **{k: v for k, v in ratings.items() if k != missing}})
    return found


def held_out_rated(seed: int) -> list[Row]:
    rows = held_out_labelled(seed)
    return [{"messages": row["messages"], "right": 4.0 * row["label"], "long": 3.0} for row in rows]


def prompts(seed: int) -> list[Row]:
    return sort_digits.prompts(seed, count=40)


def held_out(seed: int) -> list[Row]:
    return sort_digits.held_out(seed, count=8)


def reward(row: Row, completion: str) -> float:
    """An arbitrary function of the text, so that even an untrained model's groups carry signal."""
    return sum(completion.encode()) % 7 / 6


def constant(row: Row, completion: str) -> float:
    return 1.0


def varies_for_half_of_the_prompts(row: Row, completion: str) -> float:
    return reward(row, completion) if len(row["answer"]) % 2 else 0.5


def one_prompt_raises(row: Row, completion: str) -> float:
    if row == prompts(0)[0]:
        raise KeyError("no such field")
    return reward(row, completion)


def one_held_out_row_raises(row: Row, completion: str) -> float:
    if row == held_out(0)[0]:
        raise KeyError("no such field")
    return reward(row, completion)


def always_raises(row: Row, completion: str) -> float:
    raise RuntimeError("the verifier is down")


def hangs(row: Row, completion: str) -> float:
    time.sleep(3600)
    return 0.0


def kills_its_process(row: Row, completion: str) -> float:
    os._exit(3)


def not_a_number(row: Row, completion: str) -> float:
    return float("nan")


class Impatient:
    """A tracker that shortens what the driver waits for its store from minutes to seconds."""

    def start(self, facts):
        from posttrain import s3

        s3.BUDGET = s3.Budget(total_s=4.0)
        return 0

    def log(self, step, metrics):
        pass

    def text(self, step, name, text):
        pass

    def finish(self, status):
        pass


class DownTracker:
    """A tracker whose server is gone."""

    def start(self, facts):
        return 0

    def log(self, step, metrics):
        raise ConnectionError("no route to host")

    def text(self, step, name, text):
        raise ConnectionError("no route to host")

    def finish(self, status):
        raise ConnectionError("no route to host")
