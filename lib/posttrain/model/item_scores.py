"""What a model holds of every item at every event that is to be predicted: one softmax over items of one token each."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from posttrain.data.batch import collate
from posttrain.data.item_tokens import ItemTokens, name_of
from posttrain.data.pack import plan
from posttrain.data.sample import shift
from posttrain.data.tokenizer import BaseHFModelTokenizer, Encoded
from posttrain.data.turn_numbers import Numbers, with_numbers
from posttrain.data.types import Pack, Row
from posttrain.errors import DataError, RowError
from posttrain.model.decoder import Decoder
from posttrain.model.heads import SIDE


@torch.no_grad()
def item_scores(
    model: Decoder,
    tokenizer: BaseHFModelTokenizer,
    rows: Sequence[Row],
    items: ItemTokens,
    catalogue: Sequence[int],
    *,
    pack_tokens: int,
) -> np.ndarray:
    """log p of each item of the catalogue among those with a name, [N, C] float32; -inf without one.

    Args:
        rows: of events.rows(); N counts their `asked` answers, in order. A model with a module at its front reads their
            features.
        items: each of one token.

    Raises:
        DataError: a row that cannot be tokenised, or is longer than a pack; or an item of several tokens.
    """
    columns, ids = _columns(tokenizer, items, catalogue)
    samples, at = [], []
    features: Sequence[str] = model.heads[SIDE].features if SIDE in model.heads else ()  # pyright: ignore
    for each, begins in asked_answers(tokenizer, rows, features):
        beside = None if each.numbers is None else each.numbers[:-1]
        samples.append(replace(shift(each.token_ids, each.loss_mask), features=beside))
        at.append(begins - 1)  # the token before an answer predicts its first
    ends = np.cumsum([0, *map(len, at)])
    found = np.full((ends[-1], len(catalogue)), -np.inf, np.float32)
    assert model.output_head is not None, "a model that only scores ranks no items"
    weight = model.output_head.weight[torch.tensor(ids, device=model.output_head.weight.device)]
    for members in plan([len(sample) for sample in samples], pack_tokens=pack_tokens):
        pack = Pack(samples=tuple(samples[i] for i in members), num_units=len(members))
        hidden = model(collate(pack, pack_tokens=pack_tokens).to(weight.device))
        start = 0
        for i in members:
            scores = (hidden[start + torch.tensor(at[i], device=weight.device)] @ weight.T).float()
            logprobs = scores - scores.logsumexp(-1, keepdim=True)
            found[ends[i] : ends[i + 1], columns] = logprobs.cpu().numpy()
            start += len(samples[i])
    return found


def asked_answers(
    tokenizer: BaseHFModelTokenizer, rows: Sequence[Row], features: Sequence[str] = ()
) -> Iterator[tuple[Encoded, np.ndarray]]:
    """Each row's tokens, every answer in the loss, and the place of the first token of each of its `asked` answers.

    Args:
        features: names of what the model reads beside the tokens.

    Raises:
        DataError: a row that cannot be tokenised.
    """
    numbers = Numbers(features=tuple(features))
    found = with_numbers(tokenizer, rows, "all", numbers) if features else tokenizer.conversations(rows, "all")
    for row, encoded in zip(rows, found, strict=True):
        if isinstance(encoded, RowError):
            raise DataError(f"the row of member {row['member']} cannot be ranked: {encoded}")
        answered = encoded.loss_mask > 0
        begins = np.flatnonzero(answered & ~np.concatenate([[False], answered[:-1]]))
        yield encoded, begins[list(row["asked"])]


def _columns(tokenizer: BaseHFModelTokenizer, items: ItemTokens, catalogue: Sequence[int]) -> tuple[list[int], list]:
    """Columns of the catalogue whose item has a name, and the id of its token."""
    columns, ids = [], []
    for column, item in enumerate(catalogue):
        if (tokens := name_of(items, item)) is None:
            continue
        if len(tokens) != 1:
            raise DataError(f"item {item} is {len(tokens)} tokens; a softmax over tokens ranks items of one each")
        columns.append(column)
        ids.append(tokenizer.hf.convert_tokens_to_ids(tokens[0]))
    return columns, ids
