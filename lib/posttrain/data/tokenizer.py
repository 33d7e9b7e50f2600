"""Text becomes token ids and a loss mask, through the Hugging Face tokenizer that also serves the model.

The only apply_chat_template in the repository. What is trained is decided by the
template's own generation markers: training on a template without them is refused,
because its mask would be silently all zero.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import DataError

PAD, END_OF_TURN, START_OF_TURN = "<|pad|>", "<|im_end|>", "<|im_start|>"


class BaseHFModelTokenizer:
    """A thin layer over AutoTokenizer: messages to ids and masks, ids to text, and a fingerprint.

    Raises:
        DataError: the folder holds no tokenizer or no template, or its pad token is its stop token.
    """

    def __init__(self, folder: str | Path):
        from transformers import AutoTokenizer

        try:
            self.hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no tokenizer: {error}") from None
        if not self.hf.chat_template:
            raise DataError(f"{folder}: the tokenizer has no chat template")
        self.folder = folder
        self.has_markers = re.search(r"\{%-?\s*generation\b", self.hf.chat_template) is not None
        if self.hf.eos_token_id is None or self.hf.pad_token_id in (None, self.hf.eos_token_id):
            raise DataError(f"{folder}: the tokenizer needs an eos token, and a pad token that is not the eos token")
        self.stop_id: int = self.hf.eos_token_id
        self.pad_id: int = self.hf.pad_token_id
        self.vocab_size = len(self.hf)
        added = self.hf.added_tokens_decoder.values()
        self.control_tokens = sorted({*self.hf.all_special_tokens, *(t.content for t in added if t.special)})

    def conversation(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Ids and loss mask [L] of a whole conversation; 1 on assistant text and its stop token.

        Raises:
            DataError: the template marks no assistant text, cannot render the messages, no
                token is trained, or a message holds a control token as text.
        """
        if not self.has_markers:
            raise DataError(
                f"{self.folder}: the chat template has no {{% generation %}} markers, so the loss mask would be all "
                "zero; wrap the assistant's text and its stop token in {% generation %} … {% endgeneration %}"
            )
        encoded = self._render(messages, return_assistant_tokens_mask=True)
        ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
        if not any(mask):
            roles = [message.get("role") for message in messages]
            raise DataError(f"no trained token in a conversation with roles {roles}; it needs an assistant message")
        return ids, mask

    def check_no_skew(self, messages: Sequence[dict[str, Any]]) -> None:
        """Prove that what is trained is what will be served: the prompt of the first assistant turn is, token
        for token, the beginning of the conversation.

        Raises:
            DataError: the two differ; says where.
        """
        ids, mask = self.conversation(messages)
        first = next(i for i, message in enumerate(messages) if message.get("role") == "assistant")
        served, trained = self.prompt(messages[:first]), ids[: mask.index(1)]
        if served != trained:
            at = next((i for i, (a, b) in enumerate(zip(served, trained, strict=False)) if a != b), None)
            at = min(len(served), len(trained)) if at is None else at
            raise DataError(
                f"training and serving disagree from token {at} of the prompt: served "
                f"{self.hf.decode(served[at : at + 8])!r}, trained {self.hf.decode(trained[at : at + 8])!r}; "
                "the template's generation prompt must be how it opens an assistant turn"
            )

    def prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Ids [P] of a conversation up to and including the opening of the assistant's turn.

        Raises:
            DataError: the template cannot render the messages.
        """
        return list(self._render(messages, add_generation_prompt=True)["input_ids"])

    def _render(self, messages: Sequence[dict[str, Any]], **options: bool) -> Any:
        from jinja2 import TemplateError

        for index, message in enumerate(messages):
            for value in message.values() if isinstance(message, dict) else ():
                found = next((t for t in self.control_tokens if isinstance(value, str) and t in value), None)
                if found:
                    raise DataError(
                        f"messages[{index}] holds the control token {found!r} as text, which the tokenizer would read "
                        "as the real one and end or open a turn; remove it from the data"
                    )
        try:
            return self.hf.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)
        except (TemplateError, TypeError, ValueError) as error:  # what a template raises on a field it lacks
            raise DataError(f"the chat template cannot render {str(messages)[:200]}: {error}") from None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion, special tokens left out."""
        return self.hf.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def fingerprint(self) -> str:
        """sha256 over the tokenizer's serialised form and its chat template."""
        serialised = self.hf.backend_tokenizer.to_str()
        return hashlib.sha256(f"{serialised}\n{self.hf.chat_template}".encode()).hexdigest()


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
