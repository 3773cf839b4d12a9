"""Inner loops of the search in indexed shards, compiled by Numba for this processor.

A row of codes costs no more than its transfer from memory, if eight queries at a time are multiplied with it by the
processor's instruction for products of bytes while the next row is prefetched (`simd.py`).

Numba frees an array after its last use, and taking its address does not count as one. So these functions take the
addresses of arrays that they allocate inside the loops that use them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import float32, njit

from shielded.protected.search.indexed.compiled import kernel
from shielded.protected.search.indexed.index import LINE_BYTES, padded
from shielded.protected.search.indexed.simd import LANES, WIDTH_BITS, lower_bound, multiply, partial_distance

_MAX_INT32_TERMS = 1 << 15  # products of bytes that int32 can sum
_LANE_BYTES = 4 * LANES  # of one float32 or int32 for each lane
_PREFETCHED_ROWS = 16  # rows whose prefixes are fetched ahead
_ROWS_PER_PASS = 256  # rows whose products with prefixes stay in a processor's cache


class IndexedRows(NamedTuple):
    """Rows of a shard's index: see `index.Index`."""

    prefix: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    squared: np.ndarray
    rho: np.ndarray
    error: np.ndarray


class RowProducts(NamedTuple):
    """Cached products of n rows with earlier queries.

    Args:
        products: (n, LANES) float32, y·t.
        anchor: (n,) uint8, cache entry of y.
    """

    products: np.ndarray
    anchor: np.ndarray


class PrefixQueries(NamedTuple):
    """Codes of 2 u · prefix_scale for LANES queries u: `step` · (254 · coarse + fine).

    Args:
        blocks: `blocks` of the coarse codes and then of the fine ones.
        compensation: (2, LANES) int32, `compensation` of both.
        step: (LANES,) float32.
    """

    blocks: np.ndarray
    compensation: np.ndarray
    step: np.ndarray


class BoundTerms(NamedTuple):
    """Terms of a lower bound for each cached y, for none, and last for the fine codes of the present queries: float32.

    Args:
        common: (cells, steps + 2, LANES), added to a bound.
        factor: (steps + 2, LANES), factor of y·t.
        rho_factor: (steps + 2, LANES), factor of ρ.
        error_factor: (steps + 2, LANES), factor of the error of the codes.
    """

    common: np.ndarray
    factor: np.ndarray
    rho_factor: np.ndarray
    error_factor: np.ndarray


class QueryCodes(NamedTuple):
    """Codes of LANES whole queries: about `step` · codes, and closer `step` · (codes + fine / 254).

    Args:
        newest: cache entry of the former, y.
        blocks: `blocks` of the codes.
        compensation: (LANES,) int64, `compensation` of the codes.
        fine_blocks: `blocks` of the fine codes.
        fine_compensation: (LANES,) int64, `compensation` of the fine codes.
        step: (LANES,) float32.
    """

    newest: int
    blocks: np.ndarray
    compensation: np.ndarray
    fine_blocks: np.ndarray
    fine_compensation: np.ndarray
    step: np.ndarray


def blocks(codes: np.ndarray) -> np.ndarray:
    """Arrange codes (..., LANES, dim) for `multiply`: (..., dim / LINE_BYTES, LANES, LINE_BYTES), padded with 0."""
    *others, queries, dim = codes.shape
    filled = np.zeros((*others, queries, padded(dim)), np.int8)
    filled[..., :dim] = codes
    parts = filled.reshape(*others, queries, -1, LINE_BYTES).swapaxes(-3, -2)
    # Reading a vector that starts in the middle of a cache line takes twice as long.
    buffer = np.empty(filled.size + LINE_BYTES, np.int8)
    start = -buffer.ctypes.data % LINE_BYTES
    result = buffer[start : start + filled.size].reshape(parts.shape)
    result[...] = parts
    return result


def compensation(codes: np.ndarray) -> np.ndarray:
    """Compute what to subtract from the sums of `multiply` with these queries (..., dim), as int64."""
    return (128 if WIDTH_BITS else 0) * codes.sum(-1, dtype=np.int64)


