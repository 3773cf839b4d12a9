"""Exact search: which references lie within a radius, and which are nearest.

A bound can rule references out but never decide. For a small set a float32 matrix product gives every distance up to a
known rounding error; a large set has an index (`index.py`, `neighbours.py`). Whatever is not ruled out is measured
again by subtraction in float64.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from shielded.protected.search.device import DeviceCopy
from shielded.protected.search.indexed import index
from shielded.protected.search.indexed.index import Index, Projection

if TYPE_CHECKING:
    from shielded.protected.search.indexed.bounds import Pruned

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # query, row, distance

SMALL = 10_000  # rows up to which a set is searched without an index
MEMORY = 1 << 30  # bytes that a search may hold
_FEW = 16  # rows that are measured at a time, and 3 k more
_MORE = 8  # rows that are remembered for the next step, besides those asked for
_GUESS = 32  # rows that are measured if nothing is known

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
    return measured(x, lambda rows: latents[rows].numpy(), query, row)


def measured(x: np.ndarray, take: Callable[[np.ndarray], np.ndarray], query: np.ndarray, row: np.ndarray) -> np.ndarray:
    """‖x[query] - take(row)‖ in float64. NumPy sums row by row, so what else is measured changes no distance."""
    distance = np.empty(len(query))
    step = max(1, _CACHE // x.shape[1])
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        difference = x[query[part]]
        difference -= take(row[part])
        distance[part] = np.sqrt(np.square(difference, out=difference).sum(1))
    return distance


class Vectors(Protocol):
    """The references of a set as they are stored."""

    alive: np.ndarray | None
    """(K,) bool, False for stored rows that have been removed; None: none has."""

    @property
    def shape(self) -> tuple[int, int]:
        """(K, dim) with K stored rows."""

    def parts(self) -> list[tuple[int, np.ndarray]]:
        """(first stored row, (n, dim) float16 or float32) of each shard."""

    def take(self, stored_rows: np.ndarray) -> np.ndarray:
        """(P, dim) float32."""


class Search:
    """Exact search in one version of a set.

    It remembers what it found for the last queries, so that the next ones, if they are near, cost little. Queries may
    come in any order: what is remembered only ever saves time.

    Rows are counted without those that have been removed.

    Args:
        vectors: the references.
        index_paths: where the index of each shard is, or is to be.
        shape: of one latent.
        memory: bytes to hold at most, besides queries and answers.
    """

    def __init__(
        self, vectors: Vectors, index_paths: Sequence[Path], shape: tuple[int, ...], memory: int = MEMORY
    ) -> None:
        self._vectors, self._paths, self._shape, self._memory = vectors, list(index_paths), tuple(shape), memory
        alive = vectors.alive
        self._stored = np.arange(vectors.shape[0]) if alive is None else np.flatnonzero(alive)
        self._row = self._stored if alive is None else np.cumsum(alive) - 1  # of a stored row
        self._fits = 4 * len(self._stored) * vectors.shape[1] <= memory / 2

    def __len__(self) -> int:
        return len(self._stored)

    def within(
        self,
        x: Tensor,
        radius: float | np.ndarray,
        shrink: np.ndarray | None = None,
        nearest: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All pairs of a query and a row with distance < radius.

        Args:
            x: queries (B, dim), finite.
            radius: one number, (K,) or (B, K), not negative.
            shrink: (B,) what is subtracted from the squared radii of each query (posterior radius).
            nearest: only so many of each query, the nearest ones.

        Returns:
            Query, row and distance of each pair, sorted by query, then by row.
        """
        radius = np.broadcast_to(np.asarray(radius, np.float64), (len(x), len(self)))
        found: Iterable[Pairs] = []
        if len(self) and len(x):
            if self._on_device(x):
                found = self._copy(x.device).within(x, _on(x.device, radius, shrink), nearest)
            elif self._is_small() or self._compiled is None:
                found = self._within_all(_float64(x), _shrunk(radius, shrink))
            elif nearest is None:
                found = self._within_large(_float64(x), radius, shrink)
            else:
                found = self._nearest_large(_float64(x), nearest, radius, shrink)
        return sorted_pairs(_joined(found), nearest)

    def nearest(self, x: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows of each query, nearest first; equal distances in the order of the rows.

        Args:
            x: queries (B, dim), finite.
            k: how many, at most K.

        Returns:
            Distances (B, k) and rows (B, k).
        """
        if self._on_device(x):
            return self._copy(x.device).nearest(x, k)
        if self._is_small() or self._compiled is None:
            return self._nearest_all(_float64(x), k)
        found = list(self._nearest_large(_float64(x), k))
        rows = np.array([row for _, row, _ in found], np.int64).reshape(-1, k)
        return np.array([distance for _, _, distance in found]).reshape(-1, k), rows

    # ---- small sets in memory, and large ones without Numba: all of it is read ----

    def _is_small(self) -> bool:
        return len(self) <= SMALL and self._fits

    @cached_property
    def _matrix(self) -> tuple[Tensor, np.ndarray]:
        latents = torch.from_numpy(self._vectors.take(self._stored))
        return latents, squared_norms(latents)

    @cached_property
    def _compiled(self) -> ModuleType | None:
        """`neighbours.py`, which needs Numba."""
        try:
            return importlib.import_module("shielded.protected.search.indexed.bounds")
        except ImportError as error:
            warnings.warn(
                f"Every search reads all of the {len(self):,} protected images, since Numba cannot be used ({error}): "
                "pip install 'shielded[large]' makes it many times as fast.",
                stacklevel=4,
            )
            return None

    def _within_all(self, x: np.ndarray, radius: np.ndarray) -> Iterator[Pairs]:
        for first, latents, norms in self._parts():
            query, row, distance = within(x, latents, norms, radius[:, first : first + len(latents)])
            yield query, row + first, distance

    def _nearest_all(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        distances, rows = np.empty((len(x), 0)), np.empty((len(x), 0), np.int64)
        for first, latents, norms in self._parts():
            distance, row = nearest(x, latents, norms, min(k, len(latents)))
            distances, rows = np.append(distances, distance, axis=1), np.append(rows, row + first, axis=1)
            best = np.lexsort((rows, distances))[:, :k]
            distances, rows = np.take_along_axis(distances, best, 1), np.take_along_axis(rows, best, 1)
        return distances, rows

    def _parts(self) -> Iterator[tuple[int, Tensor, np.ndarray]]:
        """First row, vectors and ‖z‖² of what is in memory at a time, without rows that have been removed."""
        if self._is_small():
            yield 0, *self._matrix
            return
        for (start, vectors), norms in zip(self._vectors.parts(), self._norms, strict=True):
            alive = slice(None) if self._vectors.alive is None else self._vectors.alive[start : start + len(vectors)]
            latents = torch.from_numpy(vectors[alive].copy())
            if len(latents):
                yield int(np.searchsorted(self._stored, start)), latents, norms[alive]

    @cached_property
    def _norms(self) -> list[np.ndarray]:
        return [squared_norms(torch.from_numpy(vectors.copy())) for _, vectors in self._vectors.parts()]

    # ---- large sets: indexes on disk ----

    def _within_large(self, x: np.ndarray, radius: np.ndarray, shrink: np.ndarray | None) -> Iterator[Pairs]:
        for first, part, shields in self._batches(x, radius, shrink):
            slots, _ = self._pruned.assign(part)
            limit = shields.limit(self._pruned, self._row, len(part))
            for query, stored, _ in self._pruned.reach(part, slots, limit):
                row = self._row[stored]
                distance = measured(part, self._vectors.take, query, stored)
                inside = shields.contain(query, row, distance)
                yield query[inside] + first, row[inside], distance[inside]

    def _nearest_large(
        self, x: np.ndarray, k: int, radius: np.ndarray | None = None, shrink: np.ndarray | None = None
    ) -> Iterator[Pairs]:
        """Query by query the k nearest rows that are within the radius."""
        k = min(k, len(self))
        some = min(k + _MORE, len(self))
        for first, part, shields in self._batches(x, radius, shrink):
            slots, moved = self._pruned.assign(part)
            # Whatever is near by, the k-th nearest is not farther than the k-th nearest of some known rows.
            known = [self._pruned.neighbours[slot] for slot in slots]
            limit = self._farthest(part, known, k, shields)
            few = any(len(rows) < k for rows in known)
            if few or (np.square(moved) > limit / 4).any():  # what was near is no guide after a jump
                known = self._pruned.guess(part, slots, min(max(some, _GUESS), len(self)))
                limit = np.minimum(limit, self._farthest(part, known, k, shields))
            limit = np.minimum(limit[:, None], shields.limit(self._pruned, self._row, len(part)))
            query, stored, lower = _joined(self._pruned.reach(part, slots, limit))
            for i, slot in enumerate(slots):
                own = query == i
                distance, best = self._closest(part[i : i + 1], stored[own], lower[own], k, shields, i)
                self._pruned.neighbours[slot] = np.append(best, known[i][~np.isin(known[i], best)])[:some]
                yield np.full(min(k, len(best)), first + i), self._row[best[:k]], distance[:k]

    def _farthest(self, x: np.ndarray, known: list[np.ndarray], k: int, shields: _Shields) -> np.ndarray:
        """The squared distance (B,) of the k-th nearest of known rows within the radius; inf where there are fewer."""
        limit = np.full(len(x), np.inf)
        query = np.repeat(np.arange(len(x)), [len(rows) for rows in known])
        stored = np.concatenate(known)
        distance = measured(x, self._vectors.take, query, stored)
        inside = shields.contain(query, self._row[stored], distance)
        for i in range(len(x)):
            own = distance[inside & (query == i)]
            if len(own) >= k:
                limit[i] = np.partition(own, k - 1)[k - 1] ** 2
        return limit

    def _closest(
        self, x: np.ndarray, stored: np.ndarray, lower: np.ndarray, k: int, shields: _Shields, query: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest of the stored rows (n,) within the radius; their squared distances are at least `lower`.

        There may be more than k, but only the first k are certainly the nearest.
        """
        distance, best = np.empty(0), np.empty(0, np.int64)
        order = np.argsort(lower, kind="stable")
        step = _FEW + 3 * k
        for start in range(0, len(order), step):
            some = stored[order[start : start + step]]
            if len(best) >= k and lower[order[start]] > distance[k - 1] ** 2 * (1 + 1e-12):
                break
            more = measured(x, self._vectors.take, np.zeros_like(some), some)
            inside = shields.contain(query, self._row[some], more)
            distance, best = np.append(distance, more[inside]), np.append(best, some[inside])
            first = np.lexsort((best, distance))[:step]
            distance, best = distance[first], best[first]
        return distance, best

    def _batches(
        self, x: np.ndarray, radius: np.ndarray | None, shrink: np.ndarray | None
    ) -> Iterator[tuple[int, np.ndarray, _Shields]]:
        """As many queries at a time as the memory has room for: number of the first, queries, their radii."""
        size = max(1, self._memory // (8 * self._vectors.shape[0]))
        for first in range(0, len(x), size):
            part = slice(first, first + size)
            yield first, x[part], _Shields(*(None if v is None else v[part] for v in (radius, shrink)))

    @cached_property
    def _pruned(self) -> Pruned:
        projection = Projection(self._shape)
        parts = self._vectors.parts()
        made = [
            self._index(path, rows, projection)
            for path, (_, rows) in zip(tqdm(self._paths, "index", disable=None, leave=False), parts, strict=True)
        ]
        starts, counts = zip(*((start, len(rows)) for start, rows in parts), strict=True)
        return self._compiled.Pruned(made, list(starts), list(counts), projection, self._vectors.alive)

    def _index(self, path: Path, rows: np.ndarray, projection: Projection) -> Index:
        """The index of a shard; where the folder cannot be written to, in a temporary one."""
        found = index.read(path, len(rows), projection)
        if found is not None:
            return found
        made = index.build(rows, projection)
        try:
            index.write(path, made)
        except OSError:
            path = Path(self._folder.name) / path.name
            index.write(path, made)
        return index.read(path, len(rows), projection)

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="shielded-index-")

    # ---- on a device: all of it there, if it fits ----

    def _on_device(self, x: Tensor) -> bool:
        if x.device.type != "cuda":
            return False
        if x.device in self._copies:
            return True
        size = len(self) * self._vectors.shape[1] * self._vectors.parts()[0][1].itemsize
        return size <= 0.5 * torch.cuda.mem_get_info(x.device)[0]

    @cached_property
    def _copies(self) -> dict[torch.device, DeviceCopy]:
        return {}

    def _copy(self, device: torch.device) -> DeviceCopy:
        if device not in self._copies:
            rows = self._vectors.parts()
            dtype = torch.from_numpy(np.empty(0, rows[0][1].dtype)).dtype
            latents = torch.empty(len(self), self._vectors.shape[1], dtype=dtype, device=device)
            start = 0
            for first, part in rows:
                alive = None if self._vectors.alive is None else self._vectors.alive[first : first + len(part)]
                there = torch.from_numpy(part.copy() if alive is None else part[alive])
                latents[start : start + len(there)] = there
                start += len(there)
            self._copies[device] = DeviceCopy(latents)
        return self._copies[device]


@dataclass
class _Shields:
    """Radii (B, K), None for no limit, and what shortens them (B,)."""

    radius: np.ndarray | None
    shrink: np.ndarray | None

    def contain(self, query: np.ndarray | int, row: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """Which of the pairs lie within the radius."""
        if self.radius is None:
            return np.ones(len(distance), bool)
        return distance < _shrunk(self.radius[query, row], None if self.shrink is None else self.shrink[query])

    def limit(self, pruned: Pruned, number: np.ndarray, batch: int) -> np.ndarray:
        """The largest squared radius in each cell, (B, cells), negative where there is none."""
        if self.radius is None:
            return np.full((batch, pruned.cells), np.inf)
        largest = pruned.largest(self.radius, number)
        limit = np.square(largest) - (0 if self.shrink is None else self.shrink[:, None])
        return np.where(largest > 0, limit, -1.0)


def _shrunk(radius: np.ndarray, shrink: np.ndarray | None) -> np.ndarray:
    """sqrt(r² - shrink), 0 where that is negative; (B, K) and (B,), or (P,) and (P,)."""
    if shrink is None:
        return radius
    less = shrink.reshape(-1, *[1] * (radius.ndim - 1)) if np.ndim(shrink) else shrink
    return np.sqrt(np.maximum(np.square(radius) - less, 0))


def _on(device: torch.device, radius: np.ndarray, shrink: np.ndarray | None) -> Tensor:
    """`_shrunk` radii on a device; what is the same for all queries or rows is there once."""
    radius = radius[:1] if radius.strides[0] == 0 and shrink is None else radius
    radius = radius[:, :1] if radius.strides[1] == 0 else radius
    return torch.from_numpy(_shrunk(radius, shrink).copy()).to(device)


def sorted_pairs(pairs: Pairs, nearest: int | None = None) -> Pairs:
    """By query, then by row; only the nearest ones of each query, if a number is given."""
    query, row, distance = pairs
    if nearest is not None:
        order = np.lexsort((row, distance, query))
        rank = np.arange(len(query)) - np.searchsorted(query[order], query[order])
        query, row, distance = (part[order[rank < nearest]] for part in pairs)
    order = np.lexsort((row, query))
    return query[order], row[order], distance[order]


def _joined(found: Iterable[Pairs]) -> Pairs:
    """Query, row and distance of all of them."""
    nothing = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    query, row, distance = (np.concatenate(part) for part in zip(nothing, *found, strict=True))
    return query, row, distance


def _float64(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()
