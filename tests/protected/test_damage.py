"""Damaged files of a set: a clear error or the right answer, whatever is damaged and however it is used."""

import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shielded import LatentSpace, ProtectedSet
from shielded.protected import checksums, store
from shielded.protected.check import check_set
from shielded.protected.search import choose

SHAPE = (2, 3, 4)
SPACE = LatentSpace(SHAPE)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def indexed(monkeypatch):
    """Search small sets through an index."""
    monkeypatch.setattr(choose, "MAX_UNINDEXED_ROWS", 0)


@pytest.fixture
def filled(tmp_path):
    """Two shards, one row removed."""
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    protected.add(randn(40, *SHAPE), [f"a{i}" for i in range(40)], 2.0, [f"{i}.png" for i in range(40)])
    protected.add(randn(9, *SHAPE, seed=1), [f"b{i}" for i in range(9)], 3.0)
    protected.remove(["a3"])
    return protected


USES = {
    "ids": lambda s: list(s.ids),
    "sources": lambda s: list(s.sources),
    "radii": lambda s: s.radii.tolist(),
    "within": lambda s: s.within(randn(40, *SHAPE) + 0.05).row.tolist(),
    "nearest": lambda s: s.nearest_rows(randn(3, *SHAPE, seed=5), 4)[1].tolist(),
    "vectors": lambda s: s.vectors(range(len(s))).tolist(),
    "energy": lambda s: s.energy,
    "history": lambda s: s.history,
    "add": lambda s: (s.add(randn(30, *SHAPE, seed=9), [f"c{i}" for i in range(30)]), list(s.ids)),
    "compact": lambda s: (s.compact(), s.vectors(range(len(s))).tolist()),
}


def damaged(content, rng, kind):
    data = bytearray(content)
    at = int(rng.integers(len(data)))
    if kind == "flip":
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "cut":
        del data[at:]
    elif kind == "longer":
        data += bytes(rng.integers(256, size=9, dtype=np.uint8))
    else:
        data[:] = b""
    return bytes(data)


@pytest.mark.parametrize("kind", ["flip", "zero", "cut", "longer", "empty"])
@pytest.mark.parametrize("use", USES)
def test_no_use_of_a_damaged_set_gives_another_answer(indexed, filled, tmp_path, use, kind):
    rng = np.random.default_rng(list(USES).index(use))
    copy = tmp_path / "copy"
    shutil.copytree(filled.path, copy)
    expected = USES[use](ProtectedSet.open(copy))
    if use == "history":
        expected = filled.history
    names = sorted(path.name for path in filled.path.iterdir() if path.name != store.LOCK)
    for name in names:
        shutil.rmtree(copy)
        shutil.copytree(filled.path, copy)
        (copy / name).write_bytes(damaged((copy / name).read_bytes(), rng, kind))
        found, error = None, None
        try:
            found = USES[use](ProtectedSet.open(copy))
        except ValueError as raised:
            error = str(raised)
        if error is None:
            assert found == expected
        else:
            assert name in error
            assert "damaged" in error


@pytest.mark.parametrize("tensor", ["codes", "order", "head", "squared", "rho", "low"])
def test_a_damaged_index_is_noticed_and_built_again(indexed, filled, tensor):
    x = randn(40, *SHAPE) + 0.05
    expected = filled.within(x).row.tolist()
    file = filled.path / "000001.index.safetensors"
    content = bytearray(file.read_bytes())
    size = 8 + int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8:size])[tensor]["data_offsets"]
    content[size + (begin + end) // 2] ^= 0x55
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"000001\.index\.safetensors is damaged; delete it"):
        filled.verify()
    again = ProtectedSet.open(filled.path)
    assert again.within(x).row.tolist() == expected
    again.verify()  # the search has replaced it


