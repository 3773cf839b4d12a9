"""Searching a large set: what can be ruled out is ruled out by bounds, the rest is measured.

Notation: x a query, u = Px its lowest frequencies; a row z = Pᵀp + t with the head p of its index. Exactly,

    ‖x − z‖² = ‖x‖² + ‖z‖² − 2 u·p − 2 x·t.

The first three terms are cheap for all rows. For the last, as t has next to none of the lowest frequencies,

    |x·t| ≤ ‖Px‖ ‖Pt‖ + ‖x − PᵀPx‖ ‖t − PᵀPt‖,

which is tight for a blurred x and useless for a sharp one: then codes of the whole t are needed. But between two steps
of a sampler x moves little. So the products y·t with an earlier query y are kept for every row, and x = c y + w turns
the inequality into one for w·t. How good that is depends on how far x has moved since; where it does not rule a row
out, its codes are read, and x takes the place of y for this row.

Most cells need not even be looked at: if all rows of a cell were farther than m from an earlier query v, then now

    ‖x − z‖² ≥ m² + ‖x‖² − ‖v‖² − 2 (‖Pw‖ ‖Pz‖ + ‖w − PᵀPw‖ ‖z − PᵀPz‖)    with w = x − v.

Nothing is assumed about how queries follow each other; what is kept from earlier ones only ever saves time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from shielded.protected.search.indexed import kernels
from shielded.protected.search.indexed.index import Index, Projection
from shielded.protected.search.indexed.kernels import Heads, Known, Queries, Rows, Terms
from shielded.protected.search.indexed.simd import LANES

_ROWS = "head", "codes", "scale", "squared", "rho", "code_error"
_KEPT = 32  # earlier queries that are remembered, at most
_RING = 1 << 24  # numbers that these may have
_TAME = 1e15  # longer vectors would overflow in float32; they are always measured
_ROUNDING = 1e-9  # far above what sums of float64 products are off by, as a part of the numbers' size
_TINY = 2.0**-120
_JOBS = 32  # for threads
_UP = 1 + 1e-9


class Pruned:
    """Rules out rows of indexed shards, and remembers what it found.

    Args:
        indexes: one for each shard.
        starts: the first stored row of each shard.
        counts: how many rows each shard has.
        projection: P.
        alive: (K,) bool, False for rows that have been removed; None: none has.

    Attributes:
        cells: how many there are.
        neighbours: for each slot, stored rows that were found near its last query.
    """

    def __init__(
        self,
        indexes: list[Index],
        starts: list[int],
        counts: list[int],
        projection: Projection,
        alive: np.ndarray | None,
    ) -> None:
        self._indexes, self._starts, self._counts = indexes, starts, counts
        self._projection, self._alive = projection, alive
        cells = [len(index.low) for index in indexes]
        self.cells = sum(cells)
        self._shard = np.repeat(np.arange(len(indexes)), cells)
        self._first_cell = np.cumsum([0, *cells])
        self._first_row = np.cumsum([0, *(len(index.order) for index in indexes)])
        names = ("head_norm", "head_error", "low", "high")
        self._most = {name: np.concatenate([getattr(index, name).numpy() for index in indexes]) for name in names}
        self._rows = [Rows(*(getattr(index, name).numpy() for name in _ROWS)) for index in indexes]
        self._most["code_error"] = np.concatenate([index.code_error.view(-1, index.size).amax(1) for index in indexes])
        self._norm = np.hypot(self._most["low"], self._most["high"])
        self._head_scales = np.stack([index.head_scale.numpy() for index in indexes])
        self._groups: list[_Group] = []
        self.neighbours: list[np.ndarray] = []

    def assign(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A slot for each query (B, dim), near those of earlier queries that are near, and how far away that one was.

        Queries that are asked together are in a group, in which slot s is place s % LANES of group s // LANES.
        """
        count = -(-len(x) // LANES)
        if count > len(self._groups):
            kept = max(2, min(_KEPT, _RING // (count * LANES * self._projection.dim)))
            self._groups = [_Group(self, kept) for _ in range(count)]
            self.neighbours = [np.empty(0, np.int64)] * (count * LANES)
        slots, moved, free = np.empty(len(x), np.int64), np.empty(len(x)), list(range(len(self._groups)))
        u = self._projection.down(x)
        for first in range(0, len(x), LANES):
            own = slice(first, first + LANES)
            places = [_nearest_places(u[own], self._groups[number].u[self._groups[number].turn]) for number in free]
            best = int(np.argmin([away for _, away in places]))
            place, number = places[best][0], free.pop(best)
            group = self._groups[number]
            moved[own] = np.linalg.norm(x[own] - group.x[group.turn, place], axis=1)
            slots[own] = place + LANES * number
        return slots, moved

    def reach(self, x: np.ndarray, slots: np.ndarray, limit: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """Everything that cannot be ruled out.

        Args:
            x: queries (B, dim), float64.
            slots: theirs (B,).
            limit: (B, cells) squared distances; rows that are certainly farther than that are left out.

        Yields:
            Query, stored row and lower bound of the squared distance of the pairs that are left.
        """
        for own, group, places in self._by_group(slots):
            for query, row, lower in self._reach(_View(self, group, x[own], places), places, limit[own]):
                yield own[query], row, lower

    def _reach(self, view: _View, places: np.ndarray, limit: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        group = view.group
        needed = ~(limit < view.unseen()[:, places].T).all(0)
        top = np.full((self.cells, LANES), -np.inf, np.float32)
        with np.errstate(over="ignore"):
            top[:, places] = np.nextafter(limit.astype(np.float32), np.float32(np.inf)).T
        query = np.full(LANES, -1)
        query[places] = np.arange(len(places))

        def search(shards: np.ndarray) -> list[tuple[np.ndarray, ...]]:
            pairs = []
            room = LANES * max(len(self._rows[shard].head) for shard in shards)
            into = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.float32)
            for shard in shards:
                place, row, lower = view.search(shard, needed[self._cells(shard)], top[self._cells(shard)], into)
                if len(row):
                    stored = self._starts[shard] + self._indexes[shard].order.numpy()[row].astype(np.int64)
                    there = (query[place] >= 0) & (row < self._counts[shard])
                    if self._alive is not None:
                        there &= self._alive[stored]
                    pairs.append((query[place[there]], stored[there], lower[there].astype(np.float64)))
            return pairs

        shards = np.flatnonzero([needed[self._cells(shard)].any() for shard in range(len(self._indexes))])
        group.seen[needed] = group.kept  # in case this ends early
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            for pairs in threads.map(search, np.array_split(shards, min(len(shards), _JOBS)) if len(shards) else ()):
                yield from pairs
        group.seen[needed] = group.turn

    def guess(self, x: np.ndarray, slots: np.ndarray, k: int) -> list[np.ndarray]:
        """Some k stored rows for each query that may well be near."""
        found = [np.empty(0, np.int64)] * len(x)
        for own, group, places in self._by_group(slots):
            view = _View(self, group, x[own], places)
            values, rows = [], []
            for shard, count in enumerate(self._counts):
                stored, about = self._stored(shard)[:count], view.rough(shard)[:count, places]
                if self._alive is not None:
                    stored, about = stored[self._alive[stored]], about[self._alive[stored]]
                value, at = torch.from_numpy(np.nan_to_num(about)).topk(min(k, len(about)), dim=0, largest=False)
                values.append(value)
                rows.append(stored[at.numpy()])
            at = torch.cat(values).topk(k, dim=0, largest=False).indices.numpy()
            for query, best in zip(own, np.take_along_axis(np.concatenate(rows), at, 0).T, strict=True):
                found[query] = best
        return found

    def _by_group(self, slots: np.ndarray) -> Iterator[tuple[np.ndarray, _Group, np.ndarray]]:
        """The queries of each group, and their places in it."""
        for number in np.unique(slots // LANES):
            own = np.flatnonzero(slots // LANES == number)
            yield own, self._groups[number], slots[own] % LANES

    def largest(self, radius: np.ndarray, number: np.ndarray) -> np.ndarray:
        """The largest radius in each cell, (B, cells).

        Args:
            radius: (B, K) for the K rows that have not been removed.
            number: which of these a stored row is.
        """
        if radius.strides[1] == 0:  # one for all
            return np.broadcast_to(radius[:, :1], (len(radius), self.cells))
        largest = []
        for shard, (index, count) in enumerate(zip(self._indexes, self._counts, strict=True)):
            rows = self._stored(shard)[:count]
            values = radius[:, number[rows]] if self._alive is None else radius[:, number[rows]] * self._alive[rows]
            largest.append(np.maximum.reduceat(values, np.arange(0, count, index.size), axis=1))
        return np.concatenate(largest, axis=1)

    def _cells(self, shard: int) -> slice:
        return slice(*self._first_cell[shard : shard + 2])

    def _indexed(self, shard: int) -> slice:
        return slice(*self._first_row[shard : shard + 2])

    def _stored(self, shard: int) -> np.ndarray:
        """The stored row of each row of an index; those of blank rows mean nothing."""
        return self._starts[shard] + self._indexes[shard].order.numpy().astype(np.int64)


class _Group:
    """What is remembered of LANES queries that are asked together.

    Attributes:
        kept: how many steps are remembered.
        turn: which of their places was used last.
        x, u: (kept, LANES, ·) v and Pv.
        y, y_u: (kept, LANES, ·) y and Py.
        seen: (cells,) the v that m² of a cell belongs to; `kept`: none.
        nearest: (cells, LANES) m².
        known: y·t of each row, and the y of it; `kept`: none.
    """

    def __init__(self, found: Pruned, kept: int) -> None:
        dim, size, rows = found._projection.dim, found._projection.size, found._first_row[-1]
        self.kept, self.turn = kept, 0
        self.x, self.u = np.zeros((kept, LANES, dim)), np.zeros((kept, LANES, size))
        self.y, self.y_u = np.zeros((kept, LANES, dim)), np.zeros((kept, LANES, size))
        self.seen = np.full(found.cells, kept)
        self.nearest = np.zeros((found.cells, LANES), np.float32)
        self.known = Known(np.zeros((rows, LANES), np.float32), np.full(rows, kept, np.uint8))


class _View:
    """The bounds of up to LANES queries, which their group remembers from now on.

    Places for which there is no query keep their last one, so that all of them go on together.
    """

    def __init__(self, found: Pruned, group: _Group, x: np.ndarray, places: np.ndarray) -> None:
        self._found, self.group = found, group
        self._x = group.x[group.turn].copy()
        self._x[places] = x
        self._u = found._projection.down(self._x)
        self._squared, self._low = np.square(self._x).sum(1), np.square(self._u).sum(1)
        self._remember()
        self._heads, self._head_rounding = self._quantised_heads()
        self._terms = self._by_products()

    def _remember(self) -> None:
        group = self.group
        group.turn = (group.turn + 1) % group.kept
        group.seen[group.seen == group.turn] = group.kept
        group.known.anchor[group.known.anchor == group.turn] = group.kept
        step = np.abs(self._x).max(1) / 126
        step = np.maximum(step, _TINY).astype(np.float32)
        steps = step.astype(np.float64)[:, None]
        codes = np.rint(self._x / steps)
        y, fine = codes * steps, np.rint(254 * (self._x / steps - codes))
        group.x[group.turn], group.u[group.turn] = self._x, self._u
        group.y[group.turn], group.y_u[group.turn] = y, self._found._projection.down(y)
        self._fine = y + fine * (steps / 254)
        packed = [pack(part.astype(np.int8)) for part in (codes, fine) for pack in (kernels.blocks, kernels.shifts)]
        self._queries = Queries(group.turn, *packed, step)

    def _quantised_heads(self) -> tuple[list[Heads], np.ndarray]:
        """2 u · head_scale for each shard, and by how much (cells, LANES) products with its heads may be off."""
        found = self._found
        scaled = 2 * self._u * found._head_scales[:, None]  # (shards, LANES, size)
        step = np.abs(scaled).max(2) / (127 * 254)
        step = np.maximum(step, _TINY).astype(np.float32).astype(np.float64)
        whole = np.rint(scaled / step[..., None])
        coarse = np.clip(np.rint(whole / 254), -127, 127)
        codes = np.stack([coarse, whole - 254 * coarse], axis=1).astype(np.int8)
        off = np.linalg.norm(scaled - whole * step[..., None], axis=2)
        off += 2.0**-21 * np.linalg.norm(scaled, axis=2)  # the product in float32
        shift = kernels.shifts(codes).astype(np.int32)
        parts = zip(kernels.blocks(codes), shift, step.astype(np.float32), strict=True)
        return [Heads(*part) for part in parts], off[found._shard] * found._most["head_norm"][:, None] * _UP

    def _by_products(self) -> Terms:
        """Of all cells. x = c y + w."""
        found, group = self._found, self.group
        none, fine_u = np.zeros((1, LANES)), found._projection.down(self._fine)

        def for_each_y(kept: np.ndarray, present: np.ndarray, fine: np.ndarray) -> np.ndarray:
            return np.concatenate([np.einsum("jsd,sd->js", kept, present), none, (fine * present).sum(1)[None]])

        def squares(kept: np.ndarray, fine: np.ndarray) -> np.ndarray:
            return np.concatenate([np.square(kept).sum(2), none, np.square(fine).sum(1)[None]])

        inner, energy = for_each_y(group.y, self._x, self._fine), squares(group.y, self._fine)
        c = inner / np.where(energy > 0, energy, 1)
        w = self._squared - 2 * c * inner + c**2 * energy
        low = self._low - 2 * c * for_each_y(group.y_u, self._u, fine_u) + c**2 * squares(group.y_u, fine_u)
        length = np.sqrt(energy)
        low, high = _roots(low, w, self._squared + np.square(c * length))

        most, norm = found._most, found._norm[:, None]
        size = np.sqrt(self._squared) + norm
        length = np.abs(c) * length * _UP
        rounding = 2.0**-21 * (2 * found._norm + most["code_error"])  # of y·t, in float32, for each ‖y‖
        unsure = length * rounding[:, None, None] + low * most["head_error"][:, None, None]
        # The last two terms: about ten operations in float32, on numbers of at most twice that size; underflow.
        common = -2 * unsure
        common += (self._squared - self._head_rounding - 2.0**-19 * size**2 - 1e-36)[:, None]
        common[np.broadcast_to((size > _TAME)[:, None], common.shape)] = -np.inf
        with np.errstate(over="ignore"):
            return Terms(_below(common), *((-2 * part).astype(np.float32) for part in (c, high, length)))

    def unseen(self) -> np.ndarray:
        """Lower bounds (cells, LANES) of the squared distances to rows of a cell, from when it was last looked at."""
        found, group, none = self._found, self.group, np.zeros((1, LANES))
        squared = np.square(group.x).sum(2)
        w = self._squared - 2 * np.einsum("jsd,sd->js", group.x, self._x) + squared
        low = self._low - 2 * np.einsum("jsd,sd->js", group.u, self._u) + np.square(group.u).sum(2)
        low, high = _roots(low, w, self._squared + squared)
        more = np.concatenate([self._squared - squared, none - np.inf])[group.seen]
        low, high = (np.concatenate([part, none])[group.seen] for part in (low, high))
        most = 2 * (low * found._most["low"][:, None] + high * found._most["high"][:, None])
        size = self._squared + np.square(found._norm)[:, None]
        return group.nearest.astype(np.float64) + more - most - _ROUNDING * size

    def search(self, shard: int, needed: np.ndarray, top: np.ndarray, into: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        """Place, row of the index and lower bound of what is not above `top` (c, LANES) in the cells of a shard.

        They are the first of three arrays (n · LANES,) of int32, int32 and float32.
        """
        nearest = self.group.nearest[self._found._cells(shard)]
        count = kernels.search(needed, *self._of(shard), self._queries, top, nearest, *into)
        return [found[:count] for found in into]

    def rough(self, shard: int) -> np.ndarray:
        """‖z‖² − 2 u·p for all rows of a shard, (n, LANES)."""
        rough = np.empty((len(self._found._rows[shard].head), LANES), np.float32)
        kernels.rough(*self._of(shard), rough)
        return rough

    def _of(self, shard: int) -> tuple[Rows, Known, Heads, Terms]:
        rows, cells = self._found._indexed(shard), self._found._cells(shard)
        known = Known(*(part[rows] for part in self.group.known))
        terms = self._terms._replace(common=self._terms.common[cells])
        return self._found._rows[shard], known, self._heads[shard], terms


def _nearest_places(u: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, float]:
    """A place for each query, that of the nearest one of the last, by Px; and how far away these are in all."""
    away = np.square(last[:, None] - u).sum(2)
    places, total = np.empty(len(u), np.int64), 0.0
    for i in range(len(u)):
        places[i] = np.nanargmin(away[:, i])
        total += away[places[i], i]
        away[places[i]] = np.nan
    return places, total


def _below(values: np.ndarray) -> np.ndarray:
    """In float32, rounded down."""
    return np.nextafter(values.astype(np.float32), np.float32(-np.inf))


def _roots(low: np.ndarray, whole: np.ndarray, squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of ‖Pw‖ and ‖w − PᵀPw‖ from ‖Pw‖² and ‖w‖²; `squared`: size of what these were made of."""
    slack = _ROUNDING * squared
    return np.sqrt(np.maximum(low, 0) + slack), np.sqrt(np.maximum(whole - low, 0) + slack)
