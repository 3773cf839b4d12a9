"""Compare every kind of search with brute force in float64."""

import sys

import numpy as np
import pytest
import torch

from shielded import LatentSpace, ProtectedSet
from shielded.protected.search import choose
from shielded.protected.search.indexed import bounds
from shielded.protected.search.indexed import search as indexed_search

BATCH, STEPS = 6, 8


@pytest.fixture
def indexed(monkeypatch):
    """Search small sets through an index."""
    monkeypatch.setattr(choose, "MAX_UNINDEXED_ROWS", 0)


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(params=["index", "all", "copy", pytest.param("cuda", marks=NO_CUDA)])
def device(request, monkeypatch):
    """Choose the kind of search, and return the device of the queries."""
    monkeypatch.setattr(choose, "MAX_UNINDEXED_ROWS", 0)
    if request.param == "all":
        monkeypatch.setattr(choose, "_indexed_search", lambda rows: None)
    if request.param == "copy":
        monkeypatch.setattr(choose.Search, "_on_device", lambda *_: True)
    return "cuda" if request.param == "cuda" else "cpu"


def brute_force(x, z):
    return np.stack([np.sqrt(np.square(z - row).sum(1)) for row in x.astype(np.float64)])


def trajectory(rng, z, scale):
    """Queries from blurred to sharp; the first two end on references, the others next to some."""
    start = scale * rng.standard_normal((BATCH, z.shape[1]))
    for t in np.linspace(0, 1, STEPS):
        x = (1 - t) * 0.1 * start + t * z[:BATCH]
        x[2:] += 0.05 * t * start[2:]
        yield x.astype(np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "scale"), [((4, 4, 4), 1.0), ((4, 16, 16), 1e-3), ((96,), 50.0)])
def test_equal_to_brute_force_after_adds_and_removes(device, tmp_path, shape, scale, dtype):
    rng = np.random.default_rng(7)
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace(shape), dtype)
    for n, count in enumerate((700, 400, 40)):
        rows = torch.from_numpy(scale * rng.standard_normal((count, *shape))).to(dtype)
        rows[: count // 50] = rows[-(count // 50) or None :][: count // 50]  # duplicates
        protected.add(rows, [f"{n}-{i}" for i in range(count)])
    for removed in ((), ("0-3", "1-7", "2-0")):
        protected.remove(list(removed))
        z = protected.vectors(range(len(protected))).double().flatten(1).numpy()
        radii = np.median(brute_force(z[:1], z)) * rng.uniform(0.5, 1.1, len(z))
        for step, x in enumerate(trajectory(rng, z, scale)):
            exact, queries = brute_force(x, z), torch.from_numpy(x).unflatten(1, shape).to(device)
            k = (1, 10)[step % 2]
            distances, rows = protected.nearest_rows(queries, k)
            order = np.argsort(exact, axis=1, kind="stable")[:, :k]
            np.testing.assert_array_equal(rows.cpu(), order)
            np.testing.assert_allclose(distances.cpu(), np.take_along_axis(exact, order, 1), rtol=1e-12, atol=1e-300)
            tie = exact[0, order[0, -1]]  # d < r is strict: the row at the shell itself is no hit
            for radius in (float(np.quantile(exact, 0.02)), float(tie), torch.from_numpy(radii)):
                if not torch.as_tensor(radius).all():
                    continue
                shrink = rng.uniform(0, 0.1, BATCH) * np.square(radii.min()) if step % 2 else None
                limit = np.broadcast_to(np.asarray(radius, np.float64), exact.shape)
                if shrink is not None:
                    limit = np.sqrt(np.maximum(np.square(limit) - shrink[:, None], 0))
                hits = protected.within(queries, radius, None if shrink is None else torch.from_numpy(shrink))
                query, row = np.nonzero(exact < limit)
                np.testing.assert_array_equal(hits.query.cpu(), query)
                np.testing.assert_array_equal(hits.row.cpu(), row)


@pytest.mark.parametrize("rows", ["equal", "far", "huge", "tiny", "one large"])
def test_adversarial_sets(device, tmp_path, rows):
    rng = np.random.default_rng(3)
    z = rng.standard_normal((600, 4, 4, 4))
    if rows == "equal":
        z[:] = z[0]
    elif rows == "far":  # tiny differences on a large offset
        z = 1000 + 1e-2 * z
    elif rows == "huge":
        z *= 1e17
    elif rows == "tiny":  # float32 has no room for products
        z *= 1e-21
    else:
        z[5] *= 1e6
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace((4, 4, 4)))
    protected.add(torch.from_numpy(z).float(), [str(i) for i in range(600)])
    z = protected.vectors(range(600)).double().flatten(1).numpy()
    for step in range(4):
        x = (z[:3] * (1 + 1e-3 * step)).astype(np.float32)
        exact, queries = brute_force(x, z), torch.from_numpy(x).view(3, 4, 4, 4).to(device)
        found = protected.nearest_rows(queries, 5)[1].cpu()
        np.testing.assert_array_equal(found, np.argsort(exact, axis=1, kind="stable")[:, :5])
        radius = float(np.median(exact)) or 1.0
        hits = protected.within(queries, radius)
        query, row = np.nonzero(exact < radius)
        np.testing.assert_array_equal(hits.query.cpu(), query)
        np.testing.assert_array_equal(hits.row.cpu(), row)


