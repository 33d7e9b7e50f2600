"""Triton kernels of model/softmax.py: one program a row, float32 inside. For CUDA; empty without Triton."""

from importlib.util import find_spec

if find_spec("triton") is not None:  # a CPU build of torch does not bring it
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit
    def stats(logits, lse, entropy, stride, vocab_size, inverse_temperature, BLOCK: tl.constexpr):  # noqa: N803
        """log sum exp and entropy of each row, in one pass with a running maximum (arXiv:1805.02867).

        The maximum is the row's, not a lane's: one exp an element, where two would cost more than the memory does.
        """
        row = tl.program_id(0).to(tl.int64)
        lanes = tl.arange(0, BLOCK)
        top = -1.0e30
        mass = tl.zeros((BLOCK,), tl.float32)
        weighted = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            seen = start + lanes < vocab_size
            z = tl.load(logits + row * stride + start + lanes, mask=seen, other=float("-inf")).to(tl.float32)
            z = z * inverse_temperature
            new_top = tl.maximum(top, tl.max(z, axis=0))
            shrink = tl.exp(top - new_top)
            term = tl.exp(z - new_top)
            mass = mass * shrink + term
            weighted = weighted * shrink + tl.where(seen, term * z, 0.0)
            top = new_top
        total = tl.sum(mass, axis=0)
        value = top + tl.log(total)
        tl.store(lse + row, value)
        tl.store(entropy + row, value - tl.sum(weighted, axis=0) / total)

    @triton.jit
    def gradient(logits, lse, scale, stride, vocab_size, width, inverse_temperature, BLOCK: tl.constexpr):  # noqa: N803
        """logits <- -scale * softmax, and zero from vocab_size to width."""
        row = tl.program_id(0).to(tl.int64)
        lanes = tl.arange(0, BLOCK)
        shift = tl.load(lse + row)
        factor = -tl.load(scale + row)
        for start in range(0, width, BLOCK):
            where = logits + row * stride + start + lanes
            inside = start + lanes < width
            z = tl.load(where, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
            value = tl.where(start + lanes < vocab_size, factor * tl.exp(z - shift), 0.0)
            tl.store(where, value.to(logits.dtype.element_ty), mask=inside)
