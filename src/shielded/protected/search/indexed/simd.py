"""Vector instructions for the inner loops of the search, as intrinsics for Numba's compiler.

LLVM does not vectorise these short loops over LANES numbers of many arrays, so each intrinsic emits the vector
instructions itself. All arguments but plain numbers are addresses, and nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from shielded.protected.search.indexed.index import LINE_BYTES

LANES = 8  # queries

# Numba supplies the first parameter, `typing`, itself: callers pass the others.
_intrinsic = cast("Callable[[Callable[..., Any]], Callable[..., Any]]", intrinsic)

_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_REALS, _INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_INT, LANES)
_PREFETCH_READ_ALL_CACHES = [ir.Constant(_INT, value) for value in (0, 3, 1)]


def vnni_width_bits() -> int:
    """Read the width of the processor's vectors that multiply bytes and add the products (VNNI); 0: it has none."""
    features = binding.get_host_cpu_features()
    return 512 if features.get("avx512vnni") else 256 if features.get("avxvnni") else 0


def multiplication(width: int) -> Callable[..., Any]:
    """Make `multiply` for processors whose `vnni_width_bits` is `width`."""
    part = width // 8 or 16  # bytes per vector
    sums = ir.VectorType(_INT, width // 32 or part)
    part_type = ir.VectorType(_BYTE, part)

    def codes_of(builder, codes):
        if width:
            # The instruction takes one factor unsigned: `kernels.compensation` undoes the added 128.
            return builder.bitcast(builder.xor(codes, ir.Constant(part_type, [128] * part)), sums)
        return builder.sext(codes, sums)

    def added(builder, total, codes, query):
        if width:
            function = builder.module.declare_intrinsic(
                f"llvm.x86.avx512.vpdpbusd.{width}", (), ir.FunctionType(sums, [sums] * 3)
            )
            return builder.call(function, [total, codes, builder.bitcast(query, sums)])
        return builder.add(total, builder.mul(codes, builder.sext(query, sums)))

    def halved(builder, one, other):
        """Add neighbouring numbers, of one vector and then of the other."""
        masks = (ir.Constant(sums, list(range(first, 2 * sums.count, 2))) for first in (0, 1))
        return builder.add(*(builder.shuffle_vector(one, other, mask) for mask in masks))

    @_intrinsic
    def multiply(typing, row, next_row, queries, count, out):
        """Compute ∑ row · query for LANES queries; with VNNI, ∑ (row + 128) · query.

        Args:
            typing: Numba's typing context.
            row: int8 codes.
            next_row: int8 codes of the row that is needed next, prefetched.
            queries: int8, (count, LANES, LINE_BYTES).
            count: lines of LINE_BYTES, at least 1; int32 has room for 2¹⁵ products.
            out: int32, set to the sums.
        """

        def generate(context, builder, signature, arguments):
            row, next_row, queries = (builder.inttoptr(at, _BYTE.as_pointer()) for at in arguments[:3])
            count, out = arguments[3:]
            prefetch = builder.module.declare_intrinsic(
                "llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
            )

            def load(start, offset):
                at = builder.bitcast(builder.gep(start, [offset]), part_type.as_pointer())
                return builder.load(at, align=1)

            before, loop, after = builder.block, *map(builder.append_basic_block, ("loop", "after"))
            builder.branch(loop)
            builder.position_at_end(loop)
            line, totals = builder.phi(_LONG), [builder.phi(sums) for _ in range(LANES)]
            start = builder.mul(line, ir.Constant(_LONG, LINE_BYTES))
            builder.call(prefetch, [builder.gep(next_row, [start]), *_PREFETCH_READ_ALL_CACHES])
            new = totals
            for first in range(0, LINE_BYTES, part):
                codes = codes_of(builder, load(row, builder.add(start, ir.Constant(_LONG, first))))
                of_queries = builder.mul(start, ir.Constant(_LONG, LANES))
                new = [
                    added(
                        builder,
                        total,
                        codes,
                        load(queries, builder.add(of_queries, ir.Constant(_LONG, first + LINE_BYTES * query))),
                    )
                    for query, total in enumerate(new)
                ]
            next_line = builder.add(line, ir.Constant(_LONG, 1))
            for value, at_first, later in zip(
                [line, *totals],
                [ir.Constant(_LONG, 0), *[ir.Constant(sums, None)] * LANES],
                [next_line, *new],
                strict=True,
            ):
                value.add_incoming(at_first, before)
                value.add_incoming(later, loop)
            builder.cbranch(builder.icmp_signed("<", next_line, count), loop, after)
            builder.position_at_end(after)
            while len(new) > 1:
                new = [halved(builder, one, other) for one, other in zip(new[::2], new[1::2], strict=True)]
            if sums.count > LANES:
                new = [halved(builder, new[0], new[0])]
            first_lanes = ir.Constant(_INTS, list(range(LANES)))
            builder.store(
                builder.shuffle_vector(new[0], new[0], first_lanes), builder.inttoptr(out, _INTS.as_pointer()), align=4
            )
            return context.get_dummy_value()

        return types.void(types.uintp, types.uintp, types.uintp, types.intp, types.uintp), generate

    return multiply


WIDTH_BITS = vnni_width_bits()
multiply = multiplication(WIDTH_BITS)


def _load(builder, address, kind=_REALS):
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _store(builder, value, address):
    builder.store(value, builder.inttoptr(address, _REALS.as_pointer()), align=4)


def _broadcast(builder, value):
    one = builder.insert_element(ir.Constant(_REALS, ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTS, None))


@_intrinsic
def partial_distance(typing, squared, sums, compensations, step, partial):
    """Compute ‖z‖² − step · (254 · coarse + fine), where sums − compensations are coarse and fine.

    Args:
        typing: Numba's typing context.
        squared: ‖z‖², a float32.
        sums: int32, coarse and fine.
        compensations: int32, coarse and fine.
        step: float32.
        partial: float32, set to the result.
    """
    two = types.UniTuple(types.uintp, 2)

    def generate(context, builder, signature, arguments):
        squared, sums, compensations, step, partial = arguments
        pairs = zip(*(cgutils.unpack_tuple(builder, pair) for pair in (sums, compensations)), strict=True)
        coarse, fine = (
            builder.sitofp(builder.sub(*(_load(builder, at, _INTS) for at in pair)), _REALS) for pair in pairs
        )
        inner = builder.fadd(builder.fmul(coarse, ir.Constant(_REALS, [254.0] * LANES)), fine)
        product = builder.fmul(_load(builder, step), inner)
        _store(builder, builder.fsub(_broadcast(builder, squared), product), partial)
        return context.get_dummy_value()

    return types.void(types.float32, two, two, types.uintp, types.uintp), generate


@_intrinsic
def lower_bound(typing, rho, error, partial, terms, products, limit, lower, minimum):
    """Compute partial + factor · product + (rho_factor · ρ + error_factor · error) + common.

    Args:
        typing: Numba's typing context.
        rho: a float32.
        error: a float32.
        partial: float32.
        terms: float32: common, factor, rho_factor and error_factor.
        products: float32.
        limit: float32.
        lower: float32, set to the result.
        minimum: float32, lowered to `lower` where that is less.

    Returns:
        A bit for each lane, set where `lower` is not above `limit`.
    """
    four = types.UniTuple(types.uintp, 4)

    def generate(context, builder, signature, arguments):
        rho, error, partial, terms, products, limit, lower, minimum = arguments
        common, factor, rho_factor, error_factor = (
            _load(builder, part) for part in cgutils.unpack_tuple(builder, terms)
        )
        unknown = builder.fadd(
            builder.fmul(rho_factor, _broadcast(builder, rho)), builder.fmul(error_factor, _broadcast(builder, error))
        )
        known = builder.fadd(_load(builder, partial), builder.fmul(factor, _load(builder, products)))
        bound, before = builder.fadd(builder.fadd(known, unknown), common), _load(builder, minimum)
        _store(builder, bound, lower)
        _store(builder, builder.select(builder.fcmp_ordered("<", bound, before), bound, before), minimum)
        # Unordered: NaN, where something overflowed, is not above anything.
        survives = builder.fcmp_unordered("<=", bound, _load(builder, limit))
        return builder.zext(builder.bitcast(survives, ir.IntType(LANES)), _LONG)

    return types.int64(types.float32, types.float32, types.uintp, four, *[types.uintp] * 4), generate
