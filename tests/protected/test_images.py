import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from shielded.latent_space import LatentSpace, to_pixels
from shielded.protected import ProtectedSet, add_images, load_images
from shielded.protected.ingest import encoding, sources


@pytest.fixture(scope="module")
def space():
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    return LatentSpace((4, 8, 8), (16, 16), vae_class="AutoencoderTiny", vae_sha256="0" * 64, vae=vae)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    for name in ("a.png", "b.JPG", "b.webp", "deep/a.bmp", "deep/er/v1.2.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_load_images(folder):
    images, skipped = load_images(folder)
    assert [name for name, *_ in images] == ["a", "b", "b-2", "deep/a", "deep/er/v1.2"]
    assert not skipped
    for _, image, source, sha256 in images:
        assert image.mode == "RGB"
        assert sha256 == hashlib.sha256(Path(source).read_bytes()).hexdigest()
    np.testing.assert_array_equal(np.asarray(images[0][1]), np.asarray(Image.open(folder / "a.png")))


def test_files_folders_and_globs(folder):
    def ids(paths):
        return [name for name, *_ in load_images(paths)[0]]

    assert ids(str(folder / "a.png")) == ["a"]
    assert ids(folder / "*.png") == ["a"]
    assert ids(str(folder / "**" / "*.png")) == ["a", "deep/er/v1.2"]
    assert ids([folder / "deep", folder / "a.png", folder / "deep" / "a.bmp"]) == ["a", "er/v1.2", "a-2"]
    for missing in (folder / "none.png", folder / "*.tif", folder / "none"):
        with pytest.raises(FileNotFoundError, match="No images at"):
            load_images(missing)


def test_files_that_cannot_be_decoded(folder):
    content = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").touch()
    Image.new("F", (4, 4)).save(folder / "float.tif")
    images, skipped = load_images(folder)
    assert len(images) == 5
    assert [path.rsplit("/", 1)[1] for path, _ in skipped] == ["cut.png", "empty.jpg", "float.tif"]
    assert all(reason for _, reason in skipped)
    with pytest.raises(ValueError, match=r"cut\.png cannot be decoded"):
        load_images(folder, strict=True)


def test_photos_are_turned_upright(tmp_path):
    image = Image.new("RGB", (8, 4), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_images(tmp_path)[0][0][1].size == (4, 8)


def test_add_images(folder, space, tmp_path):
    (folder / "broken.png").write_bytes(b"x")
    protected = ProtectedSet.create(tmp_path / "set", space)
    result = add_images(protected, folder, radius=3.0, batch_size=2)
    assert (result.added, result.present) == (5, 0)
    assert [path for path, _ in result.skipped] == [str(folder / "broken.png")]
    images, _ = load_images(folder)
    assert protected.ids == [name for name, *_ in images]
    assert protected.sources == [source for *_, source, _ in images]
    assert protected.sha256 == [sha256 for *_, sha256 in images]
    assert protected.radii.tolist() == [3.0] * 5
    expected = space.encode([image for _, image, *_ in images])
    torch.testing.assert_close(protected.vectors(range(5)), expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_encoded_twice(folder, space, tmp_path, monkeypatch):
    """A run that is interrupted goes on where it stopped, and copies of a file count as present."""
    protected = ProtectedSet.create(tmp_path / "set", space)
    encode = LatentSpace.encode
    encoded = []

    def watched(self, images, *batch_size):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.extend(images)
        return encode(self, images, *batch_size)

    with monkeypatch.context() as patch:
        patch.setattr(LatentSpace, "encode", watched)
        with pytest.raises(KeyboardInterrupt):
            add_images(protected, folder, batch_size=2)
    protected = ProtectedSet.open(tmp_path / "set")
    assert len(protected) == 2
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "copy2.bmp").write_bytes((folder / "deep" / "a.bmp").read_bytes())
    result = add_images(protected, folder, batch_size=2, space=space)
    assert (result.added, result.present) == (3, 4)
    assert add_images(protected, folder, space=space).added == 0
    assert len(protected) == len(set(protected.ids)) == 5


def test_mirrored_images(folder, space, tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", space)
    add_images(protected, [folder / "a.png", folder / "deep" / "a.bmp"])
    result = add_images(protected, folder, radius=2.0, mirror=True, batch_size=3)
    assert (result.added, result.present) == (3 + 5, 0)
    assert add_images(protected, folder, mirror=True).present == add_images(protected, folder).present == 5
    plain = [name for name in protected.ids if not name.startswith("mirrored:")]
    assert sorted(f"mirrored:{name}" for name in ("a", "b", "b-2", "deep/a", "deep/er/v1.2")) == sorted(
        set(protected.ids) - set(plain)
    )
    assert protected.ids[2:4] == ["mirrored:a", "b"]  # neighbours, in the order of the files
    pictures = {source: image for _, image, source, _ in load_images(folder)[0]}
    for row, source in enumerate(protected.sources):
        mirrored = protected.ids[row].startswith("mirrored:")
        image = to_pixels(pictures[source], space.image_size)
        expected = space.encode((image.flip(-1) if mirrored else image)[None])
        torch.testing.assert_close(protected.vectors([row]), expected, atol=1e-5, rtol=1e-5)
        assert protected.sha256[row] == hashlib.sha256(Path(source).read_bytes()).hexdigest()


def test_a_failure_keeps_what_was_encoded(folder, space, tmp_path, monkeypatch):
    read = sources.pictures

    def failing(paths):
        for number, picture in enumerate(read(paths)):
            if number == 4:
                raise OSError("the network is gone")
            yield picture

    monkeypatch.setattr(sources, "pictures", failing)
    protected = ProtectedSet.create(tmp_path / "set", space)
    with pytest.raises(OSError, match="network"):
        add_images(protected, folder, batch_size=1)
    assert ProtectedSet.open(tmp_path / "set").ids == ["a", "b", "b-2"]


def test_the_encoder_is_given_the_same_batches_after_a_stop(folder, space, tmp_path, monkeypatch):
    """So the set is the same to the last bit."""
    batches = []
    encode = LatentSpace.encode

    def watched(self, pixels, *batch_size):
        if len(pixels):
            batches.append(pixels)
        return encode(self, pixels, *batch_size)

    monkeypatch.setattr(LatentSpace, "encode", watched)
    monkeypatch.setattr(encoding, "_SAVE_SECONDS", 0)
    (folder / "b0.png").write_bytes(b"broken")
    (folder / "b1.png").write_bytes((folder / "a.png").read_bytes())
    whole = ProtectedSet.create(tmp_path / "whole", space)
    add_images(whole, folder, batch_size=2)
    expected, batches[:] = list(batches), []
    stopped = ProtectedSet.create(tmp_path / "stopped", space)
    add = ProtectedSet.add

    def add_once(self, *arguments):
        if len(self):
            raise KeyboardInterrupt
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ProtectedSet, "add", add_once)
        with pytest.raises(KeyboardInterrupt):
            add_images(stopped, folder, batch_size=2)
    assert len(stopped) == 2
    del batches[1:]
    add_images(stopped, folder, batch_size=2)
    assert len(batches) == len(expected) == 3
    assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))
    assert stopped.ids == whole.ids