def test_an_index_that_is_damaged_or_missing_is_made_anew(indexed, tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace((4, 4, 4)))
    protected.add(torch.randn(300, 4, 4, 4, generator=torch.Generator().manual_seed(0)), [str(i) for i in range(300)])
    query = torch.zeros(1, 4, 4, 4)
    expected = protected.nearest_rows(query, 3)[1]
    (path,) = (tmp_path / "set").glob("*.index.safetensors")
    path.write_bytes(b"nothing")
    assert torch.equal(ProtectedSet.open(tmp_path / "set").nearest_rows(query, 3)[1], expected)
    path.unlink()
    assert torch.equal(ProtectedSet.open(tmp_path / "set").nearest_rows(query, 3)[1], expected)
    protected.remove(["0"])
    protected.compact()
    assert not path.exists()


def test_less_memory_takes_fewer_queries_at_a_time_and_finds_the_same(indexed, tmp_path):
    rng = np.random.default_rng(5)
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace((4, 4, 4)))
    protected.add(torch.from_numpy(rng.standard_normal((900, 4, 4, 4))), [str(i) for i in range(900)])
    queries = protected.vectors(range(0, 900, 100)) + 0.01
    little = ProtectedSet.open(tmp_path / "set", memory=8 * 900 * 2)  # two queries at a time
    for radius in (1.0, 9.0):
        for nearest in (None, 1, 3):
            all_at_once, two = (s.within(queries, radius, nearest=nearest) for s in (protected, little))
            assert torch.equal(all_at_once.row, two.row)
            assert torch.equal(all_at_once.distance, two.distance)
    with pytest.raises(ValueError, match="memory must be a positive number"):
        ProtectedSet.open(tmp_path / "set", memory=0)


def test_any_number_of_queries_for_any_number_of_steps(indexed, monkeypatch, tmp_path):
    monkeypatch.setattr(bounds, "_MAX_CACHED_STEPS", 3)  # earlier queries leave the cache soon
    rng = np.random.default_rng(8)
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace((4, 6, 6)))
    for n in range(3):
        protected.add(torch.from_numpy(rng.standard_normal((500, 4, 6, 6))), [f"{n}-{i}" for i in range(500)])
    protected.remove([f"1-{i}" for i in range(0, 500, 7)])
    z = protected.vectors(range(len(protected))).double().flatten(1).numpy()
    x = rng.standard_normal((19, 144))
    calls, kernel = [], bounds.kernels.search
    monkeypatch.setattr(bounds.kernels, "search", lambda *arguments: calls.append(1) or kernel(*arguments))
    for step in range(25):
        x = 0.95 * x + 0.05 * z[rng.integers(0, len(z), 19)] + 0.1 * rng.standard_normal(x.shape) * (step % 5 == 0)
        asked = x[rng.permutation(19)[: (19, 3, 11, 1)[step % 4]]].astype(np.float32)
        exact, queries = brute_force(asked, z), torch.from_numpy(asked).view(-1, 4, 6, 6)
        order = np.argsort(exact, axis=1, kind="stable")[:, :4]
        np.testing.assert_array_equal(protected.nearest_rows(queries, 4)[1], order)
        radius = float(np.quantile(exact, 0.05))
        query, row = np.nonzero(exact < radius)
        hits = protected.within(queries, radius)
        np.testing.assert_array_equal(hits.query, query)
        np.testing.assert_array_equal(hits.row, row)
    shards = len(protected._reader.vectors.extents())
    assert 0 < len(calls) <= 2 * 25 * shards  # a shard is read once for all queries of a search


