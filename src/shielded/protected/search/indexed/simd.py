"""What the inner loops of the search do with LANES numbers at once, as instructions for Numba's compiler.

Compilers make loops over so few numbers of so many arrays one number at a time; here they are told what they may do.
All arguments but plain numbers are addresses, and nothing is checked.
"""

from __future__ import annotations

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from shielded.protected.search.indexed.index import LINE

LANES = 8  # queries

_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_REALS, _INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_INT, LANES)
_READ_SOON_INTO_ALL_CACHES = [ir.Constant(_INT, value) for value in (0, 3, 1)]


def instruction_width() -> int:
    """Bits of the vectors of which the processor multiplies bytes and adds the products (VNNI); 0: it cannot."""
    features = binding.get_host_cpu_features()
    return 512 if features.get("avx512vnni") else 256 if features.get("avxvnni") else 0


def multiplication(width: int):
    """`multiply` for processors whose `instruction_width` is this."""
    part = width // 8 or 16  # bytes at a time
    sums = ir.VectorType(_INT, width // 32 or part)
    part_type = ir.VectorType(_BYTE, part)

    def codes_of(builder, codes):
        if width:
            # The instruction wants one of the two without a sign: 128 more, which has to be taken off again.
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
        """The sums of neighbouring numbers, of one vector and then of the other."""
        masks = (ir.Constant(sums, list(range(first, 2 * sums.count, 2))) for first in (0, 1))
        return builder.add(*(builder.shuffle_vector(one, other, mask) for mask in masks))

    @intrinsic
    def multiply(typing, row, following, queries, count, out):
        """∑ row · query for LANES queries; with an instruction, ∑ (row + 128) · query.

        Args:
            typing: of Numba.
            row: int8 codes.
            following: the row that is needed next, which is sent for meanwhile.
            queries: int8, (count, LANES, LINE).
            count: of lines, at least 1; int32 has room for 2¹⁵ products.
            out: int32, is set.
        """

        def generate(context, builder, signature, arguments):
            row, following, queries = (builder.inttoptr(at, _BYTE.as_pointer()) for at in arguments[:3])
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
            start = builder.mul(line, ir.Constant(_LONG, LINE))
            builder.call(prefetch, [builder.gep(following, [start]), *_READ_SOON_INTO_ALL_CACHES])
            new = totals
            for first in range(0, LINE, part):
                codes = codes_of(builder, load(row, builder.add(start, ir.Constant(_LONG, first))))
                of_queries = builder.mul(start, ir.Constant(_LONG, LANES))
                new = [
                    added(
                        builder,
                        total,
                        codes,
                        load(queries, builder.add(of_queries, ir.Constant(_LONG, first + LINE * query))),
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


WIDTH = instruction_width()
multiply = multiplication(WIDTH)


def _load(builder, address, kind=_REALS):
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _store(builder, value, address):
    builder.store(value, builder.inttoptr(address, _REALS.as_pointer()), align=4)


def _every(builder, value):
    one = builder.insert_element(ir.Constant(_REALS, ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTS, None))


@intrinsic
def from_heads(typing, squared, sums, shifts, step, rough):
    """‖z‖² − step · (254 · coarse + fine), where sums less shifts are coarse and fine.

    Args:
        typing: of Numba.
        squared: ‖z‖², a float32.
        sums: int32, coarse and fine.
        shifts: int32, coarse and fine.
        step: float32.
        rough: float32, is set.
    """
    two = types.UniTuple(types.uintp, 2)

    def generate(context, builder, signature, arguments):
        squared, sums, shifts, step, rough = arguments
        pairs = zip(*(cgutils.unpack_tuple(builder, pair) for pair in (sums, shifts)), strict=True)
        coarse, fine = (
            builder.sitofp(builder.sub(*(_load(builder, at, _INTS) for at in pair)), _REALS) for pair in pairs
        )
        inner = builder.fadd(builder.fmul(coarse, ir.Constant(_REALS, [254.0] * LANES)), fine)
        away = builder.fmul(_load(builder, step), inner)
        _store(builder, builder.fsub(_every(builder, squared), away), rough)
        return context.get_dummy_value()

    return types.void(types.float32, two, two, types.uintp, types.uintp), generate


@intrinsic
def to_bounds(typing, rho, error, rough, terms, products, top, lower, least):
    """rough + factor · product + (high · ρ + doubt · error) + common.

    Args:
        typing: of Numba.
        rho: a float32.
        error: a float32.
        rough: float32.
        terms: float32: common, factor, high and doubt.
        products: float32.
        top: float32.
        lower: float32, is set.
        least: float32, is brought down to `lower` where that is less.

    Returns:
        A bit for each of the lanes, set where `lower` is not above `top`.
    """
    four = types.UniTuple(types.uintp, 4)

    def generate(context, builder, signature, arguments):
        rho, error, rough, terms, products, top, lower, least = arguments
        common, factor, high, doubt = (_load(builder, part) for part in cgutils.unpack_tuple(builder, terms))
        unknown = builder.fadd(builder.fmul(high, _every(builder, rho)), builder.fmul(doubt, _every(builder, error)))
        known = builder.fadd(_load(builder, rough), builder.fmul(factor, _load(builder, products)))
        bound, before = builder.fadd(builder.fadd(known, unknown), common), _load(builder, least)
        _store(builder, bound, lower)
        _store(builder, builder.select(builder.fcmp_ordered("<", bound, before), bound, before), least)
        # Unordered: NaN, where something overflowed, is not above anything.
        risk = builder.fcmp_unordered("<=", bound, _load(builder, top))
        return builder.zext(builder.bitcast(risk, ir.IntType(LANES)), _LONG)

    return types.int64(types.float32, types.float32, types.uintp, four, *[types.uintp] * 4), generate
