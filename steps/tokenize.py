"""Rows become token ids and masks on disk, once; every limit on lengths is checked here, on a CPU."""

from typing import Any

from posttrain import storage
from posttrain.config import RunConfig
from posttrain.data.source import stored_rows
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.tokens import (
    describe,
    tokenize_conversations,
    tokenize_prompts,
    write_prompts,
    write_samples,
)
from posttrain.data.types import Sample
from posttrain.errors import DataError
from posttrain.model.families import decoder_config
from posttrain.model.load import read_config


def tokenize(config: RunConfig, *, root: str, data_uri: str, model_uri: str) -> dict[str, Any]:
    """Write token Parquet for every set.

    Returns:
        uri of the folder, tokenizer fingerprint, statistics, and a preview: tokens of the
        first demonstration with their loss mask.

    Raises:
        DataError: a prompt or conversation is longer than its limit, or trains no token.
    """
    data, model_folder = storage.fetch(data_uri), storage.fetch(model_uri)
    tokenizer = BaseHFModelTokenizer(model_folder)
    shape = decoder_config(read_config(model_folder))
    if tokenizer.vocab_size > shape.vocab_size:
        raise DataError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {shape.vocab_size} rows")
    need = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if need > shape.max_length:
        raise DataError(
            f"data.max_prompt_tokens + rollout.max_new_tokens = {need}; the model holds {shape.max_length} tokens"
        )
    prompts = {}
    for name in ("prompts", "held_out"):
        rows = stored_rows(data / f"{name}.parquet")
        limit = config.data.max_prompt_tokens
        prompts[name] = (rows, tokenize_prompts(rows, tokenizer, key=f"data.{name}", max_prompt_tokens=limit))
    samples: list[Sample] = []
    if config.warmup:
        rows = stored_rows(data / "demonstrations.parquet")
        samples = tokenize_conversations(rows, tokenizer, key="data.demonstrations")
        longest = max(range(len(samples)), key=lambda i: len(samples[i]))
        limit = min(config.data.pack_tokens, shape.max_length)
        if len(samples[longest]) > limit:
            raise DataError(
                f"data.demonstrations, row {longest} has {len(samples[longest])} tokens, "
                f"a pack or the model holds {limit}; raise data.pack_tokens or shorten it"
            )
    uri = storage.join(root, "tokens")

    def write(folder):
        for name, (rows, ids) in prompts.items():
            write_prompts(rows, ids, folder / f"{name}.parquet")
        if samples:
            write_samples(samples, folder / "demonstrations.parquet")

    storage.ensure_folder(uri, write)
    return {
        "uri": uri,
        "tokenizer_sha256": tokenizer.fingerprint(),
        "stats": {
            "prompts": {name: _prompt_stats(ids) for name, (_, ids) in prompts.items()},
            "demonstrations": describe(samples, pack_tokens=config.data.pack_tokens) if samples else None,
        },
        "preview": _preview(samples[0], tokenizer) if samples else [],
    }


def _prompt_stats(ids: list[tuple[int, ...]]) -> dict[str, int]:
    lengths = [len(prompt) for prompt in ids]
    return {"prompts": len(ids), "tokens": sum(lengths), "longest": max(lengths)}


def _preview(sample: Sample, tokenizer: BaseHFModelTokenizer) -> list[dict[str, Any]]:
    """Every target token as text, and whether it is trained."""
    return [
        {"token": tokenizer.hf.decode([int(token)]), "trained": bool(weight)}
        for token, weight in zip(sample.target_ids, sample.loss_mask, strict=True)
    ]


if __name__ == "__main__":
    from steps.program import main

    main(tokenize)
