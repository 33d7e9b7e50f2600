"""A trained reward model as RL's judge: rows and completions in, scores out, in the process that rewards live in.

It reads what it was trained on: the conversation in its own tokenizer's template, up to the stop token of the answer.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from posttrain import storage
from posttrain.data.batch import collate
from posttrain.data.encode import Encoder
from posttrain.data.pack import pack
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.types import Row
from posttrain.errors import RewardError, RowError
from posttrain.model.forward import forward
from posttrain.model.heads import NATIVE, output_names
from posttrain.model.load import load_decoder, read_config

FILES = (".json", ".jinja", ".txt", ".model", ".safetensors")


class RewardModel:
    """Scores completions with the head `score` of a model folder; stands where a RewardWorker stands."""

    def __init__(self, folder: str, weights: Mapping[str, float] | None = None):
        """
        Args:
            weights: of a model with several outputs, name -> weight in the reward; it has no others then.
        """
        local = storage.download(folder, suffixes=FILES) if storage.is_s3(folder) else Path(folder)
        self.model = load_decoder(local).requires_grad_(False)
        names = output_names(read_config(local)) if weights else (NATIVE,)
        self.weights = {names.index(name): (name, weight) for name, weight in (weights or {NATIVE: 1.0}).items()}
        self.room = self.model.config.max_length
        tokenizer = BaseHFModelTokenizer(local)
        self.encoder = Encoder(tokenizer, wanted="unpaired", pack_tokens=self.room, over_long="drop", scored=True)

    def ready(self) -> bool:
        """Answers once the model is loaded."""
        return True

    @torch.no_grad()
    def score(self, row: Row, completions: Sequence[str]) -> list[tuple[float, dict[str, float]]]:
        """The score of every completion of one prompt; of several outputs the weighted sum, and each part of it.

        Raises:
            RewardError: a completion cannot be read, as it is too long or writes control tokens; says which.
        """
        asked = {"tools": row["tools"]} if row.get("tools") else {}
        answers = [[*row["messages"], {"role": "assistant", "content": text}] for text in completions]
        units = []
        for index, found in enumerate(self.encoder([{"messages": each, "label": True, **asked} for each in answers])):
            if isinstance(found, RowError):
                raise RewardError(f"reward.model, completion {index}: {found}: {completions[index][:200]!r}")
            units += found
        scores: list[list[float]] = [[]] * len(units)
        for each in pack(units, pack_tokens=self.room, draws=range(len(units))):
            batch = collate(each, pack_tokens=each.num_tokens)
            found = forward(self.model, batch, with_logprobs=False).scores[NATIVE]
            for number, values in zip(each.draws, found.tolist(), strict=True):
                scores[number] = values
        return [self._reward(index, values) for index, values in enumerate(scores)]

    def _reward(self, index: int, scores: Sequence[float]) -> tuple[float, dict[str, float]]:
        parts = {name: weight * scores[column] for column, (name, weight) in self.weights.items()}
        if not all(map(math.isfinite, parts.values())):
            raise RewardError(f"reward.model, completion {index}: the score is {scores}, not finite numbers")
        return sum(parts.values()), parts if len(scores) > 1 else {"reward": scores[0]}
