"""Semantic IDs: near items begin alike, every item has its own name, and names never change."""

import json
from itertools import combinations

import numpy as np
import pytest

from posttrain.data.event_world import World
from posttrain.data.semantic_ids import FILE, SemanticIds, fit_semantic_ids, lloyd
from posttrain.data.token_trie import TokenTrie
from posttrain.errors import CodesFullError, DataError

WORLD = World(0, members=5, items=300)
WARM = np.flatnonzero(~WORLD.cold)
FACTS = {"levels": 3, "codes": 16, "last_codes": 8, "seed": 0}


@pytest.fixture(scope="module")
def ids() -> SemanticIds:
    return fit_semantic_ids(WARM.tolist(), WORLD.item_embeddings[WARM], **FACTS)


def test_each_level_says_more_of_the_embedding(ids: SemanticIds):
    codes = ids.encode(WORLD.item_embeddings[WARM])
    errors = [((ids.decode(codes[:, :n]) - WORLD.item_embeddings[WARM]) ** 2).sum(1).mean() for n in (1, 2, 3)]
    spread = WORLD.item_embeddings[WARM].var(0).sum()
    assert errors[0] < 0.5 * spread and errors[1] < 0.8 * errors[0] and errors[2] < 0.8 * errors[1]


def test_every_item_has_a_name_of_its_own_and_none_begins_another(ids: SemanticIds):
    names = [ids.tokens(item) for item in WARM.tolist()]
    number = {token: place for place, token in enumerate(ids.vocabulary)}
    assert len(TokenTrie([[number[token] for token in name] for name in names])) == len(WARM)
    assert len(ids.vocabulary) == len(set(ids.vocabulary)) == 3 * 16 + 8
    with pytest.raises(KeyError):
        ids.tokens(int(np.flatnonzero(WORLD.cold)[0]))


def test_equal_codes_are_counted_in_the_order_of_the_items(ids: SemanticIds):
    shared = {}
    for item, (*prefix, last) in zip(ids.items.tolist(), ids.codes.tolist(), strict=True):
        shared.setdefault(tuple(prefix), []).append((item, last))
    assert any(len(found) > 1 for found in shared.values())
    for found in shared.values():
        assert [last for _, last in sorted(found)] == list(range(len(found)))


def test_order_of_the_items_does_not_matter_and_the_seed_decides(ids: SemanticIds):
    order = np.random.default_rng(1).permutation(WARM)
    again = fit_semantic_ids(order.tolist(), WORLD.item_embeddings[order], **FACTS)
    assert np.array_equal(again.codes, ids.codes) and np.array_equal(again.codebooks, ids.codebooks)
    other = fit_semantic_ids(WARM.tolist(), WORLD.item_embeddings[WARM], **FACTS | {"seed": 1})
    assert not np.array_equal(other.codes, ids.codes)


def test_items_that_are_near_share_how_their_names_begin(ids: SemanticIds):
    seen, codes = WORLD.item_embeddings[WARM], ids.encode(WORLD.item_embeddings[WARM])
    pairs = list(combinations(range(len(WARM)), 2))
    distance = np.array([((seen[a] - seen[b]) ** 2).sum() for a, b in pairs])
    shared = np.array([codes[a, 0] == codes[b, 0] for a, b in pairs])
    near = distance < np.quantile(distance, 0.02)
    assert shared[near].mean() > 0.6 and shared[distance > np.median(distance)].mean() < 0.02
    genres = [WORLD.genre[WARM[codes[:, 0] == code]] for code in range(16)]
    assert np.average([np.bincount(g).max() / len(g) for g in genres], weights=[len(g) for g in genres]) > 0.9


def test_centroids_without_a_point_are_put_to_use():
    """Three of four start at one place: two of them have no point, since of equals the first is the nearest."""
    corners = np.array([[0.0, 0.0], [0.0, 9.0], [9.0, 0.0], [9.0, 9.0]])
    points = np.concatenate([corner + 0.1 * np.random.default_rng(0).normal(size=(50, 2)) for corner in corners])
    found = lloyd(points, np.array([[0.0, 0.0]] * 3 + [[9.0, 9.0]]))
    assert sorted(map(tuple, found.round().astype(int).tolist())) == [(0, 0), (0, 9), (9, 0), (9, 9)]


def test_items_that_come_later_change_no_name_and_take_what_is_free(ids: SemanticIds):
    cold = np.flatnonzero(WORLD.cold)
    more = ids.add(cold.tolist(), WORLD.item_embeddings[cold])
    assert all(more.tokens(item) == ids.tokens(item) for item in WARM.tolist())
    assert len({more.tokens(item) for item in more.items.tolist()}) == 300 and more.vocabulary == ids.vocabulary
    twin = ids.add([1000], WORLD.item_embeddings[WARM[:1]])
    first = ids.codes[0]
    taken = [last for *prefix, last in ids.codes.tolist() if prefix == first[:-1].tolist()]
    assert twin.codes[-1].tolist() == [*first[:-1].tolist(), max(taken) + 1]


def test_a_full_code_refuses_the_next_item_by_name(ids: SemanticIds):
    same = np.repeat(WORLD.item_embeddings[WARM[:1]], 8, 0)
    with pytest.raises(CodesFullError, match=r"item 100\d: 8 items share its codes .* last_codes = 8 tells no more"):
        ids.add(range(1000, 1008), same)
    with pytest.raises(CodesFullError, match="fit anew with more levels"):
        fit_semantic_ids(range(20), np.repeat(same, 3, 0)[:20], levels=2, codes=4, last_codes=16, seed=0)


def test_what_was_saved_is_loaded_and_a_changed_file_is_refused(ids: SemanticIds, tmp_path):
    ids.save(tmp_path)
    found = SemanticIds.load(tmp_path)
    assert all(np.array_equal(getattr(found, n), getattr(ids, n)) for n in ("codebooks", "items", "codes"))
    assert found.codes.dtype == np.int32 and found.last_codes == 8 and found.vocabulary == ids.vocabulary
    made = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(made | {"last_codes": 9}))
    with pytest.raises(DataError, match="was changed since it was written"):
        SemanticIds.load(tmp_path)
    with pytest.raises(DataError, match="holds no semantic ids: FileNotFoundError"):
        SemanticIds.load(tmp_path / "elsewhere")


def test_embeddings_that_do_not_fit_are_refused(ids: SemanticIds):
    with pytest.raises(DataError, match="item 0 has a semantic id already"):
        ids.add([0], WORLD.item_embeddings[:1])
    with pytest.raises(DataError, match=r"must be \[n, 16\] of finite numbers"):
        ids.add([1000], np.full((1, 16), np.nan, np.float32))
    with pytest.raises(DataError, match="2 items, each once, need embeddings"):
        ids.add([1000, 1000], WORLD.item_embeddings[:2])
