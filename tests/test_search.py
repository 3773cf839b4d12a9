"""The search in large sets against brute force in float64, and the bounds that it is made of."""

import os
import stat

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shielded.protected import index, neighbours, search
from shielded.protected.vectors import Vectors


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Every loop runs more than once, and every way through the search is taken, on sets of some dozen rows."""
    for module, name, value in (
        (search, "SMALL", 0),
        (index, "CELL", 8),
        (index, "_HEAD", 6),
        (index, "_PIECE", 100),
        (neighbours, "_FEW", 1),
        (neighbours, "_WORTH", 3),
        (neighbours, "_KEPT", 3),
    ):
        monkeypatch.setattr(module, name, value)


def references(kind, rng, rows, dim):
    """Float64 vectors that float32 holds exactly."""
    z = rng.standard_normal((rows, dim))
    if kind == "offset":  # tiny distances at a large distance from the origin
        z = 1e3 + 1e-3 * z
    elif kind == "clusters":
        z = 10 * z[rng.integers(4, size=rows)] + 1e-2 * z
    elif kind == "duplicates":
        z = z[rng.integers(5, size=rows)]
    elif kind == "equal":
        z[:] = z[0]
    elif kind == "zero":
        z[:] = 0
    elif kind == "norms":
        z *= 10.0 ** rng.integers(-8, 9, size=(rows, 1))
    elif kind == "tiny":
        z *= 1e-30
    elif kind == "huge":
        z *= 1e30
    elif kind == "integers":
        z = np.rint(3 * z)
    elif kind == "outlier":
        z[0] *= 1e6
    elif kind == "lines":  # energy in a few numbers
        z[:, 1:] *= 1e-4
    return z.astype(np.float32)


KINDS = ["plain", "offset", "clusters", "duplicates", "equal", "zero", "norms", "tiny", "huge", "integers", "outlier"]
SHAPES = [(1,), (5,), (40,), (2, 3, 3), (3, 4, 6), (2, 2, 3, 4)]


def make(folder, z, shape, shards=3, alive=None, **options):
    blocks = np.array_split(z, shards)
    vectors = Vectors([], blocks, z.shape[1], alive)
    paths = [index.index_path(folder / f"{number:06d}.safetensors") for number in range(shards)]
    return search.Search(vectors, paths, shape, **options)


def distances(x, z):
    """All distances in float64, by subtraction."""
    return np.stack([np.sqrt(np.square(query - z.astype(np.float64)).sum(1)) for query in x])


def trajectory(rng, z, batch, steps):
    """Queries that go from a blurred mean to references and beyond, with jumps; float64."""
    goal = z[rng.integers(len(z), size=batch)].astype(np.float64)
    scale = np.abs(goal).max() / 3
    for step in range(steps):
        share = step / max(1, steps - 2)
        x = share * goal + (1 - share) * z.mean(0)
        if step % 3 == 2:
            x = x + scale * rng.standard_normal(x.shape) * 10.0 ** rng.integers(-6, 1)
        yield x[rng.permutation(batch)[: rng.integers(1, batch + 1)]] if step % 4 == 3 else x


def check(found, x, z, rng):
    """One batch of queries, each way of asking."""
    exact = distances(x, z)
    queries = torch.from_numpy(x)
    k = int(rng.integers(1, len(z) + 1))
    distance, rows = found.nearest(queries, k)
    order = np.argsort(exact, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_array_equal(distance, np.take_along_axis(exact, order, 1))

    shell = float(rng.choice(exact.flatten()))  # strictly nearer: what is just on the shell is outside
    shrink = rng.random(len(x)) * shell**2
    for radius, less in (
        (shell, None),
        (np.nextafter(shell, np.inf), None),
        (rng.permutation(exact[0]), None),
        (exact * rng.choice([0.5, 1, 2], size=exact.shape), None),
        (2 * shell, shrink),
        (0.0, None),
        (np.inf, None),
    ):
        limit = np.broadcast_to(radius, exact.shape)
        if less is not None:
            limit = np.sqrt(np.maximum(np.square(limit) - less[:, None], 0))
        query, row = np.nonzero(exact < limit)
        found_query, found_row, distance = found.within(queries, radius, less)
        np.testing.assert_array_equal(found_query, query)
        np.testing.assert_array_equal(found_row, row)
        np.testing.assert_array_equal(distance, exact[query, row])

        nearest = [np.sort([r for r in o if exact[q, r] < limit[q, r]][:k]) for q, o in enumerate(np.argsort(exact, 1, kind="stable"))]
        found_query, found_row, distance = found.within(queries, radius, less, nearest=k)
        np.testing.assert_array_equal(found_query, np.repeat(np.arange(len(x)), [len(rows) for rows in nearest]))
        np.testing.assert_array_equal(found_row, np.concatenate(nearest))
        np.testing.assert_array_equal(distance, exact[found_query, found_row])


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from(SHAPES),
    rows=st.integers(3, 60),
    half=st.booleans(),
    removed=st.booleans(),
    memory=st.sampled_from([1, 1 << 20]),
)
def test_any_sequence_of_queries(tmp_path_factory, seed, kind, shape, rows, half, removed, memory):
    rng = np.random.default_rng(seed)
    z = references(kind, rng, rows, int(np.prod(shape)))
    if half and np.abs(z).max() < 6e4:
        z = z.astype(np.float16)
    alive = None
    if removed:
        alive = rng.random(rows) < 0.7
        alive[rng.integers(rows)] = True
    with pytest.MonkeyPatch.context() as patch:
        if memory == 1:
            patch.setattr(neighbours, "_WORTH", int(rng.integers(1, 100)))
        found = make(tmp_path_factory.mktemp("index"), z, shape, int(rng.integers(1, 4)), alive, memory=memory)
        for x in trajectory(rng, z, batch=3, steps=5):
            check(found, x, z if alive is None else z[alive], rng)
