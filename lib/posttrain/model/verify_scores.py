"""A model that only scores, held against transformers' ...ForSequenceClassification class of the same folder."""

from pathlib import Path
from typing import Any

import torch

from posttrain.errors import ModelError
from posttrain.model.forward import forward
from posttrain.model.heads import NATIVE
from posttrain.model.load import FROM_FOLDER, load_decoder
from posttrain.model.verify import TOLERANCE, batch_of, random_documents


@torch.no_grad()
def compare_scores(folder: str | Path, *, seed: int = 0, num_docs: int = 6) -> dict[str, Any]:
    """Scores of random documents: ours packed in one batch, transformers' a document at a time, float32 on the CPU.

    Returns:
        max_abs_diff.

    Raises:
        ModelError: they differ by more than TOLERANCE.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kwargs: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"} | FROM_FOLDER
    model, theirs = load_decoder(folder), AutoModelForSequenceClassification.from_pretrained(folder, **kwargs).eval()
    documents = random_documents(model, seed=seed, num_docs=num_docs, without=theirs.config.pad_token_id)
    ours = forward(model, batch_of(documents), with_logprobs=False).scores[NATIVE]
    expected = torch.cat([theirs(torch.tensor([ids[:-1]])).logits.float() for ids in documents])
    worst = float((ours - expected).abs().max())
    if not worst <= TOLERANCE:
        raise ModelError(f"{folder}: scores differ from transformers by {worst:.2e}, allowed {TOLERANCE:.0e}")
    return {"max_abs_diff": worst}
