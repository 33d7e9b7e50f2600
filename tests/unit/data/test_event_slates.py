"""The example of RL on a business metric: what its rows hold, and that its parts say what they are named for."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from posttrain.data import event_slates
from posttrain.data.environment import EnvironmentHost
from posttrain.data.event_slates import DIVERSITY, HISTORY, SIZE, history, item_ids, judged, read_slate, slates
from posttrain.data.event_world import World

WORLD = World(0, members=40, items=300)


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(event_slates, "world", lambda seed: WORLD)
    history.cache_clear()
    item_ids.cache_clear()
    yield
    history.cache_clear()
    item_ids.cache_clear()


def shown() -> list[dict]:
    return event_slates.held_out(0, 20)


def text(items: list[int]) -> str:
    return "".join(token for item in items for token in item_ids(0).tokens(item))


def test_training_rows_hold_nothing_of_the_cutoff_or_later_and_held_out_visits_come_after_it():
    for row in event_slates.prompts(0, 50):
        assert history(0, row["member"])[row["place"]].time < WORLD.cutoff
    for row in shown():
        assert history(0, row["member"])[row["place"]].time >= WORLD.cutoff
    for row in event_slates.demonstrations(0, 50):
        slate = read_slate(row["messages"][-1]["content"], item_ids(0))
        assert len(set(slate)) == SIZE and not WORLD.cold[slate].any()


def test_a_prompt_tells_the_history_and_not_what_was_taken():
    for row in event_slates.prompts(0, 20):
        past = history(0, row["member"])[: row["place"]]
        answers = [each["content"] for each in row["messages"] if each["role"] == "assistant"]
        assert row["messages"][-1]["role"] == "user"
        assert answers == [text([event.item]) for event in past[-len(answers) :]] and len(answers) >= 4


def test_who_serves_what_members_want_earns_more_than_who_serves_anything():
    rng = np.random.default_rng(0)
    known = np.flatnonzero(~WORLD.cold)
    wanted, anything = [], []
    for row in shown():
        past, now = history(0, row["member"])[: row["place"]], history(0, row["member"])[row["place"]].time
        value = WORLD.utility(row["member"], past, now)[known]
        wanted.append(judged(row, known[np.argsort(-value)[:SIZE]].tolist(), rng))
        anything.append(judged(row, rng.choice(known, SIZE, replace=False).tolist(), rng))
    engaged = [np.mean([each["engagement"] for each in found]) for found in (wanted, anything)]
    assert engaged[0] > 3 * engaged[1] > 0


def test_guardrails_charge_for_what_they_are_named_for_and_nothing_else():
    row = shown()[0]
    past = history(0, row["member"])[: row["place"]]
    told = past[1 - HISTORY :]
    played = next(event.item for event in told if event.action != "skip" and not WORLD.cold[event.item])
    free = [i for i in np.flatnonzero(~WORLD.cold).tolist() if i not in {event.item for event in past}]
    short = [i for i in free if WORLD.length_minutes[i] < 90]
    long = [i for i in free if WORLD.length_minutes[i] > 95]

    def guards(items: list[int]) -> tuple[float, ...]:
        parts = judged(row, items, np.random.default_rng(0))
        return tuple(round(parts[name], 6) for name in event_slates.GUARDRAILS)

    assert guards(short[:5]) == (0, 0, 0)
    assert guards([played, *short[:4]])[0] == pytest.approx(-0.2 * event_slates.REPEATED)
    assert guards([*short[:4], long[0]])[1] == 0 and guards([*short[:2], *long[:3]])[1] == -0.4
    assert guards([*short[:3], short[0], -1])[2] == -0.4 and guards([])[2] == -1.0


def test_items_that_are_alike_are_less_diverse():
    row, known = shown()[0], np.flatnonzero(~WORLD.cold)
    alike = known[WORLD.genre[known] == WORLD.genre[known[0]]][:SIZE].tolist()
    apart = [known[WORLD.genre[known] == genre][0].item() for genre in range(SIZE)]
    found = [judged(row, items, np.random.default_rng(0))["diversity"] for items in (alike, apart)]
    assert 0 < found[0] < 0.5 * found[1] < DIVERSITY


def test_a_slate_is_read_from_its_text_as_the_policy_writes_it():
    ids = item_ids(0)
    items = ids.items[:SIZE].tolist()
    assert read_slate(text(items), ids) == items
    assert read_slate(text(items[:2]) + "<sid_0_1>", ids) == [*items[:2], -1]
    assert read_slate("", ids) == []


def test_the_constraint_lets_every_item_be_written_and_ends_after_a_slate(tmp_path: Path):
    ids = item_ids(0)
    event_slates.tokenizer(tmp_path, 0)
    rule = slates(tmp_path)
    assert len(rule.trie) == len(ids.items)
    path = [token for item in (0, 1, 2, 3, 4) for token in rule.trie.paths[item]]
    assert rule.allowed((), path) == (rule.stop_id,)
    assert rule.trie.paths[0][0] in rule.allowed((), path[:3])


def test_an_episode_gives_the_parts_and_the_same_after_a_restart():
    row, said = shown()[0], text(item_ids(0).items[:SIZE].tolist())

    async def played() -> dict:
        host = EnvironmentHost("posttrain.data.event_slates:Members")
        assert await host.start("a", row, 5) == {"ask": []}
        return await host.go_on("a", said)

    first, again = asyncio.run(played()), asyncio.run(played())
    reward, parts = first["reward"]
    assert first == again and reward == pytest.approx(sum(parts.values()))
    assert set(parts) == {"engagement", "diversity", *event_slates.GUARDRAILS}
