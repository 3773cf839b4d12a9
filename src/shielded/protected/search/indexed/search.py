"""Exact search in a large set: bounds from an index on disk rule rows out, the rest is measured in float64."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from shielded.protected.search.indexed import index
from shielded.protected.search.indexed.bounds import PrunedShards, Pruner
from shielded.protected.search.indexed.index import Index, Projection
from shielded.protected.search.interface import (
    Pairs,
    SearchableVectors,
    exact_distances,
    float64,
    joined,
    live_rows,
    shrunk,
    sorted_pairs,
)

_MIN_ROWS_PER_PASS = 16  # rows that are measured before the next lower bound is compared, besides 3 k
_CACHED_BYTES_PER_ROW = 40  # of a pruner with one cache
_SPARE_NEIGHBOURS = 8  # rows that are cached for the next step, besides the k asked for
_MIN_INITIAL_ROWS = 32  # rows that are measured for a first upper bound when the cache is empty or outdated


class IndexedSearch:
    """Search through an index of each shard, which is built where it is missing.

    Caches queries and what was found for them: see `bounds.py`. Threads that search at the same time have caches of
    their own: at most one for each processor, and as many as there is memory for.

    Args:
        vectors: the references.
        index_paths: index file of each shard.
        shape: shape of one latent.
        memory: bytes to hold at most, besides queries and answers.
    """

    def __init__(
        self, vectors: SearchableVectors, index_paths: Sequence[Path], shape: tuple[int, ...], memory: int
    ) -> None:
        self._vectors, self._paths, self._shape, self._memory = vectors, list(index_paths), shape, memory
        self._count = len(live_rows(vectors))
        # The row of each stored row.
        self._row = np.arange(self._count) if vectors.alive is None else np.cumsum(vectors.alive) - 1
        self._free: list[tuple[int, Pruner]] = []  # caches that no thread uses, and the thread that used each last
        self._made = self._active = 0
        self._most = max(1, min(os.cpu_count() or 1, memory // (_CACHED_BYTES_PER_ROW * max(1, vectors.shape[0]))))
        self._changed = threading.Condition()

    def within(self, x: Tensor, radius: np.ndarray, shrink: np.ndarray | None, nearest: int | None) -> Pairs:
        """Find all pairs with distance < radius: see `ExactSearch`."""
        queries = float64(x)
        with self._pruner() as pruner:
            if nearest is None:
                return sorted_pairs(joined(self._all_within(pruner, queries, radius, shrink)))
            return sorted_pairs(joined(self._nearest_within(pruner, queries, nearest, radius, shrink)), nearest)

    def nearest(self, x: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest rows of each query: see `ExactSearch`."""
        with self._pruner() as pruner:
            found = list(self._nearest_within(pruner, float64(x), k))
        rows = np.array([row for _, row, _ in found], np.int64).reshape(-1, k)
        return np.array([distance for _, _, distance in found]).reshape(-1, k), rows

    def _all_within(
        self, pruner: Pruner, x: np.ndarray, radius: np.ndarray, shrink: np.ndarray | None
    ) -> Iterator[Pairs]:
        for first, part, radii in self._batches(x, radius, shrink):
            lanes, _ = pruner.match(part)
            limit = radii.cell_limits(pruner, self._row, len(part))
            for query, stored, _ in pruner.survivors(part, lanes, limit):
                row = self._row[stored]
                distance = exact_distances(part, self._vectors.take, query, stored)
                inside = radii.contain(query, row, distance)
                yield query[inside] + first, row[inside], distance[inside]

    def _nearest_within(
        self,
        pruner: Pruner,
        x: np.ndarray,
        k: int,
        radius: np.ndarray | None = None,
        shrink: np.ndarray | None = None,
    ) -> Iterator[Pairs]:
        """Yield the k nearest rows within the radius, query by query."""
        k = min(k, self._count)
        cached = min(k + _SPARE_NEIGHBOURS, self._count)
        for first, part, radii in self._batches(x, radius, shrink):
            lanes, moved = pruner.match(part)
            # The k-th nearest row is not farther than the k-th nearest of any known rows.
            known = [pruner.neighbours[lane] for lane in lanes]
            limit = self._squared_kth(part, known, k, radii)
            # After a jump the cached neighbours say little.
            if any(len(rows) < k for rows in known) or (np.square(moved) > limit / 4).any():
                known = pruner.approximate_nearest(part, lanes, min(max(cached, _MIN_INITIAL_ROWS), self._count))
                limit = np.minimum(limit, self._squared_kth(part, known, k, radii))
            limit = np.minimum(limit[:, None], radii.cell_limits(pruner, self._row, len(part)))
            query, stored, lower = joined(pruner.survivors(part, lanes, limit))
            for i, lane in enumerate(lanes):
                of_query = query == i
                distance, best = self._closest(part[i : i + 1], stored[of_query], lower[of_query], k, radii, i)
                pruner.neighbours[lane] = np.append(best, known[i][~np.isin(known[i], best)])[:cached]
                yield np.full(min(k, len(best)), first + i), self._row[best[:k]], distance[:k]

    def _squared_kth(self, x: np.ndarray, known: list[np.ndarray], k: int, radii: _Radii) -> np.ndarray:
        """Compute the squared distance (B,) of the k-th nearest known row within the radius; inf if there are fewer."""
        limit = np.full(len(x), np.inf)
        query = np.repeat(np.arange(len(x)), [len(rows) for rows in known])
        stored = np.concatenate(known)
        distance = exact_distances(x, self._vectors.take, query, stored)
        inside = radii.contain(query, self._row[stored], distance)
        for i in range(len(x)):
            of_query = distance[inside & (query == i)]
            if len(of_query) >= k:
                limit[i] = np.partition(of_query, k - 1)[k - 1] ** 2
        return limit

    def _closest(
        self, x: np.ndarray, stored: np.ndarray, lower: np.ndarray, k: int, radii: _Radii, query: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Measure one query's candidates in the order of their lower bounds, until none can be among the k nearest.

        Args:
            x: the query (1, dim).
            stored: candidates (n,), stored rows.
            lower: (n,) lower bounds of their squared distances.
            k: neighbours.
            radii: radii of all queries.
            query: number of the query among them.

        Returns:
            Distances and stored rows within the radius, nearest first. There may be more than k; only the first k are
            certainly the nearest.
        """
        distance, best = np.empty(0), np.empty(0, np.int64)
        order = np.argsort(lower, kind="stable")
        step = _MIN_ROWS_PER_PASS + 3 * k
        for start in range(0, len(order), step):
            batch = stored[order[start : start + step]]
            if len(best) >= k and lower[order[start]] > distance[k - 1] ** 2 * (1 + 1e-12):
                break
            measured = exact_distances(x, self._vectors.take, np.zeros_like(batch), batch)
            inside = radii.contain(query, self._row[batch], measured)
            distance, best = np.append(distance, measured[inside]), np.append(best, batch[inside])
            first = np.lexsort((best, distance))[:step]
            distance, best = distance[first], best[first]
        return distance, best

    def _batches(
        self, x: np.ndarray, radius: np.ndarray | None, shrink: np.ndarray | None
    ) -> Iterator[tuple[int, np.ndarray, _Radii]]:
        """Yield (first query, queries, their radii), as many queries at a time as the memory has room for."""
        size = max(1, self._memory // (8 * self._vectors.shape[0]))
        for first in range(0, len(x), size):
            part = slice(first, first + size)
            yield first, x[part], _Radii(*(None if values is None else values[part] for values in (radius, shrink)))

    @contextmanager
    def _pruner(self) -> Iterator[Pruner]:
        """Lend this thread a pruner: the one that it used last, or a new one, or one that is free.

        Raises:
            ValueError: a shard is damaged.
        """
        me = threading.get_ident()
        with self._changed:
            while not (pruner := self._taken(me)):
                self._changed.wait()
            self._active += 1
            # Each of several searches at once is one thread, so that none waits for another's interpreter lock.
            pruner.threads = max(1, torch.get_num_threads() // self._active)
        try:
            yield pruner
        finally:
            with self._changed:
                self._active -= 1
                self._free.append((me, pruner))
                self._changed.notify()

    def _taken(self, thread: int) -> Pruner | None:
        at = next((i for i, (last, _) in enumerate(self._free) if last == thread), None)
        if at is None and self._made < self._most:
            self._made += 1
            try:
                return Pruner(*self._shared)
            except BaseException:
                self._made -= 1
                raise
        if at is None and not self._free:
            return None
        return self._free.pop(at or 0)[1]

    @cached_property
    def _shared(self) -> tuple[PrunedShards, Projection, np.ndarray | None]:
        """Map or build what all pruners read and none changes."""
        projection = Projection(self._shape)
        extents, digests = self._vectors.extents(), self._vectors.digests

        def read(number: int) -> Index | None:
            return index.read_index(self._paths[number], extents[number][1], projection, digests[number])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(read, range(len(extents))))
        indexes = []
        for number, known in enumerate(tqdm(found, "index", disable=None, leave=False)):
            indexes.append(known if known is not None else self._built(number, projection))
        starts, counts = zip(*extents, strict=True)
        return PrunedShards(indexes, list(starts), list(counts)), projection, self._vectors.alive

    def _built(self, number: int, projection: Projection) -> Index:
        """Build the index of a shard and write it; to a temporary folder if the set's is read-only."""
        path, digest, rows = self._paths[number], self._vectors.digests[number], self._vectors.block(number)
        built = index.build_index(rows, projection)
        try:
            index.write_index(path, built, digest)
        except OSError:
            path = Path(self._folder.name) / path.name
            index.write_index(path, built, digest)
        return index.read_index(path, len(rows), projection, digest) or built

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="shielded-index-")


@dataclass
class _Radii:
    """Radii (B, K), None for no limit, and what is subtracted from their squares (B,), None for nothing."""

    radius: np.ndarray | None
    shrink: np.ndarray | None

    def contain(self, query: np.ndarray | int, row: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """Say which of the pairs (P,) lie within the radius."""
        if self.radius is None:
            return np.ones(len(distance), bool)
        return distance < shrunk(self.radius[query, row], None if self.shrink is None else self.shrink[query])

    def cell_limits(self, pruner: Pruner, row: np.ndarray, batch: int) -> np.ndarray:
        """Compute the largest squared radius (B, cells) in each cell, negative where there is none.

        Args:
            pruner: knows the cells.
            row: the row of each stored row.
            batch: B.
        """
        if self.radius is None:
            return np.full((batch, pruner.cells), np.inf)
        largest = pruner.largest(self.radius, row)
        limit = np.square(largest) - (0 if self.shrink is None else self.shrink[:, None])
        return np.where(largest > 0, limit, -1.0)
