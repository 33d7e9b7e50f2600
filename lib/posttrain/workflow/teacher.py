"""What a teacher says of units, written down before training: of every token that carries loss its K likeliest.

In: units, and a model over their vocabulary. Out: the same units in the same order, with teacher_ids and
teacher_logprobs; the train step then needs no teacher (model/losses/distill.py, TopKDistillLoss).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from posttrain.data.batch import collate
from posttrain.data.pack import pack
from posttrain.data.types import Unit
from posttrain.model.head import Head, top_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A frozen model, and what it is asked."""

    model: Any
    vocab_size: int
    """Of the student: probabilities are over its tokens, whatever rows the teacher's matrix has beyond them."""
    top_k: int
    temperature: float
    pack_tokens: int

    def teach(self, units: Sequence[Unit]) -> list[Unit]:
        """The same units with what the teacher says of them."""
        found: dict[int, Unit] = {}
        for each in pack(units, pack_tokens=self.pack_tokens, draws=range(len(units))):
            counts = [int(np.count_nonzero(sample.loss_mask)) for sample in each.samples]
            ids, logprobs = (np.split(rows, np.cumsum(counts)[:-1]) for rows in self._top(each))
            said = iter(zip(ids, logprobs, strict=True))
            for number in each.draws:
                columns = [next(said) for _ in units[number]]
                found[number] = tuple(
                    replace(sample, teacher_ids=theirs, teacher_logprobs=given)
                    for sample, (theirs, given) in zip(units[number], columns, strict=True)
                )
        return [found[number] for number in range(len(units))]

    @torch.no_grad()
    def _top(self, packed: Any) -> tuple[np.ndarray, np.ndarray]:
        weight = self.model.output_head.weight
        batch = collate(packed, pack_tokens=self.pack_tokens).to(weight.device)
        head = Head(vocab_size=self.vocab_size, temperature=self.temperature)
        ids, logprobs = top_logprobs(self.model(batch)[batch.loss_idx], weight, head, k=self.top_k)
        return ids.cpu().numpy().astype(np.int32), logprobs.cpu().numpy()
