"""Tokenizers of known model families: their stock chat templates, their special tokens, a vocabulary of our own."""

import re
from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.data.tokenizer import BaseHFModelTokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"
STOCK = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BOS_AND_EOS = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<eos>"),
    "diffusion_gemma": ("<bos>", "<eos>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "glm": (None, "<|endoftext|>"),
    "llava": ("<s>", "</s>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>"),
    "idefics": ("<|begin_of_text|>", "<end_of_utterance>"),
}
"""By the beginning of the family's name; <|im_end|> and no bos elsewhere."""
SPECIAL = re.compile(
    r"<\|[a-zA-Z_]+\|>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|<\|channel>|<channel\|>|<end_of_utterance>|<｜[^'\"｜]+｜>"
)


def stock_template(name: str) -> str:
    """The text of a family's template."""
    return CHATML if name == "chatml" else (FOLDER / f"{name}.jinja").read_text()


def save_tokenizer(
    folder: Path, template: str, *, bos: str | None = None, eos: str = "<|im_end|>", trim_offsets: bool = False
) -> Path:
    """A byte-level BPE with every control token that the template writes, as AutoTokenizer opens it."""
    special = sorted({*SPECIAL.findall(template), eos, "<|reserved_0|>", *([bos] if bos else [])})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant system\n\nthe answer is the word\n\n"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = template
    fast.save_pretrained(str(folder))
    return folder


def stock_tokenizer(name: str, folder: Path, **options: bool) -> BaseHFModelTokenizer:
    """The tokenizer of a family, opened."""
    bos, eos = next((each for key, each in BOS_AND_EOS.items() if name.startswith(key)), (None, "<|im_end|>"))
    return BaseHFModelTokenizer(save_tokenizer(folder, stock_template(name), bos=bos, eos=eos, **options))
