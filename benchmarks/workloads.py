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


def lengths(workload: str, tokens: int, *, seed: int, longest: int = LONGEST) -> list[int]:
    """Lengths of documents of at least `tokens` in all; `longest` below 8192 clips them for small models."""
    rng, found = np.random.default_rng(seed), []
    while sum(found) < tokens:
        if workload == "W1":
            length = rng.lognormal(np.log(350), 1.2)
        else:
            short, long, which = rng.lognormal(np.log(120), 0.6), rng.uniform(4096, LONGEST), rng.random()
            length = short if which < 0.95 else long
        found.append(int(np.clip(length, 16, longest)))
    return found


def documents(workload: str, tokens: int, *, seed: int, vocab: int, longest: int = LONGEST) -> list[np.ndarray]:
    """[n] int64 token ids of each document."""
    rng = np.random.default_rng(seed + 1)
    return [
        np.exp(rng.uniform(0, np.log(vocab), length)).astype(np.int64)
        for length in lengths(workload, tokens, seed=seed, longest=longest)
    ]


def packs_of(found: list[np.ndarray], pack_tokens: int) -> list[Any]:
    """The documents as a run packs them: window by window, every token but the first a target; draws number them."""
    from posttrain.data.mixture import WINDOW
    from posttrain.data.pack import pack
    from posttrain.data.sample import shift

    units = [(shift(ids, np.ones(len(ids))),) for ids in found]
    made = []
    for start in range(0, len(units), WINDOW):
        part = units[start : start + WINDOW]
        made += pack(part, pack_tokens=pack_tokens, draws=range(start, start + len(part)))
    return made
