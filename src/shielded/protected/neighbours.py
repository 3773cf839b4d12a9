"""Searching a large set: what can be ruled out is ruled out by bounds, the rest is measured.

Notation: x a query, u = Px its lowest frequencies; a row z = Pᵀp + t with the head p of its index. Exactly,

    ‖x − z‖² = ‖x‖² + ‖z‖² − 2 u·p − 2 x·t.

The first three terms are cheap for all rows. For the last, as t has next to none of the lowest frequencies,

    |x·t| ≤ ‖Px‖ ‖Pt‖ + ‖x − PᵀPx‖ ‖t − PᵀPt‖,

which is tight for a blurred x and useless for a sharp one: then codes of the whole t are needed. But between two steps
of a sampler x moves little. So the products y·t with an earlier query y are kept for every row, and x = c y + w turns
the inequality into one for w·t. How good that is depends on how far x has moved since; where it rules out too little,
the codes of the cell are read, and x takes the place of y.

Most cells need not even be looked at: if all rows of a cell were farther than m from an earlier query v, then now

    ‖x − z‖² ≥ m² + ‖x‖² − ‖v‖² − 2 (‖Pw‖ ‖Pz‖ + ‖w − PᵀPw‖ ‖z − PᵀPz‖)    with w = x − v.

Nothing is assumed about how queries follow each other; what is kept from earlier ones only ever saves time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .index import Index, Projection, products

_KEPT = 8  # earlier queries that are remembered
_WORTH = 12  # reading so many rows in order is about as fast as reading one here and there
_FEW = 16  # rows that are measured without looking at their codes
_TAME = 1e15  # longer vectors would overflow in float32; they are always measured
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
        neighbours: for each remembered query, stored rows that were found near it.
    """

    neighbours: list[np.ndarray]

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
        names = ("head_norm", "head_error", "code_error", "low", "high")
        self._most = {name: np.concatenate([getattr(index, name).numpy() for index in indexes]) for name in names}
        self._norm = np.hypot(self._most["low"], self._most["high"])
        self._head_scales = np.stack([index.head_scale.numpy() for index in indexes])
        self._remember(0)

    def _remember(self, slots: int) -> None:
        """Forgets everything, and makes room for so many queries."""
        dim, size = self._projection.dim, self._projection.size
        self._turn = np.zeros(slots, np.int64)  # which of its places was used last
        self._x = np.zeros((slots, _KEPT, dim))  # v
        self._u = np.zeros((slots, _KEPT, size))  # Pv
        self._codes = np.zeros((slots, _KEPT, dim), np.int8)  # y = step · codes
        self._step = np.ones((slots, _KEPT))
        self._code_u = np.zeros((slots, _KEPT, size))  # Py
        # For each cell, the v that m² belongs to, and the y that the products belong to; _KEPT: none.
        self._seen, self._of = np.full((2, slots, self.cells), _KEPT)
        self._nearest = np.zeros((slots, self.cells))  # m²
        self._error = np.zeros((slots, self.cells))  # of the products
        self._products = torch.zeros(slots, int(self._first_row[-1]))  # y·t
        self.neighbours = [np.empty(0, np.int64)] * slots

    def assign(self, x: np.ndarray) -> np.ndarray:
        """A slot for each query (B, dim): that of the nearest earlier query."""
        if len(x) > len(self._turn):
            self._remember(len(x))
        last = self._x[np.arange(len(self._turn)), self._turn]
        away = np.stack([np.square(last - query).sum(1) for query in x])
        slots = np.empty(len(x), np.int64)
        for i in range(len(x)):
            slots[i] = np.nanargmin(away[i])
            away[:, slots[i]] = np.nan
        return slots

    def reach(self, x: np.ndarray, slots: np.ndarray, limit: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """Everything that cannot be ruled out.

        Args:
            x: queries (B, dim), float64.
            slots: theirs (B,).
            limit: (B, cells) squared distances; rows that are certainly farther than that are left out.

        Yields:
            Query, stored row and lower bound of the squared distance of the pairs that are left.
        """
        view = _View(self, x, slots)
        needed = ~(view.unseen() > limit).all(0)
        with np.errstate(over="ignore"):
            top = torch.from_numpy(np.nextafter(limit.astype(np.float32), np.float32(np.inf)))
        for shard, index in enumerate(self._indexes):
            cells = self._first_cell[shard] + np.flatnonzero(needed[slice(*self._first_cell[shard : shard + 2])])
            if len(cells):
                part = _Part(view, shard, index, int(cells[0]), int(cells[-1]) + 1)
                pairs = part.left(top)
                view.note(part.cells, part.nearest())
                if pairs is not None:
                    yield self._pairs(shard, *pairs)

    def guess(self, x: np.ndarray, slots: np.ndarray, k: int) -> list[np.ndarray]:
        """Some k stored rows for each query that may well be near."""
        view = _View(self, x, slots)
        found = [(np.empty(0), np.empty(0, np.int64)) for _ in x]
        for shard, index in enumerate(self._indexes):
            rows = self._rows(shard)
            usable = np.arange(len(rows)) if self._alive is None else np.flatnonzero(self._alive[rows])
            lower = _Part(view, shard, index, *self._first_cell[shard : shard + 2].tolist()).lower.flatten(1)
            best, at = lower.nan_to_num(0.0)[:, usable].topk(min(k, len(usable)), largest=False)
            near = rows[usable[at.numpy()]]
            for query, (value, known) in enumerate(found):
                value, known = np.append(value, best[query].numpy()), np.append(known, near[query])
                order = value.argsort(kind="stable")[:k]
                found[query] = value[order], known[order]
        return [rows for _, rows in found]

    def largest(self, radius: np.ndarray, number: np.ndarray) -> np.ndarray:
        """The largest radius in each cell, (B, cells).

        Args:
            radius: (B, K) for the K rows that have not been removed.
            number: which of these a stored row is.
        """
        if radius.strides[1] == 0:  # one for all
            return np.broadcast_to(radius[:, :1], (len(radius), self.cells))
        largest = []
        for shard, index in enumerate(self._indexes):
            rows = self._rows(shard)
            values = radius[:, number[rows]] if self._alive is None else radius[:, number[rows]] * self._alive[rows]
            largest.append(np.maximum.reduceat(values, np.arange(0, len(rows), index.size), axis=1))
        return np.concatenate(largest, axis=1)

    def _rows(self, shard: int) -> np.ndarray:
        """The stored row of each row of an index, without the blank ones."""
        return self._starts[shard] + self._indexes[shard].order[: self._counts[shard]].numpy().astype(np.int64)

    def _pairs(self, shard: int, query: Tensor, row: Tensor, lower: Tensor) -> tuple[np.ndarray, ...]:
        query, row, lower = query.numpy(), row.numpy(), lower.numpy().astype(np.float64)
        there = row < self._counts[shard]
        rows = self._starts[shard] + self._indexes[shard].order.numpy()[row].astype(np.int64)
        if self._alive is not None:
            there &= self._alive[rows]
        return query[there], rows[there], lower[there]


class _View:
    """The bounds of one batch of queries, which are remembered from now on."""

    def __init__(self, found: Pruned, x: np.ndarray, slots: np.ndarray) -> None:
        self.found, self.slots, self._x = found, slots, x
        self._squared = np.square(x).sum(1)
        self._u = found._projection.down(x)
        self._remember()
        self.heads, self.head_step, self._head_rounding = self._quantised_heads()
        self._split = self._by_products()
        self.terms = self._terms(found._of[slots], found._error[slots])
        self._present: Tensor | None = None

    def _remember(self) -> None:
        found, slots = self.found, self.slots
        found._turn[slots] = self.turn = (found._turn[slots] + 1) % _KEPT
        for kept in (found._seen, found._of):
            kept[slots] = np.where(kept[slots] == self.turn[:, None], _KEPT, kept[slots])
        step = np.abs(self._x).max(1) / 126
        step = np.where(step > 0, step, 1.0).astype(np.float32).astype(np.float64)
        codes = np.rint(self._x / step[:, None])
        at = slots, self.turn
        found._x[at], found._u[at], found._step[at] = self._x, self._u, step
        found._codes[at], found._code_u[at] = codes, found._projection.down(codes * step[:, None])
        self.codes, self.code_step = torch.from_numpy(found._codes[at]), torch.from_numpy(step).float()

    def _quantised_heads(self) -> tuple[Tensor, Tensor, np.ndarray]:
        """u · head_scale as two int8 numbers, step · (254 · high + low), for each shard, and how far off that is."""
        found = self.found
        scaled = self._u * found._head_scales[:, None]  # (shards, B, size)
        step = np.abs(scaled).max(2) / (127 * 254)
        step[step == 0] = 1.0
        whole = np.rint(scaled / step[..., None])
        high = np.clip(np.rint(whole / 254), -127, 127)
        heads = torch.from_numpy(np.concatenate([high, whole - 254 * high], axis=1).astype(np.int8))
        off = np.linalg.norm(scaled - whole * step[..., None], axis=2)
        off += 2.0**-21 * np.linalg.norm(scaled, axis=2)  # the product in float32
        return heads, torch.from_numpy(step).float(), off[found._shard].T * found._most["head_norm"] * _UP

    def _by_products(self) -> np.ndarray:
        """x = c y + w for each y that is remembered, and at last for y = 0: c, ‖Pw‖, ‖w − PᵀPw‖; (3, B, _KEPT + 1)."""
        found, slots = self.found, self.slots
        split = np.zeros((3, len(slots), _KEPT + 1))
        for j in range(_KEPT):
            y = found._codes[slots, j] * found._step[slots, j, None]
            energy = np.square(y).sum(1)
            c = (self._x * y).sum(1) / np.where(energy > 0, energy, 1)
            w, down = self._x - c[:, None] * y, self._u - c[:, None] * found._code_u[slots, j]
            split[:, :, j] = c, *_low_and_high(w, down, self._squared)
        split[1:, :, _KEPT] = _low_and_high(self._x, self._u, self._squared)
        return split

    def unseen(self) -> np.ndarray:
        """Lower bounds (B, cells) of the squared distances to all rows of a cell, from when it was last looked at."""
        found, slots = self.found, self.slots
        split = np.zeros((3, len(slots), _KEPT + 1))
        for j in range(_KEPT):
            v, u = found._x[slots, j], found._u[slots, j]
            squared = np.square(v).sum(1)
            split[:, :, j] = self._squared - squared, *_low_and_high(self._x - v, self._u - u, self._squared + squared)
        split[0, :, _KEPT] = -np.inf
        more, low, high = np.take_along_axis(split, found._seen[None, slots], 2)
        size = self._squared[:, None] + np.square(found._norm)
        return found._nearest[slots] + more - 2 * (low * found._most["low"] + high * found._most["high"]) - 1e-9 * size

    def note(self, cells: slice, nearest: Tensor) -> None:
        """Remembers the lower bounds (B, c) that were found."""
        self.found._nearest[self.slots, cells] = nearest.double().nan_to_num(-np.inf).numpy()
        self.found._seen[self.slots, cells] = self.turn[:, None]

    def _terms(self, which: np.ndarray, error: np.ndarray) -> Tensor:
        """What all rows of a cell have in common, and the factors of y·t and ρ: (3, B, cells)."""
        most, norm = self.found._most, self.found._norm
        c, low, high = np.take_along_axis(self._split, which[None], 2)
        unsure = self._head_rounding + np.abs(c) * error + low * most["head_error"]
        # The last two terms: about ten operations in float32, on numbers of at most twice that size; underflow.
        size = np.sqrt(self._squared)[:, None] + norm
        common = self._squared[:, None] - 2 * unsure - 2.0**-19 * size**2 - 1e-36
        common[size > _TAME] = -np.inf
        with np.errstate(over="ignore"):
            common = np.nextafter(common.astype(np.float32), np.float32(-np.inf))
            return torch.from_numpy(np.stack([common, -2 * c, -2 * high]).astype(np.float32))

    @property
    def present(self) -> Tensor:
        """The terms once the products are those with these queries themselves."""
        if self._present is None:
            found = self.found
            length = np.linalg.norm(self.codes.numpy() * self.code_step.double().numpy()[:, None], axis=1)[:, None]
            code_error = found._most["code_error"]
            self._errors = length * (code_error + 2.0**-21 * (2 * found._norm + code_error)) * _UP
            self._present = self._terms(np.broadcast_to(self.turn[:, None], self._errors.shape), self._errors)
        return self._present

    def look(self, cell: int) -> None:
        """Takes over that the products of a cell are now those with these queries."""
        self.terms[:, :, cell] = self.present[:, :, cell]
        self.found._of[self.slots, cell], self.found._error[self.slots, cell] = self.turn, self._errors[:, cell]

    def has_looked(self, cell: int) -> bool:
        return bool((self.found._of[self.slots, cell] == self.turn).all())


class _Part:
    """Some cells of a shard that follow each other, seen from a batch of queries.

    Attributes:
        cells: which.
        lower: (B, c, size) lower bounds of the squared distances.
    """

    def __init__(self, view: _View, shard: int, index: Index, first: int, stop: int) -> None:
        self._view, self._index, self._size = view, index, index.size
        self.cells = slice(first, stop)
        self._start = (first - int(view.found._first_cell[shard])) * index.size  # in the index
        self._offset = int(view.found._first_row[shard])
        rows = slice(self._start, self._start + (stop - first) * index.size)
        batch = len(view.slots)
        both = products(view.heads[shard], index.head[rows])
        heads = both[batch:].float().add_(both[:batch], alpha=254)
        cheap = torch.addcmul(index.squared[rows], heads, -2 * view.head_step[shard, :, None])
        self._cheap = cheap.view(batch, stop - first, index.size)  # ‖z‖² − 2 u·p
        self.lower = self._bound(slice(None))

    def _bound(self, cell: slice) -> Tensor:
        """The lower bounds of these cells, from the products that are kept."""
        start, stop, _ = cell.indices(self._cheap.shape[1])
        rows = slice(self._start + start * self._size, self._start + stop * self._size)
        common, c, high = self._view.terms[:, :, self.cells][:, :, cell, None]
        lower = torch.addcmul(self._cheap[:, cell], self._index.rho[rows].view(-1, self._size), high)
        if c.any():
            kept = self._view.found._products[:, self._offset + rows.start : self._offset + rows.stop]
            lower.addcmul_(kept[self._view.slots].view_as(lower), c)
        return lower.add_(common)

    def left(self, top: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Query, row of the index and lower bound of what is not above `top` (B, cells), after a closer look at it."""
        bar = top[:, self.cells, None]
        if (self.nearest() > bar[..., 0]).all():
            return None
        risky = (self.lower > bar).all(0).logical_not_()  # NaN, where something overflowed, counts as a risk
        count = risky.sum(1)
        for cell in count.nonzero().flatten().tolist():
            if count[cell] * _WORTH > self._size and not self._view.has_looked(self.cells.start + cell):
                self._look(cell)
            elif count[cell] > _FEW:
                self._look_at(cell, risky[cell].nonzero().flatten())
        query, cell, row = (self.lower > bar).logical_not_().nonzero(as_tuple=True)
        return query, self._start + cell * self._size + row, self.lower[query, cell, row]

    def nearest(self) -> Tensor:
        """(B, c) lower bounds for all rows of a cell; NaN where something overflowed."""
        return self.lower.amin(2)

    def _look(self, cell: int) -> None:
        """Reads the codes of a cell."""
        start = self._start + cell * self._size
        kept = slice(self._offset + start, self._offset + start + self._size)
        self._view.found._products[self._view.slots, kept] = self._inner(slice(start, start + self._size))
        self._view.look(self.cells.start + cell)
        self.lower[:, cell] = self._bound(slice(cell, cell + 1))[:, 0]

    def _look_at(self, cell: int, row: Tensor) -> None:
        """Reads the codes of some rows of a cell."""
        at = self._start + cell * self._size + row
        common, c, high = self._view.present[:, :, self.cells.start + cell, None]
        lower = torch.addcmul(self._cheap[:, cell, row], self._index.rho[at], high)
        self.lower[:, cell, row] = lower.addcmul_(self._inner(at), c).add_(common)

    def _inner(self, rows: slice | Tensor) -> Tensor:
        """y·t for the present queries, (B, n)."""
        inner = products(self._view.codes, self._index.codes[rows]).float()
        return inner.mul_(self._view.code_step[:, None]).mul_(self._index.scale[rows])


def _low_and_high(w: np.ndarray, down: np.ndarray, squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (B,) of ‖Pw‖ and ‖w − PᵀPw‖ for w (B, dim) and Pw; `squared`: size of what w was made of."""
    low = np.square(down).sum(1)
    high = np.maximum(np.square(w).sum(1) - low, 0)
    return np.sqrt(low + 1e-12 * squared), np.sqrt(high + 1e-12 * squared)
