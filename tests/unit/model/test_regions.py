"""Cuts of a copy between a parameter and a checkpoint tensor miss no element and take none twice."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.model.regions import boxes, copy_of, first_element, hull
from posttrain.model.weights import Piece


@st.composite
def spans(draw, size: int) -> range:
    start = draw(st.integers(0, size - 1))
    return range(start, draw(st.integers(start + 1, size)))


@settings(deadline=None)
@given(st.data())
def test_boxes_cover_a_region_once_and_are_contiguous(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    wanted = tuple(data.draw(spans(size)) for size in shape)
    limit = data.draw(st.integers(1, 40))
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    seen: list[int] = []
    for box in boxes(wanted, shape, limit):
        inside = tensor[tuple(slice(span.start, span.stop) for span in box)].flatten()
        first = first_element(box, shape)
        assert inside.tolist() == list(range(first, first + len(inside))) and len(inside) <= limit
        seen += inside.tolist()
    assert len(seen) == len(set(seen))
    assert set(tensor[tuple(slice(span.start, span.stop) for span in wanted)].flatten().tolist()) <= set(seen)


@settings(deadline=None)
@given(st.data())
def test_a_parameter_put_together_from_boxes_is_the_pieces_of_the_whole(data):
    """Against plain indexing: stacked experts, gate and up rows interleaved or not, transposed or not."""
    experts, rows, columns = (data.draw(st.integers(1, 5)) for _ in range(3))
    transposed, interleaved = data.draw(st.booleans()), data.draw(st.booleans())
    theirs_shape = (experts, columns, 2 * rows) if transposed else (experts, 2 * rows, columns)
    theirs = torch.arange(torch.Size(theirs_shape).numel()).view(theirs_shape)
    every, whole, made = slice(None), torch.full((experts, 2 * rows, columns), -1), []
    for half in range(2):
        picked = slice(half, None, 2) if interleaved else slice(half * rows, (half + 1) * rows)
        index = (every, every, picked) if transposed else (every, picked)
        region = (every, slice(half * rows, (half + 1) * rows))
        made.append(Piece(theirs="t", region=region, index=index, transposed=transposed))
        whole[region] = theirs[index].mT if transposed else theirs[index]
    region = tuple(data.draw(spans(size)) for size in whole.shape)
    local = torch.full([len(span) for span in region], -2)
    copies = [copy_of(piece, whole.shape, theirs_shape).within("target", region) for piece in made]
    copies = [copy for copy in copies if copy]
    for box in boxes(hull(copies), theirs_shape, data.draw(st.integers(1, 30))):
        values = theirs[tuple(slice(span.start, span.stop) for span in box)].clone()
        for copy in copies:
            if part := copy.within("source", box):
                starts = [span.start for span in region], [span.start for span in box]
                part.put(local, values, target_from=starts[0], source_from=starts[1])
    assert torch.equal(local, whole[tuple(slice(span.start, span.stop) for span in region)])


@settings(deadline=None)
@given(st.integers(1, 4), st.data())
def test_one_expert_of_many_fills_its_place(experts: int, data):
    expert, theirs = data.draw(st.integers(0, experts - 1)), torch.arange(12).view(3, 4)
    copy = copy_of(Piece(theirs="t", region=(expert, slice(2, 5))), (experts, 6, 4), (3, 4))
    region = (data.draw(spans(experts)), data.draw(spans(6)), data.draw(spans(4)))
    local = torch.full([len(span) for span in region], -1)
    expected = torch.full((experts, 6, 4), -1)
    expected[expert, 2:5] = theirs
    if part := copy.within("target", region):
        assert not part.transposed
        part.put(local, theirs, target_from=[span.start for span in region], source_from=[0, 0])
    assert torch.equal(local, expected[tuple(slice(span.start, span.stop) for span in region)])
