"""The paths of tokens that name an item, as a trie: what may follow a beginning, and slates of distinct items."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from posttrain.errors import DataError

Path = tuple[int, ...]
"""Token ids that together name one item."""


class TokenTrie:
    """Items by their paths; the item's number is its place in `paths`.

    Raises:
        DataError: a path is empty, is another's, or begins another: its end could not be told.
    """

    def __init__(self, paths: Sequence[Sequence[int]]):
        self.paths: list[Path] = [tuple(path) for path in paths]
        self.items = {path: number for number, path in enumerate(self.paths)}
        self.leaves: Counter[Path] = Counter()
        """Items below a beginning, itself among them."""
        nodes: dict[Path, dict[int, None]] = {}
        for path in self.paths:
            for depth, token in enumerate(path):
                nodes.setdefault(path[:depth], {})[token] = None
            self.leaves.update(path[:depth] for depth in range(len(path) + 1))
        self.children: dict[Path, Path] = {prefix: tuple(sorted(found)) for prefix, found in nodes.items()}
        """Beginning -> tokens that may follow it, ascending."""
        twice = next((path for path in self.paths if not path or path in self.children or self.leaves[path] > 1), None)
        if twice is not None:
            raise DataError(f"the path {list(twice)} is empty, or names or begins more than one item")

    def __len__(self) -> int:
        return len(self.paths)

    def split(self, tokens: Sequence[int]) -> tuple[list[int], Path]:
        """Items that `tokens` name one after another, and the path that is begun after them.

        Raises:
            DataError: a token follows that no path has there.
        """
        found: list[int] = []
        begun: Path = ()
        for token in tokens:
            begun = (*begun, token)
            if begun in self.items:
                found.append(self.items[begun])
                begun = ()
            elif begun not in self.children:
                raise DataError(f"no item's path begins with {list(begun)}, after {len(found)} items")
        return found, begun


class Slate:
    """A Constraint: `size` items, none twice, then the stop token.

    Args:
        stop_id: the token that ends a turn.
    """

    def __init__(self, trie: TokenTrie, *, size: int, stop_id: int):
        if size > len(trie):
            raise DataError(f"a slate of {size} distinct items cannot be made of {len(trie)}")
        self.trie, self.size, self.stop_id = trie, size, stop_id

    def allowed(self, prompt: Sequence[int], completion: Sequence[int]) -> Sequence[int]:
        """Tokens of the path that is begun, below which an item is left."""
        chosen, begun = self.trie.split(completion)
        if len(chosen) == self.size:
            return (self.stop_id,)
        used = [self.trie.paths[item] for item in chosen]
        depth = len(begun) + 1
        taken = Counter(path[:depth] for path in used if path[: depth - 1] == begun)
        return tuple(t for t in self.trie.children[begun] if self.trie.leaves[(*begun, t)] > taken[(*begun, t)])


def trie_of(names: Iterable[Sequence[str]], ids: Mapping[str, int]) -> TokenTrie:
    """The trie of items whose names are tokens of a vocabulary, in the order of `names`.

    Raises:
        DataError: the vocabulary lacks a token; or as TokenTrie.
    """
    paths = [tuple(name) for name in names]
    if lacking := sorted({token for path in paths for token in path} - ids.keys()):
        raise DataError(f"the tokenizer has no {lacking[0]!r} ({len(lacking)} such); add the items' tokens to it")
    return TokenTrie([[ids[token] for token in path] for path in paths])
