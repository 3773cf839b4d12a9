"""What a search needs and what it returns: stored vectors, three kinds of search, pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from torch import Tensor

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Query (P,) int64, row (P,) int64 and distance (P,) float64."""

_NOT_FINITE = "The protected set is damaged: a row is not finite, so its distance is not defined."
_MAX_CACHED_NUMBERS = 1 << 18  # numbers that stay in a processor's cache from one operation to the next


class SearchableVectors(Protocol):
    """The references of a set as they are stored."""

    alive: np.ndarray | None
    """(K,) bool, False for stored rows that have been removed; None: no row has been removed."""

    digests: list[str]
    """SHA-256 of each shard's file."""

    @property
    def shape(self) -> tuple[int, int]:
        """(K, dim) with K stored rows."""
        ...

    def extents(self) -> list[tuple[int, int]]:
        """List (first stored row, number of rows) of each shard."""
        ...

    def block(self, number: int) -> np.ndarray:
        """Return the (n, dim) float16 or float32 of a shard."""
        ...

    def parts(self) -> list[tuple[int, np.ndarray]]:
        """List (first stored row, (n, dim) float16 or float32) of each shard."""
        ...

    def take(self, stored_rows: np.ndarray) -> np.ndarray:
        """Read stored rows (P,) as (P, dim) float32."""
        ...


class ExactSearch(Protocol):
    """Find references without missing any. Rows are numbered without those that have been removed."""

    def within(self, x: Tensor, radius: np.ndarray, shrink: np.ndarray | None, nearest: int | None) -> Pairs:
        """Find all pairs of a query and a row with distance < radius.

        Args:
            x: queries (B, dim), finite; B >= 1.
            radius: (B, K), not negative; may be a broadcast view.
            shrink: (B,) subtracted from each query's squared radii (posterior radius); None: nothing.
            nearest: keep only this many rows of each query, the nearest ones; None: all.

        Returns:
            Query, row and distance of each pair, sorted by query, then by row.
        """
        ...

    def nearest(self, x: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest rows of each query, nearest first; equal distances in the order of the rows.

        Args:
            x: queries (B, dim), finite.
            k: neighbours per query, at most K.

        Returns:
            Distances (B, k) float64 and rows (B, k) int64.
        """
        ...


def live_rows(vectors: SearchableVectors) -> np.ndarray:
    """List the stored rows that have not been removed: the stored row of each row."""
    return np.arange(vectors.shape[0]) if vectors.alive is None else np.flatnonzero(vectors.alive)


def exact_distances(
    x: np.ndarray, take: Callable[[np.ndarray], np.ndarray], query: np.ndarray, row: np.ndarray
) -> np.ndarray:
    """Compute ‖x[query] - take(row)‖ in float64.

    NumPy sums row by row, so a distance does not depend on which others are computed with it.
    """
    distance = np.empty(len(query))
    step = max(1, _MAX_CACHED_NUMBERS // x.shape[1])
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        difference = x[query[part]]
        difference -= take(row[part])
        distance[part] = np.sqrt(np.square(difference, out=difference).sum(1))
    if np.isnan(distance).any():
        raise ValueError(_NOT_FINITE)
    return distance


def require_finite(norms: np.ndarray) -> np.ndarray:
    """Return the norms of stored rows.

    Raises:
        ValueError: one of them is not finite, so that its row would count as outside of every shield.
    """
    if not np.isfinite(norms).all():
        raise ValueError(_NOT_FINITE)
    return norms


def shrunk(radius: np.ndarray, shrink: np.ndarray | None) -> np.ndarray:
    """Compute sqrt(r² - shrink), 0 where that is negative; for (B, K) and (B,), or (P,) and (P,)."""
    if shrink is None:
        return radius
    subtracted = shrink.reshape(-1, *[1] * (radius.ndim - 1)) if np.ndim(shrink) else shrink
    with np.errstate(invalid="ignore"):  # an infinite radius less an infinite number: nothing is left
        return np.sqrt(np.fmax(np.square(radius) - subtracted, 0))


def sorted_pairs(pairs: Pairs, nearest: int | None = None) -> Pairs:
    """Sort pairs by query, then by row.

    Args:
        pairs: query, row and distance (P,) each.
        nearest: keep only this many pairs of each query, the nearest ones; None: all.
    """
    query, row, distance = pairs
    if nearest is not None:
        order = np.lexsort((row, distance, query))
        rank = np.arange(len(query)) - np.searchsorted(query[order], query[order])
        query, row, distance = (part[order[rank < nearest]] for part in pairs)
    order = np.lexsort((row, query))
    return query[order], row[order], distance[order]


def joined(found: Iterable[Pairs]) -> Pairs:
    """Concatenate pairs."""
    empty = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    query, row, distance = (np.concatenate(part) for part in zip(empty, *found, strict=True))
    return query, row, distance


def float64(x: Tensor) -> np.ndarray:
    """Copy queries to the host as float64."""
    return x.detach().cpu().double().numpy()
