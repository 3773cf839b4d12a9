"""Lower bounds of distances to the rows of a large set, from its indexes and from cached queries.

Notation: x a query, u = Px its lowest frequencies; a row z = Pᵀp + t with the prefix p of its index. Exactly,

    ‖x − z‖² = ‖x‖² + ‖z‖² − 2 u·p − 2 x·t.

The first three terms are cheap for all rows. For the last, as t has next to none of the lowest frequencies,

    |x·t| ≤ ‖Px‖ ‖Pt‖ + ‖x − PᵀPx‖ ‖t − PᵀPt‖,

which is tight for a blurred x and useless for a sharp one: then codes of the whole t are needed. But between two steps
of a sampler x moves little. So the products y·t with an earlier query y, the row's anchor, are cached for every row,
and x = c y + w turns the inequality into one for w·t. How good that is depends on how far x has moved since; where it
does not rule a row out, its codes are read, and x becomes the anchor of this row.

Most cells need not even be searched: if all rows of a cell were farther than m from an earlier query v, then now

    ‖x − z‖² ≥ m² + ‖x‖² − ‖v‖² − 2 (‖Pw‖ ‖Pz‖ + ‖w − PᵀPw‖ ‖z − PᵀPz‖)    with w = x − v.

No bound assumes how queries follow each other: cached queries only save time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from shielded.protected.search.indexed import kernels
from shielded.protected.search.indexed.caches import CacheMemory, QueryCache
from shielded.protected.search.indexed.index import Index, Projection
from shielded.protected.search.indexed.kernels import BoundTerms, IndexedRows, PrefixQueries, QueryCodes, RowProducts
from shielded.protected.search.indexed.simd import LANES
from shielded.protected.search.interface import Pairs

_MAX_CACHED_STEPS = 32  # earlier queries of each lane that are cached
_MAX_CACHED_NUMBERS = 1 << 24  # numbers in all of them
_MAX_FLOAT32_NORM = 1e15  # longer vectors would overflow in float32; they are always measured
_FLOAT64_ERROR = 1e-9  # relative; far above the rounding error of sums of float64 products
_MIN_CODE_STEP = 2.0**-120
_MAX_TASKS = 32  # of the thread pool
_ROUND_UP = 1 + 1e-9


class PrunedShards:
    """Indexes of all shards and what follows from them. Nothing of it changes, so that threads may share it.

    Args:
        indexes: index of each shard.
        starts: first stored row of each shard.
        counts: rows of each shard.
    """

    def __init__(self, indexes: list[Index], starts: list[int], counts: list[int]) -> None:
        self.indexes, self.starts, self.counts = indexes, starts, counts
        self.rows = [
            IndexedRows(*(part.numpy() for part in (i.prefix, i.codes, i.scale, i.squared, i.rho, i.code_error)))
            for i in indexes
        ]
        self.maxima = _CellMaxima(indexes)


class Pruner:
    """Rule out rows of indexed shards, and cache what the search finds. One thread at a time may use it.

    Queries that are searched at once share caches of LANES lanes each. Lane n is lane n % LANES of cache n // LANES.

    Args:
        shards: the indexes.
        projection: P.
        alive: (K,) bool, False for rows that have been removed; None: no row has been removed.

    Attributes:
        cells: cells of all shards.
        neighbours: for each lane, stored rows that were found near its last query.
        threads: how many share the work of a search.
    """

    threads = 1

    def __init__(self, shards: PrunedShards, projection: Projection, alive: np.ndarray | None) -> None:
        self.indexes = indexes = shards.indexes
        self.projection, self._starts, self._counts, self._alive = projection, shards.starts, shards.counts, alive
        self.rows, self.maxima = shards.rows, shards.maxima
        cells = [len(index.low_norm) for index in indexes]
        self.cells = sum(cells)
        self._cell_starts = np.cumsum([0, *cells])
        self._row_starts = np.cumsum([0, *(len(index.order) for index in indexes)])
        self._caches: list[QueryCache] = []
        self.neighbours: list[np.ndarray] = []

    def match(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Match each query batch to its predecessor by low-frequency distance.

        Args:
            x: queries (B, dim), float64.

        Returns:
            Lane of each query (B,), and the distance (B,) to the query that was in it before.
        """
        count = -(-len(x) // LANES)
        if count > len(self._caches):
            steps = max(2, min(_MAX_CACHED_STEPS, _MAX_CACHED_NUMBERS // (count * LANES * self.projection.dim)))
            self.memory = CacheMemory(count, self.cells, int(self._row_starts[-1]), steps)
            self._caches = [QueryCache(self.projection, self.memory, number, steps) for number in range(count)]
            self.neighbours = [np.empty(0, np.int64)] * (count * LANES)
        lanes, moved, free = np.empty(len(x), np.int64), np.empty(len(x)), list(range(len(self._caches)))
        u = self.projection.down(x)
        for first in range(0, len(x), LANES):
            part = slice(first, first + LANES)
            matches = [_nearest_lanes(u[part], self._caches[number].last_u) for number in free]
            best = int(np.argmin([distance for _, distance in matches]))
            lane, number = matches[best][0], free.pop(best)
            moved[part] = np.linalg.norm(x[part] - self._caches[number].last_x[lane], axis=1)
            lanes[part] = lane + LANES * number
        return lanes, moved

    def survivors(self, x: np.ndarray, lanes: np.ndarray, limit: np.ndarray) -> Iterator[Pairs]:
        """Find all pairs that no bound rules out.

        Args:
            x: queries (B, dim), float64.
            lanes: lane of each query (B,).
            limit: (B, cells) squared distances; rows that are certainly farther are ruled out.

        Yields:
            Query, stored row and lower bound of the squared distance of the surviving pairs.
        """
        groups = _Groups(
            self,
            [(_QueryBounds(self, cache, x[part], lane), part, lane) for part, cache, lane in self._by_cache(lanes)],
            limit,
        )

        def search(shards: np.ndarray) -> list[Pairs]:
            size = len(groups.searched) * LANES * max(len(self.rows[shard].prefix) for shard in shards)
            buffers = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.float32)
            return [groups.search(shard, buffers) for shard in shards]

        searched = np.logical_or.reduce(groups.searched)
        shards = np.flatnonzero([searched[self.cells_of(shard)].any() for shard in range(len(self.indexes))])
        groups.begin()
        tasks = np.array_split(shards, min(len(shards), _MAX_TASKS)) if len(shards) else []
        if min(self.threads, len(tasks)) < 2:  # handing over to a thread takes longer than small searches
            for task in tasks:
                yield from search(task)
        else:
            with ThreadPoolExecutor(min(self.threads, len(tasks))) as threads:
                for pairs in threads.map(search, tasks):
                    yield from pairs
        groups.end()

    def stored(self, shard: int, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the stored row of index rows (n,) of a shard, and whether there are such rows (n,) bool."""
        stored = self._starts[shard] + self.indexes[shard].order.numpy()[row].astype(np.int64)
        exists = row < self._counts[shard]
        return stored, exists if self._alive is None else exists & self._alive[stored]

    def approximate_nearest(self, x: np.ndarray, lanes: np.ndarray, k: int) -> list[np.ndarray]:
        """Pick k stored rows for each query that are near it by their prefixes."""
        found = [np.empty(0, np.int64)] * len(x)
        for part, cache, lane in self._by_cache(lanes):
            bounds = _QueryBounds(self, cache, x[part], lane)
            values, rows = [], []
            for shard, count in enumerate(self._counts):
                stored, partial = self._stored(shard)[:count], bounds.partial_distances(shard)[:count, lane]
                if self._alive is not None:
                    stored, partial = stored[self._alive[stored]], partial[self._alive[stored]]
                smallest = torch.from_numpy(np.nan_to_num(partial)).topk(min(k, len(partial)), dim=0, largest=False)
                values.append(smallest.values)
                rows.append(stored[smallest.indices.numpy()])
            at = torch.cat(values).topk(k, dim=0, largest=False).indices.numpy()
            for query, best in zip(part, np.take_along_axis(np.concatenate(rows), at, 0).T, strict=True):
                found[query] = best
        return found

    def _by_cache(self, lanes: np.ndarray) -> Iterator[tuple[np.ndarray, QueryCache, np.ndarray]]:
        """Yield the queries of each cache, the cache, and their lanes in it."""
        for number in np.unique(lanes // LANES):
            part = np.flatnonzero(lanes // LANES == number)
            yield part, self._caches[number], lanes[part] % LANES

    def largest(self, radius: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Compute the largest radius (B, cells) in each cell.

        Args:
            radius: (B, K) for the K rows that have not been removed.
            row: the row of each stored row.
        """
        if radius.strides[1] == 0:  # one for all
            return np.broadcast_to(radius[:, :1], (len(radius), self.cells))
        largest = []
        for shard, (index, count) in enumerate(zip(self.indexes, self._counts, strict=True)):
            stored = self._stored(shard)[:count]
            values = radius[:, row[stored]]
            if self._alive is not None:
                values = np.where(self._alive[stored], values, 0.0)
            largest.append(np.maximum.reduceat(values, np.arange(0, count, index.cell_rows), axis=1))
        return np.concatenate(largest, axis=1)

    def cells_of(self, shard: int) -> slice:
        """Slice the cells of a shard out of those of all shards."""
        return slice(*self._cell_starts[shard : shard + 2])

    def index_rows(self, shard: int) -> slice:
        """Slice the index rows of a shard out of those of all shards."""
        return slice(*self._row_starts[shard : shard + 2])

    def _stored(self, shard: int) -> np.ndarray:
        """List the stored row of each index row of a shard; those of blank rows are meaningless."""
        return self._starts[shard] + self.indexes[shard].order.numpy().astype(np.int64)


class _CellMaxima:
    """Maxima over the rows of each cell (cells,), of all shards: see `Index`."""

    def __init__(self, indexes: list[Index]) -> None:
        self.prefix_norm = np.concatenate([index.prefix_norm.numpy() for index in indexes])
        self.prefix_error = np.concatenate([index.prefix_error.numpy() for index in indexes])
        self.low_norm = np.concatenate([index.low_norm.numpy() for index in indexes])
        self.high_norm = np.concatenate([index.high_norm.numpy() for index in indexes])
        self.code_error = np.concatenate([index.code_error.view(-1, index.cell_rows).amax(1) for index in indexes])
        self.norm = np.hypot(self.low_norm, self.high_norm)
        self.prefix_scales = np.stack([index.prefix_scale.numpy() for index in indexes])  # (shards, size)
        self.shard = np.repeat(np.arange(len(indexes)), [len(index.low_norm) for index in indexes])


class _QueryBounds:
    """Bound the distances of up to LANES queries, and enter the queries into their cache.

    Lanes without a query keep their last one, so that all lanes of a cache advance at once.

    Args:
        pruner: knows the indexes.
        cache: of the queries' lanes.
        x: queries (n, dim), float64.
        lane: their lanes (n,).
    """

    def __init__(self, pruner: Pruner, cache: QueryCache, x: np.ndarray, lane: np.ndarray) -> None:
        self._pruner, self.cache = pruner, cache
        self._x = cache.last_x.copy()
        self._x[lane] = x
        self._u = pruner.projection.down(self._x)
        self._squared, self._low = np.square(self._x).sum(1), np.square(self._u).sum(1)
        self._enter()
        self.prefixes, self._prefix_rounding = self._quantised_prefixes()
        self.terms = self._bound_terms()

    def _enter(self) -> None:
        cache = self.cache
        cache.advance()
        step = np.abs(self._x).max(1) / 126
        step = np.maximum(step, _MIN_CODE_STEP).astype(np.float32)
        steps = step.astype(np.float64)[:, None]
        codes = np.rint(self._x / steps)
        y, fine = codes * steps, np.rint(254 * (self._x / steps - codes))
        cache.x[cache.newest], cache.u[cache.newest] = self._x, self._u
        cache.y[cache.newest], cache.y_u[cache.newest] = y, y_u = y, self._pruner.projection.down(y)
        cache.energies[:, cache.newest] = self._squared, self._low, np.square(y).sum(1), np.square(y_u).sum(1)
        self._fine = y + fine * (steps / 254)
        coarse_codes, fine_codes = codes.astype(np.int8), fine.astype(np.int8)
        self.queries = QueryCodes(
            cache.newest,
            kernels.blocks(coarse_codes),
            kernels.compensation(coarse_codes),
            kernels.blocks(fine_codes),
            kernels.compensation(fine_codes),
            step,
        )

    def _quantised_prefixes(self) -> tuple[list[PrefixQueries], np.ndarray]:
        """Quantise 2 u · prefix_scale for each shard; bound the error (cells, LANES) of products with its prefixes."""
        maxima = self._pruner.maxima
        scaled = 2 * self._u * maxima.prefix_scales[:, None]  # (shards, LANES, size)
        step = np.abs(scaled).max(2) / (127 * 254)
        step = np.maximum(step, _MIN_CODE_STEP).astype(np.float32).astype(np.float64)
        whole = np.rint(scaled / step[..., None])
        coarse = np.clip(np.rint(whole / 254), -127, 127)
        codes = np.stack([coarse, whole - 254 * coarse], axis=1).astype(np.int8)
        error = np.linalg.norm(scaled - whole * step[..., None], axis=2)
        error += 2.0**-21 * np.linalg.norm(scaled, axis=2)  # the product in float32
        compensation = kernels.compensation(codes).astype(np.int32)
        parts = zip(kernels.blocks(codes), compensation, step.astype(np.float32), strict=True)
        return [PrefixQueries(*part) for part in parts], error[maxima.shard] * maxima.prefix_norm[:, None] * _ROUND_UP

    def _bound_terms(self) -> BoundTerms:
        """Compute the terms of all cells. x = c y + w."""
        cache, maxima = self.cache, self._pruner.maxima
        none, fine_u = np.zeros((1, LANES)), self._pruner.projection.down(self._fine)

        def for_each_y(cached: np.ndarray, present: np.ndarray, fine: np.ndarray) -> np.ndarray:
            return np.concatenate([np.einsum("jsd,sd->js", cached, present), none, (fine * present).sum(1)[None]])

        def squares(cached: np.ndarray, fine: np.ndarray) -> np.ndarray:
            return np.concatenate([cached, none, np.square(fine).sum(1)[None]])

        _, _, y_energy, y_u_energy = cache.energies
        inner, energy = for_each_y(cache.y, self._x, self._fine), squares(y_energy, self._fine)
        c = inner / np.where(energy > 0, energy, 1)
        w = self._squared - 2 * c * inner + c**2 * energy
        low = self._low - 2 * c * for_each_y(cache.y_u, self._u, fine_u) + c**2 * squares(y_u_energy, fine_u)
        length = np.sqrt(energy)
        low, high = _norms(low, w, self._squared + np.square(c * length))

        size = np.sqrt(self._squared) + maxima.norm[:, None]
        length = np.abs(c) * length * _ROUND_UP
        rounding = 2.0**-21 * (2 * maxima.norm + maxima.code_error)  # of y·t, in float32, for each ‖y‖
        slack = length * rounding[:, None, None] + low * maxima.prefix_error[:, None, None]
        # The last two terms: about ten operations in float32, on numbers of at most twice that size; underflow.
        common = -2 * slack
        common += (self._squared - self._prefix_rounding - 2.0**-19 * size**2 - 1e-36)[:, None]
        common[np.broadcast_to((size > _MAX_FLOAT32_NORM)[:, None], common.shape)] = -np.inf
        with np.errstate(over="ignore"):
            return BoundTerms(_rounded_down(common), *((-2 * part).astype(np.float32) for part in (c, high, length)))

    def cell_bounds(self) -> np.ndarray:
        """Bound the squared distances (cells, LANES) to the rows of each cell, from when it was last searched."""
        cache, maxima, none = self.cache, self._pruner.maxima, np.zeros((1, LANES))
        squared, low_squared, _, _ = cache.energies
        w = self._squared - 2 * np.einsum("jsd,sd->js", cache.x, self._x) + squared
        low = self._low - 2 * np.einsum("jsd,sd->js", cache.u, self._u) + low_squared
        low, high = _norms(low, w, self._squared + squared)
        change = np.concatenate([self._squared - squared, none - np.inf])[cache.cell_anchor]
        low, high = (np.concatenate([part, none])[cache.cell_anchor] for part in (low, high))
        largest = 2 * (low * maxima.low_norm[:, None] + high * maxima.high_norm[:, None])
        size = self._squared + np.square(maxima.norm)[:, None]
        return cache.cell_minimum.astype(np.float64) + change - largest - _FLOAT64_ERROR * size

    def partial_distances(self, shard: int) -> np.ndarray:
        """Compute ‖z‖² − 2 u·p for all index rows of a shard, (n, LANES)."""
        partial = np.empty((len(self._pruner.rows[shard].prefix), LANES), np.float32)
        kernels.partial_distances(*self._arguments(shard), partial)
        return partial

    def _arguments(self, shard: int) -> tuple[IndexedRows, RowProducts, PrefixQueries, BoundTerms]:
        rows, cells = self._pruner.index_rows(shard), self._pruner.cells_of(shard)
        products = RowProducts(*(part[rows] for part in self.cache.products))
        terms = self.terms._replace(common=self.terms.common[cells])
        return self._pruner.rows[shard], products, self.prefixes[shard], terms


class _Groups:
    """Queries that are searched at once, those of each cache as a group.

    Args:
        pruner: knows the indexes.
        parts: bounds of each group, numbers of its queries (n,) and their lanes (n,).
        limit: (B, cells) squared distances.

    Attributes:
        searched: (groups, cells) bool, cells that bounds of cells leave open.
    """

    def __init__(
        self, pruner: Pruner, parts: list[tuple[_QueryBounds, np.ndarray, np.ndarray]], limit: np.ndarray
    ) -> None:
        self._pruner, self._bounds = pruner, [bounds for bounds, _, _ in parts]
        self.searched = np.zeros((len(parts), pruner.cells), bool)
        self._limit = np.full((len(parts), pruner.cells, LANES), -np.inf, np.float32)
        self._query = np.full((len(parts), LANES), -1)
        for group, (bounds, query, lane) in enumerate(parts):
            self.searched[group] = np.any(np.logical_not(limit[query] < bounds.cell_bounds()[:, lane].T), axis=0)
            with np.errstate(over="ignore"):
                self._limit[group][:, lane] = np.nextafter(limit[query].astype(np.float32), np.float32(np.inf)).T
            self._query[group, lane] = query
        self._caches = np.array([bounds.cache.number for bounds in self._bounds])
        self._prefixes = [
            kernels.stacked(list(of_shard)) for of_shard in zip(*(b.prefixes for b in self._bounds), strict=True)
        ]
        self._terms = kernels.stacked([bounds.terms for bounds in self._bounds])
        self._queries = kernels.stacked([bounds.queries for bounds in self._bounds])

    def begin(self) -> None:
        """Forget what is known of the cells that are searched, in case the search is interrupted."""
        for bounds, searched in zip(self._bounds, self.searched, strict=True):
            bounds.cache.cell_anchor[searched] = bounds.cache.steps

    def search(self, shard: int, buffers: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Pairs:
        """Find query, stored row and lower bound of the pairs of a shard that no bound rules out.

        Args:
            shard: its number.
            buffers: three arrays (n · groups · LANES,) of int32, int32 and float32, written to.
        """
        pruner, memory = self._pruner, self._pruner.memory
        rows, cells = pruner.index_rows(shard), pruner.cells_of(shard)
        count = kernels.search(
            self.searched[:, cells],
            pruner.rows[shard],
            memory.products[:, rows],
            memory.anchor[:, rows],
            self._caches,
            self._prefixes[shard],
            self._terms._replace(common=self._terms.common[:, cells]),
            self._queries,
            self._limit[:, cells],
            memory.cell_minimum[:, cells],
            *buffers,
        )
        lane, row, lower = (buffer[:count] for buffer in buffers)
        query = self._query.reshape(-1)[lane]
        stored, exists = pruner.stored(shard, row)
        exists &= query >= 0
        return query[exists], stored[exists], lower[exists].astype(np.float64)

    def end(self) -> None:
        """Remember the bounds of the cells that have been searched."""
        for bounds, searched in zip(self._bounds, self.searched, strict=True):
            bounds.cache.cell_anchor[searched] = bounds.cache.newest


def _nearest_lanes(u: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, float]:
    """Assign each query, in turn, the free lane whose last query was nearest by Px; sum the squared distances."""
    distance = np.square(last[:, None] - u).sum(2)
    lanes, total = np.empty(len(u), np.int64), 0.0
    for i in range(len(u)):
        lanes[i] = np.nanargmin(distance[:, i])
        total += distance[lanes[i], i]
        distance[lanes[i]] = np.nan
    return lanes, total


def _rounded_down(values: np.ndarray) -> np.ndarray:
    """Round to float32, downwards."""
    return np.nextafter(values.astype(np.float32), np.float32(-np.inf))


def _norms(low: np.ndarray, whole: np.ndarray, squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bound ‖Pw‖ and ‖w − PᵀPw‖ from ‖Pw‖² and ‖w‖²; `squared` is the size of the numbers they were computed from."""
    slack = _FLOAT64_ERROR * squared
    return np.sqrt(np.maximum(low, 0) + slack), np.sqrt(np.maximum(whole - low, 0) + slack)
