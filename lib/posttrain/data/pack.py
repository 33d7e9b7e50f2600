"""Units become packs of at most T tokens: no unit split, lost or repeated."""

from collections.abc import Sequence

from posttrain.data.types import Pack, Unit
from posttrain.errors import DataError


def pack(units: Sequence[Unit], *, pack_tokens: int) -> list[Pack]:
    """Best-fit-decreasing packing, deterministic in the order and lengths of `units`.

    Longest units are placed first, each into the fullest pack that still takes it.
    Within a pack units keep their input order.

    Raises:
        DataError: a unit is longer than a pack.
    """
    sizes = [sum(len(sample) for sample in unit) for unit in units]
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(units)), key=lambda i: (-sizes[i], i)):
        if sizes[index] > pack_tokens:
            raise DataError(
                f"unit {index} has {sizes[index]} tokens and a pack holds {pack_tokens}; "
                f"raise data.pack_tokens to at least {sizes[index]} or filter the source"
            )
        fits = [(room, b) for b, room in enumerate(free) if room >= sizes[index]]
        if fits:
            _, chosen = min(fits)
        else:
            chosen = len(bins)
            bins.append([])
            free.append(pack_tokens)
        bins[chosen].append(index)
        free[chosen] -= sizes[index]
    return [
        Pack(samples=tuple(sample for i in sorted(members) for sample in units[i]), num_units=len(members))
        for members in bins
    ]


def deal(packs: Sequence[Pack], *, ranks: int) -> list[list[Pack]]:
    """Give every rank its packs so that token counts balance: largest first, to the least loaded rank.

    A rank may get none when there are fewer packs than ranks; its gradient is then zero.
    """
    shares: list[list[Pack]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for index in sorted(range(len(packs)), key=lambda i: (-packs[i].num_tokens, i)):
        rank = load.index(min(load))
        shares[rank].append(packs[index])
        load[rank] += packs[index].num_tokens
    return shares
