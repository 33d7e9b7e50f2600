"""Batch -> what the losses read, and the loss itself. Only rows that carry loss meet the LM head."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from posttrain.data.types import Batch
from posttrain.model.allowed import renormalised
from posttrain.model.collectives import Group, gather_rows
from posttrain.model.context import spread
from posttrain.model.decoder import Decoder
from posttrain.model.head import Head, divergence_loss, logprobs_and_entropy, row_loss
from posttrain.model.heads import SIDE, VALUE
from posttrain.model.losses import Loss
from posttrain.model.losses.tasks import TaskLoss
from posttrain.model.losses.value import ValueLoss
from posttrain.model.output import Output

__all__ = ["Output", "Teacher", "forward", "logits", "loss_index", "loss_sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A teacher's distributions at the rows that carry loss, before its own head: smaller than [N, V] by far."""

    hidden: Tensor
    """[M, d] final hidden states at loss_index(), of a student on the same ranks."""
    weight: Tensor
    """[V, d] its output head; row i is the student's token i."""


def forward(model: Decoder, batch: Batch, *, temperature: float = 1.0, with_logprobs: bool = True) -> Output:
    """Run the model once and score the targets that carry loss.

    Args:
        temperature: the one the targets were sampled at, so that logprobs compare with
            the sampler's; 1 for everything but rollouts.
        with_logprobs: off where only the other heads are wanted; the LM head is then not applied.
    """
    hidden, at = model(batch), loss_index(batch)
    mine, index = _share(model, len(at)), None if batch.share is None else batch.share.row_idx
    rows = hidden[at[mine]]

    def whole(found: Tensor) -> Tensor:
        return _whole(model, found, len(at), index, len(batch.loss_idx))

    scores, values = _scores(model, hidden, batch), _values(model, rows)
    values = None if values is None else whole(values)
    if model.output_head is None or not with_logprobs:
        empty = hidden.new_empty(0, dtype=torch.float32)
        _release(model)
        return Output(logprobs=empty, entropy=empty, values=values, scores=scores)
    head = Head(vocab_size=model.config.vocab_size, temperature=temperature)
    targets = _targets(_held(batch).rows(mine))
    found = logprobs_and_entropy(rows, model.output_head.weight, targets, head)
    _release(model)
    logprobs, entropy = map(whole, found)
    return replace(_output(logprobs, entropy, batch), values=values, scores=scores)


