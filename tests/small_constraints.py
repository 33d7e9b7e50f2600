"""Constraints over the first hundred ids of any vocabulary, for tests of generators and of the loss."""

from collections.abc import Sequence
from pathlib import Path

from posttrain.data.token_trie import Slate, TokenTrie
from posttrain.data.tokenizer import BaseHFModelTokenizer

PATHS = [(10, 20, 30), (10, 20, 31), (10, 21, 30), (11, 20, 30), (11, 22, 32), (12, 23, 33)]
"""Six items; 12 leads to one alone."""
STOP = 7


def slates(folder: Path) -> Slate:
    """Three of six items, none twice, then the stop token 7."""
    return Slate(TokenTrie(PATHS), size=3, stop_id=STOP)


class AfterOneFreeToken:
    """Any token first, then one of two as the prompt's last token is even or odd, and the stop token at last."""

    def allowed(self, prompt: Sequence[int], completion: Sequence[int]) -> Sequence[int] | None:
        if not completion:
            return None
        return (STOP,) if len(completion) > 4 else (40 + prompt[-1] % 2, 50)


def after_one_free_token(folder: Path) -> AfterOneFreeToken:
    return AfterOneFreeToken()


class Nothing:
    def allowed(self, prompt: Sequence[int], completion: Sequence[int]) -> Sequence[int]:
        return ()


def nothing(folder: Path) -> Nothing:
    return Nothing()


def no_constraint(folder: Path) -> object:
    return object()


def served_slates(folder: Path) -> Slate:
    """slates() with the stop token of the folder's tokenizer."""
    return Slate(TokenTrie(PATHS), size=3, stop_id=BaseHFModelTokenizer(folder).stop_id)


class SlateTask:
    """One turn under served_slates(), which reward.function scores."""

    constraint = "small_constraints:served_slates"

    async def rollout(self, row, talk) -> None:
        await talk.turn()


class LostConstraint(SlateTask):
    constraint = "small_constraints:sonnets"
