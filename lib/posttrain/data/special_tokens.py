"""Which tokens of a vocabulary steer: those that end a turn, the one that pads, those no text may hold."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import DataError, RowError

PADS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|endoftext|>", "<|fim_pad|>", "<|vision_pad|>")
"""Names that families give to a token which is never text, best first."""


def control_tokens(hf: Any) -> list[str]:
    """Every token that is special, sorted."""
    added = hf.added_tokens_decoder.values()
    return sorted({*hf.all_special_tokens, *(token.content for token in added if token.special)})


def pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """One regex that finds any of `tokens`, the longest where one begins another.

    A trie, since a plain alternation of the thousands of reserved tokens of some
    vocabularies tries them all at every "<".
    """
    trie: dict[str, Any] = {}
    for token in tokens:
        node = trie
        for letter in token:
            node = node.setdefault(letter, {})
        node[""] = {}
    return re.compile(_alternatives(trie) or r"(?!)")


def refuse(control: re.Pattern[str], value: Any, where: str) -> None:
    """Look for control tokens in a value, however deep: message contents, calls and tools are all rendered.

    Raises:
        RowError: `control_token`, names the place.
    """
    if isinstance(value, str):
        if found := control.search(value):
            raise RowError(
                "control_token",
                f"{where} holds the control token {found[0]!r} as text, which the tokenizer would read "
                "as the real one and end or open a turn; remove it from the data",
            )
    elif isinstance(value, Mapping):
        for key, each in value.items():
            refuse(control, each, f"{where}.{key}")
            refuse(control, key, where)
    elif isinstance(value, Sequence):
        for index, each in enumerate(value):
            refuse(control, each, f"{where}[{index}]")


def generation_stops(folder: str | Path) -> list[int]:
    """Eos ids of generation_config.json, where the folder has one.

    Raises:
        DataError: the file is no JSON object.
    """
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is no JSON object: {error}; copy it again from the model's home") from None
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def choose_pad(hf: Any, stop_ids: Iterable[int], folder: str | Path) -> int:
    """Id of the pad token, which is set on `hf` so that it is saved: never one that ends a turn.

    A pad that is also a stop token would take the stop token out of the loss wherever
    padding is masked by id.

    Raises:
        DataError: the vocabulary has no token to spare.
    """
    stops = set(stop_ids)
    if hf.pad_token_id is not None and hf.pad_token_id not in stops:
        return hf.pad_token_id
    vocabulary = hf.get_vocab()
    spare = [token.content for _, token in sorted(hf.added_tokens_decoder.items())]
    spare = [name for name in spare if re.search(r"pad|reserved|unused", name, re.IGNORECASE)]
    for name in (*PADS, *spare):
        if name in vocabulary and vocabulary[name] not in stops:
            hf.pad_token = name
            return vocabulary[name]
    raise DataError(
        f"{folder}: no pad token, or one that also ends a turn ({hf.pad_token!r}), and no reserved token to take its "
        "place; add a token such as <|pad|> to the tokenizer and name it pad_token in tokenizer_config.json"
    )


def semantic_id_token(level: int, code: int) -> str:
    """Name of the token of one code of a hierarchical item id."""
    return f"<sid_{level}_{code}>"


def semantic_id_tokens(levels: int, codes: int) -> list[str]:
    """Names of the tokens of hierarchical item ids, by level: <sid_0_0>, <sid_0_1>, …"""
    return [semantic_id_token(level, code) for level in range(levels) for code in range(codes)]


def _alternatives(node: dict[str, Any]) -> str:
    branches = [re.escape(letter) + _alternatives(child) for letter, child in node.items() if letter]
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    return f"(?:{joined})?" if "" in node else joined
