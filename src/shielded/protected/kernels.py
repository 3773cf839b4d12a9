"""The inner loops of the search in indexed shards, compiled by Numba for the processor at hand.

A row of codes costs what it takes to get it from memory, if eight queries at a time are multiplied with it by the
processor's instruction for int8 products (VNNI), and the next row is asked for meanwhile. Processors without that
instruction take a plain loop.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import float32, int32, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8  # queries that are multiplied with a row together
BLOCK = 64  # numbers of a query that lie together in `blocks`, query by query
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
    """Codes (..., S, dim) as `search` wants them: (..., S / LANES, dim / BLOCK, LANES, BLOCK), filled up with 0."""
    *others, queries, dim = codes.shape
    filled = np.zeros((*others, queries, -(-dim // BLOCK) * BLOCK), np.int8)
    filled[..., :dim] = codes
    return np.ascontiguousarray(filled.reshape(*others, queries // LANES, LANES, -1, BLOCK).swapaxes(-3, -2))


def _width() -> int:
    """Bits of a vector of which the processor multiplies bytes and adds the products; 0: it cannot."""
    features = binding.get_host_cpu_features()
    return 512 if features.get("avx512vnni") else 256 if features.get("avxvnni") else 0


def _vector_products(width: int):
    """∑ row · query for LANES queries, over whole blocks."""

    @intrinsic
    def multiply(typing, row, following, queries, count, sums):
        signature = types.void(types.uintp, types.uintp, types.uintp, types.intp, types.uintp)

        def generate(context, builder, signature, arguments):
            byte, lane, address = ir.IntType(8), ir.IntType(32), ir.IntType(64)
            vector, whole = ir.VectorType(lane, width // 32), ir.VectorType(byte, width // 8)
            row, following, queries, count, sums = arguments
            row, following, queries = (builder.inttoptr(p, byte.as_pointer()) for p in (row, following, queries))
            sums = builder.inttoptr(sums, lane.as_pointer())
            module = builder.module
            add_products = module.declare_intrinsic(
                f"llvm.x86.avx512.vpdpbusd.{width}", (), ir.FunctionType(vector, [vector] * 3)
            )
            prefetch = module.declare_intrinsic(
                "llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), [byte.as_pointer(), lane, lane, lane])
            )

            def load(pointer, offset):
                at = builder.bitcast(builder.gep(pointer, [offset]), whole.as_pointer())
                value = builder.load(at)
                value.align = 1
                return value

            before = builder.block
            loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
            builder.branch(loop)
            builder.position_at_end(loop)
            step = builder.phi(address)
            step.add_incoming(ir.Constant(address, 0), before)
            added = [builder.phi(vector) for _ in range(LANES)]
            for value in added:
                value.add_incoming(ir.Constant(vector, None), before)
            start = builder.mul(step, ir.Constant(address, BLOCK))
            # Read, into all caches, data.
            hints = [ir.Constant(lane, value) for value in (0, 3, 1)]
            builder.call(prefetch, [builder.gep(following, [start]), *hints])
            new = added
            for part in range(0, BLOCK, width // 8):
                # The instruction wants one of the two without a sign: 128 more, which `shift` takes off again.
                codes = load(row, builder.add(start, ir.Constant(address, part)))
                codes = builder.xor(codes, ir.Constant(whole, [128] * (width // 8)))
                codes = builder.bitcast(codes, vector)
                offset = builder.add(builder.mul(start, ir.Constant(address, LANES)), ir.Constant(address, part))
                new = [
                    builder.call(
                        add_products,
                        [
                            value,
                            codes,
                            builder.bitcast(
                                load(queries, builder.add(offset, ir.Constant(address, BLOCK * query))), vector
                            ),
                        ],
                    )
                    for query, value in enumerate(new)
                ]
            following_step = builder.add(step, ir.Constant(address, 1))
            step.add_incoming(following_step, loop)
            for value, next_value in zip(added, new, strict=True):
                value.add_incoming(next_value, loop)
            builder.cbranch(builder.icmp_signed("<", following_step, count), loop, after)
            builder.position_at_end(after)

            def halved(one, other):
                """The sums of neighbouring lanes, of one vector and then of the other."""
                masks = (
                    ir.Constant(ir.VectorType(lane, len(lanes)), lanes)
                    for lanes in (list(range(first, 2 * width // 32, 2)) for first in (0, 1))
                )
                return builder.add(*(builder.shuffle_vector(one, other, mask) for mask in masks))

            while len(new) > 1:
                new = [halved(one, other) for one, other in zip(new[::2], new[1::2], strict=True)]
            if width // 32 > LANES:
                new = [halved(new[0], new[0])]
            builder.store(
                builder.shuffle_vector(new[0], new[0], ir.Constant(ir.VectorType(lane, LANES), list(range(LANES)))),
                builder.bitcast(sums, ir.VectorType(lane, LANES).as_pointer()),
                align=4,
            )
            return context.get_dummy_value()

        return signature, generate

    return multiply


def _lanes(builder):
    """Loads, stores and copies of LANES numbers."""
    real, lane = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)

    def load(address, kind=real):
        return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)

    def store(value, address):
        builder.store(value, builder.inttoptr(address, real.as_pointer()), align=4)

    def every(value):
        one = builder.insert_element(ir.Constant(real, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(one, one, ir.Constant(lane, None))

    return real, lane, load, store, every


@intrinsic
def _rough(typing, squared, sums, shifts, step, rough):
    """‖z‖² − 2 u·p of one row for LANES queries.

    Args:
        typing: of Numba.
        squared: float32, of the row.
        sums: addresses of the coarse sums and the fine ones, int32.
        shifts: of both, addresses.
        step: address.
        rough: address of what is set.
    """
    two = types.UniTuple(types.uintp, 2)

    def generate(context, builder, signature, arguments):
        real, lane, load, store, every = _lanes(builder)
        squared, sums, shifts, step, rough = arguments
        coarse, fine = (
            builder.sitofp(builder.sub(load(total, lane), load(shift, lane)), real)
            for total, shift in zip(*(cgutils.unpack_tuple(builder, pair) for pair in (sums, shifts)), strict=True)
        )
        inner = builder.fadd(builder.fmul(coarse, ir.Constant(real, [254.0] * LANES)), fine)
        store(builder.fsub(every(squared), builder.fmul(load(step), inner)), rough)
        return context.get_dummy_value()

    return types.void(types.float32, two, two, types.uintp, types.uintp), generate


@intrinsic
def _bounds(typing, rho, error, rough, terms, products, top, lower, least):
    """Lower bounds for one row and LANES queries.

    Args:
        typing: of Numba.
        rho: float32, of the row.
        error: float32, of the row.
        rough: address of ‖z‖² − 2 u·p.
        terms: addresses of those of `Terms`.
        products: address.
        top: address.
        lower: address of the bounds, which are set.
        least: address of the least bounds so far, which are brought up to date.

    Returns:
        A bit for each query, which is set if the bound is not above `top`.
    """
    four = types.UniTuple(types.uintp, 4)

    def generate(context, builder, signature, arguments):
        _, _, load, store, every = _lanes(builder)
        rho, error, rough, terms, products, top, lower, least = arguments
        common, factor, high, doubt = (load(part) for part in cgutils.unpack_tuple(builder, terms))
        unknown = builder.fadd(builder.fmul(high, every(rho)), builder.fmul(doubt, every(error)))
        known = builder.fadd(load(rough), builder.fmul(factor, load(products)))
        bound, before = builder.fadd(builder.fadd(known, unknown), common), load(least)
        store(bound, lower)
        store(builder.select(builder.fcmp_ordered("<", bound, before), bound, before), least)
        # Unordered: NaN, where something overflowed, is not above anything.
        risk = builder.fcmp_unordered("<=", bound, load(top))
        return builder.zext(builder.bitcast(risk, ir.IntType(LANES)), ir.IntType(64))

    return types.int64(*[types.float32] * 2, types.uintp, four, *[types.uintp] * 4), generate


_WIDTH = _width()
_multiply = _vector_products(_WIDTH) if _WIDTH else None


@njit(nogil=True)
def _by_vectors(codes, row, following, queries, group, first, last, sums, i):
    """∑ (row + 128) · query over the blocks from `first` to `last`; asks for the following row meanwhile."""
    dim, blocks = codes.shape[1], queries.shape[1]
    start = codes.ctypes.data + first * BLOCK
    at = queries.ctypes.data + (group * blocks + first) * (BLOCK * LANES)
    into = sums.ctypes.data + 4 * i * LANES
    _multiply(start + row * dim, start + following * dim, at, last - first, into)


@njit(nogil=True)
def _by_loops(codes, row, following, queries, group, first, last, sums, i):
    """∑ row · query over the blocks from `first` to `last`, of which the last one may be shorter."""
    for query in range(LANES):
        total = int32(0)
        for block in range(first, last):
            start = block * BLOCK
            for k in range(min(BLOCK, codes.shape[1] - start)):
                total += int32(codes[row, start + k]) * int32(queries[group, block, query, k])
        sums[i, query] = total


_whole_blocks = _by_vectors if _WIDTH else _by_loops
_OFFSET = 128 if _WIDTH else 0


def shifts(codes: np.ndarray) -> np.ndarray:
    """What to take off the sums of these queries (..., S, dim)."""
    whole = codes.shape[-1] // BLOCK * BLOCK
    return _OFFSET * codes[..., :whole].sum(-1, dtype=np.int64)


@njit(nogil=True)
def _inner(codes, row, following, queries, group, sums, inner):
    """Codes of a row · codes of LANES queries, rounded to float32 once."""
    dim, start = codes.shape[1], group * LANES
    whole, step = dim // BLOCK, _MOST // BLOCK
    if whole * BLOCK == dim and whole <= step:
        _whole_blocks(codes, row, following, queries.blocks, group, 0, whole, sums, 0)
        for k in range(LANES):
            inner[k] = float32(sums[0, k] - queries.shift[start + k])
    else:
        totals = -queries.shift[start : start + LANES]
        for first in range(0, whole, step):
            _whole_blocks(codes, row, following, queries.blocks, group, first, min(first + step, whole), sums, 0)
            totals += sums[0]
        if whole * BLOCK < dim:
            _by_loops(codes, row, following, queries.blocks, group, whole, whole + 1, sums, 0)
            totals += sums[0]
        for k in range(LANES):
            inner[k] = float32(totals[k])


@njit(nogil=True)
def _head_products(head, first, count, heads, sums):
    """∑ head · query for `count` rows from `first` on, for all groups of `heads`; up to what `shifts` takes off."""
    whole, last, groups = head.shape[1] // BLOCK, len(head) - 1, len(heads)
    sums = sums.reshape(-1, LANES)
    for i in range(count):
        for group in range(groups):
            at = i * groups + group
            _whole_blocks(head, first + i, min(first + i + 1, last), heads, group, 0, whole, sums, at)
    if whole * BLOCK < head.shape[1]:
        rest = np.empty((1, LANES), np.int32)
        for i in range(count):
            for group in range(groups):
                _by_loops(head, first + i, 0, heads, group, whole, whole + 1, rest, 0)
                for k in range(LANES):
                    sums[i * groups + group, k] += rest[0, k]


@njit(nogil=True)
def _at(terms, offset):
    return (
        terms.common.ctypes.data + offset,
        terms.factor.ctypes.data + offset,
        terms.high.ctypes.data + offset,
        terms.doubt.ctypes.data + offset,
    )


@njit(nogil=True)
def bounds(first, rows, known, heads, terms, top, rough, risky, least):
    """Looks at the rows of a cell, as far as products are known.

    Args:
        first: the first of them.
        rows: `Rows`.
        known: `Known`.
        heads: `Heads`.
        terms: `Terms` of this cell.
        top: (S,) squared distances; what is certainly farther is ruled out.
        rough: (m, S) is set to ‖z‖² − 2 u·p.
        risky: (m · S / LANES + 1, 2) is filled with row and group, where a group of queries has one that is not ruled
            out. Rows are counted from `first`.
        least: (S,) is set to the least bounds.

    Returns:
        How many are risky.
    """
    groups, slots = known.anchor.shape[1], known.products.shape[1]
    sums, lower = np.empty((min(_PIECE, len(rough)), 2, slots), np.int32), np.empty(LANES, np.float32)
    least[:] = np.inf
    found = 0
    for start in range(0, len(rough), _PIECE):
        count = min(_PIECE, len(rough) - start)
        _head_products(rows.head, first + start, count, heads.blocks, sums)
        for i in range(count):
            row = first + start + i
            for group in range(groups):
                own = 4 * LANES * group
                here = rough.ctypes.data + 4 * slots * (start + i) + own
                coarse, shift = sums.ctypes.data + 8 * slots * i + own, heads.shift.ctypes.data + own
                _rough(
                    rows.squared[row],
                    (coarse, coarse + 4 * slots),
                    (shift, shift + 4 * slots),
                    heads.step.ctypes.data + own,
                    here,
                )
                risk = _bounds(
                    rows.rho[row],
                    rows.error[row],
                    here,
                    _at(terms, 4 * slots * known.anchor[row, group] + own),
                    known.products.ctypes.data + 4 * slots * row + own,
                    top.ctypes.data + own,
                    lower.ctypes.data,
                    least.ctypes.data + own,
                )
                risky[found, 0], risky[found, 1] = start + i, group
                found += risk != 0
    return found


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
    size, slots = len(rows.head) // len(needed), len(queries.step)
    rough, risky = np.empty((size, slots), np.float32), np.empty((size * slots // LANES + 1, 2), np.int64)
    sums, inner, lower = np.empty((1, LANES), np.int32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    found = 0
    for cell in range(len(needed)):
        if not needed[cell]:
            continue
        first = cell * size
        own = Terms(terms.common[cell], terms.factor, terms.high, terms.doubt)
        count = bounds(first, rows, known, heads, own, top[cell], rough, risky, nearest[cell])
        if count:
            nearest[cell] = -np.inf
        for j in range(count):
            i, group = risky[j]
            row, following, start = first + i, first + risky[min(j + 1, count - 1), 0], group * LANES
            _inner(rows.codes, row, following, queries, group, sums, inner)
            known.anchor[row, group] = queries.turn
            for k in range(LANES):
                known.products[row, start + k] = inner[k] * queries.step[start + k] * rows.scale[row]
            risk = _bounds(
                rows.rho[row],
                rows.error[row],
                rough.ctypes.data + 4 * (slots * i + start),
                _at(own, 4 * (slots * queries.turn + start)),
                known.products.ctypes.data + 4 * (slots * row + start),
                top.ctypes.data + 4 * (slots * cell + start),
                lower.ctypes.data,
                inner.ctypes.data,
            )
            if risk:
                for k in range(LANES):
                    if risk >> k & 1:
                        query_found[found], row_found[found], lower_found[found] = start + k, row, lower[k]
                        found += 1
    return found
