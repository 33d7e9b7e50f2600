"""Draw number -> where the row is: pure functions of seed and number, epochs included, without any state.

All bits come from a counter-based generator (Philox). BlockOrder sorts them itself, so
that its order does not depend on the machine or on numpy's version.
"""

from functools import lru_cache

import numpy as np

GROUP_BYTES = 32 * 1024 * 1024
"""Rows are shuffled within groups of random blocks of about this size: what a reader must hold at once."""


def permutation(count: int, *key: int) -> np.ndarray:
    """[count] int64, 0 … count-1 in an order that depends on `key` alone."""
    return np.argsort(_bits(count, key), kind="stable")


def uniforms(count: int, *key: int) -> np.ndarray:
    """[count] float64 in [0, 1), a function of `key` alone."""
    return (_bits(count, key) >> np.uint64(11)) * 2.0**-53


def draw(n: int, *, seed: int, num_rows: int) -> int:
    """Row of draw n. Every epoch of num_rows draws visits each row once, in its own order."""
    return int(_epoch_order(num_rows, seed, n // num_rows)[n % num_rows])


class BlockOrder:
    """The order of one source's rows when only whole blocks can be read: permuted blocks, then permuted rows
    within groups of consecutive permuted blocks.

    Every epoch visits each row once; reading it in order touches each block once.
    """

    def __init__(self, block_rows: np.ndarray, block_bytes: np.ndarray, *, seed: int, source: int):
        """
        Args:
            block_rows: [B] rows of each block.
            block_bytes: [B] bytes of each block in memory.
        """
        self.block_rows, self.block_bytes = np.asarray(block_rows, np.int64), np.asarray(block_bytes, np.int64)
        self.key = (seed, source)
        self.num_rows = int(self.block_rows.sum())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._group = lru_cache(maxsize=4)(self._make_group)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks and rows within them, both [N] int64, of draws `positions` [N] of this source."""
        positions = np.asarray(positions, np.int64)
        blocks, rows = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(positions // self.num_rows):
            _, group_first = self._epoch(int(epoch))
            here = np.flatnonzero(positions // self.num_rows == epoch)
            offsets = positions[here] % self.num_rows
            groups = np.searchsorted(group_first, offsets, side="right") - 1
            for group in np.unique(groups):
                chosen = groups == group
                at = self._group(int(epoch), int(group))[:, offsets[chosen] - group_first[group]]
                blocks[here[chosen]], rows[here[chosen]] = at
        return blocks, rows

    def group_after(self, position: int) -> np.ndarray:
        """Blocks of the group that follows the one `position` is in: what to read ahead."""
        epoch, offset = divmod(int(position), self.num_rows)
        _, group_first = self._epoch(epoch)
        group = int(np.searchsorted(group_first, offset, side="right"))
        if group == len(group_first):
            epoch, group = epoch + 1, 0
        return np.unique(self._group(epoch, group)[0])

    def _make_epoch(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Blocks of every group, and the epoch's position at which each group begins."""
        groups: list[list[int]] = []
        held = GROUP_BYTES
        for block in permutation(len(self.block_rows), *self.key, epoch).tolist():
            if held >= GROUP_BYTES:
                groups.append([])
                held = 0
            groups[-1].append(block)
            held += int(self.block_bytes[block])
        sizes = [int(self.block_rows[group].sum()) for group in groups]
        return [np.array(group) for group in groups], np.cumsum([0, *sizes[:-1]])

    def _make_group(self, epoch: int, group: int) -> np.ndarray:
        """[2, rows]: block and row of every position of a group."""
        blocks = self._epoch(epoch)[0][group]
        sizes = self.block_rows[blocks]
        of_block = np.repeat(blocks, sizes)
        in_block = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.stack([of_block, in_block])[:, permutation(len(of_block), *self.key, epoch, 1 + group)]


def _bits(count: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


@lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)
