"""Attention inside documents: every backend that runs here against a loop over documents in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain.data.batch import collate
from posttrain.data.context import chunks, with_share
from posttrain.data.sample import shift
from posttrain.data.types import Batch, Pack
from posttrain.model import attention
from posttrain.model.attention import Layout, attend, default_backend
from posttrain.model.attention_flex import BLOCK, block_mask


def batch_of(lengths: list[int]) -> Batch:
    samples = tuple(shift([1] * (n + 1), [1.0] * (n + 1)) for n in lengths)
    return collate(Pack(samples=samples, num_units=len(samples)), pack_tokens=sum(lengths) + 5)


def plain(q: Tensor, k: Tensor, v: Tensor, batch: Batch, window: int | None, scale: float, sinks: Tensor | None):
    """A loop over documents and heads."""
    out = torch.zeros_like(q)
    group, bounds = q.shape[1] // k.shape[1], batch.cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        for head in range(q.shape[1]):
            scores = q[start:end, head] @ k[start:end, head // group].T * scale
            index = torch.arange(end - start)
            distance = index[:, None] - index[None, :]
            hidden = (distance < 0) | (distance >= window if window else False)
            scores = scores.masked_fill(hidden, -torch.inf)
            if sinks is not None:
                scores = torch.cat((scores, sinks[head].expand(end - start, 1)), dim=1)
            share = scores.softmax(-1)[:, : end - start]
            out[start:end, head] = share @ v[start:end, head // group]
    return out


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_attention_and_its_gradients_equal_a_loop_over_documents(heads, kv_heads, window, with_sinks):
    torch.manual_seed(0)
    batch = batch_of([9, 1, 17, 4])
    size = len(batch.input_ids)
    leaves = [torch.randn(size, n, 8, dtype=torch.float64, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
    sinks = torch.randn(heads, dtype=torch.float64, requires_grad=True) if with_sinks else None
    leaves += [sinks] if sinks is not None else []
    layout = Layout.of(batch, backend="sdpa", windows={window})
    expected = plain(*leaves[:3], batch, window, 0.3, sinks)
    got = attend(*leaves[:3], layout, window=window, scale=0.3, sinks=sinks)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 3, 60])
def test_flex_equals_the_rows_of_sdpa(window, with_sinks):
    torch.manual_seed(0)
    batch = batch_of([90, 1, 170, 40])
    q, k, v = (torch.randn(len(batch.input_ids), n, 8) for n in (4, 2, 2))
    sinks = torch.randn(4) if with_sinks else None
    both = [
        attend(q, k, v, Layout.of(batch, backend=name, windows={window}), window=window, scale=0.3, sinks=sinks)
        for name in ("flex", "sdpa")
    ]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 3, 60])
@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_ranks_that_share_tokens_find_together_what_one_finds(backend, window, with_sinks):
    torch.manual_seed(0)
    batch = batch_of([90, 1, 170, 42])
    size = len(batch.input_ids)
    q, k, v = (torch.randn(size, n, 8, dtype=torch.float64) for n in (4, 2, 2))
    sinks = torch.randn(4, dtype=torch.float64) if with_sinks else None
    expected, found = plain(q, k, v, batch, window, 0.3, sinks), torch.zeros_like(q)
    for rank in range(2):
        shared = with_share(batch, rank=rank, ranks=2)
        mine, layout = shared.share.token_idx, Layout.of(shared, backend=backend, windows={window})
        found[mine] = attend(q[mine], k, v, layout, window=window, scale=0.3, sinks=sinks)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_segments_say_which_keys_a_kernel_that_aligns_masks_at_their_ends_may_see(ranks, window):
    """The kernel itself runs on GPUs only (tests/gpu/test_model_gpu.py): here its rule, in a loop over segments."""
    batch = batch_of([9, 1, 17, 4, 4])
    size = len(batch.input_ids)
    q, k, v = (torch.randn(size, 1, 8, dtype=torch.float64) for _ in range(3))
    expected = plain(q, k, v, batch, window, 0.3, None)
    for rank in range(ranks):
        shared = with_share(batch, rank=rank, ranks=ranks)
        layout = Layout.of(shared, backend="varlen", windows={window})
        mine = torch.arange(size) if shared.share is None else shared.share.token_idx
        assert sum(run.queries for run in layout.segments) == len(mine)
        for run, part in zip(layout.segments, mine.split([run.queries for run in layout.segments]), strict=True):
            bounds = zip(pairwise(run.cu_queries.tolist()), pairwise(run.cu_keys.tolist()), strict=True)
            for (first, last), (start, end) in bounds:
                assert end <= run.keys and end - start <= int(layout.longest)
                for number in range(first, last):
                    sees = range(start, end - (last - 1 - number))
                    sees = sees if window is None else sees[-window:]
                    share = (q[part[number], 0] @ k[sees, 0].T * 0.3).softmax(-1)
                    torch.testing.assert_close(share @ v[sees, 0], expected[part[number], 0])


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.sampled_from([1, 2, 127, 128, 129, 5000])),
    rank=st.sampled_from([None, 0, 1]),
)
def test_the_block_mask_says_of_every_block_whether_none_some_or_all_is_seen(lengths, window, rank):
    lengths[-1] += -sum(lengths) % 4  # for two ranks
    starts = torch.from_numpy(np.repeat(np.cumsum([0, *lengths[:-1]]), lengths))
    size = len(starts)
    index = torch.arange(size)
    seen = (index[None, :] >= starts[:, None]) & (index[None, :] <= index[:, None])
    if window is not None:
        seen &= index[:, None] - index[None, :] < window
    queries = None
    if rank is not None:
        queries = torch.cat([index[start:end] for start, end in chunks(size, rank=rank, ranks=2)])
        seen = seen[queries]
    mask = block_mask(starts, window, queries)
    count, columns = (-(-each // BLOCK) for each in seen.shape)
    listed = {name: torch.zeros(count, columns, dtype=torch.bool) for name in ("some", "all")}
    for kind, numbers, indices in (
        ("some", mask.kv_num_blocks, mask.kv_indices),
        ("all", mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(count):
            listed[kind][row, indices[0, 0, row, : numbers[0, 0, row]].long()] = True
    for row in range(count):
        for column in range(columns):
            block = seen[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
            assert listed["all"][row, column] <= block.all(), "a block called whole hides something"
            told = listed["all"][row, column] | listed["some"][row, column]
            # A block of queries from both ends of a pack may list keys between them, which its mask then hides.
            across = rank is not None and row == size // 4 // BLOCK
            assert told == block.any() or (across and told)
            assert not (listed["all"][row, column] & listed["some"][row, column])
    some, others = (torch.randint(0, high, (200,)) for high in seen.shape)
    zero = torch.tensor(0)
    assert torch.equal(mask.mask_mod(zero, zero, some, others), seen[some, others])


def test_the_fastest_backend_that_serves_a_model_is_taken(monkeypatch):
    gpu, half, whole = torch.device("cuda"), torch.bfloat16, torch.float32
    assert default_backend(torch.device("cpu"), half, compiled=True) == "sdpa"
    without, with_it = ["flex", "flex", "varlen", "sdpa"], ["flash4", "flex", "flash4", "sdpa"]
    for installed, expected in ((False, without), (True, with_it)):
        monkeypatch.setattr(attention, "has_flash4", lambda device, installed=installed: installed)
        given = [(half, True), (whole, True), (half, False), (whole, False)]
        assert [default_backend(gpu, dtype, compiled=compiled) for dtype, compiled in given] == expected
