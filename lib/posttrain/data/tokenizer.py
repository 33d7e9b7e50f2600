"""Text becomes token ids and a loss mask, through the Hugging Face tokenizer that also serves the model.

Rows are rendered one by one in Python and encoded a batch at a time in Rust. What is trained is decided by a
template's generation markers: its own, those that markers.py adds and proves, or the proved difference of
renderings where neither works. A row that cannot be proved is refused; no mask is ever all zero, or a guess.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data import special_tokens
from posttrain.data.chat_template import ChatTemplate, Messages, Spans, Tools, check_messages, strftime_now
from posttrain.data.markers import Turn, choose_template, read_turn
from posttrain.data.masks import TrainOn, assistant_spans, token_mask, turn_weights
from posttrain.data.pieces import Pieces, can_be_cut
from posttrain.data.template_fixtures import FIXTURES
from posttrain.errors import DataError, RowError


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised conversation, not yet shifted."""

    token_ids: np.ndarray
    """[L+1] int32."""
    loss_mask: np.ndarray
    """[L+1] float32, the loss weight of each token itself; 0 where it is not trained."""
    numbers: np.ndarray | None = None
    """[L+1, F + K] float32 beside the tokens (turn_numbers.py)."""


class BaseHFModelTokenizer:
    """A thin layer over AutoTokenizer: messages to ids and masks, ids to text, and a fingerprint.

    Args:
        folder: what AutoTokenizer opens; its generation_config.json is read where it has one.

    Raises:
        DataError: the folder holds no fast tokenizer, no template, no eos token, or none to pad with.
    """

    def __init__(self, folder: str | Path):
        from transformers import AutoTokenizer

        try:
            self.hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no tokenizer: {error}") from None
        found = self.hf.chat_template
        text = found.get("default") if isinstance(found, dict) else found
        if not text:
            raise DataError(f"{folder}: the tokenizer has no chat template; save it with the one it is served with")
        if not self.hf.is_fast:
            raise DataError(f"{folder}: the tokenizer has no tokenizer.json, so masks cannot be exact; convert it")
        if self.hf.eos_token_id is None:
            raise DataError(f"{folder}: the tokenizer needs an eos token; name it eos_token in tokenizer_config.json")
        self.folder = folder
        self.stock = ChatTemplate(text, dict(self.hf.special_tokens_map))
        self._control = special_tokens.pattern(special_tokens.control_tokens(self.hf))
        try:
            self.turn = read_turn(self.stock, self._control)
        except RowError:
            self.turn = Turn((), ())
        ends = [self.hf.convert_tokens_to_ids(stop) for stop in self.turn.stops]
        self.stop_id: int = ends[0] if ends else self.hf.eos_token_id
        """The token that ends an assistant's turn."""
        stops = [self.stop_id, *ends, self.hf.eos_token_id, *special_tokens.generation_stops(folder)]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stops))
        """Every token that ends generation, stop_id first."""
        self.pad_id: int = special_tokens.choose_pad(self.hf, self.stop_ids, folder)
        self.stock = ChatTemplate(text, dict(self.hf.special_tokens_map))
        self._read_vocabulary()
        self.template = choose_template(self.stock, self.turn)
        """The template in use: as `stock`, with markers where they could be proved."""
        self.why_no_mask = ""
        self.why_no_mask = self._prove()
        """What keeps it from making masks, if anything; prompts need none."""

    def conversations(self, rows: Sequence[Mapping[str, Any]], train_on: TrainOn = "all") -> list[Encoded | RowError]:
        """Ids and loss masks of whole conversations.

        Args:
            rows: {"messages": [...], "tools": [...] or absent}.
            train_on: "all" assistant messages, the "last" one, or "weights": each by its own `weight`, default 1.

        Raises:
            DataError: the template has no markers, none could be added, and no difference of renderings proves a mask.
        """
        if self.why_no_mask:
            raise DataError(f"{self.folder}: {self.why_no_mask}")

        def render(row: Mapping[str, Any]) -> tuple[str, Spans, list[float]]:
            text, spans = assistant_spans(self.template, self.turn, row["messages"], row.get("tools"))
            return text, spans, turn_weights(row["messages"], train_on)

        return self._encode(rows, render)

    def prompts(self, rows: Sequence[Mapping[str, Any]]) -> list[np.ndarray | RowError]:
        """Ids [P] int32 of conversations, each up to and including the opening of the assistant's turn."""

        def render(row: Mapping[str, Any]) -> tuple[str, Spans, list[float]]:
            if row["messages"][-1]["role"] == "assistant":
                detail = "the prompt ends with an assistant turn, which would give the answer away; remove it"
                raise RowError("prompt_ends_with_answer", detail)
            return self.stock.render(row["messages"], row.get("tools"), prompt=True)[0], [], []

        found = self._encode(rows, render)
        return [each if isinstance(each, RowError) else each.token_ids for each in found]

    def pair(self, row: Mapping[str, Any]) -> tuple[Encoded, Encoded] | RowError:
        """A preference pair: ids and loss masks of (chosen, rejected), loss on the response's turns only.

        Args:
            row: {"prompt": messages, "chosen": messages, "rejected": messages, "tools": [...] or absent}.
        """
        tools, prompt = row.get("tools"), _weighted(row.get("prompt"), 0)
        sides = [[*prompt, *_weighted(row.get(side), 1)] for side in ("chosen", "rejected")]
        chosen, rejected = self.conversations([{"messages": side, "tools": tools} for side in sides], "weights")
        served = self.prompts([{"messages": prompt, "tools": tools}])[0]
        if isinstance(served, RowError) or isinstance(chosen, RowError) or isinstance(rejected, RowError):
            return next(each for each in (served, chosen, rejected) if isinstance(each, RowError))
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            if not np.array_equal(side.token_ids[: np.flatnonzero(side.loss_mask)[0]], served):
                return RowError(
                    "mask_not_provable", f"the prompt is tokenised otherwise once the {name} answer follows"
                )
        return chosen, rejected

    def conversation(self, messages: Messages, tools: Tools = None) -> tuple[list[int], list[float]]:
        """Ids and loss mask [L+1] of one conversation; 1 on assistant text and its stop token.

        Raises:
            RowError: as conversations() returns it.
            DataError: as conversations().
        """
        encoded = _one(self.conversations([{"messages": messages, "tools": tools}]))
        return encoded.token_ids.tolist(), encoded.loss_mask.tolist()

    def prompt(self, messages: Messages, tools: Tools = None) -> list[int]:
        """Ids [P] of one prompt.

        Raises:
            RowError: as prompts() returns it.
        """
        return _one(self.prompts([{"messages": messages, "tools": tools}])).tolist()

    def text(self, text: str) -> np.ndarray:
        """Ids [L+1] int32 of plain text: the beginning-of-text token where the tokenizer has one, the text, eos.

        Raises:
            RowError: `control_token`.
        """
        special_tokens.refuse(self._control, text, "the text")
        ids = self._encoder.encode(text, add_special_tokens=False).ids
        begin = [] if self.hf.bos_token_id is None else [self.hf.bos_token_id]
        return np.array([*begin, *ids, self.hf.eos_token_id], np.int32)

    def check_no_skew(self, messages: Messages, tools: Tools = None) -> None:
        """Prove that what is trained is what will be served: the prompt of the last assistant turn is, token for
        token, the beginning of the conversation. (The last: templates drop the reasoning of earlier ones.)

        Raises:
            RowError: the conversation or its prompt is refused.
            DataError: the two differ; says where.
        """
        encoded = _one(self.conversations([{"messages": messages, "tools": tools}], "last"))
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        served = self.prompt(messages[:last], tools) if last else []
        trained = encoded.token_ids[: np.flatnonzero(encoded.loss_mask)[0]].tolist()
        if last and served != trained:
            at = next((i for i, (a, b) in enumerate(zip(served, trained, strict=False)) if a != b), None)
            at = min(len(served), len(trained)) if at is None else at
            raise DataError(
                f"training and serving disagree from token {at} of the prompt: served "
                f"{self.hf.decode(served[at : at + 8])!r}, trained {self.hf.decode(trained[at : at + 8])!r}; "
                "the template's generation prompt must be how it opens an assistant turn"
            )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion, special tokens left out."""
        return self.hf.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def unk_share(self, token_ids: Sequence[int] | np.ndarray) -> float:
        """Share of unknown tokens, 0 to 1; above 0.01 the tokenizer does not fit the text."""
        if self.hf.unk_token_id is None or len(token_ids) == 0:
            return 0.0
        return float(np.mean(np.asarray(token_ids) == self.hf.unk_token_id))

    def add_tokens(self, tokens: Sequence[str]) -> int:
        """Add tokens that text may hold (not control tokens); how many were new. The model needs rows for them.

        Raises:
            DataError: a token does not encode to one id.
        """
        from tokenizers import AddedToken

        added = self.hf.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
        self._read_vocabulary()
        for token in tokens:
            ids = self._encoder.encode(token, add_special_tokens=False).ids
            if len(ids) != 1:
                raise DataError(f"the added token {token!r} encodes to {ids}, not to one id; choose another name")
        return added

    def save(self, folder: str | Path) -> None:
        """Write what AutoTokenizer opens; the template is the stock one, which serves."""
        self.hf.save_pretrained(str(folder))

    def fingerprint(self) -> str:
        """sha256 over what decides the ids and masks: the serialised tokenizer, the template in use, its special
        tokens and those that end a turn. The pad token and generation_config.json decide neither, and an export
        writes them anew."""
        names = {name: token for name, token in self.template.variables.items() if name != "pad_token"}
        chosen = json.dumps([self.template.text, names, self.turn.stops, self.stop_id], default=str)
        return hashlib.sha256(f"{self._encoder.to_str()}\n{chosen}".encode()).hexdigest()

    def _read_vocabulary(self) -> None:
        """A copy of the Rust tokenizer that no padding or truncation asked of `hf` reaches, its offsets whole."""
        from tokenizers import Tokenizer

        whole = re.sub(r'"trim_offsets":\s*true', '"trim_offsets":false', self.hf.backend_tokenizer.to_str())
        self._encoder = Tokenizer.from_str(whole)
        self._encoder.no_padding()
        self._encoder.no_truncation()
        whole_texts = partial(self._encoder.encode_batch, add_special_tokens=False)
        self._batch: Callable[[list[str]], Sequence[Any]] = (
            Pieces(self._encoder).encode_batch if can_be_cut(self._encoder) else whole_texts
        )
        self._adds_bos = self.hf.bos_token_id is not None and self.hf.bos_token_id in self.hf("a")["input_ids"]
        self.vocab_size = len(self.hf)
        self.max_id: int = max(self.hf.get_vocab().values())
        """The largest id it can write: the model needs more rows than this."""

    def _encode(
        self, rows: Sequence[Mapping[str, Any]], render: Callable[[Mapping[str, Any]], tuple[str, Spans, list[float]]]
    ) -> list[Any]:
        """An Encoded or a RowError for each row; the batch is encoded in one call."""
        found: list[Any] = []
        for row in rows:
            try:
                check_messages(row.get("messages"), row.get("tools"), self.template.text)
                special_tokens.refuse(self._control, row["messages"], "messages")
                special_tokens.refuse(self._control, row.get("tools"), "tools")
                found.append(render(row))
            except RowError as error:
                found.append(error)
        fit = [index for index, each in enumerate(found) if not isinstance(each, RowError)]
        encodings = self._batch([found[index][0] for index in fit])
        for index, encoding in zip(fit, encodings, strict=True):
            try:
                mask = token_mask(encoding, *found[index])
                found[index] = Encoded(np.array(encoding.ids, np.int32), mask)
            except RowError as error:
                found[index] = error
        return found

    def _prove(self) -> str:
        """Encode the fixtures as training would; says what is wrong, or is empty."""
        rows = [{"messages": messages, "tools": tools} for messages, tools in FIXTURES]
        pairs = [(r, e) for r, e in zip(rows, self.conversations(rows), strict=True) if isinstance(e, Encoded)]
        for row, encoded in pairs:
            options = {"tools": row["tools"], "chat_template": self.template.text, "strftime_now": strftime_now}
            expected = self.hf.apply_chat_template(list(row["messages"]), return_dict=True, **options)["input_ids"]
            if encoded.token_ids.tolist() != list(expected):
                return (
                    "its tokenizer.json encodes otherwise than AutoTokenizer does; save it again with save_pretrained"
                )
            ids = encoded.token_ids
            begins = int((ids == self.hf.bos_token_id).sum()) if self._adds_bos else 1
            if begins != 1:
                return f"the chat template writes {self.hf.bos_token} {begins} times, not once; mend the template"
            if why := self.turn.miscounted(row["messages"], ids[encoded.loss_mask > 0], self.stop_ids):
                return why
        if not pairs:
            return (
                "the chat template has no {% generation %} markers, and what the assistant writes cannot be proved "
                "without; wrap its text and its stop token in {% generation %} … {% endgeneration %}"
            )
        return ""


def _one(found: Any) -> Any:
    """The only entry of a batch of one, or its error raised."""
    if isinstance(found[0], RowError):
        raise found[0]
    return found[0]


def _weighted(messages: Any, weight: int) -> list[Any]:
    """The messages with one loss weight; what is no message is left for the check that refuses it."""
    found = messages if isinstance(messages, Sequence) else []
    return [{**message, "weight": weight} if isinstance(message, Mapping) else message for message in found]
