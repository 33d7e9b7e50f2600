"""Beam search over items against scoring every item of the trie by itself."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.data.token_trie import TokenTrie, trie_of
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.train_tokenizer import word_tokenizer
from posttrain.model.build import build_model, fresh_config
from posttrain.model.load import load_decoder
from posttrain.model.rank_items import path_scores, rank_items
from tiny import tiny_model

PROMPTS = [(5, 6, 7), (9,), (8, 8, 8, 8, 8, 8)]
RNG = np.random.default_rng(0)
PATHS = [(a, b, c) for a in range(20, 24) for b in range(30, 33) for c in range(40, 44) if RNG.random() < 0.6]
PATHS += [(50,), (51, 30)]
"""Paths of one to three tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@lru_cache(maxsize=1)
def theirs(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def brute_force(folder: Path, prompt: tuple[int, ...]) -> np.ndarray:
    """[items] nats, by transformers: at each token a softmax over what may follow there."""
    model, trie = theirs(folder), TokenTrie(PATHS)
    scores = []
    for path in PATHS:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *path]])).logits[0, len(prompt) - 1 : -1].double()
        total = 0.0
        for depth, token in enumerate(path):
            children = list(trie.children[path[:depth]])
            total += float(logits[depth, children].log_softmax(0)[children.index(token)])
        scores.append(total)
    return np.array(scores)


def test_a_beam_that_holds_all_items_is_exact(folder: Path):
    trie = TokenTrie(PATHS)
    items, scores = rank_items(load_decoder(folder), PROMPTS, trie, k=len(PATHS), beam=len(PATHS), pack_tokens=32)
    for prompt, order, found in zip(PROMPTS, items, scores, strict=True):
        expected = brute_force(folder, prompt)
        assert order.tolist() == np.argsort(-expected).tolist()
        np.testing.assert_allclose(found, expected[order], atol=1e-5)
        assert np.exp(found).sum() == pytest.approx(1.0, abs=1e-6)


def test_a_narrow_beam_keeps_true_scores_of_distinct_items(folder: Path):
    items, scores = rank_items(load_decoder(folder), PROMPTS, TokenTrie(PATHS), k=3, beam=4)
    assert items.shape == scores.shape == (3, 3)
    for prompt, order, found in zip(PROMPTS, items, scores, strict=True):
        assert len(set(order.tolist())) == 3 and list(found) == sorted(found, reverse=True)
        np.testing.assert_allclose(found, brute_force(folder, prompt)[order], atol=1e-5)


def test_new_items_share_what_the_beginning_that_they_have_in_common_with_trained_ones_is_worth(folder: Path):
    trie, model = TokenTrie(PATHS), load_decoder(folder)
    below = [number for number, path in enumerate(PATHS) if path[0] == 20]
    leaf = below[0]  # its first two tokens are those of others
    branch = [number for number, path in enumerate(PATHS) if path[:2] == (21, 31)]
    assert trie.leaves[(20,)] > 1 and 0 < len(branch) < trie.leaves[(21,)]
    twins = trie.leaves[PATHS[leaf][:2]]
    assert twins > 1
    new = [leaf, *branch, PATHS.index((50,))]
    items, scores = rank_items(model, PROMPTS, trie, k=len(PATHS), beam=len(PATHS), new=new)
    kept = TokenTrie([path for number, path in enumerate(PATHS) if number not in new])
    old_items, old_scores = rank_items(model, PROMPTS, kept, k=len(kept), beam=len(kept))
    for row in range(len(PROMPTS)):
        found = {PATHS[item]: score for item, score in zip(items[row].tolist(), scores[row], strict=True)}
        old = {kept.paths[item]: score for item, score in zip(old_items[row].tolist(), old_scores[row], strict=True)}
        assert sum(map(np.exp, found.values())) == pytest.approx(1.0, abs=1e-9)
        assert found[(50,)] == pytest.approx(-np.log(len(PATHS)))
        rest = np.log1p(-1 / len(PATHS))  # of what is left to all others at the first token
        prefix = np.logaddexp.reduce([score for path, score in old.items() if path[:2] == PATHS[leaf][:2]])
        assert found[PATHS[leaf]] == pytest.approx(prefix + rest - np.log(twins), abs=1e-5)
        first = np.logaddexp.reduce([score for path, score in old.items() if path[0] == 21])
        for item in branch:
            assert found[PATHS[item]] == pytest.approx(first + rest - np.log(trie.leaves[(21,)]), abs=1e-5)


def test_items_of_one_token_are_ranked_by_their_logits(folder: Path):
    trie = TokenTrie([(token,) for token in range(60, 90)])
    items, _ = rank_items(load_decoder(folder), PROMPTS, trie, k=5, beam=5)
    model = theirs(folder)
    for prompt, order in zip(PROMPTS, items, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1, 60:90]
        assert order.tolist() == logits.topk(5).indices.tolist()


class Named:
    """Five items of two tokens; item 9 has no name."""

    vocabulary = ("<a_0>", "<a_1>", "<b_0>", "<b_1>", "<b_2>")

    def tokens(self, item: int) -> tuple[str, ...]:
        return {0: ("<a_0>", "<b_0>"), 1: ("<a_0>", "<b_1>"), 2: ("<a_1>", "<b_0>"), 3: ("<a_1>", "<b_2>")}[item]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With more, or without MKL_CBWR=COMPATIBLE, MKL rounds a row by where it stands in a matrix on some CPUs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")  # equal answers are equal to the bit wherever they stand in a pack
def test_each_asked_answer_of_a_row_is_ranked_by_what_stands_before_it(tmp_path: Path):
    size = word_tokenizer(("<next>", *Named.vocabulary), tmp_path)
    shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_size": 64, "max_length": 64}
    build_model(tmp_path, fresh_config(vocab_size=size, **shape), seed=0)
    tokenizer, model = BaseHFModelTokenizer(tmp_path), load_decoder(tmp_path)
    said = [("user", "<next>"), ("assistant", "<a_0><b_1>"), ("user", "<next>"), ("assistant", "<a_1><b_2>")]
    messages = [{"role": role, "content": content, "weight": 0} for role, content in said]
    rows = [{"messages": messages, "asked": [1]}, {"messages": messages, "asked": [0, 1]}]
    found = path_scores(model, tokenizer, rows, Named(), (3, 9, 0, 1, 2), pack_tokens=64)
    assert found.shape == (3, 5) and np.isneginf(found[:, 1]).all()
    np.testing.assert_array_equal(found[0], found[2])
    trie = trie_of([Named().tokens(item) for item in range(4)], tokenizer.hf.get_vocab())
    for row, asked in ((found[1], messages[:1]), (found[2], messages[:3])):
        items, scores = rank_items(model, [tokenizer.prompt(asked)], trie, k=4, beam=4)
        np.testing.assert_allclose(row[[2, 3, 4, 0]][items[0]], scores[0], atol=1e-6)
