"""Caches of earlier queries, from which bounds of distances to rows and cells follow: see `bounds.py`."""

from __future__ import annotations

import numpy as np

from shielded.protected.search.indexed.index import Projection
from shielded.protected.search.indexed.kernels import RowProducts
from shielded.protected.search.indexed.simd import LANES


class CacheMemory:
    """What all caches know of cells and rows, as one array each.

    Attributes:
        cell_minimum: (caches, cells, LANES) m².
        products: (caches, rows, LANES) y·t.
        anchor: (caches, rows) entry y of each product.
    """

    def __init__(self, caches: int, cells: int, rows: int, steps: int) -> None:
        self.cell_minimum = np.zeros((caches, cells, LANES), np.float32)
        self.products = np.zeros((caches, rows, LANES), np.float32)
        self.anchor = np.full((caches, rows), steps, np.uint8)


class QueryCache:
    """Cache the last queries of LANES lanes that are searched at once, in a ring buffer of steps.

    Attributes:
        steps: length of the ring buffer; as an anchor: none.
        newest: its newest entry.
        x, u: (steps, LANES, ·) v and Pv.
        y, y_u: (steps, LANES, ·) y and Py.
        energies: (4, steps, LANES) squared lengths of x, u, y and y_u.
        cell_anchor: (cells,) entry v that `cell_minimum` of a cell belongs to.
        cell_minimum: (cells, LANES) m².
        products: y·t of each row, and the entry y of it.
        number: of the cache.
    """

    def __init__(self, projection: Projection, memory: CacheMemory, number: int, steps: int) -> None:
        dim, size = projection.dim, projection.size
        self.steps, self.newest, self.number = steps, 0, number
        self.x, self.u = np.zeros((steps, LANES, dim)), np.zeros((steps, LANES, size))
        self.y, self.y_u = np.zeros((steps, LANES, dim)), np.zeros((steps, LANES, size))
        self.energies = np.zeros((4, steps, LANES))
        self.cell_minimum = memory.cell_minimum[number]
        self.cell_anchor = np.full(len(self.cell_minimum), steps)
        self.products = RowProducts(memory.products[number], memory.anchor[number])

    @property
    def last_x(self) -> np.ndarray:
        """(LANES, dim)."""
        return self.x[self.newest]

    @property
    def last_u(self) -> np.ndarray:
        """(LANES, size)."""
        return self.u[self.newest]

    def advance(self) -> None:
        """Free the oldest entry for the next queries."""
        self.newest = (self.newest + 1) % self.steps
        self.cell_anchor[self.cell_anchor == self.newest] = self.steps
        self.products.anchor[self.products.anchor == self.newest] = self.steps
