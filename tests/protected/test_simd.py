"""Compare vector instructions with integers and float64 of NumPy."""

import numpy as np
import pytest
from numba import njit

from shielded.protected.search.indexed import kernels, simd
from shielded.protected.search.indexed.index import LINE_BYTES

WIDTHS = [0] + [width for width in (256, 512) if width <= simd.WIDTH_BITS]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("numbers", [LINE_BYTES, 5 * LINE_BYTES, 1 << 15])
def test_products_of_bytes_are_exact(width, numbers):
    multiply = simd.multiplication(width)

    @njit
    def run(rows, queries, out):
        for row in range(len(rows)):
            multiply(
                rows[row].ctypes.data,
                rows[min(row + 1, len(rows) - 1)].ctypes.data,
                queries.ctypes.data,
                rows.shape[1] // LINE_BYTES,
                out[row].ctypes.data,
            )

    rng = np.random.default_rng(0)
    rows = rng.integers(-127, 128, (6, numbers), dtype=np.int8)
    codes = rng.integers(-127, 128, (simd.LANES, numbers), dtype=np.int8)
    rows[0], codes[0] = 127, 127  # the largest sum
    rows[1], codes[1] = -127, 127
    out = np.zeros((6, simd.LANES), np.int32)
    run(rows, kernels.blocks(codes), out)
    shift = (128 if width else 0) * codes.astype(np.int64).sum(1)
    np.testing.assert_array_equal(out - shift, rows.astype(np.int64) @ codes.T.astype(np.int64))


def test_codes_are_filled_up_and_lie_together_query_by_query():
    codes = np.random.default_rng(0).integers(-127, 128, (3, 8, 100), dtype=np.int8)
    blocks = kernels.blocks(codes)
    assert blocks.shape == (3, 2, 8, 64)
    assert blocks.ctypes.data % LINE_BYTES == 0
    np.testing.assert_array_equal(blocks[1, 1, 2, :36], codes[1, 2, 64:])
    assert not blocks[:, 1, :, 36:].any()


def test_bounds_are_what_float64_says():
    @njit
    def run(squared, rho, error, sums, shifts, step, terms, products, limit, partial, lower, minimum):
        at, of = sums.ctypes.data, shifts.ctypes.data
        simd.partial_distance(squared, (at, at + 32), (of, of + 32), step.ctypes.data, partial.ctypes.data)
        first = terms.ctypes.data
        return simd.lower_bound(
            rho,
            error,
            partial.ctypes.data,
            (first, first + 32, first + 64, first + 96),
            products.ctypes.data,
            limit.ctypes.data,
            lower.ctypes.data,
            minimum.ctypes.data,
        )

    rng = np.random.default_rng(1)
    squared, rho, error = rng.uniform(1, 2, 3).astype(np.float32)
    sums, shifts = rng.integers(-(10**6), 10**6, (2, 2, 8)).astype(np.int32)
    step, products = rng.standard_normal((2, 8)).astype(np.float32)
    step *= 1e-8
    terms = rng.standard_normal((4, 8)).astype(np.float32)
    partial, lower = np.zeros((2, 8), np.float32)
    coarse, fine = (sums - shifts).astype(np.float64)
    expected = squared - step.astype(np.float64) * (254 * coarse + fine)
    common, factor, rho_factor, error_factor = terms.astype(np.float64)
    bounds = expected + factor * products + rho_factor * rho + error_factor * error + common
    limit = (bounds + np.array([1, -1, 1, -1, 1, -1, 1, -1])).astype(np.float32)
    terms[0, 6:] = np.nan  # NaN from an overflow survives any limit and is no smallest bound
    minimum = np.full(8, bounds[2], np.float32)
    bits = run(squared, rho, error, sums, shifts, step, terms, products, limit, partial, lower, minimum)
    assert f"{bits:08b}" == "11010101"
    np.testing.assert_allclose(partial, expected, rtol=1e-6)
    np.testing.assert_allclose(lower[:6], bounds[:6], rtol=1e-5, atol=1e-6)
    assert np.isnan(lower[6:]).all()
    np.testing.assert_allclose(minimum[:6], np.minimum(bounds[:6], bounds[2]), rtol=1e-5, atol=1e-6)
    assert (minimum[6:] == np.float32(bounds[2])).all()
