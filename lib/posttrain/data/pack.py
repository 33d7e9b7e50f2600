"""Units become packs of at most T tokens, and packs are dealt to ranks: nothing split, lost or repeated."""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

from posttrain.data.types import Pack, Unit
from posttrain.errors import DataError

LONG_SHARE = 4
"""A unit of T / 4 and more is hard to place and goes first; measured by benchmarks/packing_fill.py."""


def pack(units: Sequence[Unit], *, pack_tokens: int, draws: Sequence[int] = ()) -> list[Pack]:
    """Best-fit packing, deterministic in the order and lengths of `units`.

    Within a pack units keep their input order.

    Args:
        draws: draw number of each unit, kept with its pack; none if the units have none.

    Raises:
        DataError: a unit is longer than a pack.
    """
    return [
        Pack(
            samples=tuple(sample for i in members for sample in units[i]),
            num_units=len(members),
            draws=tuple(draws[i] for i in members) if draws else (),
        )
        for members in plan([sum(map(len, unit)) for unit in units], pack_tokens=pack_tokens)
    ]


def plan(sizes: Sequence[int], *, pack_tokens: int) -> list[list[int]]:
    """Which units share a pack, from their token counts alone: indices, ascending within a pack.

    The long ones first, longest before shorter; then the others in their own order. Each goes into the fullest pack
    that still takes it (of equals the first opened). Pure best-fit-decreasing would sort all by length, so that a
    pack holds documents of one length and a global batch is no fair sample: benchmarks/packing_fill.py.

    Raises:
        DataError: a unit is longer than a pack.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, bin), sorted; at most one entry a bin
    shortest_long = pack_tokens // LONG_SHARE
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i] if sizes[i] >= shortest_long else 0):
        size = sizes[index]
        if size > pack_tokens:
            raise DataError(
                f"unit {index} has {size} tokens and a pack holds {pack_tokens}; "
                f"raise data.pack_tokens to at least {size}, or choose data.over_long: drop, truncate or split"
            )
        at = bisect_left(free, (size, -1))
        if at < len(free):
            room, chosen = free.pop(at)
        else:
            room, chosen = pack_tokens, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if room > size:
            insort(free, (room - size, chosen))
    return [sorted(members) for members in bins]


def fill(packs: Sequence[Pack], *, pack_tokens: int) -> float:
    """Share of the packs' positions that hold a token."""
    return sum(pack.num_tokens for pack in packs) / (len(packs) * pack_tokens)


def deal(packs: Sequence[Pack], *, ranks: int, cost: Callable[[Pack], float]) -> list[list[Pack]]:
    """Give every rank its packs so that costs balance: dearest first, to the least loaded rank that has room.

    Ranks get equally many packs, or one less; with fewer packs than ranks some get none, and their gradient is
    zero.
    """
    shares: list[list[Pack]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    most = -(-len(packs) // ranks)
    full = ranks if len(packs) % ranks == 0 else len(packs) % ranks
    costs = [cost(pack) for pack in packs]
    for index in sorted(range(len(packs)), key=lambda i: (-costs[i], i)):
        # Only `full` ranks may hold `most` packs; the others stop one earlier.
        at_most = sum(len(share) == most for share in shares)
        open_ranks = [r for r in range(ranks) if len(shares[r]) < (most if at_most < full else most - 1)]
        rank = min(open_ranks, key=lambda r: (load[r], r))
        shares[rank].append(packs[index])
        load[rank] += costs[index]
    return shares


def attention_cost(pack: Pack, *, linear: float, quadratic: float) -> float:
    """FLOPs of a pack, up to a factor: `linear` a token, `quadratic` a pair of positions of one document."""
    return sum(linear * len(sample) + quadratic * len(sample) ** 2 for sample in pack.samples)
