"""The documents that benchmarks of training share: lengths by a seed, and tokens with something to learn in them.

Token ids are log-uniform over the vocabulary, as words of a text nearly are, so that a loss falls below its start
within a few steps and two curves can be told from two flat lines.
"""

from typing import Any

import numpy as np

LONGEST = 8192
WORKLOADS = {
    "W1": "lengths lognormal, median 350, sigma 1.2, in 16-8192",
    "W2": "95 % lengths lognormal, median 120, sigma 0.6; 5 % uniform 4096-8192",
}


def lengths(workload: str, count: int, *, seed: int, longest: int = LONGEST) -> np.ndarray:
    """[count] int64 tokens of each document; `longest` below 8192 makes all shorter, for small models."""
    rng = np.random.default_rng(seed)
    if workload == "W1":
        found = rng.lognormal(np.log(350), 1.2, count)
    else:
        short, long = rng.lognormal(np.log(120), 0.6, count), rng.uniform(4096, LONGEST, count)
        found = np.where(rng.random(count) < 0.95, short, long)
    return np.clip(found * (longest / LONGEST), 16, longest).astype(np.int64)


def documents(workload: str, count: int, *, seed: int, vocab: int, longest: int = LONGEST) -> list[np.ndarray]:
    """[n] int64 token ids of each of `count` documents."""
    rng = np.random.default_rng(seed + 1)
    return [
        np.exp(rng.uniform(0, np.log(vocab), length)).astype(np.int64)
        for length in lengths(workload, count, seed=seed, longest=longest)
    ]


def count_of(workload: str, tokens: int, *, seed: int, longest: int = LONGEST) -> int:
    """How many documents have at least `tokens` in all; none is shorter than 16."""
    sums = np.cumsum(lengths(workload, tokens // 16 + 1, seed=seed, longest=longest))
    return int(np.searchsorted(sums, tokens)) + 1


def packs_of(found: list[np.ndarray], pack_tokens: int) -> list[Any]:
    """The documents as a run packs them: window by window, every token but the first a target."""
    from posttrain.data.mixture import window_draws
    from posttrain.data.pack import pack
    from posttrain.data.sample import shift

    units = [(shift(ids, np.ones(len(ids))),) for ids in found]
    made, window = [], window_draws(pack_tokens)
    for start in range(0, len(units), window):
        made += pack(units[start : start + window], pack_tokens=pack_tokens)
    return made