@njit(nogil=True)
def _bound_cell(first, rows, cached, prefixes, terms, limit, partial, candidates, minimum):
    """Bound the distances to the rows of a cell by their prefixes and cached products.

    Args:
        first: first row of the cell.
        rows: `IndexedRows`.
        cached: `RowProducts`.
        prefixes: `PrefixQueries`.
        terms: addresses of the cell's `BoundTerms`.
        limit: (LANES,) squared distances; rows that are certainly farther are ruled out.
        partial: (m, LANES), set to ‖z‖² − 2 u·p.
        candidates: (m + 1,), set to the rows that are not ruled out for every query, counted from `first`.
        minimum: (LANES,), set to the smallest bounds.

    Returns:
        Number of candidates.
    """
    anchor, squared, rho, error = cached.anchor, rows.squared, rows.rho, rows.error
    width, last = rows.prefix.shape[1], len(squared) - 1
    sums, lower = np.empty((min(_ROWS_PER_PASS, len(partial)), 2, LANES), np.int32), np.empty(LANES, np.float32)
    at_prefix, at_coarse, lines = rows.prefix.ctypes.data, prefixes.blocks.ctypes.data, width // LINE_BYTES
    at_fine, at_compensation, at_step = (
        at_coarse + width * LANES,
        prefixes.compensation.ctypes.data,
        prefixes.step.ctypes.data,
    )
    at_partial, at_products, at_limit, at_minimum = (
        partial.ctypes.data, cached.products.ctypes.data, limit.ctypes.data, minimum.ctypes.data,
    )  # fmt: skip
    common, factor, rho_factor, error_factor = terms
    minimum[:] = np.inf
    found = 0
    for start in range(0, len(partial), _ROWS_PER_PASS):
        count = min(_ROWS_PER_PASS, len(partial) - start)
        for i in range(count):
            row = first + start + i
            at_row, at_next = at_prefix + row * width, at_prefix + min(row + _PREFETCHED_ROWS, last) * width
            out = sums.ctypes.data + 2 * _LANE_BYTES * i
            multiply(at_row, at_next, at_coarse, lines, out)
            multiply(at_row, at_next, at_fine, lines, out + _LANE_BYTES)
        for i in range(count):
            row, entry = first + start + i, _LANE_BYTES * anchor[first + start + i]
            coarse, out = sums.ctypes.data + 2 * _LANE_BYTES * i, at_partial + _LANE_BYTES * (start + i)
            partial_distance(
                squared[row],
                (coarse, coarse + _LANE_BYTES),
                (at_compensation, at_compensation + _LANE_BYTES),
                at_step,
                out,
            )
            survives = lower_bound(
                rho[row],
                error[row],
                out,
                (common + entry, factor + entry, rho_factor + entry, error_factor + entry),
                at_products + _LANE_BYTES * row,
                at_limit,
                lower.ctypes.data,
                at_minimum,
            )
            candidates[found] = start + i
            found += survives != 0
    return found


@kernel
def partial_distances(rows, cached, prefixes, terms, out):
    """Set `out` (n, LANES) to ‖z‖² − 2 u·p for all rows of a shard; the other arguments are those of `search`."""
    limit = np.full(LANES, -np.inf, np.float32)
    candidates = np.empty(len(out) + 1, np.int64)
    _bound_cell(0, rows, cached, prefixes, _addresses(terms, 0), limit, out, candidates, np.empty_like(limit))


@njit(nogil=True)
def _addresses(terms, cell):
    """Return the addresses of the `BoundTerms` of a cell."""
    common = terms.common.ctypes.data + cell * terms.common.strides[0]
    return common, terms.factor.ctypes.data, terms.rho_factor.ctypes.data, terms.error_factor.ctypes.data


@njit(nogil=True)
def _inner(at_row, at_next, dim, at_queries, compensation, sums, inner):
    """Set `inner` to the exact ∑ row · query for LANES queries."""
    for k in range(LANES):
        inner[k] = -compensation[k]
    for part in range(0, dim, _MAX_INT32_TERMS):
        multiply(
            at_row + part,
            at_next + part,
            at_queries + part * LANES,
            min(_MAX_INT32_TERMS, dim - part) // LINE_BYTES,
            sums.ctypes.data,
        )
        for k in range(LANES):
            inner[k] += sums[k]


