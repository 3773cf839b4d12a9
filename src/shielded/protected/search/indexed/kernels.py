"""The inner loops of the search in indexed shards, compiled by Numba for the processor at hand.

A row of codes costs what it takes to get it from memory, if eight queries at a time are multiplied with it by the
processor's instruction for products of bytes, and the next row is sent for meanwhile (`simd.py`).

Numba frees an array after its last use, and an address of it is none. So addresses of arrays that are made here are
taken inside the loops that use them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import float32, njit

from shielded.protected.search.indexed.index import LINE, padded
from shielded.protected.search.indexed.simd import LANES, WIDTH, from_heads, multiply, to_bounds

_MOST = 1 << 15  # products of bytes that are added in int32
_LANES = 4 * LANES  # bytes of so many numbers
_AHEAD = 16  # rows whose heads are sent for early
_PIECE = 256  # rows whose products with heads stay in a processor's cache


class Rows(NamedTuple):
    """An index of a shard: see `index.Index`."""

    head: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    squared: np.ndarray
    rho: np.ndarray
    error: np.ndarray


class Known(NamedTuple):
    """What is known of n rows.

    Args:
        products: (n, LANES) float32, y·t.
        anchor: (n,) uint8, which y that is.
    """

    products: np.ndarray
    anchor: np.ndarray


class Heads(NamedTuple):
    """2 u · head_scale for LANES queries u: `step` · (254 · coarse + fine).

    Args:
        blocks: `blocks` of the coarse codes and then of the fine ones.
        shift: (2, LANES) int32, their `shifts`.
        step: (LANES,) float32.
    """

    blocks: np.ndarray
    shift: np.ndarray
    step: np.ndarray


class Terms(NamedTuple):
    """For each y that is kept, for none, and at last for the fine codes of the present queries: float32.

    Args:
        common: (cells, kept + 2, LANES), what is added to a bound.
        factor: (kept + 2, LANES) of y·t.
        high: (kept + 2, LANES), factor of ρ.
        doubt: (kept + 2, LANES), factor of the error of the codes.
    """

    common: np.ndarray
    factor: np.ndarray
    high: np.ndarray
    doubt: np.ndarray


class Queries(NamedTuple):
    """The whole of LANES queries: about `step` · codes, and closer to it `step` · (codes + fine / 254).

    Args:
        turn: which y the former are.
        blocks: `blocks` of the codes, and
        shift: (LANES,) int64, their `shifts`.
        fine_blocks: the same of the fine codes, and
        fine_shift: (LANES,) int64.
        step: (LANES,) float32.
    """

    turn: int
    blocks: np.ndarray
    shift: np.ndarray
    fine_blocks: np.ndarray
    fine_shift: np.ndarray
    step: np.ndarray


def blocks(codes: np.ndarray) -> np.ndarray:
    """Codes (..., LANES, dim) as `multiply` wants them: (..., dim / LINE, LANES, LINE), filled up with 0."""
    *others, queries, dim = codes.shape
    filled = np.zeros((*others, queries, padded(dim)), np.int8)
    filled[..., :dim] = codes
    parts = filled.reshape(*others, queries, -1, LINE).swapaxes(-3, -2)
    # Where a vector starts in the middle of a line of the cache, reading it takes twice as long.
    room = np.empty(filled.size + LINE, np.int8)
    start = -room.ctypes.data % LINE
    result = room[start : start + filled.size].reshape(parts.shape)
    result[...] = parts
    return result


def shifts(codes: np.ndarray) -> np.ndarray:
    """What to take off the sums that `multiply` makes with these queries (..., dim)."""
    return (128 if WIDTH else 0) * codes.sum(-1, dtype=np.int64)


@njit(nogil=True)
def _bounds(first, rows, known, heads, terms, top, rough, risky, least):
    """Looks at the rows of a cell, as far as products are known.

    Args:
        first: the first of them.
        rows: `Rows`.
        known: `Known`.
        heads: `Heads`.
        terms: addresses of those of `Terms` of this cell.
        top: (LANES,) squared distances; what is certainly farther is ruled out.
        rough: (m, LANES) is set to ‖z‖² − 2 u·p.
        risky: (m + 1,) is filled with the rows that are not ruled out for each query, counted from `first`.
        least: (LANES,) is set to the least bounds.

    Returns:
        How many are risky.
    """
    anchor, squared, rho, error = known.anchor, rows.squared, rows.rho, rows.error
    width, last = rows.head.shape[1], len(squared) - 1
    sums, lower = np.empty((min(_PIECE, len(rough)), 2, LANES), np.int32), np.empty(LANES, np.float32)
    at_head, at_coarse, lines = rows.head.ctypes.data, heads.blocks.ctypes.data, width // LINE
    at_fine, at_shift, at_step = at_coarse + width * LANES, heads.shift.ctypes.data, heads.step.ctypes.data
    at_rough, at_products, at_top, at_least = (
        rough.ctypes.data, known.products.ctypes.data, top.ctypes.data, least.ctypes.data,
    )  # fmt: skip
    common, factor, high, doubt = terms
    least[:] = np.inf
    found = 0
    for start in range(0, len(rough), _PIECE):
        count = min(_PIECE, len(rough) - start)
        for i in range(count):
            row = first + start + i
            here, following = at_head + row * width, at_head + min(row + _AHEAD, last) * width
            out = sums.ctypes.data + 2 * _LANES * i
            multiply(here, following, at_coarse, lines, out)
            multiply(here, following, at_fine, lines, out + _LANES)
        for i in range(count):
            row, y = first + start + i, _LANES * anchor[first + start + i]
            coarse, here = sums.ctypes.data + 2 * _LANES * i, at_rough + _LANES * (start + i)
            from_heads(squared[row], (coarse, coarse + _LANES), (at_shift, at_shift + _LANES), at_step, here)
            risk = to_bounds(
                rho[row],
                error[row],
                here,
                (common + y, factor + y, high + y, doubt + y),
                at_products + _LANES * row,
                at_top,
                lower.ctypes.data,
                at_least,
            )
            risky[found] = start + i
            found += risk != 0
    return found


@njit(nogil=True)
def rough(rows, known, heads, terms, out):
    """Sets `out` (n, LANES) to ‖z‖² − 2 u·p for all rows of a shard; the others as for `search`."""
    top = np.full(LANES, -np.inf, np.float32)
    risky = np.empty(len(out) + 1, np.int64)
    _bounds(0, rows, known, heads, _addresses(terms, 0), top, out, risky, np.empty_like(top))


@njit(nogil=True)
def _addresses(terms, cell):
    """Of `Terms` of a cell."""
    common = terms.common.ctypes.data + cell * terms.common.strides[0]
    return common, terms.factor.ctypes.data, terms.high.ctypes.data, terms.doubt.ctypes.data


@njit(nogil=True)
def _inner(here, then, dim, at_queries, shift, sums, inner):
    """Sets `inner` to ∑ row · query for LANES queries: exact."""
    for k in range(LANES):
        inner[k] = -shift[k]
    for part in range(0, dim, _MOST):
        multiply(here + part, then + part, at_queries + part * LANES, min(_MOST, dim - part) // LINE, sums.ctypes.data)
        for k in range(LANES):
            inner[k] += sums[k]


@njit(nogil=True)
def search(needed, rows, known, heads, terms, queries, top, nearest, query_found, row_found, lower_found):
    """Finds what cannot be ruled out in the cells of a shard, and reads the codes of rows that cannot be without.

    Args:
        needed: (c,) bool, which cells.
        rows: `Rows`.
        known: `Known`, which is brought up to date.
        heads: `Heads`.
        terms: `Terms` of all cells.
        queries: `Queries`.
        top: (c, LANES) squared distances; what is certainly farther is ruled out.
        nearest: (c, LANES) is set to the least bound in each cell, −inf in one that had to be looked at more closely.
        query_found: (n · LANES,) int32, and
        row_found: (n · LANES,) int32, are filled with what cannot be ruled out, and
        lower_found: (n · LANES,) float32, with its bounds.

    Returns:
        How much that is.
    """
    scale, rho, error, anchor, products = rows.scale, rows.rho, rows.error, known.anchor, known.products
    shift, fine_shift, step, turn = queries.shift, queries.fine_shift, queries.step, queries.turn
    size, dim = len(scale) // len(needed), rows.codes.shape[1]
    rough, risky = np.empty((size, LANES), np.float32), np.empty(size + 1, np.int64)
    sums, inner, fine = np.empty(LANES, np.int32), np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    product, lower, unused = np.empty((3, LANES), np.float32)
    at_codes, at_products = rows.codes.ctypes.data, products.ctypes.data
    at_queries, at_fine = queries.blocks.ctypes.data, queries.fine_blocks.ctypes.data
    last = _LANES * (len(terms.factor) - 1)
    found = 0
    for cell in range(len(needed)):
        if not needed[cell]:
            continue
        first, own = cell * size, _addresses(terms, cell)
        count = _bounds(first, rows, known, heads, own, top[cell], rough, risky, nearest[cell])
        if count:
            nearest[cell] = -np.inf
        common, factor, high, doubt = own
        y = _LANES * turn
        for j in range(count):
            row, following = first + risky[j], first + risky[min(j + 1, count - 1)]
            here, then = at_codes + row * dim, at_codes + following * dim
            _inner(here, then, dim, at_queries, shift, sums, inner)
            anchor[row] = turn
            for k in range(LANES):
                products[row, k] = float32(inner[k]) * step[k] * scale[row]
            risk = to_bounds(
                rho[row],
                error[row],
                rough.ctypes.data + _LANES * risky[j],
                (common + y, factor + y, high + y, doubt + y),
                at_products + _LANES * row,
                top.ctypes.data + _LANES * cell,
                lower.ctypes.data,
                unused.ctypes.data,
            )
            if risk:
                _inner(here, then, dim, at_fine, fine_shift, sums, fine)
                for k in range(LANES):
                    product[k] = float32(254 * inner[k] + fine[k]) * (step[k] / float32(254)) * scale[row]
                risk = to_bounds(
                    rho[row],
                    error[row],
                    rough.ctypes.data + _LANES * risky[j],
                    (common + last, factor + last, high + last, doubt + last),
                    product.ctypes.data,
                    top.ctypes.data + _LANES * cell,
                    lower.ctypes.data,
                    unused.ctypes.data,
                )
                for k in range(LANES):
                    if risk >> k & 1:
                        query_found[found], row_found[found], lower_found[found] = k, row, lower[k]
                        found += 1
    return found
