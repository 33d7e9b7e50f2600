"""Ids by pieces are the tokenizer's own ids of the whole text, whatever the text; other tokenizers are not cut."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from posttrain.data import pieces
from posttrain.data.pieces import SPLITS, PieceEncoding, Pieces, can_be_cut

WORDS = [
    "don't",
    "DON'T",
    "we'll",
    "Straße",
    "naïve",
    "日本語",
    "a1b22",
    "12345",
    "x.y",
    "e.g.",
    "--",
    "…",
    "'s",
    "A",
    "é",
]
PROSE = [" ".join(WORDS), "the quick brown fox, 42 times. It's 'quoted' text\n\nand more  spaces \t here " * 20]


def trained(pre_tokenizer, normalizer=None):
    """A byte-level BPE that merges what its pre-tokenizer lets it merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PROSE * 3, trainer)
    return tokenizer


def split(regex):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), byte_level])


TOKENIZERS = {
    "GPT-2": trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    **{family: trained(split(regex), normalizers.NFC()) for family, regex in SPLITS.items()},
}
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            [*WORDS, " ", "  ", "\n", " \n", "\t", "\u00a0", "\u3000", "\u0301", "<|im_start|>", "<|im_end|>"]
        ),
        st.sampled_from([" a", " B", ". c", "' d", ") e", "1 f", "> g", " 7", "the quick brown fox", "\r\n h"]),
        st.text(max_size=4),
    ),
    max_size=14,
).map("".join)


@pytest.mark.parametrize("family", TOKENIZERS)
def test_the_families_can_be_cut(family):
    assert can_be_cut(TOKENIZERS[family])


@pytest.mark.parametrize("family", TOKENIZERS)
@settings(max_examples=400, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@example(texts=["' s b", "it' s b", "a\u0301 b", "x \u0301b", "1 2 a", "<|im_end|> a <|im_start|> b", "", " ", " a"])
def test_any_text_has_the_ids_and_offsets_of_the_whole(family, texts):
    tokenizer = TOKENIZERS[family]
    by_pieces = CUTTERS[family]
    for text, found in zip(texts, by_pieces.encode_batch(texts), strict=True):
        whole = tokenizer.encode(text, add_special_tokens=False)
        assert found.ids == whole.ids and len(found) == len(whole)
        assert [found.char_to_token(c) for c in range(len(text))] == [whole.char_to_token(c) for c in range(len(text))]
        assert [found.token_to_chars(t) for t in range(len(found))] == whole.offsets


CUTTERS = {family: Pieces(tokenizer) for family, tokenizer in TOKENIZERS.items()}
"""Kept from text to text, as in a run."""


def test_pieces_are_encoded_once_and_long_ones_are_not_kept():
    cutter = Pieces(TOKENIZERS["GPT-2"])
    text = "the quick brown fox " + "x" * 100 + " quick end"
    first, again = cutter.encode_batch([text])[0], cutter.encode_batch([text])[0]
    assert first.ids == again.ids == TOKENIZERS["GPT-2"].encode(text, add_special_tokens=False).ids
    assert set(cutter._kept) == {"quick", "brown", "fox", "end"}


def test_all_is_forgotten_when_it_is_too_much(monkeypatch):
    monkeypatch.setattr(pieces, "MOST_PIECES", 3)
    cutter = Pieces(TOKENIZERS["GPT-2"])
    cutter.encode_batch(["a b c d e f"])
    assert cutter.encode_batch(["a b"])[0].ids == TOKENIZERS["GPT-2"].encode("a b", add_special_tokens=False).ids
    assert set(cutter._kept) == {"b"}


def other(change):
    """The GPT-2-like tokenizer with its JSON changed."""
    parts = json.loads(TOKENIZERS["Llama 3"].to_str())
    change(parts)
    return Tokenizer.from_str(json.dumps(parts))


def added(content, **flags):
    tokenizer = Tokenizer.from_str(TOKENIZERS["Llama 3"].to_str())
    tokenizer.add_tokens([AddedToken(content, **flags)])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        other(lambda parts: parts.update(normalizer={"type": "Lowercase"})),
        other(lambda parts: parts["pre_tokenizer"]["pretokenizers"].pop(0)),
        other(lambda parts: parts["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\s+")),
        other(lambda parts: parts["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed")),
        other(lambda parts: parts.update(pre_tokenizer=None)),
        other(lambda parts: parts.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "split": False})),
        trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        added("New York"),
        added("<mask>", lstrip=True),
        added("word", single_word=True),
    ],
)
def test_a_tokenizer_that_is_not_known_to_allow_it_is_not_cut(tokenizer):
    assert not can_be_cut(tokenizer)


def test_a_tokenizer_that_must_not_be_cut_is_noticed_by_comparison():
    joined = added("New York")
    with pytest.raises(AssertionError, match="a text encodes otherwise in pieces: 'in New York'"):
        Pieces(joined).encode_batch(["in New York"])


def test_an_encoding_of_nothing_is_empty():
    (found,) = CUTTERS["GPT-2"].encode_batch([""])
    assert isinstance(found, PieceEncoding) and found.ids == []
