"""The bank gives what a comparison with every vector in float64 gives, ties included."""

import itertools

import numpy as np
import pytest
import torch

from shielded.copies import Bank, Descriptors, bank


def unit(rng, n, d):
    vectors = rng.normal(size=(n, d))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def brute_force(vectors, queries, k, alive):
    similarities = (vectors.astype(np.float64)[None] * queries.astype(np.float64)[:, None]).sum(axis=2)
    similarities[:, ~alive] = -np.inf
    rows = np.stack([np.lexsort((np.arange(len(vectors)), -values))[:k] for values in similarities])
    return np.take_along_axis(similarities, rows, 1), rows


@pytest.fixture(params=["integer products", "float32 products"])
def products(request, monkeypatch):
    if request.param == "float32 products":
        monkeypatch.setattr(bank, "_integer_products_work", lambda: False)
        monkeypatch.setattr(bank, "_MAX_FLOAT64_NUMBERS", 1 << 15)


@pytest.mark.parametrize(("n", "d", "k"), [(5000, 24, 1), (5000, 24, 70), (4000, 257, 3), (60, 24, 20)])
def test_equals_brute_force_in_float64_with_ties(n, d, k, products):
    rng = np.random.default_rng(n + d)
    vectors = unit(rng, n, d)
    vectors[n // 2 : n // 2 + 40] = vectors[3]  # in two files, so that ties cross them
    queries = np.concatenate([vectors[3:4], unit(rng, 3, d), -vectors[7:8]])
    alive = rng.random(n) < 0.8
    cuts = [0, n // 2 + 7, n - 1, n]
    blocks = [Descriptors.of(vectors[a:b]) for a, b in itertools.pairwise(cuts)]
    for part in (part for block in blocks for part in vars(block).values()):
        part.flags.writeable = False  # as arrays are that are mapped from a set's files
    similarities, rows = Bank(blocks, alive).nearest(queries, k)
    expected, expected_rows = brute_force(vectors, queries, k, alive)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(similarities, expected)


def test_vectors_along_one_axis_are_told_apart():
    # Codes of these are as coarse as can be: all of a vector lies in one number, the rest is rounded to zero.
    vectors = np.zeros((3000, 16), np.float32)
    vectors[:, 0] = 1
    vectors[:, 1] = np.linspace(0, 0.003, 3000)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarities, rows = Bank([Descriptors.of(vectors)]).nearest(vectors[[1234]], 2)
    expected, expected_rows = brute_force(vectors, vectors[[1234]], 2, np.ones(3000, bool))
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(similarities, expected)


def test_products_of_bytes_are_exact_at_their_extremes():
    rng = np.random.default_rng(0)
    codes, queries = rng.choice(np.array([-127, 127, 1], np.int8), (500, 1024)), np.full((3, 1024), 127, np.int8)
    codes[0], queries[1] = 127, -127
    expected = codes.astype(np.int64) @ queries.T.astype(np.int64)
    np.testing.assert_array_equal(bank.byte_products(codes, queries), expected)


def test_bytes_are_not_multiplied_where_sums_overflow(monkeypatch):
    bank._integer_products_work.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.int() @ b.int()).clamp(max=32767))
    try:
        assert not bank._integer_products_work()
    finally:
        bank._integer_products_work.cache_clear()
