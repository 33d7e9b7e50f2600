"""Batch -> what the losses read, and the loss itself. Only rows that carry loss meet the LM head."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from posttrain.data.types import Batch
from posttrain.model.collectives import Group, gather_rows
from posttrain.model.decoder import Decoder
from posttrain.model.head import Head, divergence_loss, logprobs_and_entropy, row_loss
from posttrain.model.heads import VALUE
from posttrain.model.losses import Loss
from posttrain.model.losses.value import ValueLoss
from posttrain.model.output import Output

__all__ = ["Output", "Teacher", "forward", "logits", "loss_sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A teacher's distributions at the rows that carry loss, before its own head: smaller than [N, V] by far."""

    hidden: Tensor
    """[N, d] final hidden states at batch.loss_idx."""
    weight: Tensor
    """[V, d] its output head; row i is the student's token i."""


def forward(model: Decoder, batch: Batch, *, temperature: float = 1.0, with_logprobs: bool = True) -> Output:
    """Run the model once and score the targets that carry loss.

    Args:
        temperature: the one the targets were sampled at, so that logprobs compare with
            the sampler's; 1 for everything but rollouts.
        with_logprobs: off where only the other heads are wanted; the LM head is then not applied.
    """
    hidden, group, count = model(batch), _group(model), len(batch.loss_idx)
    part = batch if group is None else batch.rows(group.share(count))
    scores, values = _scores(model, hidden, batch), _values(model, hidden[part.loss_idx])
    values = None if values is None else gather_rows(values, group, count)
    if model.output_head is None or not with_logprobs:
        empty = hidden.new_empty(0, dtype=torch.float32)
        _release(model)
        return Output(logprobs=empty, entropy=empty, values=values, scores=scores)
    head = Head(vocab_size=model.config.vocab_size, temperature=temperature)
    logprobs, entropy = logprobs_and_entropy(hidden[part.loss_idx], model.output_head.weight, _targets(part), head)
    _release(model)
    found = _output(gather_rows(logprobs, group, count), gather_rows(entropy, group, count))
    return replace(found, values=values, scores=scores)


def loss_sum(
    model: Decoder, batch: Batch, loss_fn: Loss, *, scale: float = 1.0, teacher: Teacher | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """scale * loss sum with gradient, and metric sums of one batch, the unscaled "loss" among them: what
    Engine.train_step calls for every micro-batch.

    A loss that reads tokens, one row at a time, gets its gradients in this forward pass, so backward() must be
    called on what is returned, and on nothing made from it.

    Ranks that share the model share the rows too: metric sums are one rank's part, to be summed over all ranks.
    """
    group = _group(model)
    if loss_fn.reads in ("scores", "documents", "sequences"):
        output = forward(model, batch, temperature=loss_fn.temperature, with_logprobs=loss_fn.reads != "scores")
        loss, metrics = loss_fn(output, batch)
        copies = 1 if group is None else group.size  # each makes the loss whole, from rows that it gathered
        return scale * loss, {name: value / copies for name, value in {"loss": loss.detach(), **metrics}.items()}
    assert model.output_head is not None, f"a loss that reads {loss_fn.reads} needs an LM head"
    if group is not None:
        rows = group.share(len(batch.loss_idx))
        batch = batch.rows(rows)
        teacher = teacher and replace(teacher, hidden=teacher.hidden[rows])
    hidden, weight = model(batch)[batch.loss_idx], model.output_head.weight
    weight = weight if torch.is_grad_enabled() else weight.detach()  # evaluation makes no gradients on the way
    head = Head(vocab_size=model.config.vocab_size, temperature=loss_fn.temperature)
    sums: dict[str, Tensor] = {}
    if loss_fn.reads == "teacher":
        assert teacher is not None, "a loss that reads a teacher needs one"
        distance = _distance(loss_fn, batch, scale, sums)
        loss = divergence_loss(hidden, weight, teacher.hidden, teacher.weight, head, distance)
    else:
        by_row = loss_fn.policy if isinstance(loss_fn, ValueLoss) else loss_fn
        loss = row_loss(hidden, weight, _targets(batch), head, _chunk_loss(by_row, batch, scale, sums))
        if isinstance(loss_fn, ValueLoss):
            values = _values(model, hidden)
            assert values is not None, f"a loss that reads values needs the head {VALUE!r}"
            of_values, metrics = loss_fn.of_values(values, batch)
            _add(sums, {"loss": of_values, **metrics})
            loss = loss + scale * of_values
    _release(model)
    return loss, sums


@torch.no_grad()
def logits(model: Decoder, batch: Batch) -> Tensor:
    """Raw [T, vocab_size] logits of a small batch, for comparing models; never used in training."""
    assert model.output_head is not None, "a model that only scores has no logits"
    found = model.output_head(model(batch))[:, : model.config.vocab_size]
    _release(model)
    return found


def _group(model: nn.Module) -> Group | None:
    """Ranks that share the model and what its heads do."""
    return getattr(model, "tensor", None)  # the fallback's models are never shared


def _release(model: nn.Module) -> None:
    """Give up what FSDP gathered for a forward that no backward follows, or the next would not see new weights."""
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        model.reshard()


def _chunk_loss(
    loss_fn: Loss, batch: Batch, scale: float, sums: dict[str, Tensor]
) -> Callable[[slice, Tensor, Tensor], Tensor]:
    def part(rows: slice, logprobs: Tensor, entropy: Tensor) -> Tensor:
        loss, metrics = loss_fn(_output(logprobs, entropy), batch.rows(rows))
        _add(sums, {"loss": loss, **metrics})
        return scale * loss

    return part


def _distance(
    loss_fn: Any, batch: Batch, scale: float, sums: dict[str, Tensor]
) -> Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def part(rows: slice, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        divergence, gradient = loss_fn.rows(student, teacher)
        weights = batch.loss_mask[rows]
        loss = (weights * divergence).sum()
        _add(sums, {"loss": loss})
        return scale * loss, gradient.mul_(scale * weights[:, None])

    return part


def _add(sums: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, value in found.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()


def _targets(batch: Batch) -> Tensor:
    """[N, 1 + K] int64: the next token, then those that a teacher names."""
    column = batch.target_ids[batch.loss_idx, None]
    return column if batch.teacher_ids is None else torch.cat((column, batch.teacher_ids), dim=1)


def _output(logprobs: Tensor, entropy: Tensor) -> Output:
    rest = logprobs[:, 1:] if logprobs.shape[1] > 1 else None
    return Output(logprobs=logprobs[:, 0], entropy=entropy, teacher_logprobs=rest)


def _values(model: Decoder, rows: Tensor) -> Tensor | None:
    """[n] float32 of the critic at hidden rows [n, d], which is before each row's target is known; None without one."""
    return model.heads[VALUE](rows).float().squeeze(-1) if VALUE in model.heads else None


def _scores(model: Decoder, hidden: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Every score head at the last token of each sample, [S, k] float32."""
    heads = {name: head for name, head in model.heads.items() if name != VALUE}
    if not heads:
        return {}
    last = hidden[(batch.cu_seqlens[1 : batch.num_samples + 1] - 1).long()]
    group, count = _group(model), len(last)
    last = last if group is None else last[group.share(count)]
    return {name: gather_rows(head(last).float(), group, count) for name, head in heads.items()}
