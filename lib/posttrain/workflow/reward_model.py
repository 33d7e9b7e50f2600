"""A trained reward model as RL's judge: rows and completions in, scores out, in the process that rewards live in.

It reads what it was trained on: the conversation in its own tokenizer's template, up to the stop token of the answer.
"""

import math
from collections.abc import Sequence
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
from posttrain.model.heads import NATIVE
from posttrain.model.load import load_decoder

FILES = (".json", ".jinja", ".txt", ".model", ".safetensors")


class RewardModel:
    """Scores completions with the head `score` of a model folder; stands where a RewardWorker stands."""

    def __init__(self, folder: str):
        local = storage.download(folder, suffixes=FILES) if storage.is_s3(folder) else Path(folder)
        self.model = load_decoder(local).requires_grad_(False)
        self.room = self.model.config.max_length
        tokenizer = BaseHFModelTokenizer(local)
        self.encoder = Encoder(tokenizer, wanted="unpaired", pack_tokens=self.room, over_long="drop", scored=True)

    def ready(self) -> bool:
        """Answers once the model is loaded."""
        return True

    @torch.no_grad()
    def score(self, row: Row, completions: Sequence[str]) -> list[tuple[float, dict[str, float]]]:
        """The score of every completion of one prompt.

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
        scores = [math.nan] * len(units)
        for each in pack(units, pack_tokens=self.room, draws=range(len(units))):
            batch = collate(each, pack_tokens=each.num_tokens)
            found = forward(self.model, batch, with_logprobs=False).scores[NATIVE]
            for number, value in zip(each.draws, found[:, 0].tolist(), strict=True):
                scores[number] = value
        bad = [index for index, value in enumerate(scores) if not math.isfinite(value)]
        if bad:
            raise RewardError(f"reward.model, completion {bad[0]}: the score is {scores[bad[0]]}, not a finite number")
        return [(value, {"reward": value}) for value in scores]