@kernel
def search(searched, rows, cached, prefixes, terms, queries, limit, cell_minimum, found_lane, found_row, found_lower):
    """Find what no bound rules out in the cells of a shard; read the codes of rows that other bounds leave open.

    Args:
        searched: (c,) bool, cells to search.
        rows: `IndexedRows`.
        cached: `RowProducts`, updated.
        prefixes: `PrefixQueries`.
        terms: `BoundTerms` of all cells.
        queries: `QueryCodes`.
        limit: (c, LANES) squared distances; rows that are certainly farther are ruled out.
        cell_minimum: (c, LANES), set to the smallest bound in each cell, −inf in one whose codes had to be read.
        found_lane: (n · LANES,) int32, set to the lanes of the survivors,
        found_row: (n · LANES,) int32, to their rows, and
        found_lower: (n · LANES,) float32, to their lower bounds.

    Returns:
        Number of survivors.
    """
    scale, rho, error, anchor, products = rows.scale, rows.rho, rows.error, cached.anchor, cached.products
    compensation, fine_compensation, step, newest = (
        queries.compensation,
        queries.fine_compensation,
        queries.step,
        queries.newest,
    )
    size, dim = len(scale) // len(searched), rows.codes.shape[1]
    partial, candidates = np.empty((size, LANES), np.float32), np.empty(size + 1, np.int64)
    sums, inner, fine = np.empty(LANES, np.int32), np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    product, lower, unused = np.empty((3, LANES), np.float32)
    at_codes, at_products = rows.codes.ctypes.data, products.ctypes.data
    at_queries, at_fine = queries.blocks.ctypes.data, queries.fine_blocks.ctypes.data
    last = _LANE_BYTES * (len(terms.factor) - 1)
    found = 0
    for cell in range(len(searched)):
        if not searched[cell]:
            continue
        first, cell_terms = cell * size, _addresses(terms, cell)
        count = _bound_cell(
            first, rows, cached, prefixes, cell_terms, limit[cell], partial, candidates, cell_minimum[cell]
        )
        if count:
            cell_minimum[cell] = -np.inf
        common, factor, rho_factor, error_factor = cell_terms
        entry = _LANE_BYTES * newest
        for j in range(count):
            row, next_row = first + candidates[j], first + candidates[min(j + 1, count - 1)]
            at_row, at_next = at_codes + row * dim, at_codes + next_row * dim
            _inner(at_row, at_next, dim, at_queries, compensation, sums, inner)
            anchor[row] = newest
            for k in range(LANES):
                products[row, k] = float32(inner[k]) * step[k] * scale[row]
            survives = lower_bound(
                rho[row],
                error[row],
                partial.ctypes.data + _LANE_BYTES * candidates[j],
                (common + entry, factor + entry, rho_factor + entry, error_factor + entry),
                at_products + _LANE_BYTES * row,
                limit.ctypes.data + _LANE_BYTES * cell,
                lower.ctypes.data,
                unused.ctypes.data,
            )
            if survives:
                _inner(at_row, at_next, dim, at_fine, fine_compensation, sums, fine)
                for k in range(LANES):
                    product[k] = float32(254 * inner[k] + fine[k]) * (step[k] / float32(254)) * scale[row]
                survives = lower_bound(
                    rho[row],
                    error[row],
                    partial.ctypes.data + _LANE_BYTES * candidates[j],
                    (common + last, factor + last, rho_factor + last, error_factor + last),
                    product.ctypes.data,
                    limit.ctypes.data + _LANE_BYTES * cell,
                    lower.ctypes.data,
                    unused.ctypes.data,
                )
                for k in range(LANES):
                    if survives >> k & 1:
                        found_lane[found], found_row[found], found_lower[found] = k, row, lower[k]
                        found += 1
    return found