def test_an_index_of_another_shard_is_not_used(indexed, tmp_path):
    """Of the same number of rows, and intact."""
    sets = [ProtectedSet.create(tmp_path / name, SPACE) for name in ("one", "other")]
    for seed, protected in enumerate(sets):
        protected.add(randn(50, *SHAPE, seed=seed), range(50), 2.0)
        protected.within(randn(2, *SHAPE))
    x = randn(50, *SHAPE, seed=1) + 0.1
    expected = sets[1].within(x).row.tolist()
    name = "000001.index.safetensors"
    shutil.copy(tmp_path / "one" / name, tmp_path / "other" / name)
    with pytest.raises(ValueError, match="is damaged"):
        sets[1].verify()
    assert ProtectedSet.open(tmp_path / "other").within(x).row.tolist() == expected


def forged(protected, change):
    """Write a shard with other tensors, and a manifest whose checksums all hold."""
    manifest = store.read_manifest(protected.path)
    entry = manifest["shards"][0]
    file = protected.path / entry["file"]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with open(file, "rb") as content:
        columns = checksums.columns_sha256(content)
    manifest["shards"][0] = entry | {"sha256": checksums.file_digest(file), "columns": columns}
    store.write_manifest(protected.path, manifest)


def search_by(monkeypatch, search):
    """Choose one of the searches for all sets."""
    monkeypatch.setattr(choose, "MAX_UNINDEXED_ROWS", 10_000 if search == "whole" else 0)
    if search == "parts":
        monkeypatch.setattr(choose, "_indexed_search", lambda rows: None)
    if search == "copy":
        monkeypatch.setattr(choose.Search, "_on_device", lambda *_: True)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("search", ["whole", "parts", "index", "copy"])
def test_a_row_that_is_not_finite_is_an_error(monkeypatch, filled, search, number):
    search_by(monkeypatch, search)
    forged(filled, lambda tensors: tensors["latents"][7, 1].fill_(number))
    protected = ProtectedSet.open(filled.path)
    for use in (lambda: protected.within(randn(2, *SHAPE), 1.0), lambda: protected.nearest(randn(2, *SHAPE))):
        with pytest.raises(ValueError, match="is damaged: a row is not finite"):
            use()
    with pytest.raises(ValueError, match="not finite"):
        protected.vectors([6])
    with pytest.raises(ValueError, match="not finite"):
        protected.verify()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["radii"].fill_(-1.0),
        lambda t: t["radii"][2:3].fill_(float("inf")),
        lambda t: t["norms"][:1].fill_(float("nan")),
        lambda t: t["ids_offsets"][1:2].fill_(10**6),
        lambda t: t["sources_offsets"].fill_(0),
        lambda t: t.update(keys=t["keys"][:-1].clone()),
        lambda t: t.update(latents=t["latents"].half()),
        lambda t: t.pop("sha256"),
    ],
)
def test_a_shard_that_no_set_wrote_is_refused(filled, change):
    forged(filled, change)
    with pytest.raises(ValueError, match=r"000001\.safetensors is damaged"):
        ProtectedSet.open(filled.path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "3"),
        ("version", True),
        ("version", -4),
        ("version", 10**40),
        ("next_file", 1),
        ("oldest", 99),
        ("dtype", "float64"),
        ("shards", {"file": "000001.safetensors"}),
        ("shards", [["000001.safetensors"]]),
        ("shards", [{"file": "../other/000001.safetensors", "rows": 1, "sha256": "0" * 64}]),
        ("shards", [{"file": "/etc/passwd", "rows": 1, "sha256": "0" * 64}]),
        ("shards", [{"file": "000001.safetensors", "rows": 1.5, "sha256": "0" * 64}]),
        ("shards", [{"file": "000001.safetensors", "rows": 40, "sha256": None}]),
        ("removed", [1]),
        ("removed", {"file": "000003.removed.safetensors", "rows": 10**6, "sha256": "0" * 64}),
        ("history", {"bytes": "12", "sha256": "0" * 64}),
        ("space", {"shape": [2, 3, 1 << 62]}),
        ("space", {"shape": [2, 3, 4], "scaling": float("nan")}),
        ("space", {"shape": [2, 3, 4], "vae": "mine"}),
        ("space", []),
        ("fingerprint", None),
    ],
)
def test_fields_of_the_manifest_have_types_and_ranges(filled, field, value):
    manifest = store.read_manifest(filled.path)
    for key in (field, None):
        changed = {k: v for k, v in manifest.items() if k != field} | ({} if key is None else {field: value})
        if "shards" not in changed:
            continue  # the text of a manifest always has them
        store.write_manifest(filled.path, changed)
        for use in (lambda: ProtectedSet.open(filled.path), filled.compact, filled.verify):
            with pytest.raises(ValueError, match=r"set\.json is damaged: [^\n]*\.$"):
                use()


