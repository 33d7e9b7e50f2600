"""The seam between items and tokens: what an item of an event is called in a sequence, one token or several."""

from collections.abc import Iterable
from typing import Protocol


class ItemTokens(Protocol):
    """Names of items. Every item has its own tuple, and none is the beginning of another's."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token that an item may be made of, in the order in which a tokenizer numbers them."""
        ...

    def tokens(self, item: int) -> tuple[str, ...]:
        """What an item is written as.

        Raises:
            KeyError: an item that has no name.
        """
        ...


def name_of(items: ItemTokens, item: int) -> tuple[str, ...] | None:
    """What an item is written as; None for one that has no name."""
    try:
        return items.tokens(item)
    except KeyError:
        return None


class PlainItems:
    """One token an item: `<item_12>`. What was not there when the vocabulary was made has no name."""

    def __init__(self, items: Iterable[int]):
        self._names = {item: (f"<item_{item}>",) for item in sorted(set(items))}

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return tuple(name for (name,) in self._names.values())

    def tokens(self, item: int) -> tuple[str, ...]:
        return self._names[item]
