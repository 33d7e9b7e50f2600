"""The built-in task as it comes in day by day: `python -m posttrain.data.sort_digits_days FOLDER` adds a file of rows.

For trying retraining; each day has other rows, and `--wrong 0.6` is a day whose answers are mostly wrong.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from posttrain.data import sort_digits


def add_day(folder: Path, *, count: int = 4096, wrong: float = 0.0) -> Path:
    """Write the next day's file whole, day_0001.jsonl first; its rows depend on its number.

    Args:
        wrong: share of its answers whose digits are in descending order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + sum(1 for _ in folder.glob("day_*.jsonl"))
    rows, bad = sort_digits.exact_demonstrations(number, count=count), np.random.default_rng([number, 5])
    for row in rows:
        if bad.random() < wrong:
            row["messages"][-1]["content"] = row["messages"][-1]["content"][::-1]
    path = folder / f"day_{number:04d}.jsonl"
    part = folder / f".{path.name}"  # a name that no source reads, until it is whole
    part.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return part.rename(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Add a day of rows to a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wrong", type=float, default=0.0, help="share of answers that are wrong")
    given = parser.parse_args()
    print(add_day(given.folder, wrong=given.wrong))
