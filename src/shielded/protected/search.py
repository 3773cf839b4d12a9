"""Exact search: which references lie within a radius, and which are nearest.

A float32 matrix product gives every distance up to a known rounding error, so it can rule references out but never
decide. Whatever it cannot rule out is measured again by subtraction in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

# Components that are summed in float32 before the sum goes on in float64. A float32 inner product of n terms is off
# by at most n u / (1 - n u) |x| |z| with u = 2^-24, in whatever order it is summed (Higham, Accuracy and Stability of
# Numerical Algorithms, section 3.1).
_BLOCK = 4096
_WORKING_SET = 1 << 24  # numbers in the largest temporary array
_CACHE = 1 << 18  # numbers that stay in a processor's cache between one operation and the next


@dataclass(frozen=True)
class Hits:
    """The references within a radius, sorted by query, then by row.

    Args:
        query: (P,) int64, index into the batch.
        row: (P,) int64, index into the protected set.
        distance: (P,) float64, L2.
    """

    query: Tensor
    row: Tensor
    distance: Tensor

    def __len__(self) -> int:
        return len(self.row)


def squared_norms(latents: Tensor) -> np.ndarray:
    """‖z‖² of each row of (K, dim), in float64."""
    step = max(1, _WORKING_SET // max(1, latents.shape[1]))
    parts = [np.square(part.double().numpy()).sum(1) for part in latents.split(step)]
    return np.concatenate([np.empty(0), *parts])


def within(
    x: np.ndarray, latents: Tensor, norms: np.ndarray, radius: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of a query and a row with distance < radius.

    Args:
        x: queries (B, dim), float64.
        latents: references (K, dim), float32 or float16.
        norms: ‖z‖² of the references (K,).
        radius: (B, K), which may be a broadcast view.

    Returns:
        Query, row and distance of each pair, sorted by query, then by row.
    """
    rounded, shift = _rounded(x)
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    for first, references in _chunks(latents):
        columns = slice(first, first + len(references))
        for start in range(0, len(x), _rows_per_chunk(len(references))):
            queries = slice(start, start + _rows_per_chunk(len(references)))
            lower, _ = _bounds(rounded[queries], references, norms[columns])
            query, row = np.nonzero(lower <= radius[queries, columns] + shift[queries, None])
            query, row = query + start, row + first
            distance = _distances(x, latents, query, row)
            inside = distance < radius[query, row]
            found.append((query[inside], row[inside], distance[inside]))
    query, row, distance = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((row, query))
    return query[order], row[order], distance[order]


def nearest(x: np.ndarray, latents: Tensor, norms: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of each query, nearest first; equal distances in the order of the rows.

    Args:
        x: queries (B, dim), float64.
        latents: references (K, dim), float32 or float16, with K >= k.
        norms: ‖z‖² of the references (K,).
        k: how many.

    Returns:
        Distances (B, k) and rows (B, k).
    """
    distances, rows = np.empty((len(x), k)), np.empty((len(x), k), np.int64)
    rounded, shift = _rounded(x)
    size = _rows_per_chunk(len(latents))
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


def _rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The queries in float32, and how far (B,) that moved each of them."""
    with np.errstate(over="ignore"):
        rounded = x.astype(np.float32)
    return rounded, np.sqrt(np.square(x - rounded).sum(1))


def _chunks(latents: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """The references in float32, as many at a time as the working set holds, with the index of the first."""
    step = max(1, _WORKING_SET // latents.shape[1])
    for first in range(0, len(latents), step):
        yield first, latents[first : first + step].float().numpy()


def _rows_per_chunk(columns: int) -> int:
    return max(1, _WORKING_SET // (4 * columns))


def _bounds(x: np.ndarray, z: np.ndarray, norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds (B, K) of the distances between float32 vectors.

    NumPy does the product, because torch may be told to use TF32 or bfloat16 for float32 matrices.
    """
    dim = x.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.zeros((len(x), len(z)))
        for start in range(0, dim, _BLOCK):
            product += x[:, start : start + _BLOCK] @ z[:, start : start + _BLOCK].T
        scale = np.square(x, dtype=np.float64).sum(1)[:, None] + norms
        squared = scale - 2 * product
        # 2 |x| |z| <= |x|² + |z|². The further terms are the float64 sums, generously, and float32 underflow.
        error = (1.01 * min(dim, _BLOCK) * 2.0**-24 + dim * 2.0**-50 + 1e-12) * scale + dim * 2.0**-125
        lower = np.sqrt(np.maximum(squared - error, 0))
        upper = np.sqrt(np.maximum(squared + error, 0))
    overflow = ~np.isfinite(squared)
    lower[overflow], upper[overflow] = 0, np.inf
    return lower, upper


def _distances(x: np.ndarray, latents: Tensor, query: np.ndarray, row: np.ndarray) -> np.ndarray:
    """‖x[query] - latents[row]‖ in float64. NumPy sums row by row, so what else is measured changes no distance."""
    distance = np.empty(len(query))
    step = max(1, _CACHE // x.shape[1])
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        difference = x[query[part]]
        difference -= latents[row[part]].numpy()
        distance[part] = np.sqrt(np.square(difference, out=difference).sum(1))
    return distance
