"""A tokenizer of our own: trained on texts, saved as the folder that AutoTokenizer opens."""

from collections.abc import Iterable
from pathlib import Path

PAD, END_OF_TURN, START_OF_TURN = "<|pad|>", "<|im_end|>", "<|im_start|>"


def train_tokenizer(texts: Iterable[str], folder: str | Path, *, vocab_size: int) -> int:
    """Train a byte-level BPE tokenizer with one token per digit and ChatML turns; return its size.

    No token reaches from the opening of the assistant's turn into its text: a prompt is
    then the beginning of its conversation, and the mask is exact.

    The folder is what AutoTokenizer opens: tokenizer.json, tokenizer_config.json and the
    template with generation markers.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END_OF_TURN)
    fast.chat_template = Path(__file__).with_name("templates").joinpath("chatml.jinja").read_text()
    fast.save_pretrained(str(folder))
    return len(fast)