def loss_sum(
    model: Decoder, batch: Batch, loss_fn: Loss, *, scale: float = 1.0, teacher: Teacher | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """scale * loss sum with gradient, and metric sums of one batch, the unscaled "loss" among them: what
    Engine.train_step calls for every micro-batch.

    A loss that reads tokens, one row at a time, gets its gradients in this forward pass, so backward() must be
    called on what is returned, and on nothing made from it.

    Ranks that share the model or its tokens share the rows too: metric sums are one rank's part, to be summed over all
    ranks; they are empty where it has no row.
    """
    if loss_fn.reads in ("scores", "documents", "sequences"):
        output = forward(model, batch, temperature=loss_fn.temperature, with_logprobs=loss_fn.reads != "scores")
        loss, metrics = loss_fn(output, batch)
        copies = math.prod(group.size for group in _groups(model))  # each makes it whole, from rows that it gathered
        return scale * loss, {name: value / copies for name, value in {"loss": loss.detach(), **metrics}.items()}
    assert model.output_head is not None, f"a loss that reads {loss_fn.reads} needs an LM head"
    at = loss_index(batch)
    mine = _share(model, len(at))
    every, weight, asked = model(batch), model.output_head.weight, batch
    hidden = every[at[mine]]
    batch, teacher = _held(batch).rows(mine), teacher and replace(teacher, hidden=teacher.hidden[mine])
    weight = weight if torch.is_grad_enabled() else weight.detach()  # evaluation makes no gradients on the way
    head = Head(vocab_size=model.config.vocab_size, temperature=loss_fn.temperature)
    sums: dict[str, Tensor] = {}
    if loss_fn.reads == "teacher":
        assert teacher is not None, "a loss that reads a teacher needs one"
        distance = _distance(loss_fn, batch, scale, sums)
        loss = divergence_loss(hidden, weight, teacher.hidden, teacher.weight, head, distance)
    else:
        by_row = loss_fn.policy if isinstance(loss_fn, ValueLoss | TaskLoss) else loss_fn
        loss = row_loss(hidden, weight, _targets(batch), head, _chunk_loss(by_row, batch, scale, sums))
        if isinstance(loss_fn, ValueLoss):
            values = _values(model, hidden)
            assert values is not None, f"a loss that reads values needs the head {VALUE!r}"
            rest, metrics = loss_fn.of_values(values, batch)
            _add(sums, {"loss": rest, **metrics})
            loss = loss + scale * rest
        if isinstance(loss_fn, TaskLoss):
            rest, metrics = loss_fn.of_tasks(*_labelled(model, every, asked))
            _add(sums, {"loss": rest, **metrics})
            loss = loss + scale * rest
    _release(model)
    return loss, sums


@torch.no_grad()
def logits(model: Decoder, batch: Batch) -> Tensor:
    """Raw [T, vocab_size] logits of a small batch, for comparing models; never used in training."""
    assert model.output_head is not None, "a model that only scores has no logits"
    found = model.output_head(model(batch))[:, : model.config.vocab_size]
    _release(model)
    return found


def loss_index(batch: Batch) -> Tensor:
    """Where in a decoder's hidden states the rows that carry loss are: [N], or [M] of them among this rank's tokens."""
    return batch.loss_idx if batch.share is None else batch.share.row_at


def _held(batch: Batch) -> Batch:
    """The batch with the columns of those rows alone."""
    return batch if batch.share is None else batch.rows(batch.share.row_idx)


def _group(model: nn.Module, kind: str = "tensor") -> Group | None:
    """Ranks that share the model and what its heads do, or the tokens ("context")."""
    return getattr(model, kind, None)  # the fallback's models are never shared


def _groups(model: nn.Module) -> list[Group]:
    return [group for kind in ("tensor", "context") if (group := _group(model, kind)) is not None]


def _share(model: nn.Module, count: int) -> slice:
    """Which of `count` rows this rank computes, of those that its tensor group all has."""
    group = _group(model)
    return slice(None) if group is None else group.share(count)


def _whole(model: nn.Module, mine: Tensor, held: int, index: Tensor | None, count: int) -> Tensor:
    """Results of _share() become those of all `count` rows, the `held` of this rank's tokens being at `index`."""
    rows = gather_rows(mine, _group(model), held)
    return rows if index is None else spread(rows, index, count, _group(model, "context"))


def _release(model: nn.Module) -> None:
    """Give up what FSDP gathered for a forward that no backward follows, or the next would not see new weights."""
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        model.reshard()


def _chunk_loss(
    loss_fn: Loss, batch: Batch, scale: float, sums: dict[str, Tensor]
) -> Callable[[slice, Tensor, Tensor], Tensor]:
    def part(rows: slice, logprobs: Tensor, entropy: Tensor) -> Tensor:
        part_of = batch.rows(rows)
        loss, metrics = loss_fn(_output(logprobs, entropy, part_of), part_of)
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
    """[N, 1 + K] int64: the next token, then those that a teacher names, or that the policy may choose from."""
    column = batch.target_ids[batch.loss_idx, None]
    if batch.allowed_ids is not None:
        return torch.cat((column, batch.allowed_ids.clamp(min=0)), dim=1)
    return column if batch.teacher_ids is None else torch.cat((column, batch.teacher_ids), dim=1)


def _output(logprobs: Tensor, entropy: Tensor, batch: Batch) -> Output:
    if batch.allowed_ids is not None:
        among, spread = renormalised(logprobs, batch.allowed_ids, entropy)
        return Output(logprobs=among, entropy=spread)
    rest = logprobs[:, 1:] if logprobs.shape[1] > 1 else None
    return Output(logprobs=logprobs[:, 0], entropy=entropy, teacher_logprobs=rest)


def _values(model: Decoder, rows: Tensor) -> Tensor | None:
    """[n] float32 of the critic at hidden rows [n, d], which is before each row's target is known; None without one."""
    return model.heads[VALUE](rows).float().squeeze(-1) if VALUE in model.heads else None


def _scores(model: Decoder, hidden: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Every score head at the last token of each sample, [S, k] float32."""
    heads = _score_heads(model)
    if not heads:
        return {}
    share, last = batch.share, (batch.cu_seqlens[1 : batch.num_samples + 1] - 1).long()
    at, index = (last, None) if share is None else (share.sample_at, share.sample_idx)
    mine = hidden[at[_share(model, len(at))]]
    return {name: _whole(model, head(mine).float(), len(at), index, len(last)) for name, head in heads.items()}


def _score_heads(model: Decoder) -> dict[str, Any]:
    """Those that are read where an answer ends."""
    return {name: head for name, head in model.heads.items() if name not in (VALUE, SIDE)}


def _labelled(model: Decoder, hidden: Tensor, batch: Batch) -> tuple[dict[str, Tensor], Batch]:
    """[m, k] float32 of every head at the labelled positions that this rank scores, and the batch with their labels."""
    assert batch.label_idx is not None and batch.labels is not None, "heads of answers learn from the rows' labels"
    assert batch.share is None, "a config with parallel.context > 1 and heads is refused"
    mine = _share(model, len(batch.label_idx))
    rows = hidden[batch.label_idx[mine]]
    scores = {name: head(rows).float() for name, head in _score_heads(model).items()}
    return scores, replace(batch, labels=batch.labels[mine])
