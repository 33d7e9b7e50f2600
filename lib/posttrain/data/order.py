"""Global draw n -> row index: a pure function of (seed, number of rows, n), epochs included. No state."""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def _permutation(seed: int, num_rows: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)


def draw(n: int, *, seed: int, num_rows: int) -> int:
    """Row of draw n. Every epoch of num_rows draws visits each row once, in its own order."""
    return int(_permutation(seed, num_rows, n // num_rows)[n % num_rows])
