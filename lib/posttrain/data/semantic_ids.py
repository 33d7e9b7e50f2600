"""Semantic IDs: an item's embedding becomes a few codes, so that items which are alike share how their names begin.

Residual quantisation (TIGER, arXiv:2305.05065, sec. 3.1, with k-means in the RQ-VAE's place): the first code is the
nearest of K centroids, the next the nearest of K others to what is left, and so on. Items whose codes are all equal
are told apart by a last code, which every item has: 0, 1, 2, … in the order of their numbers. A name is therefore
levels + 1 tokens long, and none begins another.

An item that comes later is encoded by the centroids as they are, and takes the next last code that is free: names that
a model was trained on never change.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.special_tokens import semantic_id_token, semantic_id_tokens
from posttrain.errors import CodesFullError, DataError
from posttrain.manifest import json_sha256

FILE = "semantic_ids.json"
"""Beside the model; it travels with the folder, as config and tokenizer do."""
FORMAT = "posttrain.semantic_ids/1"
LLOYD_ROUNDS = 50
"""At most; k-means mostly stands still before."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SemanticIds:
    """Items and their codes, as ItemTokens."""

    codebooks: np.ndarray
    """[levels, K, dim] float32, centroids of what the levels before left."""
    items: np.ndarray
    """[N] int64, the items' numbers."""
    codes: np.ndarray
    """[N, levels + 1] int32; the last tells items of equal codes apart."""
    last_codes: int
    """How many items may share all other codes."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token of any item that there is or will be, level by level."""
        levels, codes, _ = self.codebooks.shape
        last = (semantic_id_token(levels, code) for code in range(self.last_codes))
        return (*semantic_id_tokens(levels, codes), *last)

    def tokens(self, item: int) -> tuple[str, ...]:
        """The names of an item's codes.

        Raises:
            KeyError: an item that has none.
        """
        return tuple(semantic_id_token(level, code) for level, code in enumerate(self.codes[self._row[item]]))

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """[n, levels] int32: the codes of embeddings [n, dim], without the last."""
        _check(embeddings, self.codebooks.shape[2])
        left, found = embeddings.astype(np.float64), []
        for book in self.codebooks:
            found.append(_nearest(left, book)[0])
            left = left - book[found[-1]]
        return np.stack(found, 1).astype(np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """[n, dim] float32: the sum of the centroids that codes [n, L] name, L at most the levels."""
        levels = min(codes.shape[1], len(self.codebooks))
        return np.sum([self.codebooks[level][codes[:, level]] for level in range(levels)], axis=0)

    def add(self, items: Sequence[int], embeddings: np.ndarray) -> "SemanticIds":
        """The same with more items, [n, dim] embeddings; centroids and older names stay.

        Raises:
            DataError: an item is there already, or numbers and embeddings do not fit together.
            CodesFullError: one more would share its codes than last_codes can tell apart.
        """
        numbers, embeddings = _in_order(items, embeddings)
        if known := sorted(self._row.keys() & set(numbers.tolist())):
            raise DataError(f"item {known[0]} has a semantic id already ({len(known)} such); add each item once")
        prefixes = self.encode(embeddings)
        taken: dict[tuple[int, ...], int] = {}
        for *prefix, last in self.codes.tolist():
            taken[tuple(prefix)] = max(taken.get(tuple(prefix), 0), last + 1)
        rows = []
        for number, prefix in zip(numbers.tolist(), map(tuple, prefixes.tolist()), strict=True):
            last = taken.get(prefix, 0)
            if last >= self.last_codes:
                raise CodesFullError(
                    f"item {number}: {last} items share its codes {list(prefix)}, and last_codes = {self.last_codes} "
                    "tells no more apart; fit anew with more levels, codes or last_codes, and train on the new names"
                )
            taken[prefix] = last + 1
            rows.append([*prefix, last])
        codes = np.array(rows, np.int32).reshape(-1, self.codes.shape[1])
        return replace(self, items=np.concatenate((self.items, numbers)), codes=np.concatenate((self.codes, codes)))

    def save(self, folder: str | Path) -> None:
        """Write FILE into a model's folder."""
        body: dict[str, Any] = {name: _written(getattr(self, name)) for name in ("codebooks", "items", "codes")}
        body["last_codes"] = self.last_codes
        made = {"format": FORMAT, "sha256": json_sha256(body), **body}
        Path(folder, FILE).write_text(json.dumps(made) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "SemanticIds":
        """Read FILE of a model's folder.

        Raises:
            DataError: there is none, or it is not what save() wrote.
        """
        path = Path(folder, FILE)
        try:
            made = json.loads(path.read_text())
            body = {name: made[name] for name in ("codebooks", "items", "codes", "last_codes")}
            if made["format"] != FORMAT or made["sha256"] != json_sha256(body):
                raise DataError(f"{path} was changed since it was written; copy it again from the model's home")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} holds no semantic ids: {type(error).__name__}: {error}") from None
        arrays = {name: _read(body[name]) for name in ("codebooks", "items", "codes")}
        return cls(**arrays, last_codes=body["last_codes"])

    @cached_property
    def _row(self) -> dict[int, int]:
        return {number: row for row, number in enumerate(self.items.tolist())}


def fit_semantic_ids(
    items: Sequence[int], embeddings: np.ndarray, *, levels: int = 3, codes: int = 32, last_codes: int = 16, seed: int
) -> SemanticIds:
    """Fit centroids, and name every item; a function of the pairs (item, embedding) and the seed, not of their order.

    Args:
        embeddings: [N, dim].
        codes: centroids of each level.

    Raises:
        DataError: numbers and embeddings do not fit together, or there are fewer items than codes.
        CodesFullError: more items share all codes than last_codes tells apart.
    """
    numbers, embeddings = _in_order(items, embeddings)
    if len(numbers) < codes:
        raise DataError(f"{len(numbers)} items for {codes} codes a level; a centroid needs an item: choose fewer codes")
    left, books = embeddings.astype(np.float64), []
    for level in range(levels):
        books.append(_kmeans(left, codes, np.random.default_rng([seed, level])).astype(np.float32))
        left = left - books[-1][_nearest(left, books[-1])[0]]
    none = {"items": np.empty(0, np.int64), "codes": np.empty((0, levels + 1), np.int32)}
    return SemanticIds(codebooks=np.stack(books), **none, last_codes=last_codes).add(numbers.tolist(), embeddings)


def _kmeans(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[count, dim] centroids: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's rounds."""
    centers = points[rng.integers(len(points), size=1)]
    distance = ((points - centers[0]) ** 2).sum(1)
    while len(centers) < count:
        total = distance.sum()
        chance = distance / total if total > 0 else np.full(len(points), 1 / len(points))
        centers = np.concatenate((centers, points[rng.choice(len(points), size=1, p=chance)]))
        distance = np.minimum(distance, ((points - centers[-1]) ** 2).sum(1))
    return lloyd(points, centers)


def lloyd(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """[count, dim] centroids that are the means of the points [n, dim] nearest to them, as far as LLOYD_ROUNDS go.

    A centroid that no point is nearest to is put where the point is that is farthest from its own.
    """
    for _ in range(LLOYD_ROUNDS):
        nearest, distance = _nearest(points, centers)
        sizes = np.bincount(nearest, minlength=len(centers))
        sums = np.zeros_like(centers)
        np.add.at(sums, nearest, points)
        moved = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centers)
        far = np.argsort(-distance, kind="stable")
        for dead, point in zip(np.flatnonzero(sizes == 0), far, strict=False):
            if distance[point] > 0:
                moved[dead] = points[point]
        if np.array_equal(moved, centers):
            break
        centers = moved
    return centers


def _nearest(points: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] index of the nearest center, the first of equals, and the squared distance to it."""
    squares = (points**2).sum(1)[:, None] - 2 * points @ centers.T + (centers**2).sum(1)
    nearest = squares.argmin(1)
    return nearest, ((points - centers[nearest]) ** 2).sum(1)


def _in_order(items: Sequence[int], embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.asarray(items, np.int64)
    if embeddings.ndim != 2 or len(numbers) != len(embeddings) or len(np.unique(numbers)) != len(numbers):
        raise DataError(
            f"{len(numbers)} items, each once, need embeddings [{len(numbers)}, dim], not {embeddings.shape}"
        )
    _check(embeddings, embeddings.shape[1])
    order = np.argsort(numbers)
    return numbers[order], embeddings[order]


def _check(embeddings: np.ndarray, dim: int) -> None:
    if embeddings.ndim != 2 or embeddings.shape[1] != dim or not np.isfinite(embeddings).all():
        raise DataError(f"embeddings {embeddings.shape} must be [n, {dim}] of finite numbers")


def _written(array: np.ndarray) -> dict[str, object]:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {"dtype": little.dtype.str, "shape": little.shape, "base64": base64.b64encode(little.tobytes()).decode()}


def _read(written: dict) -> np.ndarray:
    raw = np.frombuffer(base64.b64decode(written["base64"]), np.dtype(written["dtype"]))
    return raw.reshape(written["shape"]).astype(raw.dtype.newbyteorder("="))
