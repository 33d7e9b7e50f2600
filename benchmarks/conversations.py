"""The workload of the data engine's benchmarks: made-up conversations, a tokenizer trained on them, and a stream.

Nothing is fetched: words are syllables, drawn by Zipf's law, so that a byte-level BPE has the work that it has on
prose (about 450 pieces and 500 tokens a row, 80,000 kinds of piece).
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from posttrain.data.encode import Encoder
from posttrain.data.mixture import Mixture, Part
from posttrain.data.row_reader import RowReader
from posttrain.data.source import Source
from posttrain.data.stream import PackStream, UnitSource
from posttrain.data.tokenizer import BaseHFModelTokenizer

T = 8192
"""Tokens of a pack."""
GROUP_ROWS = 8192
"""Rows of a Parquet row group: about 15 MB of text."""


def words(count: int = 120_000) -> list[str]:
    """Made-up words of one to four syllables, a function of nothing."""
    rng = np.random.default_rng(0)
    syllables = np.array([a + b + c for a in "bdfgklmnprstvwz" for b in "aeiou" for c in ("", "n", "r", "s", "l")])
    lengths = rng.choice([1, 2, 3, 4], count, p=[0.2, 0.4, 0.3, 0.1])
    drawn = iter(rng.choice(syllables, int(lengths.sum())).tolist())
    return ["".join(next(drawn) for _ in range(length)) for length in lengths.tolist()]


def conversations(rows: int, *, seed: int, median_words: int = 230) -> pa.Table:
    """Column `messages`: one to four turns, lognormal lengths, words drawn by Zipf's law with marks and numbers."""
    rng, vocabulary = np.random.default_rng(seed), np.array(words(), object)
    vocabulary[7::50] = [f"{word}." for word in vocabulary[7::50]]
    vocabulary[3::40] = [f"{word}," for word in vocabulary[3::40]]
    vocabulary[11::90] = [f"{number}" for number in range(len(vocabulary[11::90]))]
    vocabulary[13::100] = [f"{word}.\n\n{word.title()}" for word in vocabulary[13::100]]
    chance = 1.0 / np.arange(2, len(vocabulary) + 2)
    cumulated = np.cumsum(chance) / chance.sum()
    turns = rng.choice([1, 2, 3, 4], rows, p=[0.5, 0.25, 0.15, 0.1])
    sizes = np.clip(rng.lognormal(np.log(median_words), 0.9, rows), 12, 3000)
    records = []
    for count, size in zip(turns.tolist(), sizes.tolist(), strict=True):
        text = vocabulary[np.searchsorted(cumulated, rng.random(int(size)))].tolist()
        cuts = [0, *np.sort(rng.choice(np.arange(1, len(text)), 2 * count - 1, replace=False)).tolist(), len(text)]
        parts = [" ".join(text[a:b]) for a, b in pairwise(cuts)]
        roles = ("user", "assistant") * count
        records.append([{"role": role, "content": part} for role, part in zip(roles, parts, strict=True)])
    return pa.table({"messages": records})


def make_tokenizer(folder: Path, texts: list[str]) -> BaseHFModelTokenizer:
    """A byte-level BPE of 32k in `folder`, trained on `texts`, with TRL's training template of Qwen3."""
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3_training.jinja").read_text()
    fast.save_pretrained(str(folder))
    return BaseHFModelTokenizer(folder)


def open_stream(tokenizer: BaseHFModelTokenizer, sources: Sequence[Source]) -> PackStream:
    """A stream that draws every row of its sources once, in proportion to their sizes."""
    encoder = Encoder(tokenizer, wanted="conversation", pack_tokens=T, over_long="drop")
    read = RowReader(wanted="conversation")
    units = [UnitSource(source, encoder, read=read, seed=0, number=n) for n, source in enumerate(sources)]
    parts = [
        Part(name=source.key, num_rows=source.num_rows, weight=((0, source.num_rows),), max_draws=source.num_rows)
        for source in sources
    ]
    return PackStream(Mixture(parts, seed=0), units, pack_tokens=T, seed=0)
