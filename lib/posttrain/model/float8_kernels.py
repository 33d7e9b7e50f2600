"""Triton kernel of model/float8.py: a matrix and its transpose in float8, of one read. Empty without Triton."""

from importlib.util import find_spec

if find_spec("triton") is not None:  # a CPU build of torch does not bring it
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit
    def cast_tile(
        x, scale, rows, columns, m, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr
    ):  # noqa: N803, PLR0913
        """x [m, n] times a scale -> rows [m, n] and columns [n, m]; one program a tile of M x N."""
        i = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None]
        j = (tl.program_id(1) * N + tl.arange(0, N)).to(tl.int64)[None, :]
        inside = (i < m) & (j < n)
        value = tl.load(x + i * n + j, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
        if ROWS:
            tl.store(rows + i * n + j, value.to(rows.dtype.element_ty), mask=inside)
        if COLUMNS:
            tl.store(columns + j * m + i, value.to(columns.dtype.element_ty), mask=inside)
