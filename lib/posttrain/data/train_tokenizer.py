"""Tokenizers of our own, saved as the folder that AutoTokenizer opens: trained on texts, or made of given words."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posttrain.errors import DataError

PAD, END_OF_TURN, START_OF_TURN = "<|pad|>", "<|im_end|>", "<|im_start|>"
END_OF_ANSWER, UNKNOWN = "<|end|>", "<|unknown|>"


def train_tokenizer(texts: Iterable[str], folder: str | Path, *, vocab_size: int) -> int:
    """Train a byte-level BPE tokenizer with one token per digit and ChatML turns; return its size.

    No token reaches from the opening of the assistant's turn into its text: a prompt is
    then the beginning of its conversation, and the mask is exact.

    The folder is what AutoTokenizer opens: tokenizer.json, tokenizer_config.json and the
    template with generation markers.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\Aassistant\n"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _save(tokenizer, folder, template="chatml.jinja", pad_token=PAD, eos_token=END_OF_TURN)


def word_tokenizer(words: Iterable[str], folder: str | Path) -> int:
    """Make a tokenizer whose vocabulary is three control tokens and `words`, in their order; return its size.

    A word is written `<name>` and is one token, with or without spaces around it; anything else is unknown. A
    conversation is its messages' words, the end of an answer after each of the assistant's: no other token is spent.

    Raises:
        DataError: a word twice, or one that is not `<name>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {PAD: 0, END_OF_ANSWER: 1, UNKNOWN: 2}
    for word in words:
        if word in vocabulary or not re.fullmatch(r"<[^<>|\s]+>", word):
            wrong = "there twice" if word in vocabulary else "no <name> without spaces, '<', '>' and '|'"
            raise DataError(f"the word {word!r} of a vocabulary is {wrong}; give each its own name, as <item_12>")
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("<[^<>]*>"), behavior="isolated")]
    )
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": PAD, "eos_token": END_OF_ANSWER, "unk_token": UNKNOWN}
    return _save(tokenizer, folder, template="events.jinja", **special)


def _save(tokenizer: Any, folder: str | Path, *, template: str, **special: str) -> int:
    """Write what AutoTokenizer opens, with a template of ours; the tokenizer's size."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = Path(__file__).with_name("templates").joinpath(template).read_text()
    fast.save_pretrained(str(folder))
    return len(fast)
