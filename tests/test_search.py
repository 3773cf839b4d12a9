"""The search of large sets, with its indexes, against brute force in float64."""

import numpy as np
import pytest
import torch

from shielded import LatentSpace, ProtectedSet
from shielded.protected import search

BATCH, STEPS = 6, 8


@pytest.fixture
def indexed(monkeypatch):
    """Small sets are searched as large ones are."""
    monkeypatch.setattr(search, "SMALL", 0)


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
def test_equal_to_brute_force_after_adds_and_removes(indexed, tmp_path, shape, scale, dtype):
    rng = np.random.default_rng(7)
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace(shape), dtype)
    for n, count in enumerate((2500, 1500, 40)):
        rows = torch.from_numpy(scale * rng.standard_normal((count, *shape))).to(dtype)
        rows[: count // 50] = rows[-(count // 50) or None :][: count // 50]  # duplicates
        protected.add(rows, [f"{n}-{i}" for i in range(count)])
    for removed in ((), ("0-3", "1-7", "2-0")):
        protected.remove(list(removed))
        z = protected.vectors(range(len(protected))).double().flatten(1).numpy()
        radii = np.median(brute_force(z[:1], z)) * rng.uniform(0.5, 1.1, len(z))
        for step, x in enumerate(trajectory(rng, z, scale)):
            exact, queries = brute_force(x, z), torch.from_numpy(x).unflatten(1, shape)
            k = (1, 10)[step % 2]
            distances, rows = protected.nearest_rows(queries, k)
            order = np.argsort(exact, axis=1, kind="stable")[:, :k]
            np.testing.assert_array_equal(rows, order)
            np.testing.assert_allclose(distances, np.take_along_axis(exact, order, 1), rtol=1e-12, atol=1e-300)
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
                np.testing.assert_array_equal(hits.query, query)
                np.testing.assert_array_equal(hits.row, row)


@pytest.mark.parametrize("rows", ["equal", "far", "huge", "one large"])
def test_adversarial_sets(indexed, tmp_path, rows):
    rng = np.random.default_rng(3)
    z = rng.standard_normal((600, 4, 4, 4))
    if rows == "equal":
        z[:] = z[0]
    elif rows == "far":  # tiny differences on a large offset
        z = 1000 + 1e-2 * z
    elif rows == "huge":
        z *= 1e17
    else:
        z[5] *= 1e6
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace((4, 4, 4)))
    protected.add(torch.from_numpy(z).float(), [str(i) for i in range(600)])
    z = protected.vectors(range(600)).double().flatten(1).numpy()
    for step in range(4):
        x = (z[:3] * (1 + 1e-3 * step)).astype(np.float32)
        exact, queries = brute_force(x, z), torch.from_numpy(x).view(3, 4, 4, 4)
        found = protected.nearest_rows(queries, 5)[1]
        np.testing.assert_array_equal(found, np.argsort(exact, axis=1, kind="stable")[:, :5])
        radius = float(np.median(exact)) or 1.0
        hits = protected.within(queries, radius)
        query, row = np.nonzero(exact < radius)
        np.testing.assert_array_equal(hits.query, query)
        np.testing.assert_array_equal(hits.row, row)


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


@settings(max_examples=60, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), shape=st.sampled_from(SHAPES), rows=st.integers(3, 40))
def test_bounds_hold(tmp_path_factory, seed, kind, shape, rows):
    """Those of rows, before and after their codes are read, and those of cells that were not looked at again."""
    rng = np.random.default_rng(seed)
    z = references(kind, rng, rows, int(np.prod(shape)))
    pruned = make(tmp_path_factory.mktemp("index"), z, shape, shards=2)._pruned
    tight = []
    for x in trajectory(rng, z, batch=3, steps=5):
        squared = np.square(distances(x, z))
        view = neighbours._View(pruned, x, pruned.assign(x))
        unseen = view.unseen()
        for shard, part_index in enumerate(pruned._indexes):
            first, stop = pruned._first_cell[shard : shard + 2].tolist()
            part = neighbours._Part(view, shard, part_index, first, stop)
            exact = squared[:, pruned._rows(shard)]
            by_cell = np.minimum.reduceat(exact, np.arange(0, exact.shape[1], part_index.size), axis=1)
            assert (unseen[:, first:stop] <= by_cell).all()
            before = part.lower.flatten(1).double().numpy()[:, : exact.shape[1]]
            assert (~(before > exact)).all()
            rows_of_cell = torch.arange(0, min(part_index.size, exact.shape[1]), 2)
            part._look_at(0, rows_of_cell)
            view.note(part.cells, part.nearest())
            if rng.random() < 0.5:
                part._look(int(rng.integers(stop - first)))
            after = part.lower.flatten(1).double().numpy()[:, : exact.shape[1]]
            assert (~(after > exact)).all()
            tight.append((exact - after)[:, rows_of_cell] / (np.square(x).sum(1)[:, None] + np.square(z).sum(1).max()))
    if kind == "plain":
        assert np.median(np.concatenate(tight, axis=None)) < 0.02


