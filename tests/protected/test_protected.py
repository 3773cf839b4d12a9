import errno
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from shielded.core import distances as core_distances
from shielded.core.distances import bounded_squares, squared_norms
from shielded.latent_space import LatentSpace
from shielded.protected import ProtectedSet, store, writer
from shielded.protected.search import interface, whole

SHAPE = (2, 3, 4)
SPACE = LatentSpace(SHAPE)


def randn(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def names(n, prefix="image"):
    return [f"{prefix} {i}" for i in range(n)]


@pytest.fixture
def filled(tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    protected.add(randn(6, *SHAPE), names(6), radius=2.0)
    return protected


def brute_force(x, z):
    """All distances in float64, one pair at a time."""
    x, z = x.double().flatten(1), z.double().flatten(1)
    return torch.stack([torch.stack([(q - r).norm() for r in z]) for q in x])


def check_against_brute_force(protected, x, radii, stored, ks=(1, 3)):
    """`stored`: the references as they are on disk."""
    distance = brute_force(x, stored)
    for radius in radii:
        hits = protected.within(x, radius)
        query, row = (distance < radius).nonzero(as_tuple=True)
        assert hits.query.tolist() == query.tolist()
        assert hits.row.tolist() == row.tolist()
        torch.testing.assert_close(hits.distance, distance[query, row], rtol=1e-12, atol=1e-12)
        assert len(hits) == len(row)
    for k in ks:
        distances, rows = protected.nearest_rows(x, k)
        ordered = distance.sort(dim=1, stable=True)
        torch.testing.assert_close(distances, ordered.values[:, :k], rtol=1e-12, atol=1e-12)
        assert rows.tolist() == ordered.indices[:, :k].tolist()


# ---- search ----


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    rows=st.integers(3, 30),
    dim=st.integers(1, 40),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
    spread=st.sampled_from([1e-3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    block=st.sampled_from([7, 4096]),
)
def test_search_is_exact(tmp_path_factory, seed, batch, rows, dim, offset, spread, dtype, block):
    """A large common offset makes the matrix product cancel; small chunks let the loops run more than once."""
    z = randn(rows, dim, seed=seed, scale=spread) + offset
    x = (randn(batch, dim, seed=seed + 1, scale=spread) + offset).double()
    x[0] = z[1].to(dtype)
    protected = ProtectedSet.create(tmp_path_factory.mktemp("set") / "s", LatentSpace((dim,)), dtype=dtype)
    protected.add(z, names(rows))
    stored = z.to(dtype).double()
    middle = brute_force(x, stored).median().item() * (1 + 1e-9)  # not on a shell, where the last bit decides
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_distances, "_MAX_FLOAT32_TERMS", block)
        patch.setattr(whole, "_MAX_ARRAY_NUMBERS", 64)
        patch.setattr(interface, "_MAX_CACHED_NUMBERS", 64)
        check_against_brute_force(protected, x, [0.0, middle / 2, middle, 2 * middle, float("inf")], stored)


def test_blurred_queries_and_latent_sizes(tmp_path):
    space = LatentSpace((4, 40, 40))
    z = randn(200, *space.shape)
    x = torch.cat([z[:3] * 0.2, z[3:6] + 0.01 * randn(3, *space.shape, seed=1), randn(2, *space.shape, seed=2)])
    protected = ProtectedSet.create(tmp_path / "set", space, dtype=torch.float16)
    protected.add(z, names(200))
    middle = brute_force(x, z).median().item()
    check_against_brute_force(protected, x, [1.0, middle], z.half())


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    dim=st.sampled_from([1, 5, 300, 5000]),
    scale=st.sampled_from([1e-30, 1e-12, 1.0, 1e15, 1e30]),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_bounds_hold(seed, dim, scale, offset):
    x, z = ((randn(n, dim, seed=seed + n) + offset).mul(scale) for n in (3, 4))
    squared, error = bounded_squares(x, z, squared_norms(z))
    exact = (x.double()[:, None] - z.double()).square().sum(2)
    assert (squared - error <= exact).all()
    assert (exact <= squared + error).all()


def test_bounds_are_tight_where_they_matter():
    """Latents of unit variance: what is not ruled out without need stays below half a percent of the distance."""
    x, z = randn(2, 65536), randn(3, 65536, seed=1)
    squared, error = bounded_squares(x, z, squared_norms(z))
    lower, upper = (squared - error).sqrt(), (squared + error).sqrt()
    assert ((upper - lower) / upper < 5e-3).all()


def test_torch_precision_settings_do_not_matter(filled):
    x = randn(2, *SHAPE, seed=5)
    expected = filled.nearest_rows(x, 6)
    torch.set_float32_matmul_precision("medium")
    try:
        torch.testing.assert_close(filled.nearest_rows(x, 6), expected, rtol=0, atol=0)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_shell_is_outside(tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    protected.add(torch.zeros(1, *SHAPE), ["zero"], radius=3.0)
    x = torch.zeros(3, *SHAPE, dtype=torch.float64)
    x[:, 0, 0, 0] = torch.tensor([3.0, np.nextafter(3.0, 0), np.nextafter(3.0, 4)])
    for radius in (None, 3.0, torch.tensor([3.0])):
        assert protected.within(x, radius).query.tolist() == [1]
    assert protected.within(x * 0, 0.0).row.tolist() == []


def test_duplicates_come_in_row_order(tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    one, other = randn(1, *SHAPE, scale=100), randn(1, *SHAPE, seed=1, scale=100)
    protected.add(torch.cat([other, one, other, one, other]), list("abcde"))
    distances, ids = protected.nearest(torch.cat([one, other]), k=5)
    assert ids == [list("bdace"), list("acebd")]
    assert distances[0, :2].tolist() == [0, 0]
    assert protected.within(one, 1e-6).row.tolist() == [1, 3]


def test_radii(tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    z = randn(5, *SHAPE)
    protected.add(z[:3], list("abc"), radius=torch.tensor([1.0, 2.5, 4.0]))
    protected.add(z[3:], list("de"), radius=7.0)
    assert protected.radii.tolist() == [1.0, 2.5, 4.0, 7.0, 7.0]
    x = z[:2] + 0.3 * randn(2, *SHAPE, seed=1)
    distance = brute_force(x, z)
    per_query = distance * torch.tensor([0.9, 1.1, 0.5, 2.0, 1.0])
    for given_radius, radius in ((None, protected.radii), (protected.radii / 2, protected.radii / 2), (per_query,) * 2):
        hits = protected.within(x, given_radius)
        assert torch.stack([hits.query, hits.row], dim=1).tolist() == (distance < radius).nonzero().tolist()
    protected.add(z[:1] + 1, ["open"])
    assert protected.radii.isnan().tolist() == [False] * 5 + [True]
    with pytest.raises(ValueError, match=r"1 of 6 references have no radius of their own; pass radius="):
        protected.within(x)
    for wrong in (-1.0, float("nan"), torch.ones(5), torch.ones(3, 6)):
        with pytest.raises(ValueError, match="radius"):
            protected.within(x, wrong)


def test_bad_queries(filled):
    for call in (lambda x: filled.within(x, 1.0), filled.nearest):
        for wrong in (torch.zeros(SHAPE), torch.zeros(1, 2, 4, 3), torch.zeros(1, 24), torch.tensor(1.0)):
            with pytest.raises(ValueError, match="x0 must have the shape"):
                call(wrong)
        for value in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match="NaN or infinite"):
                call(torch.full((1, *SHAPE), value))
    for k in (0, 7):
        with pytest.raises(ValueError, match="between 1 and the 6 rows"):
            filled.nearest(torch.zeros(1, *SHAPE), k)


def test_empty_set_and_empty_batch(tmp_path, filled):
    empty = ProtectedSet.create(tmp_path / "empty", SPACE)
    for radius in (None, 1.0):
        assert len(empty.within(torch.zeros(2, *SHAPE), radius)) == 0
    assert (len(empty), empty.ids, empty.energy) == (0, [], 0.0)
    with pytest.raises(ValueError, match="is empty"):
        empty.nearest(torch.zeros(1, *SHAPE))
    assert len(filled.within(torch.zeros(0, *SHAPE))) == 0
    assert filled.nearest(torch.zeros(0, *SHAPE), 2)[0].shape == (0, 2)


def test_queries_of_other_dtypes_are_left_alone(filled):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = randn(2, *SHAPE, seed=3).to(dtype).requires_grad_()
        before = x.detach().clone()
        check_against_brute_force(filled, x.detach(), [5.0, 7.0], randn(6, *SHAPE))
        assert len(filled.within(x)) == len(filled.within(before))
        assert torch.equal(x.detach(), before)


# ---- the set ----


def test_vectors_and_energy(filled):
    z = randn(6, *SHAPE)
    assert torch.equal(filled.vectors([4, 0, 4]), z[[4, 0, 4]])
    assert filled.vectors(torch.tensor([], dtype=torch.int64)).shape == (0, *SHAPE)
    assert filled.energy == pytest.approx(z.double().square().sum().item() / 6, rel=1e-12)
    filled.add(z[:1] * 100, ["far"])
    assert filled.energy == pytest.approx(torch.cat([z, z[:1] * 100]).double().square().sum().item() / 7, rel=1e-6)


def test_changes_are_the_same_in_memory_and_on_disk(tmp_path):
    """A sequence of changes against a dictionary, before and after opening the set again."""
    protected = ProtectedSet.create(tmp_path / "set", SPACE, dtype=torch.float16)
    z = randn(20, *SHAPE)
    model = {}

    def add(rows, ids):
        protected.add(z[rows], ids, radius=[1.0 + row for row in rows], sources=[f"{i}.png" for i in ids])
        model.update({i: row for i, row in zip(ids, rows, strict=True)})

    def remove(ids):
        protected.remove(ids)
        for i in ids:
            del model[i]

    steps = [
        lambda: add([0, 1, 2], ["a", "b", "c"]),
        lambda: add([3], ["d"]),
        lambda: remove(["b", "d"]),
        lambda: add([4, 5], ["b", "e"]),  # an id may come back
        lambda: remove(["b", "a"]),
        protected.compact,
        lambda: add([6], ["a"]),
        lambda: remove(["c", "e", "a"]),
        protected.compact,
        lambda: add([7, 8], ["x", "c"]),
    ]
    for number, step in enumerate(steps):
        step()
        for current in (protected, ProtectedSet.open(tmp_path / "set")):
            assert current.ids == list(model)
            rows = list(model.values())
            assert torch.equal(current.vectors(range(len(rows))), z[rows].half().float())
            assert current.radii.tolist() == [1.0 + row for row in rows]
            assert current.sources == [f"{i}.png" for i in model]
            assert current.version == number + 2
            assert current.verify()["rows"] == len(current) == len(model)
            if rows:
                check_against_brute_force(current, z[:4], [3.0, 7.0], z[rows].half(), ks=(1,))
    history = protected.history
    assert [event["version"] for event in history] == list(range(1, len(steps) + 2))
    assert [event["action"] for event in history[:7]] == ["create", "add", "add", "remove", "add", "remove", "compact"]
    assert [event["count"] for event in history[:7]] == [0, 3, 1, 2, 2, 2, 2]
    assert history[3]["ids"] == ["b", "d"]
    assert all(event["time"].endswith("+00:00") for event in history)


def test_earlier_versions_open_until_they_are_compacted(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_MAX_SHARD_BYTES", 5 * 4 * SPACE.dim)  # five rows
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    z = randn(12, *SHAPE)
    seen = {}

    def remember():
        seen[protected.version] = list(protected.ids), protected.vectors(range(len(protected)))

    remember()
    for first in (0, 1, 2, 4, 11):
        protected.add(z[first : first + 3], [f"{first} {i}" for i in range(len(z[first : first + 3]))])
        remember()
        protected.remove([protected.ids[len(protected) // 2]])
        remember()
    for version, (ids, vectors) in seen.items():
        old = ProtectedSet.open(tmp_path / "set", version)
        assert (old.version, old.ids) == (version, ids)
        assert torch.equal(old.vectors(range(len(old))), vectors)
        assert len(old.history) == version
    old.add(z[:1], ["later"])  # builds on the newest one
    assert old.ids == [*ids, "later"]
    for wrong in (0, old.version + 1):
        with pytest.raises(ValueError, match=f"no version {wrong}; the newest is {old.version}"):
            ProtectedSet.open(tmp_path / "set", wrong)
    old.compact()
    old.remove(["later"])
    with pytest.raises(ValueError, match=r"Version 4 .* no longer exists: version 13 \(compact, .*; 13 to 14 can be"):
        ProtectedSet.open(tmp_path / "set", 4)
    assert ProtectedSet.open(tmp_path / "set", 13).ids == [*ids, "later"]
    assert ProtectedSet.open(tmp_path / "set", 14).ids == ids


def test_files_stay_few_and_the_manifest_small(tmp_path, monkeypatch):
    """Rows that are added one at a time: files of 16 rows and the binary digits of the rest."""
    monkeypatch.setattr(writer, "_MAX_SHARD_BYTES", 16 * 4 * SPACE.dim)
    monkeypatch.setattr(store.os, "fsync", lambda _: None)
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    z = randn(75, *SHAPE)
    for row in range(75):
        protected.add(z[row : row + 1], [row])
    rows = [entry["rows"] for entry in store.read_manifest(protected.path)["shards"]]
    assert rows == [16, 16, 16, 16, 8, 2, 1]
    assert len(list(protected.path.iterdir())) == len(rows) + 3
    before = (protected.path / "set.json").stat().st_size
    for row in range(0, 75, 3):
        protected.remove([row])
    assert (protected.path / "set.json").stat().st_size < before + 300
    left = [row for row in range(75) if row % 3]
    assert protected.ids == left
    assert torch.equal(protected.vectors(range(50)), z[left])
    protected.add(z[:40], range(1000, 1040))
    assert [entry["rows"] for entry in store.read_manifest(protected.path)["shards"]][-4:] == [1, 16, 16, 8]
    assert protected.ids[50:] == list(range(1000, 1040))
    protected.compact()
    rows = [entry["rows"] for entry in store.read_manifest(protected.path)["shards"]]
    assert sum(rows) == 90
    assert len(rows) <= 9
    assert protected.ids[:50] == left
    version = protected.version
    protected.compact()  # nothing to do
    assert protected.version == version


def test_what_the_search_is_given(filled):
    z = randn(9, *SHAPE)
    filled.add(z[6:7], ["six"])
    filled.add(z[7:], ["seven", "eight"])
    filled.remove(["image 2", "seven"])
    for protected in (filled, ProtectedSet.open(filled.path)):
        vectors = protected._reader.vectors
        assert vectors.shape == (9, SPACE.dim)
        assert vectors.alive.tolist() == [row not in (2, 7) for row in range(9)]
        blocks = [block for _, block in vectors.parts()]
        np.testing.assert_array_equal(np.concatenate(blocks), z.flatten(1).numpy())
        assert [first for first, _ in vectors.parts()] == [0, 6]
        assert [path.name for path in vectors.paths] == ["000001.safetensors", "000003.safetensors"]
        assert not any(block.flags.writeable for block in blocks)
        taken = vectors.take(np.array([8, 2, 8, 0]))
        np.testing.assert_array_equal(taken, z.flatten(1).numpy()[[8, 2, 8, 0]])
    assert ProtectedSet.create(filled.path, SPACE, overwrite=True)._reader.vectors.alive is None


def test_indexes_go_with_their_shards(filled):
    index = filled.path / "000001.index.safetensors"
    for name in (index.name, f"{index.name}.17.tmp", "000009.index.safetensors"):
        (filled.path / name).touch()
    filled.remove(["image 0"])
    assert sorted(file.name for file in filled.path.glob("*.index.*")) == [index.name, f"{index.name}.17.tmp"]
    filled.compact()
    assert not list(filled.path.glob("*.index.*"))


def test_the_posterior_radius(filled):
    x, z = randn(3, *SHAPE, seed=4), randn(6, *SHAPE)
    distance = brute_force(x, z)
    radius = torch.linspace(4, 9, 6, dtype=torch.float64)
    shrink = torch.tensor([0.0, 20.0, 1000.0])
    inside = distance.square() < radius.square() - shrink[:, None]
    assert inside.sum(1).tolist()[2] == 0 < inside.sum(1)[1] < inside.sum(1)[0]
    hits = filled.within(x, radius, shrink=shrink)
    assert torch.stack([hits.query, hits.row], 1).tolist() == inside.nonzero().tolist()
    for wrong in (torch.ones(2), -torch.ones(3), torch.full((3,), float("nan"))):
        with pytest.raises(ValueError, match="shrink must be"):
            filled.within(x, radius, shrink=wrong)


def test_columns_are_like_lists(tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    ids = ["a", 7, "7", "ünï\n", "", "e", "\udc80"]
    digests = [f"{n:064x}" for n in range(1, 7)] + [None]
    sources = [None, "b.png", *"cdefg"]
    for start, end in ((0, 4), (4, 5), (5, 7)):
        rows = slice(start, end)
        protected.add(randn(end - start, *SHAPE), ids[rows], None, sources[rows], digests[rows])
    protected.remove(["e"])
    for values, column in ((ids, protected.ids), (sources, protected.sources), (digests, protected.sha256)):
        values = values[:5] + values[6:]
        assert (len(column), list(column), list(reversed(column))) == (6, values, values[::-1])
        assert column == values
        assert column != values[:5]
        assert column != [*values[:5], "other"]
        assert [column[i] for i in range(-6, 6)] == values + values
        assert column[1:5:2] == values[1:5:2]
        assert all(value in column for value in values)
        assert column.index(values[4]) == 4
        with pytest.raises(IndexError):
            column[6]
    assert "e" not in protected.ids
    assert 8 not in protected.ids
    assert None not in protected.ids
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        protected.add(randn(1, *SHAPE), ["x"], sha256=["abc"])


def test_ids_whose_hashes_collide_are_told_apart(filled, monkeypatch):
    monkeypatch.setattr("shielded.protected.columns.keys", lambda ids: np.zeros(len(ids), np.int64))
    monkeypatch.setattr(writer, "keys", lambda ids: np.zeros(len(ids), np.int64))
    protected = ProtectedSet.create(filled.path.parent / "other", SPACE)
    protected.add(randn(3, *SHAPE), ["a", "b", "c"])
    protected.add(randn(1, *SHAPE), ["d"])
    protected.remove(["b", "d"])
    assert protected.ids == ["a", "c"]
    assert "b" not in protected.ids
    with pytest.raises(ValueError, match="'c'"):
        protected.add(randn(2, *SHAPE), ["b", "c"])


def test_compact_leaves_nothing_of_a_removed_image(filled):
    gone = filled.vectors([2]).numpy().tobytes()
    filled.remove(["image 2"])
    before = {file.name: file.read_bytes() for file in filled.path.iterdir()}
    assert gone in before["000001.safetensors"]
    filled.compact()
    after = {file.name: file.read_bytes() for file in filled.path.iterdir()}
    assert sorted(after) == ["000003.safetensors", "history.jsonl", "lock", "set.json"]
    assert gone not in b"".join(after.values())
    assert b"image 1" in after["000003.safetensors"]
    assert b"image 2" not in after["000003.safetensors"]
    assert filled.history[2]["ids"] == ["image 2"]  # that it was removed stays on record


def test_compact_leaves_what_does_not_change(filled, monkeypatch):
    monkeypatch.setattr(writer, "_MAX_SHARD_BYTES", 6 * 4 * SPACE.dim)
    filled.add(randn(6, *SHAPE, seed=1), names(6, "other"))
    filled.add(randn(6, *SHAPE, seed=2), names(6, "third"))
    filled.remove(["other 3"])
    kept = {name: (filled.path / name).stat().st_ino for name in ("000001.safetensors", "000003.safetensors")}
    filled.compact()
    assert {name: (filled.path / name).stat().st_ino for name in kept} == kept
    assert [entry["rows"] for entry in store.read_manifest(filled.path)["shards"]] == [6, 5, 6]


def test_shards_are_readable_without_this_package(filled):
    tensors = load_file(filled.path / "000001.safetensors")
    assert torch.equal(tensors["latents"], randn(6, *SHAPE))
    torch.testing.assert_close(tensors["norms"], randn(6, *SHAPE).double().flatten(1).square().sum(1))
    text, ends = bytes(tensors["ids"].tolist()), tensors["ids_offsets"].tolist()
    assert [json.loads(text[a:b]) for a, b in pairwise(ends)] == names(6)


def test_the_set_keeps_no_view_of_the_callers_tensor(filled):
    z = randn(1, *SHAPE, seed=9)
    filled.add(z, ["mine"])
    filled.vectors([0])  # joins the rows
    filled.add(z, ["mine too"])
    z.zero_()
    assert torch.equal(filled.vectors([6, 7]), randn(1, *SHAPE, seed=9).expand(2, *SHAPE))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"latents": torch.zeros(2, 3, 2, 4)}, ValueError, "latents must have the shape"),
        ({"latents": torch.zeros(3, *SHAPE)}, ValueError, "3 latents need as many ids; got 2"),
        ({"latents": torch.zeros(2, *SHAPE, dtype=torch.int64)}, TypeError, "float tensor; got torch.int64"),
        ({"latents": np.zeros((2, *SHAPE), int)}, TypeError, "float tensor"),
        ({"latents": torch.full((2, *SHAPE), float("nan"))}, ValueError, "not finite"),
        ({"latents": torch.full((2, *SHAPE), 1e39, dtype=torch.float64)}, ValueError, "not finite in torch.float32"),
        ({"ids": ["new", "image 3"]}, ValueError, "in the set already: 'image 3'"),
        ({"ids": ["new", "new"]}, ValueError, "repeated: 'new'"),
        ({"ids": "ab"}, TypeError, "list of strings"),
        ({"ids": ["a", None]}, TypeError, "list of strings"),
        ({"radius": 0.0}, ValueError, "positive"),
        ({"radius": torch.tensor([1.0, -1.0])}, ValueError, "positive"),
        ({"radius": float("nan")}, ValueError, "positive"),
        ({"radius": [1.0, 2.0, 3.0]}, ValueError, "radius must be one number"),
        ({"sources": ["a"]}, ValueError, "sources"),
    ],
)
def test_a_bad_add_writes_nothing(filled, change, error, message):
    files = {file: file.read_bytes() for file in filled.path.iterdir()}
    with pytest.raises(error, match=message):
        filled.add(**{"latents": torch.zeros(2, *SHAPE), "ids": ["x", "y"], **change})
    assert {file: file.read_bytes() for file in filled.path.iterdir()} == files
    assert len(filled) == 6


def test_unknown_ids_cannot_be_removed(filled):
    with pytest.raises(KeyError, match="'nobody'"):
        filled.remove(["image 1", "nobody"])
    assert len(filled) == len(ProtectedSet.open(filled.path)) == 6
    filled.remove([])
    assert filled.version == 2


def test_integer_ids(tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    protected.add(randn(3, *SHAPE), range(3))
    protected.remove([1])
    assert ProtectedSet.open(tmp_path / "set").nearest(randn(3, *SHAPE)[[2, 0]])[1] == [[2], [0]]
    assert ProtectedSet.open(tmp_path / "set").ids == [0, 2]


def test_create(tmp_path, filled):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ProtectedSet.create(filled.path, SPACE)
    with pytest.raises(ValueError, match=r"float32 or torch\.float16"):
        ProtectedSet.create(tmp_path / "other", SPACE, dtype=torch.bfloat16)
    (tmp_path / "photo.png").touch()
    with pytest.raises(FileExistsError, match="other files"):
        ProtectedSet.create(tmp_path, SPACE)
    with pytest.raises(FileNotFoundError, match="no protected set at"):
        ProtectedSet.open(tmp_path)
    other = ProtectedSet.create(filled.path, LatentSpace((5,)), overwrite=True)
    assert (len(other), other.version) == (0, 3)
    assert not list(filled.path.glob("*.safetensors"))
    half = ProtectedSet.create(tmp_path / "half", SPACE, dtype=torch.float16)
    ProtectedSet.create(tmp_path / "half", SPACE, overwrite=True)
    with pytest.raises(ValueError, match="replaced by a set of float32"):
        half.add(randn(1, *SHAPE), ["late"])
    with pytest.raises(ValueError, match="shape"):  # the open set does not write into another one
        filled.add(randn(1, *SHAPE), ["late"])


def test_foreign_spaces_are_refused(filled):
    filled.require_space(LatentSpace(SHAPE))
    with pytest.raises(ValueError, match=r"was made for another latent space.*shape \(2, 3, 4\) against \(2, 3, 5\)"):
        filled.require_space(LatentSpace((2, 3, 5)))
    known = {"vae_class": "AutoencoderKL", "vae_sha256": "0" * 64}
    protected = ProtectedSet.create(filled.path.parent / "known", LatentSpace(SHAPE, scaling=0.18215, **known))
    protected = ProtectedSet.open(protected.path)
    protected.require_space(LatentSpace(SHAPE, scaling=0.18215, **known))
    with pytest.raises(ValueError, match=r"scaling 0\.18215 against 0\.13025"):
        protected.require_space(LatentSpace(SHAPE, scaling=0.13025, **known))


# ---- what can happen to the files ----


def test_any_flipped_byte_is_found(filled):
    filled.remove(["image 0"])
    for name in ("set.json", "000001.safetensors", "000002.removed.safetensors", "history.jsonl"):
        file = filled.path / name
        content = file.read_bytes()
        for position in range(0, len(content), 37):
            damaged = bytearray(content)
            damaged[position] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                filled.verify()
        file.write_bytes(content)
    assert filled.verify() == {"version": 3, "rows": 5, "shards": 1, "fingerprint": SPACE.fingerprint}


@pytest.mark.parametrize("change", ["add", "compact"])
def test_a_damaged_file_gets_no_new_checksum(filled, change):
    filled.remove(["image 0"])
    file = filled.path / "000001.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"000001\.safetensors is damaged"):
        filled.compact() if change == "compact" else filled.add(randn(20, *SHAPE), range(20))
    assert store.read_manifest(filled.path)["version"] == 3


def test_missing_and_truncated_files_are_named(filled):
    shard = filled.path / "000001.safetensors"
    content = shard.read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        shard.write_bytes(content[:length])
        for call in (filled.verify, lambda: ProtectedSet.open(filled.path)):
            with pytest.raises(ValueError, match=r"000001\.safetensors is damaged"):
                call()
    shard.unlink()
    for call in (filled.verify, lambda: ProtectedSet.open(filled.path)):
        with pytest.raises(FileNotFoundError, match=r"000001\.safetensors is missing"):
            call()
    (filled.path / "set.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"set\.json is damaged"):
        ProtectedSet.open(filled.path)


def test_another_format_is_refused(filled):
    manifest = store.read_manifest(filled.path)
    store.write_manifest(filled.path, {**manifest, "format": 3})
    with pytest.raises(ValueError, match="has format 3; this version of shielded reads format 2"):
        ProtectedSet.open(filled.path)
    (filled.path / "set.json").write_text('{"format": 1, "sha256": "0", "version": 1}')
    with pytest.raises(ValueError, match="has format 1"):
        ProtectedSet.open(filled.path)


def check_that_nothing_changed(protected, change, message):
    before = ProtectedSet.open(protected.path)
    with pytest.raises(OSError, match=message):
        change()
    after = ProtectedSet.open(protected.path)
    assert (after.version, after.ids, after.verify()) == (before.version, before.ids, before.verify())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("action", ["add", "remove", "compact"])
@pytest.mark.parametrize("file", ["shard", "set.json", "history.jsonl"])
def test_a_full_disk(filled, monkeypatch, action, file):
    filled.remove(["image 0"])
    number = store.read_manifest(filled.path)["next_file"]
    shard = f"{number:06d}{'.removed' if action == 'remove' else ''}.safetensors"
    change = {
        "add": lambda: filled.add(randn(2, *SHAPE), ["x", "y"]),
        "remove": lambda: filled.remove(["image 1"]),
        "compact": filled.compact,
    }[action]
    message = r"set cannot be written to: No space left on device; free some space\. The set stays"
    if file == "history.jsonl":  # appended in place

        def half_a_line(folder, *_):
            with open(folder / file, "a") as history:
                history.write('{"version": 4, "ti')
            raise OSError(errno.ENOSPC, "full")

        with monkeypatch.context() as patch:
            patch.setattr(store, "append_history", half_a_line)
            check_that_nothing_changed(filled, change, message)
    else:
        draft = filled.path / f"{shard if file == 'shard' else file}.tmp"
        draft.symlink_to("/dev/full")
        check_that_nothing_changed(filled, change, message)
        assert not draft.is_symlink()  # what was begun is gone
    change()  # space again
    assert ProtectedSet.open(filled.path).version == 4
    filled.verify()


def test_a_read_only_folder(filled, monkeypatch):
    def read_only(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", read_only)  # of the lock
    for change in (lambda: filled.remove(["image 1"]), filled.compact, lambda: filled.add(randn(1, *SHAPE), ["x"])):
        with pytest.raises(OSError, match="set cannot be written to: Read-only file system; check the folder's"):
            change()
    opened = ProtectedSet.open(filled.path)
    assert opened.nearest(randn(6, *SHAPE))[1] == [[name] for name in names(6)]


def test_no_permission(filled):
    if os.name != "posix" or os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    filled.path.chmod(0o500)
    (filled.path / "lock").chmod(0o400)
    try:
        with pytest.raises(PermissionError, match="cannot be written to: Permission denied"):
            filled.remove(["image 1"])
        assert len(ProtectedSet.open(filled.path)) == 6
    finally:
        filled.path.chmod(0o700)


def test_others_may_read(filled):
    modes = {file.stat().st_mode & 0o777 for file in filled.path.iterdir()}
    assert modes == {(filled.path / "set.json").stat().st_mode & 0o777}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("action", ["add", "remove", "compact"])
@pytest.mark.parametrize("moment", range(10))
def test_killed_at_any_moment(filled, monkeypatch, action, moment):
    """Interrupts before each rename and each flush to disk: a reader sees the old or the new version, and goes on."""

    def change(protected):
        if action == "add":
            protected.add(randn(2, *SHAPE, seed=1), ["new", "newer"], radius=1.0)
        else:
            protected.remove(["image 1"]) if action == "remove" else protected.compact()

    filled.remove(["image 0"])
    old = list(filled.ids)
    finished = shutil.copytree(filled.path, filled.path.parent / "finished")
    finished = ProtectedSet.open(finished)
    change(finished)
    calls = iter(range(1000))

    def interrupted(function):
        def call(*args):
            if next(calls) == moment:
                raise Killed
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync"):
            patch.setattr(store.os, name, interrupted(getattr(os, name)))
        try:
            change(ProtectedSet.open(filled.path))
            killed = False
        except Killed:
            killed = True
    assert killed or moment >= 4
    seen = ProtectedSet.open(filled.path)
    assert seen.ids in (old, finished.ids)
    seen.verify()
    expected = filled if seen.version == filled.version else finished
    assert torch.equal(seen.vectors(range(len(seen))), expected.vectors(range(len(seen))))
    if seen.ids == old:
        change(seen)
    assert ProtectedSet.open(filled.path).ids == seen.ids == finished.ids
    seen.compact()
    assert len(list(filled.path.glob("*.safetensors"))) == 1
    assert not list(filled.path.glob("*.tmp"))
    assert [event["version"] for event in seen.history] == list(range(1, seen.version + 1))
    seen.verify()


def test_a_killed_create_can_be_repeated(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store.os, "replace", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            ProtectedSet.create(tmp_path / "set", SPACE)
    ProtectedSet.create(tmp_path / "set", SPACE)
    assert sorted(file.name for file in (tmp_path / "set").iterdir()) == ["history.jsonl", "lock", "set.json"]


def test_readers_keep_their_version_while_a_writer_works(filled):
    reader = ProtectedSet.open(filled.path)
    x = randn(2, *SHAPE, seed=2)
    before = reader.nearest(x, 6)
    filled.remove(["image 0", "image 4"])
    filled.add(x, ["p", "q"])
    filled.compact()
    distances, ids = reader.nearest(x, 6)
    assert ids == before[1]
    assert torch.equal(distances, before[0])
    assert ProtectedSet.open(filled.path).nearest(x)[1] == [["p"], ["q"]]
    reader.add(x + 1, ["r", "s"])  # builds on what the other one wrote
    assert reader.ids == [*filled.ids, "r", "s"]
    with pytest.raises(ValueError, match="'r'"):
        filled.add(x, ["r", "t"])


def test_open_follows_a_writer_that_compacts_meanwhile(filled, monkeypatch):
    stale = [store.read_manifest(filled.path)]
    filled.remove(["image 0"])
    filled.compact()
    current = store.read_manifest
    monkeypatch.setattr(store, "read_manifest", lambda folder: stale.pop() if stale else current(folder))
    assert ProtectedSet.open(filled.path).ids == filled.ids


def test_two_writers(filled):
    """A second process is refused while the first one writes, and not after that has ended without cleaning up."""
    code = """
import os, sys
from pathlib import Path
from shielded.protected import store
with store.writing(Path(sys.argv[1])):
    print("writing", flush=True)
    sys.stdin.read()
    os._exit(1)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(filled.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert other.stdout.readline() == b"writing\n"
    for call in (
        lambda: filled.add(randn(1, *SHAPE), ["x"]),
        lambda: filled.remove(["image 0"]),
        filled.compact,
        lambda: ProtectedSet.create(filled.path, SPACE, overwrite=True),
    ):
        with pytest.raises(RuntimeError, match="Another process is writing"):
            call()
    assert len(ProtectedSet.open(filled.path)) == 6
    other.communicate()
    filled.remove(["image 0"])
    assert len(filled) == 5