def test_a_manifest_that_is_nested_too_deeply(filled):
    (filled.path / "set.json").write_text('{"format": ' + "[" * 200_000)
    with pytest.raises(ValueError, match=r"set\.json is damaged"):
        ProtectedSet.open(filled.path)


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
@pytest.mark.parametrize("name", ["000001.safetensors", "set.json"])
@pytest.mark.parametrize("kind", ["link", "circle", "link to nowhere", "folder", "pipe"])
def test_files_of_a_set_are_files_of_its_folder(filled, tmp_path, kind, name):
    file = filled.path / name
    file.rename(tmp_path / "moved")
    if kind == "link":
        file.symlink_to(tmp_path / "moved")
    elif kind == "circle":
        file.symlink_to(name)
    elif kind == "link to nowhere":
        file.symlink_to("nowhere")
    elif kind == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)
    with pytest.raises(ValueError, match=rf"{name} is damaged: it is "):
        ProtectedSet.open(filled.path)


@pytest.mark.parametrize("manifest", [None, b"", b'{"version": 3', b"\xff\xfe", b"[]"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_set_without_its_manifest_is_damaged_and_not_empty(filled, manifest, overwrite):
    (filled.path / "set.json").unlink()
    if manifest is not None:
        (filled.path / "set.json").write_bytes(manifest)
    before = {file.name: file.read_bytes() for file in filled.path.iterdir()}
    with pytest.raises(ValueError, match="damaged"):
        ProtectedSet.open(filled.path)
    with pytest.raises((ValueError, FileExistsError)):
        ProtectedSet.create(filled.path, SPACE, overwrite=overwrite)
    assert {file.name: file.read_bytes() for file in filled.path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("000002.safetensors", b"weights of somebody's model"),
        ("000001.removed.safetensors", b"a list"),
        ("000017.index.safetensors", b"an index of theirs"),
        ("history.jsonl", b'{"event": "somebody\'s log"}\n'),
        ("unfinished.json", b'{"my": "notes"}'),
        ("lock", b"1234\n"),
        ("set.json", b'{"pieces": 32, "board": "walnut"}'),
        ("set.json.tmp", b"a draft of theirs"),
        ("000004.safetensors.tmp", b"a draft of theirs"),
        ("000001.safetensors.bak", b"a copy"),
    ],
)
def test_create_deletes_nothing_that_it_did_not_make(tmp_path, name, content):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(content)
    for overwrite in (False, True):
        with pytest.raises((FileExistsError, ValueError)):
            ProtectedSet.create(tmp_path / "mine", SPACE, overwrite=overwrite)
    assert [(file.name, file.read_bytes()) for file in (tmp_path / "mine").iterdir() if file.stat().st_size] == [
        (name, content)
    ]


def test_changes_delete_nothing_that_the_set_did_not_make(filled, tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    foreign = {"000900.safetensors": (tmp_path / "model.safetensors").read_bytes(), "set.json.bak": b"x", "n.txt": b"y"}
    for name, content in foreign.items():
        (filled.path / name).write_bytes(content)
    filled.remove(["a5"])
    filled.add(randn(60, *SHAPE, seed=4), range(60))
    filled.compact()
    assert {name: (filled.path / name).read_bytes() for name in foreign} == foreign
    assert check_set(filled.path).unknown == sorted(foreign)


def test_each_shard_is_read_once(filled, monkeypatch):
    read = []
    monkeypatch.setattr(checksums, "_SETTLED_SECONDS", -1.0)  # as if the files had been there for a while
    digest = checksums.file_sha256
    monkeypatch.setattr(checksums, "file_sha256", lambda path: (read.append(path.name), digest(path))[1])
    protected = ProtectedSet.open(filled.path)
    assert protected.radii.isfinite().all()
    assert not read  # columns have a digest of their own
    protected.vectors([0])
    assert read == ["000001.safetensors"]
    for _ in range(2):
        protected.within(randn(2, *SHAPE))
        ProtectedSet.open(filled.path).nearest(randn(2, *SHAPE))
    assert sorted(read) == ["000001.safetensors", "000002.safetensors"]


def test_sets_of_an_earlier_version_are_read_whole_when_they_are_opened(filled):
    manifest = store.read_manifest(filled.path)
    for entry in manifest["shards"]:
        del entry["columns"]
    store.write_manifest(filled.path, manifest)
    assert len(ProtectedSet.open(filled.path)) == 48
    file = filled.path / "000001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"000001\.safetensors is damaged"):
        ProtectedSet.open(filled.path)


# ---- threads and infinite radii ----


@pytest.mark.parametrize("search", ["whole", "index", "copy"])
def test_threads_share_a_set(monkeypatch, tmp_path, search):
    """Eight threads with trajectories of their own; every answer against float64."""
    monkeypatch.setattr(choose, "MAX_UNINDEXED_ROWS", 10_000 if search == "whole" else 0)
    if search == "copy":
        monkeypatch.setattr(choose.Search, "_on_device", lambda *_: True)
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace((4, 4, 4)))
    for n in range(3):
        protected.add(randn(700, 4, 4, 4, seed=n), [f"{n}-{i}" for i in range(700)], 4.0)
    protected.remove(["1-5"])
    z = protected.vectors(range(len(protected))).double().flatten(1)
    protected = ProtectedSet.open(protected.path)  # so that the threads also meet at the first search
    wrong, start = [], threading.Barrier(8)

    def ask(number):
        start.wait()
        near = randn(5, 4, 4, 4, seed=100 + number)
        try:
            for step in range(12):
                x = 0.97 * near + 0.03 * randn(5, 4, 4, 4, seed=1000 * number + step)
                exact = torch.cdist(x.double().flatten(1), z, compute_mode="donot_use_mm_for_euclid_dist")
                radius = float(exact.quantile(0.01))
                hits, (_, rows) = protected.within(x, radius), protected.nearest_rows(x, 2)
                right = (exact < radius).nonzero().tolist()
                if torch.stack([hits.query, hits.row], 1).tolist() != right:
                    wrong.append((number, step, "within"))
                if rows.tolist() != exact.topk(2, largest=False).indices.tolist():
                    wrong.append((number, step, "nearest"))
        except Exception as error:
            wrong.append((number, error))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("search", ["whole", "parts", "index", "copy"])
@pytest.mark.parametrize("shrink", [None, 3.0])
def test_infinite_radii(monkeypatch, filled, search, shrink):
    """For all rows, for some, and for some of some images, with and without removed rows."""
    search_by(monkeypatch, search)
    x, z = randn(3, *SHAPE, seed=7), filled.vectors(range(48))
    exact = torch.cdist(x.double().flatten(1), z.double().flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    some = torch.full((48,), 4.0).double().index_fill(0, torch.tensor([0, 11, 47]), torch.inf)
    for radius in (torch.inf, some, exact.clone().fill_(5.0).index_fill(1, torch.tensor([2, 30]), torch.inf)):
        limit = torch.as_tensor(radius).double().expand(3, 48)
        reduction = None if shrink is None else torch.tensor([0.0, shrink, 0.5 * shrink])
        if reduction is not None:
            limit = (limit.square() - reduction[:, None]).clamp(min=0).sqrt()
        hits = filled.within(x, radius, reduction)
        assert torch.stack([hits.query, hits.row], 1).tolist() == (exact < limit).nonzero().tolist()
        nearest = filled.within(x, radius, reduction, nearest=2)
        assert len(nearest) <= 6
        inside = torch.where(exact < limit, exact, torch.inf).topk(2, largest=False)
        assert sorted(zip(nearest.query.tolist(), nearest.row.tolist(), strict=True)) == sorted(
            (q, int(row))
            for q in range(3)
            for row, d in zip(inside.indices[q], inside.values[q], strict=True)
            if d < torch.inf
        )
