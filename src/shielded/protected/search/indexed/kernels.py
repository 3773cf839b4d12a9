"""Inner loops of the search in indexed shards, compiled by Numba for this processor.

A row of codes costs no more than its transfer from memory, if eight queries at a time are multiplied with it by the
processor's instruction for products of bytes while the next row is prefetched (`simd.py`).

Numba frees an array after its last use, and taking its address does not count as one. So these functions take the
addresses of arrays that they allocate inside the loops that use them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import float32, njit

from shielded.protected.search.indexed.compiled import kernel
from shielded.protected.search.indexed.index import LINE_BYTES, padded
from shielded.protected.search.indexed.simd import LANES, WIDTH_BITS, lower_bound, multiply, partial_distance

_MAX_INT32_TERMS = 1 << 15  # products of bytes that int32 can sum
_LANE_BYTES = 4 * LANES  # of one float32 or int32 for each lane
_PREFETCHED_ROWS = 16  # rows whose prefixes are fetched ahead
_BLOCK_BYTES = 1 << 19  # of codes that all queries read before the next ones
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

    newest: int | np.ndarray
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
    return _aligned(parts)


def stacked(parts: list[Any]) -> Any:
    """Stack named tuples of arrays or numbers, each array of bytes from the start of a cache line on."""
    return type(parts[0])(
        *(_aligned(np.stack([np.asarray(value) for value in values])) for values in zip(*parts, strict=True))
    )


def _aligned(values: np.ndarray) -> np.ndarray:
    # Reading a vector that starts in the middle of a cache line takes twice as long.
    if values.dtype != np.int8:
        return values
    buffer = np.empty(values.size + LINE_BYTES, np.int8)
    start = -buffer.ctypes.data % LINE_BYTES
    result = buffer[start : start + values.size].reshape(values.shape)
    result[...] = values
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


@njit(nogil=True)
def _terms_of(terms, group):
    """Take the `BoundTerms` of a group out of stacked ones."""
    return BoundTerms(terms.common[group], terms.factor[group], terms.rho_factor[group], terms.error_factor[group])


@kernel
def search(
    searched,
    rows,
    products,
    anchor,
    caches,
    prefixes,
    terms,
    queries,
    limit,
    minimum,
    found_query,
    found_row,
    found_lower,
):
    """Find what no bound rules out in the cells of a shard; read the codes of rows that other bounds leave open.

    Queries come in g groups of LANES, each with a cache. They search a cell one after the other and take turns in
    reading codes, so that codes that several groups need come from memory once and then from the processor's cache.

    Args:
        searched: (g, c) bool, cells to search.
        rows: `IndexedRows`.
        products: products of the `RowProducts` of all caches, updated.
        anchor: their anchors, updated.
        caches: (g,) the cache of each group.
        prefixes: `PrefixQueries` of the groups, stacked.
        terms: `BoundTerms` of all cells and of the groups, stacked.
        queries: `QueryCodes` of the groups, stacked.
        limit: (g, c, LANES) squared distances; rows that are certainly farther are ruled out.
        minimum: (all caches, c, LANES), set to the smallest bound in each cell, −inf in one whose codes had to be read.
        found_query: (n · g · LANES,) int32, set to group · LANES + lane of the survivors,
        found_row: (n · g · LANES,) int32, to their rows, and
        found_lower: (n · g · LANES,) float32, to their lower bounds.

    Returns:
        Number of survivors.
    """
    scale, rho, error = rows.scale, rows.rho, rows.error
    groups, cells = searched.shape
    size, dim = len(scale) // cells, rows.codes.shape[1]
    partial, candidates = np.empty((groups, size, LANES), np.float32), np.empty((groups, size + 1), np.int64)
    counts, done = np.empty(groups, np.int64), np.empty(groups, np.int64)
    sums, inner, fine = np.empty(LANES, np.int32), np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    product, lower, unused = np.empty((3, LANES), np.float32)
    at_codes = rows.codes.ctypes.data
    last = _LANE_BYTES * (terms.factor.shape[1] - 1)
    found = 0
    for cell in range(cells):
        first = cell * size
        for g in range(groups):
            counts[g] = done[g] = 0
            if searched[g, cell]:
                counts[g] = _bound_cell(
                    first,
                    rows,
                    RowProducts(products[caches[g]], anchor[caches[g]]),
                    PrefixQueries(prefixes.blocks[g], prefixes.compensation[g], prefixes.step[g]),
                    _addresses(_terms_of(terms, g), cell),
                    limit[g, cell],
                    partial[g],
                    candidates[g],
                    minimum[caches[g], cell],
                )
                if counts[g]:
                    minimum[caches[g], cell, :] = -np.inf
        # Blocks of rows whose codes stay in a processor's cache until the last group has read them.
        rows_per_block = size if groups == 1 else max(1, _BLOCK_BYTES // dim)
        for end in range(rows_per_block, size + rows_per_block, rows_per_block):
            for g in range(groups):
                count, newest = counts[g], queries.newest[g]
                of_products, of_anchor, step = products[caches[g]], anchor[caches[g]], queries.step[g]
                compensation, fine_compensation = queries.compensation[g], queries.fine_compensation[g]
                at_queries, at_fine = queries.blocks[g].ctypes.data, queries.fine_blocks[g].ctypes.data
                at_products = of_products.ctypes.data
                at_limit = limit[g, cell].ctypes.data
                common, factor, rho_factor, error_factor = _addresses(_terms_of(terms, g), cell)
                entry = _LANE_BYTES * newest
                j = done[g]
                while j < count and candidates[g, j] < end:
                    at_in_cell = candidates[g, j]
                    row, next_row = first + at_in_cell, first + candidates[g, min(j + 1, count - 1)]
                    j += 1
                    at_row, at_next = at_codes + row * dim, at_codes + next_row * dim
                    _inner(at_row, at_next, dim, at_queries, compensation, sums, inner)
                    of_anchor[row] = newest
                    for k in range(LANES):
                        of_products[row, k] = float32(inner[k]) * step[k] * scale[row]
                    survives = lower_bound(
                        rho[row],
                        error[row],
                        partial.ctypes.data + _LANE_BYTES * (g * size + at_in_cell),
                        (common + entry, factor + entry, rho_factor + entry, error_factor + entry),
                        at_products + _LANE_BYTES * row,
                        at_limit,
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
                            partial.ctypes.data + _LANE_BYTES * (g * size + at_in_cell),
                            (common + last, factor + last, rho_factor + last, error_factor + last),
                            product.ctypes.data,
                            at_limit,
                            lower.ctypes.data,
                            unused.ctypes.data,
                        )
                        for k in range(LANES):
                            if survives >> k & 1:
                                found_query[found], found_row[found] = g * LANES + k, row
                                found_lower[found] = lower[k]
                                found += 1
                done[g] = j
    return found