# ---- sources ----


def picture_bytes(folder):
    return {
        path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".png", ".jpg")
    }


@pytest.fixture
def tar(folder, tmp_path):
    """A webdataset: pictures with captions of the same name."""
    path = tmp_path / "shards" / "00000.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for number, data in enumerate(picture_bytes(folder).values()):
            for suffix, content in ((".png", data), (".json", b"{}")):
                member = tarfile.TarInfo(f"{number:05d}{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def check_set(protected, folder, ids, origins):
    data = list(picture_bytes(folder).values())
    assert protected.ids == ids
    assert protected.sources == origins
    assert protected.sha256 == [hashlib.sha256(content).hexdigest() for content in data]
    pictures = [Image.open(io.BytesIO(content)) for content in data]
    expected = protected.space.encode(pictures)
    torch.testing.assert_close(protected.vectors(range(len(ids))), expected, atol=1e-5, rtol=1e-5)


def test_tar_archives(folder, tar, space, tmp_path):
    for given in (tar, tar.parent, tar.parent / "*.tar"):
        protected = ProtectedSet.create(tmp_path / "set", space, overwrite=True)
        assert add_images(protected, given, batch_size=2).added == sources.count_pictures(given) == 3
        check_set(protected, folder, [f"00000/0000{n}" for n in range(3)], [f"{tar}/0000{n}.png" for n in range(3)])
    packed = tar.with_name("packed.tar.gz")
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(folder / "a.png", "a.png")
    assert sources.count_pictures(packed) is None
    assert [picture.name for picture in sources.pictures(packed)] == ["packed/a"]


def test_a_damaged_archive(tar, space, tmp_path):
    content = tar.read_bytes()
    with tarfile.open(tar) as archive:
        member = archive.getmembers()[2]
    tar.write_bytes(content[: member.offset_data + member.size // 2])
    protected = ProtectedSet.create(tmp_path / "set", space)
    result = add_images(protected, tar)
    assert (result.added, protected.ids) == (1, ["00000/00000"])
    ((path, reason),) = result.skipped
    assert path == str(tar)
    assert "the archive is damaged" in reason
    with pytest.raises(ValueError, match="archive is damaged"):
        add_images(ProtectedSet.create(tmp_path / "strict", space), tar, strict=True)


def test_parquet_and_saved_datasets(folder, space, tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [{"bytes": data, "path": name} for name, data in picture_bytes(folder).items()]
    values[1] = {"bytes": None, "path": str(folder / "b.JPG")}  # datasets may store a path alone
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"label": pa.array([0, 1, 2]), "image": pa.array(values, kind)})
    saved = tmp_path / "dataset"  # as Dataset.save_to_disk writes it
    saved.mkdir()
    parquet.write_table(table, saved / "train.parquet", row_group_size=2)
    with (
        pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=2)
    (saved / "cache-1.arrow").write_bytes(b"left over by datasets")
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    for file in ("train.parquet", "data-00000-of-00001.arrow"):
        protected = ProtectedSet.create(tmp_path / "set", space, overwrite=True)
        assert add_images(protected, saved / file).added == sources.count_pictures(saved / file) == 3
        stem = Path(file).stem
        check_set(protected, folder, [f"{stem}/{n}" for n in range(3)], [f"{saved / file}/{n}" for n in range(3)])
    assert [Path(picture.source).parent.name for picture in sources.pictures(saved) if picture.passed is None] == [
        *["data-00000-of-00001.arrow"] * 3,
        *["train.parquet"] * 3,
    ]
    plain = tmp_path / "plain.parquet"
    parquet.write_table(pa.table({"jpg": pa.array([picture_bytes(folder)["a.png"], None])}), plain)
    result = add_images(ProtectedSet.create(tmp_path / "plain", space), plain)
    assert (result.added, result.skipped) == (1, [(f"{plain}/1", "the table has no image in this row")])
    parquet.write_table(pa.table({"text": ["a"]}), plain)
    with pytest.raises(ValueError, match=r"no column of images .* it has \['text'\]"):
        sources.require_images(plain)
    plain.write_bytes(b"PAR1 but damaged")
    (broken,) = sources.pictures(plain)
    with pytest.raises(ValueError, match="the table is damaged"):
        broken.read()


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(RuntimeError, match="the extra `parquet`"):
        list(sources.pictures(tmp_path / "x.parquet"))


def test_lists_of_paths(folder, tar, space, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{folder / 'b.JPG'}\n\n  {folder / 'deep'}\n{tar}\n{folder / 'missing.png'}\n")
    protected = ProtectedSet.create(tmp_path / "set", space)
    result = add_images(protected, f"@{listed}")
    assert protected.ids == ["b", "a", "er/v1.2", "00000/00000"]
    assert result.present == 2  # in the archive again
    ((path, reason),) = result.skipped
    assert path == str(folder / "missing.png")
    assert "No such file" in reason
    with pytest.raises(FileNotFoundError):
        add_images(protected, "@nowhere.txt")


def test_names_that_are_not_text(space, tmp_path):
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    try:
        Image.new("RGB", (4, 4), "red").save(tmp_path / name)
    except OSError:
        pytest.skip("this file system has no such names")
    protected = ProtectedSet.create(tmp_path / "set", space)
    add_images(protected, tmp_path / "*.png")
    assert ProtectedSet.open(protected.path).sources == [str(tmp_path / name)]


def test_ids_stay_unique_across_runs(folder, space, tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", space)
    add_images(protected, folder / "a.png")
    add_images(protected, folder / "deep")
    assert protected.ids == ["a", "a-2", "er/v1.2"]


def test_refuses_a_foreign_space_and_one_without_encoder(folder, space, tmp_path):
    ProtectedSet.create(tmp_path / "set", space)
    protected = ProtectedSet.open(tmp_path / "set")
    with pytest.raises(ValueError, match=r"LatentSpace\.of"):
        add_images(protected, folder)
    with pytest.raises(ValueError, match="another latent space"):
        add_images(protected, folder, space=LatentSpace((4, 9, 8)))
    (folder / "empty.jpg").touch()
    with pytest.raises(ValueError, match=r"empty\.jpg cannot be decoded"):
        add_images(protected, folder, space=space, strict=True)
