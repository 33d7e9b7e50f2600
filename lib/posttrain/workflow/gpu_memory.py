"""When a rank's GPU is full: what was asked of it, what the plan had said, and what would help."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from posttrain.data.types import Pack
from posttrain.errors import ComputeError
from posttrain.model.decoder import Decoder
from posttrain.model.memory import GIB, Setup, memory

if TYPE_CHECKING:
    from posttrain.workflow.policy_rank import PolicyRank

LONGEST = 5
"""Documents that are named."""


@contextmanager
def naming_what_did_not_fit(rank: "PolicyRank", step: int, packs: Sequence[Pack]) -> Iterator[None]:
    """Turn torch's out-of-memory error of a step into one that names the packs, the plan and the fix.

    Raises:
        ComputeError: the device's memory was full. Nothing of the step is kept; no pack is skipped.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        lengths = sorted((len(sample) for pack in packs for sample in pack.samples), reverse=True)
        shown = ", ".join(map(str, lengths[:LONGEST]))
        lines = [
            f"step {step + 1}: out of GPU memory with {len(packs)} packs of {rank.training.pack_tokens} tokens, "
            f"{len(lengths)} documents, the longest of {shown} tokens",
            f"in use: {_in_use()}",
        ]
        if isinstance(model := rank.engine.model, Decoder) and rank.build.lora is None:
            lines.append(_planned(rank, model, packs))
        lines.append(
            "Fix: optim.activation_checkpointing: selective or full, a smaller data.pack_tokens, more ranks that share "
            "(parallel.data, .tensor, .context), or less beside the policy; `posttrain plan` says what each saves"
        )
        lines.append(f"torch: {' '.join(str(error).split())[:300]}")
        raise ComputeError("\n".join(lines)) from error


def _planned(rank: "PolicyRank", model: Decoder, packs: Sequence[Pack]) -> str:
    """The estimate that `posttrain plan` gives of this rank, with the loss rows that came."""
    rows = [sum(int((sample.loss_mask > 0).sum()) for sample in pack.samples) for pack in packs]
    setup = Setup(
        pack_tokens=rank.training.pack_tokens,
        loss_rows=max(rows, default=0),
        micro_batches=len(packs),
        precision=rank.precision,
        activation_checkpointing=rank.training.activation_checkpointing,
        data=rank.sizes.data,
        tensor=rank.sizes.tensor,
        context=rank.sizes.context,
        expert=rank.sizes.expert,
        reference=rank.reference is not None,
    )
    with torch.device("meta"):
        plan = memory(Decoder(model.config), setup)
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in plan.parts().items() if size)
    return f"planned: {plan.total / GIB:.1f} GiB at {plan.moment} ({parts}), generators beside it not counted"


def _in_use() -> str:
    if not torch.cuda.is_available():
        return "unknown, as there is no GPU here"
    free, total = torch.cuda.mem_get_info()
    ours = torch.cuda.max_memory_allocated() / GIB
    return f"{(total - free) / GIB:.1f} of {total / GIB:.1f} GiB; tensors of this process {ours:.1f} at their most"
