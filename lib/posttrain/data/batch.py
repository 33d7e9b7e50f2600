"""A pack becomes a Batch of tensors. The only padding in the repository."""

from typing import Any

import numpy as np
import torch

from posttrain.data.types import Batch, Pack


def collate(pack: Pack, *, pack_tokens: int) -> Batch:
    """Lay the samples of `pack` end to end in [T]; the tail is zeros without loss.

    The tail counts as documents no longer than the longest real one, so that padding
    never widens the attention.

    `loss_idx` is computed here, on the host, so that the LM head sees only rows that
    carry loss and no device sync is needed to know their number.
    """
    lengths = [len(sample) for sample in pack.samples]
    longest = max(lengths)
    tail = pack_tokens - sum(lengths)
    assert tail >= 0, f"pack of {sum(lengths)} tokens exceeds pack_tokens={pack_tokens}"
    lengths += [min(longest, tail - start) for start in range(0, tail, longest)]

    def flat(name: str, dtype: type) -> np.ndarray:
        columns = [getattr(sample, name) for sample in pack.samples]
        return np.concatenate([*columns, np.zeros(tail, dtype)]).astype(dtype)

    mask = flat("loss_mask", np.float32)
    loss_idx = np.flatnonzero(mask)
    extra: dict[str, Any] = {
        name: torch.from_numpy(flat(name, np.float32)[loss_idx])
        for name in ("sampler_logprobs", "advantages", "ref_logprobs", "values", "returns")
        if getattr(pack.samples[0], name) is not None
    }
    for name, dtype in (("teacher_ids", np.int64), ("teacher_logprobs", np.float32)):
        if getattr(pack.samples[0], name) is not None:
            rows = np.concatenate([getattr(sample, name) for sample in pack.samples])
            assert len(rows) == len(loss_idx), f"{name} has {len(rows)} rows for {len(loss_idx)} trained tokens"
            extra[name] = torch.from_numpy(rows.astype(dtype))
    sets = [sample.allowed_ids for sample in pack.samples if sample.allowed_ids is not None]
    if sets:
        width = max(len(each[0]) for each in sets)
        filled = [np.pad(each, ((0, 0), (0, width - len(each[0]))), constant_values=-1) for each in sets]
        assert sum(map(len, sets)) == len(loss_idx), "a set of allowed tokens for every trained token"
        extra["allowed_ids"] = torch.from_numpy(np.concatenate(filled).astype(np.int64))
    if pack.samples[0].features is not None:
        extra["features"] = torch.from_numpy(_beside(pack, "features", tail))
    if pack.samples[0].labels is not None:
        labels = _beside(pack, "labels", tail)
        label_idx = np.flatnonzero(~np.isnan(labels).all(1))
        extra |= {"label_idx": torch.from_numpy(label_idx), "labels": torch.from_numpy(labels[label_idx])}
    return Batch(
        input_ids=torch.from_numpy(flat("input_ids", np.int64)),
        target_ids=torch.from_numpy(flat("target_ids", np.int64)),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        doc_id=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        loss_idx=torch.from_numpy(loss_idx),
        loss_mask=torch.from_numpy(mask[loss_idx]),
        max_doc_len=longest,
        num_samples=len(pack.samples),
        fields={
            name: torch.tensor([sample.fields[name] for sample in pack.samples], dtype=torch.float32)
            for name in pack.samples[0].fields
        },
        **extra,
    )


def _beside(pack: Pack, name: str, tail: int) -> np.ndarray:
    """[T, width] float32 of what all samples have beside their tokens; NaN on the tail."""
    columns = [getattr(sample, name) for sample in pack.samples]
    return np.concatenate([*columns, np.full((tail, columns[0].shape[1]), np.nan, np.float32)])