def test_a_search_that_is_broken_off_leaves_nothing_wrong_behind(indexed, monkeypatch, tmp_path):
    rng = np.random.default_rng(10)
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace((4, 4, 4)))
    for n in range(3):
        protected.add(torch.from_numpy(rng.standard_normal((300, 4, 4, 4))), [f"{n}-{i}" for i in range(300)])
    z = protected.vectors(range(900)).double().flatten(1).numpy()
    far, near = z[:2] + 40, z[:2] + 0.1
    asked = [torch.from_numpy(x).float().view(2, 4, 4, 4) for x in (far, near)]
    protected.within(asked[1], 3.0)
    search_shard = bounds._Groups.search

    def broken(self, shard, *rest):
        if shard == 1:
            raise KeyboardInterrupt
        return search_shard(self, shard, *rest)

    monkeypatch.setattr(bounds._Groups, "search", broken)
    with pytest.raises(KeyboardInterrupt):
        protected.within(asked[0], 330.0)
    monkeypatch.setattr(bounds._Groups, "search", search_shard)
    for x, radius in ((near, 3.0), (far, 319.0), (near, 9.0)):
        exact = brute_force(x.astype(np.float32), z)
        hits = protected.within(torch.from_numpy(x).float().view(2, 4, 4, 4), radius)
        assert list(zip(hits.query.tolist(), hits.row.tolist(), strict=True)) == list(
            zip(*np.nonzero(exact < radius), strict=True)
        )


@pytest.mark.parametrize("shape", [(4, 100, 120), (3, 70001)])
def test_large_latents(indexed, tmp_path, shape):
    """Search latents whose products exceed int32 and whose size is no multiple of a cache line."""
    rng = np.random.default_rng(9)
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace(shape), torch.float16)
    z = np.repeat(10 * rng.uniform(0.9, 1, (8, *shape)), 5, axis=0) + 0.1 * rng.standard_normal((40, *shape))
    protected.add(torch.from_numpy(z).half(), [str(i) for i in range(40)])
    z = protected.vectors(range(40)).double().flatten(1).numpy()
    for step in range(3):
        x = ((1 - 0.01 * step) * z[:3] + 0.03 * rng.standard_normal((3, z.shape[1]))).astype(np.float32)
        exact, queries = brute_force(x, z), torch.from_numpy(x).view(3, *shape)
        order = np.argsort(exact, axis=1, kind="stable")[:, :7]
        np.testing.assert_array_equal(protected.nearest_rows(queries, 7)[1], order)
        query, row = np.nonzero(exact < exact[0, order[0, 4]])
        hits = protected.within(queries, float(exact[0, order[0, 4]]))
        assert list(zip(hits.query.tolist(), hits.row.tolist(), strict=True)) == list(zip(query, row, strict=True))


def test_without_numba_all_is_read_and_a_warning_says_so(indexed, monkeypatch, tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace((4, 4, 4)))
    protected.add(torch.randn(60, 4, 4, 4, generator=torch.Generator().manual_seed(0)), [str(i) for i in range(60)])
    monkeypatch.setitem(sys.modules, indexed_search.__name__, None)
    with pytest.warns(UserWarning, match=r"60 protected images.* need the extra `large`: pip install -e '\.\[large\]'"):
        assert protected.nearest_rows(protected.vectors([7]), 1)[1].tolist() == [[7]]
    assert not list((tmp_path / "set").glob("*.index.*"))


def test_the_nearest_within_a_radius(device, tmp_path):
    rng = np.random.default_rng(6)
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace((4, 4, 4)))
    protected.add(torch.from_numpy(rng.standard_normal((700, 4, 4, 4))), [str(i) for i in range(700)])
    z = protected.vectors(range(700)).double().flatten(1).numpy()
    x = (z[:5] * 0.9).astype(np.float32)
    exact = brute_force(x, z)
    radius = float(np.quantile(exact, 0.01))
    for k in (1, 4):
        hits = protected.within(torch.from_numpy(x).view(5, 4, 4, 4).to(device), radius, nearest=k)
        expected = [(i, row) for i in range(5) for row in sorted(np.argsort(exact[i])[:k]) if exact[i, row] < radius]
        assert list(zip(hits.query.tolist(), hits.row.tolist(), strict=True)) == expected
