"""Preference data get the reference's logprobs as a column, once, before the first step: the folder DPO trains on."""

import shutil
from pathlib import Path

from posttrain import storage
from posttrain.config import DPO, RunConfig
from posttrain.workflow.policy import Policy
from posttrain.workflow.reference import score_file, score_source
from steps.streams import HELD_OUT_SLICES, HELD_OUT_UNITS, RESERVED, store_sources, stored_sources

FOLDER = "annotated"
"""Below `tokens`, of a run that has one; its training reads this in place of `all`."""


def needs_reference(config: RunConfig) -> bool:
    """Whether the loss compares with the starting weights."""
    return isinstance(config.method, DPO) and not config.method.reference_free


async def annotate(config: RunConfig, policy: Policy, *, root: str, tokens_uri: str) -> str:
    """Score the held-out pairs, and the training pairs where they are tokenised ahead; URI of the folder to train on.

    Args:
        policy: before its first step, that is the reference.
    """
    uri = storage.join(root, "tokens", FOLDER)
    if storage.exists(storage.join(uri, "manifest.json")):
        return uri
    tokens = storage.fetch(tokens_uri)
    held_out_uri = storage.join(root, "tokens", "reference_held_out")
    await score_file(policy, tokens / HELD_OUT_UNITS, held_out_uri)
    sources = stored_sources(tokens)
    if config.data.tokenize == "ahead":
        sources = [
            await score_source(policy, source, storage.join(root, "tokens", f"reference_{number:03d}"))
            for number, source in enumerate(sources)
        ]

    def write(folder: Path) -> None:
        store_sources(sources, folder)
        shutil.copyfile(tokens / RESERVED, folder / RESERVED)
        if config.eval.slice_by is not None:
            shutil.copyfile(tokens / HELD_OUT_SLICES, folder / HELD_OUT_SLICES)
        shutil.copyfile(storage.fetch(held_out_uri) / "units.parquet", folder / HELD_OUT_UNITS)

    storage.ensure_folder(uri, write)
    return uri
