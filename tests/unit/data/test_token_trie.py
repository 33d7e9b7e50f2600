"""Paths of items: what may follow a beginning, and slates that hold no item twice."""

import itertools

import pytest

from posttrain.data.token_trie import Slate, TokenTrie
from posttrain.errors import DataError
from small_constraints import PATHS, STOP


def test_every_path_can_be_walked_and_nothing_else():
    trie = TokenTrie(PATHS)
    assert trie.children[()] == (10, 11, 12) and trie.children[10, 20] == (30, 31)
    assert len(trie) == 6 and trie.leaves[()] == 6 and trie.leaves[(10, 20)] == 2
    assert trie.split([11, 22, 32, 10, 20, 31, 12]) == ([4, 1], (12,))
    with pytest.raises(DataError, match=r"no item's path begins with \[10, 22\], after 1 items"):
        trie.split([12, 23, 33, 10, 22])


@pytest.mark.parametrize("paths", [[(1, 2), (1, 2)], [(1,), (1, 2)], [(1, 2), (1,)], [()]])
def test_paths_whose_end_could_not_be_told_are_refused(paths):
    with pytest.raises(DataError, match="is empty, or names or begins more than one item"):
        TokenTrie(paths)


def test_a_slate_allows_exactly_the_sequences_of_distinct_items():
    slate = Slate(TokenTrie(PATHS), size=3, stop_id=STOP)
    found, open_ends = set(), [()]
    while open_ends:
        begun = open_ends.pop()
        for token in slate.allowed((1, 2), begun):
            after = (*begun, token)
            found.add(after) if token == STOP else open_ends.append(after)
    expected = {(*sum(chosen, ()), STOP) for chosen in itertools.permutations(PATHS, 3)}
    assert found == expected


def test_a_slate_of_more_items_than_there_are_is_refused():
    with pytest.raises(DataError, match="a slate of 7 distinct items cannot be made of 6"):
        Slate(TokenTrie(PATHS), size=7, stop_id=STOP)
