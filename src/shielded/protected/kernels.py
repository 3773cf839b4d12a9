"""The inner loops of the search in indexed shards, compiled by Numba for the processor at hand.

A row of codes costs what it takes to get it from memory, if eight queries at a time are multiplied with it by the
processor's instruction for products of bytes, and the next row is sent for meanwhile (`simd.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import float32, njit

from .index import LINE, padded
from .simd import LANES, WIDTH, from_heads, multiply, to_bounds

_MOST = 1 << 15  # products of bytes that are added in int32
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
        products: (n, S) float32, y·t.
        anchor: (n, S / LANES) uint8, which y that is.
    """

    products: np.ndarray
    anchor: np.ndarray


class Heads(NamedTuple):
    """2 u · head_scale for S queries u: `step` · (254 · coarse + fine).

    Args:
        blocks: `blocks` of the coarse codes and then of the fine ones.
        shift: (2, S) int32, their `shifts`.
        step: (S,) float32.
    """

    blocks: np.ndarray
    shift: np.ndarray
    step: np.ndarray


class Terms(NamedTuple):
    """For each y that is kept, and at last for none: float32.

    Args:
        common: (kept + 1, S), or (cells, kept + 1, S), what is added to a bound.
        factor: (kept + 1, S) of y·t.
        high: (kept + 1, S), factor of ρ.
        doubt: (kept + 1, S), factor of the error of the codes.
    """

    common: np.ndarray
    factor: np.ndarray
    high: np.ndarray
    doubt: np.ndarray


class Queries(NamedTuple):
    """The whole of S queries.

    Args:
        turn: which y they are.
        blocks: `blocks` of their codes.
        shift: (S,) int64, `shifts` of these.
        step: (S,) float32, what one of these stands for.
    """

    turn: int
    blocks: np.ndarray
    shift: np.ndarray
    step: np.ndarray


