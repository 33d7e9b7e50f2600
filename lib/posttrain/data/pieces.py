"""The same ids as the Hugging Face tokenizer's, several times as fast: text is encoded piece by piece, each once.

A byte-level BPE looks at a text one regex match at a time, so where a match must end the text can be cut and the parts
encoded apart. Before " x", a space and an ASCII letter after something that is no space, each of the regexes
below ends one match and begins the next, whatever surrounds it; other tokenizers are not cut. Every id comes from the
Hugging Face tokenizer: what is kept is its own answer for a piece, and now and then a whole text is compared.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any

CUT = re.compile(r"(?<=[!-~]) (?=[A-Za-z])")
"""The space that begins a piece; the pieces of a text are what lies between, all but the first with their space."""

MOST_PIECES = 1_000_000
"""Pieces kept, some 200 MB; then all are forgotten. English prose has fewer."""
LONGEST_KEPT = 64
"""Characters; longer pieces hardly come again."""
COMPARED = 1024
"""One text of so many is also encoded whole."""

SPLITS = {
    "Qwen 2, 2.5 and 3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "Llama 3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt-oss": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""Family -> the regex of its Split, as its tokenizer.json has it; GPT-2's is built into ByteLevel."""


def can_be_cut(tokenizer: Any) -> bool:
    """Whether encoding the pieces of any text gives the ids of the text.

    Args:
        tokenizer: a tokenizers.Tokenizer.
    """
    parts = json.loads(tokenizer.to_str())
    if parts["normalizer"] not in (None, {"type": "NFC"}):  # NFC joins no letter to a space
        return False
    added = parts["added_tokens"]
    if any(each["lstrip"] or each["rstrip"] or each["single_word"] or CUT.search(each["content"]) for each in added):
        return False
    steps = parts["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return False
    if last["use_regex"]:
        return not splits
    (split,) = splits if len(splits) == 1 else [{}]
    whole = split.get("type") == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    return whole and split["pattern"].get("Regex") in SPLITS.values()


class Pieces:
    """Encodes texts by their pieces.

    Args:
        tokenizer: a tokenizers.Tokenizer that can_be_cut().
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._kept: dict[str, tuple[int, ...]] = {}
        """Ids of " x" by x."""
        self._seen = 0

    def encode_batch(self, texts: Sequence[str]) -> list["PieceEncoding"]:
        """What Tokenizer.encode_batch(texts, add_special_tokens=False) returns, in as far as a PieceEncoding is that.

        Raises:
            AssertionError: a text encodes otherwise in pieces; a mistake of ours, and never trained on.
        """
        if len(self._kept) > MOST_PIECES:
            self._kept.clear()
        cut = [CUT.split(text) for text in texts]
        rest = {piece for pieces in cut for piece in pieces[1:]}
        missing = [pieces[0] for pieces in cut] + [f" {piece}" for piece in rest - self._kept.keys()]
        found = self._tokenizer.encode_batch(missing, add_special_tokens=False)
        encodings = dict(zip(missing, found, strict=True))
        new = {piece[1:]: tuple(encodings[piece].ids) for piece in missing[len(cut) :]}
        self._kept |= new
        ids_of = self._kept
        made = [
            PieceEncoding(pieces, [found[n].ids, *[ids_of[piece] for piece in pieces[1:]]], self._whole(encodings))
            for n, pieces in enumerate(cut)
        ]
        for piece in [piece for piece in new if len(piece) > LONGEST_KEPT]:
            del self._kept[piece]
        self._compare(texts, made)
        return made

    def _whole(self, encodings: dict[str, Any]) -> Callable[[str], Any]:
        """Piece -> its Encoding, with offsets; those of pieces that were known are made again."""

        def encode(piece: str) -> Any:
            if piece not in encodings:
                encodings[piece] = self._tokenizer.encode(piece, add_special_tokens=False)
            return encodings[piece]

        return encode

    def _compare(self, texts: Sequence[str], made: Sequence["PieceEncoding"]) -> None:
        first = -self._seen % COMPARED
        self._seen += len(texts)
        for text, encoding in zip(texts[first::COMPARED], made[first::COMPARED], strict=True):
            whole = self._tokenizer.encode(text, add_special_tokens=False).ids
            assert encoding.ids == whole, f"a text encodes otherwise in pieces: {text[:200]!r}"


class PieceEncoding:
    """Ids of a text and where their characters are: as much of a tokenizers.Encoding as masks.py asks for."""

    def __init__(self, pieces: Sequence[str], ids: Sequence[Sequence[int]], whole: Callable[[str], Any]):
        self._pieces, self._ids, self._whole = pieces, ids, whole
        self.ids: list[int] = list(chain.from_iterable(ids))
        self._chars: list[int] = []
        self._tokens: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def char_to_token(self, char: int) -> int | None:
        """Index of the token that holds a character of the text."""
        self._count()
        piece = bisect_right(self._chars, char) - 1
        inner = self._encoding(piece).char_to_token(char - self._chars[piece])
        return None if inner is None else inner + self._tokens[piece]

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """[start, end) of a token's characters."""
        self._count()
        piece = bisect_right(self._tokens, token) - 1
        start, end = self._encoding(piece).token_to_chars(token - self._tokens[piece])
        return start + self._chars[piece], end + self._chars[piece]

    def _count(self) -> None:
        """Where the characters and tokens of each piece begin; a piece that is not the first begins with its space."""
        if not self._chars:
            first, *rest = map(len, self._pieces)
            self._chars = [0, *accumulate((size + 1 for size in rest[:-1]), initial=first)][: len(self._pieces)]
            self._tokens = list(accumulate(map(len, self._ids[:-1]), initial=0))

    def _encoding(self, piece: int) -> Any:
        return self._whole(f" {self._pieces[piece]}" if piece else self._pieces[0])
