"""A simulated service whose truth is known: members choose items of a catalogue, and every cause can be read.

What a member does follows from one number an item, utility(), which adds up

    taste       members and items have hidden vectors; items of a genre lie together
    popularity  few items are liked by most
    hour        each part of the day has genres of its own
    mood        within a session, a genre is followed by the one that `mood` names: order matters
    sequel      after an item was played to its end, its sequel: order matters, over sessions too
    freshness   an item is sought for FRESH_DAYS after its release
    seen        what was played is rarely played again

Some items are released after `cutoff` only: no event before it has them, but `item_embeddings` describes them.
All randomness is drawn from the seed; two worlds with one seed are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # read where a table is made: processes that score have no use for it
    import pyarrow as pa

START = datetime(2025, 1, 6)
SESSION_GAP = timedelta(hours=3)
"""Events of one session are nearer to each other than this."""
DEVICES = ("tv", "phone", "laptop")
ACTIONS = ("finish", "play", "skip")
"""Played to the end, played in part, refused."""
UNSEEN = "unseen"
"""What became of an item of a slate that the member did not look at."""
HOUR_PARTS = 4
"""Night, morning, afternoon and evening, six hours each."""

TASTE, POPULARITY, HOUR, MOOD, SEQUEL, FRESH, SEEN = 3.0, 1.3, 1.0, 2.0, 4.5, 1.5, 4.0
"""Weights of the causes, in nats of the choice between items."""
FRESH_DAYS, RECENT = 14, 8
"""Days of freshness; events back to which a finished item asks for its sequel."""
THRESHOLD, FINISH, EXAMINE = 3.0, 4.0, 0.85
"""Utilities at which half of the members play, and half of those finish; share of members who look one place on."""


class Event(NamedTuple):
    """One row of the table."""

    time: datetime
    """UTC, without a zone."""
    item: int
    action: str
    """One of ACTIONS."""
    watch_minutes: float
    device: str


class Response(NamedTuple):
    """What a member did with one item of a slate."""

    action: str
    """One of ACTIONS, or UNSEEN."""
    watch_minutes: float


class World:
    """A catalogue, its members, and how they choose. All arrays are the truth, to be read by tests and graders."""

    def __init__(
        self,
        seed: int,
        *,
        members: int = 1000,
        items: int = 400,
        dim: int = 16,
        genres: int = 8,
        days: int = 60,
        cold_share: float = 0.1,
    ):
        """
        Args:
            dim: of the hidden vectors and of `item_embeddings`.
            cold_share: of the items, those that are released after the cutoff, which lies at 4/5 of the days.
        """
        rng = np.random.default_rng([seed, 1])
        self.seed, self.days = seed, days
        self.cutoff = START + timedelta(days=days * 4 // 5)
        """The first moment that training must not see."""
        centers = _unit(rng.normal(size=(genres, dim)))
        self.genre = rng.choice(genres, items, p=_zipf(genres, 0.5))
        """[items] int64."""
        self.item_latent = _unit(centers[self.genre] + 0.25 * rng.normal(size=(items, dim)))
        """[items, dim] float64, unit length."""
        self.sequel = self._series(rng)
        """[items] int64, the next part of an item's series, -1 where there is none."""
        self.popularity = POPULARITY * _standard(np.log(_zipf(items, 1.0)))[rng.permutation(items)]
        """[items] float64, nats."""
        self.length_minutes = rng.uniform(20, 110, items)
        liked = rng.dirichlet(np.full(genres, 0.3), members)
        self.member_latent = _unit(liked @ centers + 0.1 * rng.normal(size=(members, dim)))
        """[members, dim] float64, unit length."""
        self.mood = _derangement(genres, rng)
        """[genres] int64, the genre that follows within a session."""
        self.hour_taste = HOUR * rng.normal(size=(HOUR_PARTS, genres))
        """[parts of the day, genres] float64, nats."""
        self.activity = rng.gamma(4.0, 3.0, members) + 3
        """[members] float64, expected sessions."""
        after = rng.uniform(days * 4 / 5, days - 2, items)
        self.cold = rng.permutation(items) < round(cold_share * items)
        """[items] bool, released after the cutoff."""
        released = np.where(self.cold, after, -365 * rng.random(items))
        self.release_times = np.datetime64(START, "us") + (released * 86400e6).astype("timedelta64[us]")
        """[items] datetime64[us]."""
        turned = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
        noisy = self.item_latent @ turned + 0.08 * rng.normal(size=(items, dim))
        self.item_embeddings = noisy.astype(np.float32)
        """[items, dim] float32, what is known of an item's content: the hidden vectors turned, with noise."""
        self._taste = TASTE * self.member_latent @ self.item_latent.T

    def utility(self, member: int, history: Sequence[Event], now: datetime) -> np.ndarray:
        """[items] float64, nats: how much a member wants each item now; -inf before its release."""
        value = self._taste[member] + self.popularity + self.hour_taste[_part(now)][self.genre]
        if history and now - history[-1].time < SESSION_GAP:
            value += MOOD * (self.genre == self.mood[self.genre[history[-1].item]])
        for event in history[-RECENT:]:
            if event.action == "finish" and self.sequel[event.item] >= 0:
                value[self.sequel[event.item]] += SEQUEL
        age = np.datetime64(now, "us") - self.release_times
        value += FRESH * (age < np.timedelta64(FRESH_DAYS, "D"))
        value[list({event.item for event in history if event.action != "skip"})] -= SEEN
        value[age < np.timedelta64(0)] = -np.inf
        return value

    def choice(self, member: int, history: Sequence[Event], now: datetime) -> np.ndarray:
        """[items] float64: the true probabilities of what a member who browses takes next; no ranking beats its."""
        value = np.exp(self.utility(member, history, now))
        return value / value.sum()

    def events(self) -> pa.Table:
        """What all members did in the world's days, by member and time.

        Columns: member int64, time timestamp[us], item int64, action string, watch_minutes float32, device string.
        """
        import pyarrow as pa

        rows = [(member, *event) for member in range(len(self.activity)) for event in self.history(member)]
        types = (pa.int64(), pa.timestamp("us"), pa.int64(), pa.string(), pa.float32(), pa.string())
        names = ("member", *Event._fields)
        columns = zip(names, types, zip(*rows, strict=True), strict=True)
        return pa.table({name: pa.array(values, kind) for name, kind, values in columns})

    def history(self, member: int) -> list[Event]:
        """The events of one member, in order; drawn from the seed and the member alone."""
        rng = np.random.default_rng([self.seed, 2, member])
        sessions = max(2, rng.poisson(self.activity[member]))
        days = np.sort(rng.choice(self.days, min(sessions, self.days), replace=False))
        found: list[Event] = []
        for day in days.tolist():
            # at most 8 events, so that a session that begins in the evening ends before the next day's begins
            now = START + timedelta(days=day, hours=float(rng.choice([1, 7, 13, 19], p=[0.1, 0.2, 0.2, 0.5])))
            device = str(rng.choice(DEVICES, p=[0.6, 0.2, 0.2] if now.hour >= 18 else [0.2, 0.5, 0.3]))
            for _ in range(min(int(rng.geometric(0.25)), 8)):
                item = int(rng.choice(len(self.genre), p=self.choice(member, found, now)))
                response = self._act(item, self.utility(member, found, now)[item], rng)
                found.append(Event(now, item, *response, device))
                now += timedelta(minutes=round(min(response.watch_minutes, 40) + 1))
        return found

    def engagement(
        self, member: int, history: Sequence[Event], slate: Sequence[int], now: datetime | None = None
    ) -> np.ndarray:
        """[k] float64: the true probability that each item of a slate is played, to the end or in part.

        A member looks at place p with probability EXAMINE ** p, and never plays an item's second mention, nor one
        that is not released.

        Args:
            now: when the slate is shown; None is a minute after the last event.
        """
        value = self.utility(member, history, now or _next(history))[list(slate)]
        first = np.array([item not in slate[:place] for place, item in enumerate(slate)], bool)
        return EXAMINE ** np.arange(len(slate)) * first * _sigmoid(value - THRESHOLD)

    def respond(
        self,
        member: int,
        history: Sequence[Event],
        slate: Sequence[int],
        rng: np.random.Generator,
        now: datetime | None = None,
    ) -> list[Response]:
        """What a member does with each item of a slate; each by itself, with the probabilities of engagement()."""
        now = now or _next(history)
        value, found = self.utility(member, history, now), []
        for place, item in enumerate(slate):
            looks = rng.random() < EXAMINE**place
            wanted = -np.inf if item in slate[:place] else value[item]
            found.append(self._act(item, wanted, rng) if looks else Response(UNSEEN, 0.0))
        return found

    def _act(self, item: int, utility: float, rng: np.random.Generator) -> Response:
        if rng.random() >= _sigmoid(utility - THRESHOLD):
            return Response("skip", 0.0)
        length = float(self.length_minutes[item])
        if rng.random() < _sigmoid(utility - FINISH):
            return Response("finish", round(length, 2))
        return Response("play", round(length * float(rng.uniform(0.05, 0.8)), 2))

    def _series(self, rng: np.random.Generator) -> np.ndarray:
        """Half of the items, in series of up to four within a genre; parts of a series are alike."""
        sequel = np.full(len(self.genre), -1)
        for genre in range(self.genre.max() + 1):
            inside = rng.permutation(np.flatnonzero(self.genre == genre))
            inside = inside[: len(inside) // 2]
            for start in range(0, len(inside), 4):
                parts = inside[start : start + 4]
                sequel[parts[:-1]] = parts[1:]
                mean = self.item_latent[parts].mean(0)
                self.item_latent[parts] = _unit(mean + 0.15 * (self.item_latent[parts] - mean))
        return sequel


def _next(history: Sequence[Event]) -> datetime:
    return history[-1].time + timedelta(minutes=1) if history else START


def _part(now: datetime) -> int:
    return now.hour * HOUR_PARTS // 24


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


def _zipf(count: int, power: float) -> np.ndarray:
    weights = 1 / np.arange(1, count + 1) ** power
    return weights / weights.sum()


def _derangement(count: int, rng: np.random.Generator) -> np.ndarray:
    """A cycle through all of them: none follows itself."""
    order = rng.permutation(count)
    following = np.empty(count, np.int64)
    following[order] = np.roll(order, -1)
    return following
