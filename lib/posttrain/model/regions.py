"""Which elements of a checkpoint tensor go where in the part of a parameter that this rank holds.

In: a Piece, the two shapes and the local region. Out: Copies, which can be cut along either side, and
boxes: contiguous runs of a checkpoint tensor, no larger than a limit. Index arithmetic only; no tensor is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from torch import Tensor

from posttrain.model.weights import Index, Piece

Spans = tuple[int | range, ...]
"""An index of every dimension: a number drops it, a range keeps it."""
Box = tuple[range, ...]
"""A contiguous run of elements: spans of length 1, then any one, then whole dimensions."""


@dataclass(frozen=True, slots=True)
class Copy:
    """target[of the parameter] = source[of the checkpoint tensor], its last two dimensions swapped if transposed."""

    target: Spans
    source: Spans
    transposed: bool

    def within(self, side: Literal["target", "source"], bounds: Sequence[range]) -> "Copy | None":
        """The part whose elements lie in `bounds`, one for each dimension of that side; None when there is none."""
        copy = self
        for dim, bound in enumerate(bounds):
            span = getattr(copy, side)[dim]
            if isinstance(span, int):
                if span not in bound:
                    return None
                continue
            first = max(0, -((span.start - bound.start) // span.step))
            last = min(len(span), -((span.start - bound.stop) // span.step))
            if first >= last:
                return None
            if (first, last) != (0, len(span)):
                copy = copy._keep(side, dim, slice(first, last))
        return copy

    def put(self, target: Tensor, source: Tensor, *, target_from: Sequence[int], source_from: Sequence[int]) -> None:
        """Copy between tensors that begin at these offsets of the parameter and of the checkpoint tensor."""
        value = source[_shifted(self.source, source_from)]
        target[_shifted(self.target, target_from)].copy_(value.mT if self.transposed else value)

    def target_view(self, target: Tensor, *, target_from: Sequence[int]) -> Tensor:
        """The elements of the target that are written."""
        return target[_shifted(self.target, target_from)]

    def covers(self, box: Box) -> bool:
        """Whether the source is every element of `box`, in its order."""
        return not self.transposed and all(range_of(a) == b for a, b in zip(self.source, box, strict=True))

    def _keep(self, side: str, dim: int, kept: slice) -> "Copy":
        mine, theirs = _kept_dims(self.target), _kept_dims(self.source)
        if self.transposed:
            theirs = [*theirs[:-2], theirs[-1], theirs[-2]]
        at = (mine if side == "target" else theirs).index(dim)
        return replace(self, target=_cut(self.target, mine[at], kept), source=_cut(self.source, theirs[at], kept))


def copy_of(piece: Piece, shape: Sequence[int], their_shape: Sequence[int]) -> Copy:
    """A Piece with every dimension spelled out: `shape` of the whole parameter, `their_shape` once it is decoded."""
    copy = Copy(_spans(piece.region, shape), _spans(piece.index, their_shape), piece.transposed)
    target = [len(span) for span in copy.target if isinstance(span, range)]
    source = [len(span) for span in copy.source if isinstance(span, range)]
    if piece.transposed:
        source[-2:] = source[:-3:-1]
    assert target == source, f"{piece} maps {source} to {target}"
    return copy


def boxes(wanted: Box, shape: Sequence[int], limit: int) -> Iterator[Box]:
    """Cut a region into contiguous boxes of at most `limit` elements, in order; trailing dimensions are taken whole.

    A leading dimension of which one element is wanted costs nothing beside it: the cut goes on below.
    """

    def cut(prefix: Box) -> Iterator[Box]:
        dim = len(prefix)
        span, row, last = wanted[dim], prod(shape[dim + 1 :]), dim + 1 == len(shape)
        if (len(span) == 1 and not last) or row > limit:
            for element in span:
                yield from cut((*prefix, range(element, element + 1)))
            return
        step = max(limit // max(row, 1), 1)
        rest = tuple(range(size) for size in shape[dim + 1 :])
        for start in range(span.start, span.stop, step):
            yield (*prefix, range(start, min(start + step, span.stop)), *rest)

    yield from cut(())


def hull(copies: Sequence[Copy]) -> Box:
    """The smallest region of the checkpoint tensor that holds the sources of all copies."""
    sides = zip(*([range_of(span) for span in copy.source] for copy in copies), strict=True)
    return tuple(range(min(each.start for each in side), max(each[-1] for each in side) + 1) for side in sides)


def first_element(box: Box, shape: Sequence[int]) -> int:
    """Where a box begins in the tensor, elements in row-major order."""
    at = 0
    for span, size in zip(box, shape, strict=True):
        at = at * size + span.start
    return at


def range_of(span: int | range) -> range:
    """A span as a range, whether or not it keeps its dimension."""
    return range(span, span + 1) if isinstance(span, int) else span


def _spans(index: Index, shape: Sequence[int]) -> Spans:
    index = (*index, *[slice(None)] * (len(shape) - len(index)))
    return tuple(
        range(*each.indices(size)) if isinstance(each, slice) else each for each, size in zip(index, shape, strict=True)
    )


def _shifted(spans: Spans, offsets: Sequence[int]) -> Index:
    pairs = zip(spans, offsets, strict=True)
    return tuple(
        span - offset if isinstance(span, int) else slice(span.start - offset, span[-1] + 1 - offset, span.step)
        for span, offset in pairs
    )


def _kept_dims(spans: Spans) -> list[int]:
    return [dim for dim, span in enumerate(spans) if isinstance(span, range)]


def _cut(spans: Spans, dim: int, kept: slice) -> Spans:
    span = spans[dim]
    assert isinstance(span, range)
    return (*spans[:dim], span[kept], *spans[dim + 1 :])
