"""Triton kernel of model/float8.py: a matrix and its transpose in float8, of one read. Empty without Triton."""

from importlib.util import find_spec

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