def blocks(codes: np.ndarray) -> np.ndarray:
    """Codes (..., S, dim) as `multiply` wants them: (..., S / LANES, dim / LINE, LANES, LINE), filled up with 0."""
    *others, queries, dim = codes.shape
    filled = np.zeros((*others, queries, padded(dim)), np.int8)
    filled[..., :dim] = codes
    parts = filled.reshape(*others, queries // LANES, LANES, -1, LINE).swapaxes(-3, -2)
    # Where a vector starts in the middle of a line of the cache, reading it takes twice as long.
    room = np.empty(filled.size + LINE, np.int8)
    start = -room.ctypes.data % LINE
    result = room[start : start + filled.size].reshape(parts.shape)
    result[...] = parts
    return result


def shifts(codes: np.ndarray) -> np.ndarray:
    """What to take off the sums that `multiply` makes with these queries (..., S, dim)."""
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
        top: (S,) squared distances; what is certainly farther is ruled out.
        rough: (m, S) is set to ‖z‖² − 2 u·p.
        risky: (m · S / LANES + 1, 2) is filled with row and group, where a group of queries has one that is not ruled
            out. Rows are counted from `first`.
        least: (S,) is set to the least bounds.

    Returns:
        How many are risky.
    """
    (groups, width), slots, last = (known.anchor.shape[1], rows.head.shape[1]), len(top), len(rows.head) - 1
    sums, lower = np.empty((min(_PIECE, len(rough)), 2, slots), np.int32), np.empty(LANES, np.float32)
    at_head, at_heads, count_heads = rows.head.ctypes.data, heads.blocks.ctypes.data, width // LINE
    at_sums, at_rough, at_lower = sums.ctypes.data, rough.ctypes.data, lower.ctypes.data
    at_shift, at_step, at_top = heads.shift.ctypes.data, heads.step.ctypes.data, top.ctypes.data
    at_products, at_least = known.products.ctypes.data, least.ctypes.data
    common, factor, high, doubt = terms
    least[:] = np.inf
    found = 0
    for start in range(0, len(rough), _PIECE):
        count = min(_PIECE, len(rough) - start)
        for i in range(count):
            row = first + start + i
            here, following = at_head + row * width, at_head + min(row + 1, last) * width
            for group in range(2 * groups):
                queries, out = group * width * LANES, 4 * LANES * (2 * groups * i + group)
                multiply(here, following, at_heads + queries, count_heads, at_sums + out)
        for i in range(count):
            row = first + start + i
            for group in range(groups):
                own = 4 * LANES * group
                y = 4 * slots * known.anchor[row, group] + own
                coarse, shift = at_sums + 8 * slots * i + own, at_shift + own
                here = at_rough + 4 * slots * (start + i) + own
                from_heads(
                    rows.squared[row], (coarse, coarse + 4 * slots), (shift, shift + 4 * slots), at_step + own, here
                )
                risk = to_bounds(
                    rows.rho[row],
                    rows.error[row],
                    here,
                    (common + y, factor + y, high + y, doubt + y),
                    at_products + 4 * slots * row + own,
                    at_top + own,
                    at_lower,
                    at_least + own,
                )
                risky[found, 0], risky[found, 1] = start + i, group
                found += risk != 0
    return found


@njit(nogil=True)
def rough(rows, known, heads, terms, out):
    """‖z‖² − 2 u·p for all rows of a shard: `Rows`, `Known`, `Heads`, `Terms` of all cells, and (n, S) to be set."""
    top = np.full(out.shape[1], -np.inf, np.float32)
    risky = np.empty((out.size // LANES + 1, 2), np.int64)
    _bounds(0, rows, known, heads, _addresses(terms, 0), top, out, risky, np.empty_like(top))


@njit(nogil=True)
def _addresses(terms, cell):
    """Of `Terms` of a cell."""
    common = terms.common.ctypes.data + cell * terms.common.strides[0]
    return common, terms.factor.ctypes.data, terms.high.ctypes.data, terms.doubt.ctypes.data


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
        top: (c, S) squared distances; what is certainly farther is ruled out.
        nearest: (c, S) is set to the least bound in each cell, −inf in one that had to be looked at more closely.
        query_found: (n · S,) int32, and
        row_found: (n · S,) int32, are filled with what cannot be ruled out, and
        lower_found: (n · S,) float32, with its bounds.

    Returns:
        How much that is.
    """
    scale, rho, error, anchor, products = rows.scale, rows.rho, rows.error, known.anchor, known.products
    shift, step = queries.shift, queries.step
    size, slots, dim = len(scale) // len(needed), len(step), rows.codes.shape[1]
    rough, risky = np.empty((size, slots), np.float32), np.empty((size * slots // LANES + 1, 2), np.int64)
    sums, inner, lower = np.empty(LANES, np.int32), np.empty(LANES, np.int64), np.empty(LANES, np.float32)
    at_codes, at_queries, at_products = rows.codes.ctypes.data, queries.blocks.ctypes.data, products.ctypes.data
    unused = np.empty(LANES, np.float32)
    at_sums, at_rough, at_lower = sums.ctypes.data, rough.ctypes.data, lower.ctypes.data
    at_unused = unused.ctypes.data
    found = 0
    for cell in range(len(needed)):
        if not needed[cell]:
            continue
        first, own, at_top = cell * size, _addresses(terms, cell), top.ctypes.data + 4 * slots * cell
        count = _bounds(first, rows, known, heads, own, top[cell], rough, risky, nearest[cell])
        if count:
            nearest[cell] = -np.inf
        common, factor, high, doubt = own
        for j in range(count):
            i, group = risky[j, 0], risky[j, 1]
            row, following, start = first + i, first + risky[min(j + 1, count - 1), 0], group * LANES
            here, then, query = at_codes + row * dim, at_codes + following * dim, at_queries + group * dim * LANES
            for k in range(LANES):
                inner[k] = -shift[start + k]
            for part in range(0, dim, _MOST):
                length = min(_MOST, dim - part) // LINE
                multiply(here + part, then + part, query + part * LANES, length, at_sums)
                for k in range(LANES):
                    inner[k] += sums[k]
            anchor[row, group] = queries.turn
            for k in range(LANES):
                products[row, start + k] = float32(inner[k]) * step[start + k] * scale[row]
            y = 4 * (slots * queries.turn + start)
            risk = to_bounds(
                rho[row],
                error[row],
                at_rough + 4 * (slots * i + start),
                (common + y, factor + y, high + y, doubt + y),
                at_products + 4 * (slots * row + start),
                at_top + 4 * start,
                at_lower,
                at_unused,
            )
            if risk:
                for k in range(LANES):
                    if risk >> k & 1:
                        query_found[found], row_found[found], lower_found[found] = start + k, row, lower[k]
                        found += 1
    return found
