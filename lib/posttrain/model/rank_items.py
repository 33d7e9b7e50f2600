"""The likeliest items after a prompt, where an item is a path of tokens: beam search over the trie of valid paths.

An item's probability is that of the policy which may only write items: at each token softmax over the children alone,
as constrained sampling draws. Beams are exact where they hold every beginning, and else miss an item only if that
many beginnings are likelier than its own.

Of an item that no training row had, a model can know what its name shares with others, and not how it ends: it has only
ever seen that end not follow. So new items take an equal share each of all items below the longest beginning that they
have in common with a trained one, and the trained ones divide the rest as the model says. (TIGER, arXiv:2305.05065,
sets a share of the answers aside for new items of the same beginning; here it follows from their number.)
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from posttrain.data.batch import collate
from posttrain.data.item_tokens import ItemTokens, name_of
from posttrain.data.pack import plan
from posttrain.data.sample import shift
from posttrain.data.token_trie import Path, TokenTrie, trie_of
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.types import Pack, Row, Sample
from posttrain.model.forward import forward
from posttrain.model.item_scores import asked_answers

Beam = list[tuple[float, Path]]
"""Beginnings with their log p, nats, the likeliest first."""


def rank_items(
    model: Any,
    prompts: Sequence[Sequence[int]],
    trie: TokenTrie,
    *,
    k: int,
    beam: int,
    pack_tokens: int = 8192,
    new: Collection[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """The k likeliest items of the trie for every prompt: numbers [P, k] int64 and log p [P, k] float64, nats.

    Args:
        beam: beginnings kept after every token, at least k; len(trie) is exact.
        pack_tokens: of one forward pass; raised to the longest prompt with its path.
        new: numbers of the trie's items that no training row had.
    """
    k, beam = min(k, len(trie)), max(beam, k)
    fresh = Counter(trie.paths[item][:depth] for item in new for depth in range(len(trie.paths[item]) + 1))
    beams: list[Beam] = [[(0.0, ())] for _ in prompts]
    while open_ends := [(p, b) for p, found in enumerate(beams) for _, b in found if b not in trie.items]:
        after: list[dict[Path, Beam]] = [{} for _ in prompts]
        trained = [_trained(trie, begun, fresh) for _, begun in open_ends]
        steps = _children(model, prompts, open_ends, trained, pack_tokens)
        steps = [_shared(trie, begun, fresh, found) for (_, begun), found in zip(open_ends, steps, strict=True)]
        for (prompt, begun), found in zip(open_ends, steps, strict=True):
            after[prompt][begun] = found
        beams = [_next(found, steps, beam) for found, steps in zip(beams, after, strict=True)]
    items = [[trie.items[path] for _, path in found[:k]] for found in beams]
    return np.array(items, np.int64).reshape(-1, k), np.array([[score for score, _ in f[:k]] for f in beams])


def path_scores(
    model: Any,
    tokenizer: BaseHFModelTokenizer,
    rows: Sequence[Row],
    items: ItemTokens,
    catalogue: Sequence[int],
    *,
    pack_tokens: int,
    beam: int = 50,
) -> np.ndarray:
    """log p of the `beam` likeliest items of the catalogue, whatever their names' length, [N, C] float32, nats; -inf
    for the others, and for one without a name. What item_scores() does for names of one token.

    Args:
        rows: of events.rows(); N counts their `asked` answers, in order.

    Raises:
        DataError: a row that cannot be tokenised, or a name of tokens that the tokenizer has not.
    """
    named = [column for column, item in enumerate(catalogue) if name_of(items, item)]
    trie = trie_of([items.tokens(catalogue[column]) for column in named], tokenizer.hf.get_vocab())
    prompts: list[Sequence[int]] = []
    for encoded, begins in asked_answers(tokenizer, rows):
        prompts += [encoded.token_ids[:begin].tolist() for begin in begins]
    found = np.full((len(prompts), len(catalogue)), -np.inf, np.float32)
    ranked, scores = rank_items(model, prompts, trie, k=beam, beam=beam, pack_tokens=pack_tokens)
    np.put_along_axis(found, np.array(named, np.int64)[ranked], scores.astype(np.float32), axis=1)
    return found


def _next(found: Beam, after: dict[Path, Beam], beam: int) -> Beam:
    """The best of finished paths and of those that go on; of equals the one with the smaller tokens."""
    every = [(score + more, (*path, *step)) for score, path in found for more, step in after.get(path, [(0.0, ())])]
    return sorted(every, key=lambda each: (-each[0], each[1]))[:beam]


def _trained(trie: TokenTrie, begun: Path, fresh: Counter[Path]) -> Path:
    """Tokens that may follow, below which an item is that training had."""
    return tuple(token for token in trie.children[begun] if trie.leaves[(*begun, token)] > fresh[(*begun, token)])


def _shared(trie: TokenTrie, begun: Path, fresh: Counter[Path], found: Beam) -> Beam:
    """With the tokens that lead to new items alone: of all items below `begun` each has the same share."""
    below = {token: trie.leaves[(*begun, token)] for token in trie.children[begun]}
    untrained = {token: count for token, count in below.items() if count == fresh[(*begun, token)]}
    if not untrained:
        return found
    every, new = sum(below.values()), sum(untrained.values())
    rest = [(score + math.log1p(-new / every), step) for score, step in found]
    return rest + [(math.log(count / every), (token,)) for token, count in untrained.items()]


def _children(
    model: Any,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[tuple[int, Path]],
    children: Sequence[Path],
    pack_tokens: int,
) -> list[Beam]:
    """Of each (prompt, beginning) the log p of every token of its `children`, among those."""
    found: list[Beam] = [[(0.0, (token,)) for token in each] for each in children]  # an only child costs nothing
    places = [place for place, each in enumerate(children) if len(each) > 1]
    widest = max((len(children[place]) for place in places), default=0)
    samples = [_sample(prompts[asked[p][0]], asked[p][1], children[p], widest) for p in places]
    size = max([pack_tokens, *map(len, samples)])
    for members in plan([len(sample) for sample in samples], pack_tokens=size):
        packed = Pack(samples=tuple(samples[i] for i in members), num_units=len(members))
        device = next(model.parameters()).device
        with torch.no_grad():
            rows = forward(model, collate(packed, pack_tokens=size).to(device)).teacher_logprobs
        assert rows is not None, "the children's columns stand beside the target's"
        for i, row in zip(members, rows.double().cpu(), strict=True):
            here = children[places[i]]
            among = row[: len(here)]
            scores = (among - among.logsumexp(0)).tolist()
            found[places[i]] = [(score, (token,)) for score, token in zip(scores, here, strict=True)]
    return found


def _sample(prompt: Sequence[int], begun: Path, children: Path, widest: int) -> Sample:
    """The sequence so far, asked for the log p of `children` after it; any of them stands in the target's place."""
    tokens = [*prompt, *begun, children[0]]
    columns = np.array([[*children, *[children[0]] * (widest - len(children))]], np.int32)
    return replace(shift(tokens, [0.0] * (len(tokens) - 1) + [1.0]), teacher_ids=columns)
