from datetime import timedelta
from itertools import pairwise

import numpy as np
import pytest

from posttrain.data.event_world import ACTIONS, SESSION_GAP, UNSEEN, World

WORLD = World(0, members=150, items=120)


@pytest.fixture(scope="module")
def histories():
    return [WORLD.history(member) for member in range(150)]


def steps(histories):
    """Events that follow one another in a history."""
    return [pair for history in histories for pair in pairwise(history)]


def test_one_seed_is_one_table_and_another_seed_another():
    small = {"members": 5, "items": 30}
    assert World(3, **small).events().equals(World(3, **small).events())
    assert not World(3, **small).events().equals(World(4, **small).events())


def test_the_table_is_what_the_members_did_in_order_of_time(histories):
    table = WORLD.events()
    assert table.num_rows == sum(map(len, histories))
    assert [str(kind) for kind in table.schema.types] == [
        "int64",
        "timestamp[us]",
        "int64",
        "string",
        "float",
        "string",
    ]
    assert set(table["action"].to_pylist()) == set(ACTIONS)
    assert all(later.time > earlier.time for earlier, later in steps(histories))


def test_a_few_items_take_most_of_the_events(histories):
    counts = np.bincount([event.item for history in histories for event in history], minlength=120)
    assert np.sort(counts)[::-1][:24].sum() > 0.5 * counts.sum()


def test_members_prefer_their_own_genres(histories):
    """A member's most frequent genre is far more frequent than in the histories of the others."""
    counts = np.stack([np.bincount(WORLD.genre[[event.item for event in each]], minlength=8) for each in histories])
    everyone = counts.sum(0) / counts.sum()
    own = counts.argmax(1)
    assert np.mean(counts.max(1) / counts.sum(1) / everyone[own]) > 1.5


def test_within_a_session_the_next_genre_follows_the_mood_and_across_sessions_it_does_not(histories):
    follows = {True: [], False: []}
    for earlier, later in steps(histories):
        within = later.time - earlier.time < SESSION_GAP
        follows[within].append(WORLD.genre[later.item] == WORLD.mood[WORLD.genre[earlier.item]])
    assert np.mean(follows[True]) > 2 * np.mean(follows[False])


def test_a_finished_item_is_followed_by_its_sequel(histories):
    found = [
        WORLD.sequel[earlier.item] == later.item
        for earlier, later in steps(histories)
        if earlier.action == "finish" and WORLD.sequel[earlier.item] >= 0
    ]
    assert len(found) > 100 and np.mean(found) > 0.1  # one of 120 items by chance


def test_the_order_of_the_same_events_changes_the_next_choice(histories):
    history = next(each[:6] for each in histories if WORLD.genre[each[5].item] != WORLD.genre[each[4].item])
    times = [event.time for event in history]
    swapped = [history[5], *history[1:5], history[0]]
    swapped = [event._replace(time=time) for event, time in zip(swapped, times, strict=True)]
    now = times[-1] + timedelta(minutes=5)
    apart = np.abs(WORLD.choice(0, history, now) - WORLD.choice(0, swapped, now)).sum()
    assert apart > 0.1


def test_no_item_is_chosen_before_its_release_and_cold_ones_only_after_the_cutoff(histories):
    events = [event for history in histories for event in history]
    assert all(np.datetime64(event.time) >= WORLD.release_times[event.item] for event in events)
    cold = [event for event in events if WORLD.cold[event.item]]
    assert len(cold) > 20 and all(event.time >= WORLD.cutoff for event in cold)


def test_embeddings_tell_the_genre_of_an_item_and_its_series():
    seen = WORLD.item_embeddings @ WORLD.item_embeddings.T
    np.fill_diagonal(seen, -np.inf)
    assert seen.dtype == np.float32
    assert np.mean(WORLD.genre[seen.argmax(1)] == WORLD.genre) > 0.8
    first = np.flatnonzero(WORLD.sequel >= 0)
    assert np.mean(seen[first, WORLD.sequel[first]] > np.median(seen[first], 1)) > 0.95


def test_members_respond_as_often_as_engagement_says(histories):
    history, rng = histories[0], np.random.default_rng(0)
    now = history[-1].time + timedelta(minutes=1)
    best = np.argsort(-WORLD.utility(0, history, now))
    slate = [int(item) for item in (best[0], best[3], best[0], best[10], best[20])]
    draws = [WORLD.respond(0, history, slate, rng) for _ in range(2000)]
    played = np.mean([[each.action in ("finish", "play") for each in draw] for draw in draws], axis=0)
    expected = WORLD.engagement(0, history, slate)
    assert expected[2] == 0 and 0 < expected[4] < expected[0] < 1
    np.testing.assert_allclose(played, expected, atol=0.04)  # 3.6 standard errors of 2000 draws
    assert all((each.watch_minutes > 0) == (each.action in ("finish", "play")) for draw in draws for each in draw)
    assert np.mean([draw[4].action == UNSEEN for draw in draws]) == pytest.approx(1 - 0.85**4, abs=0.04)
