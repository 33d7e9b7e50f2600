"""The gate between our decoder and the world: the same logits as transformers, or an error."""

from pathlib import Path

import numpy as np
import torch

from posttrain.data.batch import collate
from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.errors import ModelError
from posttrain.model.forward import logits
from posttrain.model.load import load_decoder

TOLERANCE = 1e-4
"""Largest absolute difference of float32 logits that still counts as the same model."""


@torch.no_grad()
def compare_with_transformers(folder: str | Path, *, seed: int = 0, num_docs: int = 6) -> dict[str, float]:
    """Open `folder` with both implementations and compare logits on random documents.

    Ours sees the documents packed into one flat batch, transformers one at a time, so
    the comparison also proves the document boundaries. float32 on CPU.

    Returns:
        max_abs_diff and top1_agreement over all positions.

    Raises:
        ModelError: max_abs_diff exceeds TOLERANCE.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = load_decoder(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, min(64, model.config.max_length), num_docs)
    documents = [rng.integers(0, model.config.vocab_size, n).tolist() for n in lengths]
    samples = tuple(shift(ids, [1.0] * len(ids)) for ids in documents)
    batch = collate(Pack(samples=samples, num_units=num_docs), pack_tokens=int(sum(lengths)) + 7)
    ours = logits(model, batch)
    start, worst, agree, total = 0, 0.0, 0, 0
    for sample in samples:
        expected = theirs(torch.from_numpy(sample.input_ids.astype(np.int64))[None]).logits[0].float()
        got = ours[start : start + len(sample)]
        start += len(sample)
        worst = max(worst, float((got - expected).abs().max()))
        agree += int((got.argmax(-1) == expected.argmax(-1)).sum())
        total += len(sample)
    if not worst <= TOLERANCE:
        raise ModelError(f"{folder}: logits differ from transformers by {worst:.2e}, allowed {TOLERANCE:.0e}")
    return {"max_abs_diff": worst, "top1_agreement": agree / total}
