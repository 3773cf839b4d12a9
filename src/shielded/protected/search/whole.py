"""Exact search that reads every row: small sets from memory, large ones shard by shard where Numba is missing.

A float32 matrix product gives each distance up to a known rounding error. What that error leaves open is measured again
by subtraction in float64.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from shielded.core.distances import bounded_squares, squared_norms
from shielded.protected.search.interface import (
    Pairs,
    SearchableVectors,
    exact_distances,
    float64,
    joined,
    live_rows,
    require_finite,
    shrunk,
    sorted_pairs,
)

_MAX_ARRAY_NUMBERS = 1 << 24  # numbers in the largest temporary array


class WholeSearch:
    """Compare queries with every row.

    Args:
        vectors: the references.
        in_memory: keep all rows in memory as float32; False: read them from the shards for each search.
    """

    def __init__(self, vectors: SearchableVectors, in_memory: bool) -> None:
        self._vectors, self._in_memory, self._stored = vectors, in_memory, live_rows(vectors)
        self._lock = threading.Lock()

    def within(self, x: Tensor, radius: np.ndarray, shrink: np.ndarray | None, nearest: int | None) -> Pairs:
        """Find all pairs with distance < radius: see `ExactSearch`."""
        queries, radius = float64(x), shrunk(radius, shrink)
        return sorted_pairs(joined(self._within_parts(queries, radius)), nearest)

    def _within_parts(self, x: np.ndarray, radius: np.ndarray) -> Iterator[Pairs]:
        for first, latents, norms in self._parts():
            query, row, distance = within(x, latents, norms, radius[:, first : first + len(latents)])
            yield query, row + first, distance

    def nearest(self, x: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest rows of each query: see `ExactSearch`."""
        queries = float64(x)
        distances, rows = np.empty((len(queries), 0)), np.empty((len(queries), 0), np.int64)
        for first, latents, norms in self._parts():
            distance, row = nearest(queries, latents, norms, min(k, len(latents)))
            distances, rows = np.append(distances, distance, axis=1), np.append(rows, row + first, axis=1)
            best = np.lexsort((rows, distances))[:, :k]
            distances, rows = np.take_along_axis(distances, best, 1), np.take_along_axis(rows, best, 1)
        return distances, rows

    def _parts(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield first row, vectors and ‖z‖² of the rows that are in memory at a time, without removed ones."""
        with self._lock:  # one thread computes them
            matrix = self._matrix if self._in_memory else None
            all_norms = [] if self._in_memory else self._norms
        if matrix is not None:
            yield 0, *matrix
            return
        for (start, vectors), norms in zip(self._vectors.parts(), all_norms, strict=True):
            alive = slice(None) if self._vectors.alive is None else self._vectors.alive[start : start + len(vectors)]
            latents = torch.from_numpy(vectors[alive].copy())
            if len(latents):
                yield int(np.searchsorted(self._stored, start)), latents, norms[alive]

    @cached_property
    def _matrix(self) -> tuple[Tensor, Tensor]:
        latents = torch.from_numpy(self._vectors.take(self._stored))
        return latents, _finite_norms(latents)

    @cached_property
    def _norms(self) -> list[Tensor]:
        return [_finite_norms(torch.from_numpy(vectors.copy())) for _, vectors in self._vectors.parts()]


def _finite_norms(latents: Tensor) -> Tensor:
    """Compute ‖z‖² of each row of (K, dim), in float64."""
    norms = squared_norms(latents)
    require_finite(norms.numpy())
    return norms


def within(x: np.ndarray, latents: Tensor, norms: Tensor, radius: np.ndarray) -> Pairs:
    """Find all pairs of a query and a row with distance < radius.

    Args:
        x: queries (B, dim), float64.
        latents: references (K, dim), float32 or float16.
        norms: ‖z‖² of the references (K,).
        radius: (B, K); may be a broadcast view.

    Returns:
        Query, row and distance of each pair, sorted by query, then by row.
    """
    rounded, shift = _rounded(x)
    found: list[Pairs] = []
    for first, references in _chunks(latents):
        columns = slice(first, first + len(references))
        size = _queries_per_chunk(len(references))
        for start in range(0, len(x), size):
            queries = slice(start, start + size)
            lower, _ = _bounds(rounded[queries], references, norms[columns])
            query, row = np.nonzero(lower <= radius[queries, columns] + shift[queries, None])
            query, row = query + start, row + first
            distance = _distances(x, latents, query, row)
            inside = distance < radius[query, row]
            found.append((query[inside], row[inside], distance[inside]))
    return sorted_pairs(joined(found))


def nearest(x: np.ndarray, latents: Tensor, norms: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k nearest rows of each query, nearest first; equal distances in the order of the rows.

    Args:
        x: queries (B, dim), float64.
        latents: references (K, dim), float32 or float16, with K >= k.
        norms: ‖z‖² of the references (K,).
        k: neighbours per query.

    Returns:
        Distances (B, k) and rows (B, k).
    """
    distances, rows = np.empty((len(x), k)), np.empty((len(x), k), np.int64)
    rounded, shift = _rounded(x)
    size = _queries_per_chunk(len(latents))
    for start in range(0, len(x), size):
        queries = slice(start, start + size)
        bounds = [
            _bounds(rounded[queries], references, norms[first : first + len(references)])
            for first, references in _chunks(latents)
        ]
        lower, upper = (np.concatenate(part, axis=1) for part in zip(*bounds, strict=True))
        kth = np.partition(upper, k - 1, axis=1)[:, k - 1]
        query, row = np.nonzero(lower <= (kth + 2 * shift[queries])[:, None])
        distance = _distances(x, latents, query + start, row)
        order = np.lexsort((row, distance, query))
        first_of_query = np.searchsorted(query[order], np.arange(len(lower)))
        best = order[first_of_query[:, None] + np.arange(k)]
        distances[queries], rows[queries] = distance[best], row[best]
    return distances, rows


def _bounds(x: Tensor, z: Tensor, norms: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Bound the distances (B, K) of queries and references, float32 both, from below and above."""
    squared, error = bounded_squares(x, z, norms)
    lower, upper = (squared - error).clamp_(min=0).sqrt_(), squared.add_(error).clamp_(min=0).sqrt_()
    return lower.numpy(), upper.numpy()


def _rounded(x: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Round queries to float32, and compute how far (B,) that moved each of them."""
    with np.errstate(over="ignore"):
        rounded = x.astype(np.float32)
    return torch.from_numpy(rounded), np.sqrt(np.square(x - rounded).sum(1))


def _chunks(latents: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, float32 references), as many at a time as fit into the largest temporary array."""
    step = max(1, _MAX_ARRAY_NUMBERS // latents.shape[1])
    for first in range(0, len(latents), step):
        yield first, latents[first : first + step].float()


def _queries_per_chunk(rows: int) -> int:
    return max(1, _MAX_ARRAY_NUMBERS // (4 * rows))


def _distances(x: np.ndarray, latents: Tensor, query: np.ndarray, row: np.ndarray) -> np.ndarray:
    return exact_distances(x, lambda rows: latents[rows].numpy(), query, row)
