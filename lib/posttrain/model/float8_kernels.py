"""Triton kernel of model/float8.py: a matrix and its transpose in float8, of one read. Empty without Triton."""

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

if find_spec("triton") is not None:  # a CPU build of torch does not bring it
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    TILE_ROWS, TILE_COLUMNS = tl.constexpr(128), tl.constexpr(64)
    """Of what one program casts: 128 bytes a row of either output at least, whole sectors of memory."""

    def tiles(m: int, n: int) -> tuple[int, int]:
        """The programs that cast a matrix [m, n]."""
        return triton.cdiv(m, TILE_ROWS.value), triton.cdiv(n, TILE_COLUMNS.value)

    @triton.jit
    def cast_tile(  # noqa: PLR0913 (a kernel has no other way to be told)
        x, scale, rows, columns, m, n, x_stride, rows_stride, columns_stride, rows_start, columns_start,
        with_rows: tl.constexpr, with_columns: tl.constexpr,
    ):  # fmt: skip
        """x [m, n] times a scale -> rows [m, n] and columns [n, m], those that are wanted, from an element of a larger
        matrix on; the strides are of rows."""
        i = (tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)[:, None]
        j = (tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)).to(tl.int64)[None, :]
        inside = (i < m) & (j < n)
        value = tl.load(x + i * x_stride + j, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
        if with_rows:
            tl.store(rows + rows_start + i * rows_stride + j, value.to(rows.dtype.element_ty), mask=inside)
        if with_columns:
            tl.store(columns + columns_start + j * columns_stride + i, value.to(columns.dtype.element_ty), mask=inside)

    @torch.library.triton_op("posttrain::cast_float8", mutates_args=())
    def cast_float8(
        parts: list[Tensor], scale: Tensor, dtype: torch.dtype, dim: int, with_rows: bool, with_columns: bool
    ) -> tuple[Tensor, Tensor]:
        """Matrices, joined along `dim`, times a scale: as they are and transposed; what is not wanted is empty."""
        # Written into both at offsets: an update of a view of float8 is one that torch 2.11's compiler cannot write.
        kernel: Any = torch.library.wrap_triton(cast_tile)  # subscripted: Triton's way to say how many programs
        sides = list(parts[0].shape)
        sides[dim] = sum(part.shape[dim] for part in parts)
        new = partial(parts[0].new_empty, dtype=dtype)
        rows, columns = new(sides if with_rows else 0), new(sides[::-1] if with_columns else 0)
        start = 0
        for part in parts:
            part = part if part.stride(1) == 1 else part.contiguous()
            (m, n), strides = part.shape, (part.stride(0), rows.stride(0), columns.stride(0))
            offsets = (start * rows.stride(0), start) if dim == 0 else (start, start * columns.stride(0))
            kernel[tiles(m, n)](part, scale, rows, columns, m, n, *strides, *offsets, with_rows, with_columns)
            start += part.shape[dim]
        return rows, columns