@pytest.mark.parametrize("slow", [False, True])
def test_products_are_exact(monkeypatch, slow):
    rng = np.random.default_rng(0)
    if slow:
        monkeypatch.setattr(index, "_has_fast_product", lambda: False)
    for batch, rows, dim in [(1, 1, 1), (2, 3, 1), (1, 5, 2), (3, 1, 7), (16, 100, 33), (8, 70, 4096), (2, 3, 140_000)]:
        queries, codes = (torch.from_numpy(rng.integers(-127, 128, (n, dim)).astype(np.int8)) for n in (batch, rows))
        queries[0], codes[0] = 127, -127
        exact = queries.long() @ codes.long().T
        assert torch.equal(index.products(queries, codes).double(), exact.double())
        assert torch.equal(index.products(queries, codes[rows // 2 :]).double(), exact[:, rows // 2 :].double())


@pytest.mark.parametrize("shape", SHAPES)
def test_projection(shape):
    """P has orthonormal rows, and is the transform that it is called after."""
    scipy_fft = pytest.importorskip("scipy.fft")
    projection = index.Projection(shape)
    up = projection.up(np.eye(projection.size))
    np.testing.assert_allclose(up @ up.T, np.eye(projection.size), atol=1e-13)
    np.testing.assert_allclose(projection.down(np.eye(projection.dim)), up.T, atol=1e-15)
    x = np.random.default_rng(0).standard_normal(shape)
    axes = range(min(1, len(shape) - 1), len(shape))
    full = scipy_fft.dctn(x, axes=axes, norm="ortho")
    low = full[
        tuple(
            slice(None) if axis not in axes else slice(len(projection._waves[axis - axes[0]]))
            for axis in range(len(shape))
        )
    ]
    np.testing.assert_allclose(projection.down(x.reshape(1, -1))[0], low.flatten(), atol=1e-12)


def test_index_says_no_more_than_it_knows(tmp_path):
    """What an index holds, against the rows it was made of."""
    rng = np.random.default_rng(3)
    shape = (3, 4, 6)
    projection = index.Projection(shape)
    p = projection.up(np.eye(projection.size))
    for kind in KINDS:
        z = references(kind, rng, 21, 72)
        made = index.build(z, projection)
        assert sorted(made.order[:21].tolist()) == list(range(21))
        assert len(made.order) == 24  # three cells of 8
        assert (made.order[21:] == 0).all()
        exact = z[made.order[:21].numpy()].astype(np.float64)
        head = made.head[:21].numpy() * made.head_scale.numpy()
        rest = exact - head @ p
        codes = made.codes[:21].numpy() * made.scale[:21].numpy().astype(np.float64)[:, None]
        cell = np.arange(21) // 8
        norm = np.linalg.norm
        with np.errstate(over="ignore"):
            for bound, values in (
                (made.head_norm, norm(made.head[:21].numpy().astype(float), axis=1)),
                (made.head_error, norm(rest @ p.T, axis=1)),
                (made.code_error, norm(rest - codes, axis=1)),
                (made.low, norm(exact @ p.T, axis=1)),
                (made.high, norm(exact - exact @ p.T @ p, axis=1)),
            ):
                assert (values <= bound.numpy()[cell] * (1 + 1e-9) + 1e-300).all(), kind
            assert (norm(exact - exact @ p.T @ p, axis=1) <= made.rho[:21].numpy() * (1 + 1e-9)).all()
            squared = np.square(exact).sum(1).astype(np.float32)
        np.testing.assert_allclose(made.squared[:21], squared, rtol=1e-6)
        assert (np.diff(made.squared.numpy()) >= 0).all() or kind == "huge"
        assert made.squared[21:].isinf().all()


def test_index_files(tmp_path):
    rng = np.random.default_rng(0)
    z, x = rng.standard_normal((30, 24)).astype(np.float16), torch.from_numpy(rng.standard_normal((2, 24)))
    expected = make(tmp_path, z, (2, 3, 4)).nearest(x, 3)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"{number:06d}.index.safetensors" for number in range(3)]
    stamps = [file.stat().st_mtime_ns for file in files]
    np.testing.assert_array_equal(make(tmp_path, z, (2, 3, 4)).nearest(x, 3), expected)
    assert [file.stat().st_mtime_ns for file in files] == stamps  # made once

    content = files[0].read_bytes()
    index.check(files[0])
    for position in range(len(content) // 2, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 1
        files[0].write_bytes(damaged)
        with pytest.raises(ValueError, match=r"000000\.index\.safetensors is damaged; delete it"):
            index.check(files[0])
    for useless in (b"", content[:100], content[: len(content) // 2]):
        files[0].write_bytes(useless)
        np.testing.assert_array_equal(make(tmp_path, z, (2, 3, 4)).nearest(x, 3), expected)
        assert files[0].read_bytes() == content
    other = make(tmp_path, z, (24,))  # another projection: made anew
    np.testing.assert_array_equal(other.nearest(x, 3), expected)
    assert sorted(tmp_path.iterdir()) == files


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    z, x = rng.standard_normal((30, 24)).astype(np.float32), torch.from_numpy(rng.standard_normal((2, 24)))

    def refused(path, made):
        if path.parent == tmp_path:
            raise PermissionError("read-only")
        write(path, made)

    write = index.write
    monkeypatch.setattr(index, "write", refused)
    found = make(tmp_path, z, (2, 3, 4))
    distance, row = found.nearest(x, 3)
    order = np.argsort(distances(x.numpy(), z), axis=1)[:, :3]
    np.testing.assert_array_equal(row, order)
    assert not list(tmp_path.iterdir())


def test_small_sets_need_no_index(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "SMALL", 30)
    rng = np.random.default_rng(0)
    z = references("duplicates", rng, 30, 24)
    alive = rng.random(30) < 0.7
    for removed in (None, alive):
        found = make(tmp_path, z, (24,), alive=removed)
        for x in trajectory(rng, z, batch=3, steps=3):
            check_roughly(found, x, z if removed is None else z[removed])
    assert not list(tmp_path.iterdir())


def check_roughly(found, x, z, k=3):
    exact = distances(x, z)
    radius = float(np.median(exact)) * (1 + 1e-9)
    query, row = np.nonzero(exact < radius)
    for radii in (radius, np.full(len(z), radius), np.full(exact.shape, radius)):
        found_query, found_row, distance = found.within(torch.from_numpy(x), radii)
        assert found_query.tolist() == query.tolist()
        assert found_row.tolist() == row.tolist()
        np.testing.assert_allclose(distance, exact[query, row], rtol=1e-12, atol=1e-12)
    distance, rows = found.nearest(torch.from_numpy(x), k)
    order = np.argsort(np.round(exact, 9), axis=1, kind="stable")[:, :k]
    np.testing.assert_allclose(distance, np.take_along_axis(exact, order, 1), rtol=1e-12, atol=1e-12)
    assert rows.tolist() == order.tolist()


@pytest.mark.parametrize("kind", ["plain", "offset", "duplicates", "integers", "huge", "tiny"])
def test_brute_force_on_a_device(monkeypatch, tmp_path, kind):
    """What runs on a GPU, on the CPU."""
    monkeypatch.setattr(search, "_WORKING_SET", 100)
    monkeypatch.setattr(search.Search, "_on_device", lambda self, x: True)
    rng = np.random.default_rng(0)
    z = references(kind, rng, 40, 24)
    alive = rng.random(40) < 0.7
    for removed in (None, alive):
        found = make(tmp_path, z, (24,), alive=removed)
        for x in trajectory(rng, z, batch=3, steps=4):
            check_roughly(found, x, z if removed is None else z[removed])
    assert not list(tmp_path.iterdir())


def test_empty_batches_and_sets(tmp_path):
    z = np.zeros((3, 4), np.float32)
    for found in (make(tmp_path, z, (4,)), make(tmp_path, z, (4,), alive=np.zeros(3, bool))):
        assert [len(part) for part in found.within(torch.zeros(0, 4), 1.0)] == [0, 0, 0]
    assert [len(part) for part in found.within(torch.zeros(2, 4), 1.0)] == [0, 0, 0]
    assert make(tmp_path, z, (4,)).nearest(torch.zeros(0, 4), 2)[0].shape == (0, 2)


def test_steps_that_follow_each_other_read_little(tmp_path, monkeypatch):
    """What is remembered saves work: codes are read at first, and hardly again while x stays near."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((400, 192)).astype(np.float32)
    found = make(tmp_path, z, (3, 8, 8))
    read = []
    inner = neighbours._Part._inner
    monkeypatch.setattr(neighbours._Part, "_inner", lambda part, rows: read.append(inner(part, rows)) or read[-1])
    x = z[:2] + 0.5 * rng.standard_normal((2, 192))
    work = []
    for _ in range(4):
        read.clear()
        distance, row = found.nearest(torch.from_numpy(x), 1)
        np.testing.assert_array_equal(row[:, 0], distances(x, z).argmin(1))
        work.append(sum(part.shape[1] for part in read))
        x = x + 1e-3 * rng.standard_normal(x.shape)
    assert work[0] >= 350
    assert max(work[1:]) <= 40
