"""What the reader finds, passes over and cannot read: nothing is left out without being counted."""

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from typer.testing import CliRunner

from helpers.averages import SPACE, encode_by_averages
from shielded import ProtectedSet
from shielded.cli import app
from shielded.latent_space import to_rgb
from shielded.protected import add_images, load_images
from shielded.protected.ingest import sources
from shielded.protected.ingest.pictures import count_frames


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    encode_by_averages(monkeypatch)


def image(number, size=(16, 16)):
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def encoded(number, kind="PNG", **options):
    buffer = io.BytesIO()
    image(number).save(buffer, kind, **options)
    return buffer.getvalue()


def add(tmp_path, paths, **options):
    number = len(list(tmp_path.glob("set*")))
    protected = ProtectedSet.create(tmp_path / f"set{number}", SPACE)
    result = add_images(protected, paths, 2.0, progress=False, **options)
    assert result.found == result.new + result.present + len(result.skipped)
    assert len(protected) == result.added
    return result


def protect(*arguments, code=0):
    result = CliRunner().invoke(app, ["protect", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


# ---- suffixes and other files ----

PICTURES = {
    "a.PNG": "PNG", "b.pgm": "PPM", "c.dib": "DIB", "d.icb": "TGA", "e": "WEBP", "f.jpeg_large": "JPEG",
    ".hidden.png": "PNG", ".hidden": "JPEG", ".thumbs/g.png": "PNG", "h.png.bak": "PNG", "i.pcx": "PCX", 
    "j.j2k": "JPEG2000", "k.qoi": "QOI",
    "sub.folder/l.txt": "GIF", "m.tar": "PNG", "n.parquet": "BMP",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for number, (name, kind) in enumerate(PICTURES.items()):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, kind))
    return tmp_path / "photos"


@pytest.mark.parametrize("given", ["folder", "tar", "tar.gz", "glob", "all below", "list"])
def test_content_decides_what_a_picture_is(folder, tmp_path, given):
    paths = {"folder": folder, "glob": folder / "*", "all below": folder / "**", "list": f"@{tmp_path / 'list'}"}
    (tmp_path / "list").write_text("\n".join(str(folder / name) for name in PICTURES))
    if given.startswith("tar"):
        paths[given] = tmp_path / f"all.{given}"
        with tarfile.open(paths[given], "w:gz" if given == "tar.gz" else "w") as archive:
            archive.add(folder, "photos")
    result = add(tmp_path, str(paths[given]), strict=True)
    assert (result.added, result.skipped, result.not_looked_at) == (len(PICTURES), [], {})


OTHERS = {
    "clip.mp4": (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2" + bytes(99), "video"),
    "more.zip": (b"PK\3\4\x14" + bytes(99), "zip archive"),
    "drawing.svg": (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "scan.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "PDF"),
    "new.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG XL"),
    "log.gz": (gzip.compress(b"lines"), "compressed"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("packed", [False, True])
def test_what_may_hold_pictures_and_is_not_read_is_reported(tmp_path, name, packed):
    content, reason = OTHERS[name]
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(0))
    (folder / name).write_bytes(content)
    if packed:
        with tarfile.open(tmp_path / "all.tar", "w") as archive:
            archive.add(folder, "photos")
        folder = tmp_path / "all.tar"
    result = add(tmp_path, folder)
    ((path, said),) = result.skipped
    assert path.endswith(name)
    assert reason in said
    with pytest.raises(ValueError, match=reason):
        add(tmp_path, folder, strict=True)


def test_the_sums_of_summary_and_json_agree(folder, tmp_path):
    (folder / "notes.txt").write_text("words")
    (folder / "more.json").write_text("{}")
    (folder / "empty").touch()
    (folder / "._a.png").write_bytes(b"\0\5\x16\7" + bytes(60))
    (folder / "weights.bin").write_bytes(bytes(range(256)))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    (folder / "copy.png").write_bytes((folder / "a.PNG").read_bytes())
    image(80).save(folder / "animation.gif", save_all=True, append_images=[image(81), image(82)])
    n = len(PICTURES)
    first = json.loads(protect(folder, "--out", tmp_path / "set", "--radius", 2, "--json").stdout)
    counts = {name: first[name] for name in ("found", "new", "added", "present", "size")}
    assert counts == {"found": n + 5, "new": n + 3, "added": n + 3, "present": 1, "size": n + 3}
    assert [path for path, _ in first["skipped"]] == [str(folder / "broken.jpg")]
    assert first["not_looked_at"] == {
        "text": 2, "empty": 1, "files of the system": 1, "files in which no picture is recognised": 1,
    }  # fmt: skip
    again = protect(folder, "--out", tmp_path / "set", "--add", "--mirror").stdout
    assert f"{n + 5} found: {n + 3} added, 1 already present, 1 skipped, 0 removed; {2 * n + 6} in all." in again
    assert "Not looked at: 1 empty, 1 files in which no picture is recognised, 1 files of the system, 2 text." in again
    (folder / "broken.jpg").unlink()
    assert "weights.bin is not looked at" in protect(folder, "--out", tmp_path / "x", "--strict", code=1).stderr
    (folder / "weights.bin").unlink()
    protect(folder, "--out", tmp_path / "x", "--strict")  # text is no picture for certain


# ---- animations and pages ----


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_all_frames_are_protected(tmp_path, kind):
    pages = [image(number) for number in range(4)]
    suffix = {"TIFF": "tif"}.get(kind, kind.lower())
    options = (
        {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": "4:4:4"} if kind == "AVIF" else {}
    )
    pages[0].save(tmp_path / f"a.{suffix}", kind, save_all=True, append_images=pages[1:], **options)
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    result = add_images(protected, tmp_path / f"a.{suffix}", 2.0, progress=False, strict=True, mirror=True)
    assert (result.found, result.new, result.added) == (4, 4, 8)
    assert protected.ids[::2] == ["a", "a#2", "a#3", "a#4"]
    assert protected.sources[4] == f"{tmp_path}/a.{suffix}#3"
    with Image.open(tmp_path / f"a.{suffix}") as opened:
        for frame in range(4):
            opened.seek(frame)
            expected = np.asarray(opened.convert("RGB"), np.float32).transpose(2, 0, 1) / 127.5 - 1
            found = protected.vectors([2 * frame])[0, :3]
            means = torch.nn.functional.avg_pool2d(torch.from_numpy(expected)[None], 8)[0]
            torch.testing.assert_close(found, means, atol=1e-6, rtol=1e-6)
    again = add_images(protected, tmp_path / f"a.{suffix}", 2.0, progress=False)
    assert (again.added, again.present) == (0, 4)
    protected.remove(["a#3"])
    assert add_images(protected, tmp_path / f"a.{suffix}", 2.0, progress=False).added == 1
    loaded, skipped = load_images(tmp_path / f"a.{suffix}")
    assert len(loaded) == 1
    assert skipped[0][1] == "only the first of its 4 pictures is looked at"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
def test_an_animation_that_is_cut_off_is_reported(tmp_path, kind, share):
    image(0).save(tmp_path / "a", kind, save_all=True, append_images=[image(1), image(2)])
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[: int(share * len(content))])
    assert add(tmp_path, tmp_path / "a").skipped


@pytest.mark.parametrize("second", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
@pytest.mark.parametrize("first", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_a_picture_joined_behind_another_is_reported(tmp_path, first, second):
    files = []
    for number, (kind, options) in enumerate([(first, {}), (second, {})]):
        for more in ({}, {"JPEG": {"progressive": True, "quality": 30}, "GIF": {"save_all": True}}.get(kind, {})):
            buffer = io.BytesIO()
            image(number).save(buffer, kind, **options, **more)
            files.append(buffer.getvalue())
    alone, other = files[:2], files[2:]
    for content in alone:
        path = tmp_path / "alone"
        for padded in (b"", b"\0" * 5, *([] if first == "GIF" else [b"a comment"])):
            path.write_bytes(content + padded)
            assert count_frames(path.read_bytes()) == (1, None)
        for behind in other:
            frames, problem = count_frames(content + b"\0\0" + behind)
            assert frames >= 1
            assert "another picture is joined behind" in problem


# ---- archives ----


def tar_of(numbers, kind=tarfile.GNU_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for number in numbers:
            data = encoded(number)
            member = tarfile.TarInfo(f"{number:04d}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return bytearray(buffer.getvalue())


def starts(data):
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as archive:
        return [(member.offset, member.offset_data) for member in archive]


def flipped(data, *positions):
    for at in positions:
        data[at] ^= 0x55
    return data


WHOLE = tar_of(range(6))
START = [header for header, _ in starts(WHOLE)]
DATA = [content for _, content in starts(WHOLE)]
ARCHIVES = {
    "first header": (flipped(WHOLE[:], 150), 5),
    "size in a header": (flipped(WHOLE[:], START[2] + 130), 5),
    "two headers": (flipped(WHOLE[:], START[1] + 3, START[4] + 3), 4),
    "last header": (flipped(WHOLE[:], START[5] + 20), 5),
    "a run of zeros over a header": (WHOLE[: START[3]] + bytes(512) + WHOLE[START[3] + 512 :], 5),
    "cut in the data": (WHOLE[: DATA[3] + 100], 3),
    "cut after the data": (WHOLE[: START[4]], 4),
    "cut in the first header": (WHOLE[:300], 0),
    "garbage behind the end": (WHOLE + b"x" * 700, 6),
    "a compressed one cut": (bytearray(gzip.compress(WHOLE)[:-700]), 0),
    "a compressed one flipped": (flipped(bytearray(lzma.compress(WHOLE, preset=0)), 5000), 0),
    "a compressed one without its last bytes": (bytearray(bz2.compress(WHOLE)[:-5]), 0),
}


@pytest.mark.parametrize("damage", ARCHIVES)
def test_what_is_behind_damage_is_read_and_the_archive_reported(tmp_path, damage):
    content, least = ARCHIVES[damage]
    (tmp_path / "a.tar").write_bytes(content)
    result = add(tmp_path, tmp_path / "a.tar")
    assert result.added >= least
    assert any(path == str(tmp_path / "a.tar") or "0000.png" in path for path, _ in result.skipped)
    with pytest.raises(ValueError, match=r"damaged|cannot be decoded"):
        add(tmp_path, tmp_path / "a.tar", strict=True)


@pytest.mark.parametrize("kind", ["tar", "gz", "bz2", "xz", "no name"])
def test_joined_archives_are_read_to_the_end(tmp_path, kind):
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(kind, bytes)
    path = tmp_path / ("archive" if kind == "no name" else "a.tar" + (f".{kind}" if kind != "tar" else ""))
    path.write_bytes(b"".join(compress(bytes(tar_of([n, n + 1]))) for n in (0, 2, 4)))
    assert add(tmp_path, path, strict=True).added == 6


def test_an_error_while_an_archive_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(tar_of(range(6)))
    (tmp_path / "b.tar").write_bytes(tar_of(range(6, 9)))
    taken = tarfile.TarFile.extractfile

    def failing(self, member):
        if getattr(member, "name", member) == "0003.png":
            raise OSError(5, "Input/output error")
        return taken(self, member)

    monkeypatch.setattr(tarfile.TarFile, "extractfile", failing)
    result = add(tmp_path, [tmp_path / "a.tar", tmp_path / "b.tar"])
    assert result.added == 6
    assert "Input/output error" in result.skipped[0][1]


# ---- tables ----

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def cells(*numbers):
    return [{"bytes": encoded(number), "path": None} for number in numbers]


TABLES = {
    "two structs": {"before": cells(0, 1), "after": cells(2, 3)},
    "struct and large binary": {"photo": cells(0, 1), "mask": pa.array([encoded(2), encoded(3)], pa.large_binary())},
    "list and binary": {"views": [cells(0, 1), cells(2)], "cover": [encoded(3), encoded(4)]},
    "three binaries": {"x": [encoded(0)], "y": [encoded(1)], "z": [encoded(2)]},
}


@pytest.mark.parametrize("name", TABLES)
def test_several_columns_of_images_are_refused_with_their_list(tmp_path, name):
    (tmp_path / "data").mkdir()
    parquet.write_table(pa.table(TABLES[name]), tmp_path / "data" / "a.parquet")
    for given in (tmp_path / "data" / "a.parquet", tmp_path / "data"):
        with pytest.raises(ValueError, match=f"several columns of images: {', '.join(TABLES[name])}; .*--column"):
            add(tmp_path, given)
    refused = protect(tmp_path / "data", "--out", tmp_path / "refused", code=1)
    assert "several columns" in refused.stderr
    assert not (tmp_path / "refused").exists()
    columns = list(TABLES[name])[-2:]
    both = protect(
        tmp_path / "data", "--out", tmp_path / "x", *(f"--column={c}" for c in columns), "--json", "--strict"
    )
    assert json.loads(both.stdout)["added"] == {"list and binary": 5, "three binaries": 2}.get(name, 4)
    with pytest.raises(ValueError, match="no column of images named 'nobody'"):
        add(tmp_path, tmp_path / "data", columns=["nobody"])


def test_columns_of_other_bytes_are_no_images(tmp_path):
    columns = {
        "sound": [{"bytes": b"RIFF\0\0\0\0WAVE", "path": "a.wav"}],
        "embedding": [bytes(64)],
        "picture": cells(1),
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert add(tmp_path, tmp_path / "a.parquet", strict=True).added == 1


def test_a_column_of_images_of_any_type_is_read(tmp_path):
    column = [encoded(number) for number in range(3)]
    longest = max(map(len, column))
    types = {
        "dictionary": pa.array(column).dictionary_encode(),
        "one size": pa.array([data.ljust(longest, b"\0") for data in column], pa.binary(longest)),
        "views": pa.array(column, pa.binary_view()),
    }
    for number, (name, values) in enumerate(types.items(), 1):
        path = str(tmp_path / f"{number}.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, pa.schema({name: values.type})) as writer:
            writer.write_table(pa.table({name: values}))
        assert add(tmp_path, path, strict=True).found == 3


def test_a_table_without_images_never_ends_the_walk(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.png").write_bytes(encoded(0))
    parquet.write_table(pa.table({"file_name": ["b.png"], "width": [16]}), tmp_path / "data" / "a.parquet")
    result = add(tmp_path, tmp_path / "data", strict=True)
    assert (result.added, result.not_looked_at) == (1, {"tables without a column of images": 1})
    parquet.write_table(pa.table({"pixels": [[[0, 1], [2, 3]]]}), tmp_path / "data" / "c.parquet")
    result = add(tmp_path, tmp_path / "data")
    assert (result.added, result.not_looked_at) == (1, {"tables without a column of images": 2})
    with pytest.raises(ValueError, match=r"c\.parquet is not looked at: tables without a column of images"):
        add(tmp_path, tmp_path / "data", strict=True)  # numbers may be the pixels of pictures
    with pytest.raises(ValueError, match="has no column of images"):
        add(tmp_path, tmp_path / "data" / "a.parquet")


def test_the_content_of_a_table_decides_its_format(tmp_path):
    (tmp_path / "a.parquet").write_bytes(stream_of(0, 1))
    (tmp_path / "b.arrow").write_bytes(parquet_of(2, 3))
    assert add(tmp_path, [tmp_path / "a.parquet", tmp_path / "b.arrow"], strict=True).added == 4


def stream_of(*numbers):
    table, buffer = pa.table({"image": cells(*numbers)}), io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table, max_chunksize=1)
    return buffer.getvalue()


def parquet_of(*numbers):
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"image": cells(*numbers)}), buffer)
    return buffer.getvalue()


def test_joined_and_cut_tables(tmp_path):
    (tmp_path / "a.arrow").write_bytes(stream_of(0, 1) + stream_of(2, 3))
    assert add(tmp_path, tmp_path / "a.arrow", strict=True).added == 4
    whole = stream_of(0, 1, 2)
    for content in (whole[:-8], whole[:-300], whole[: len(whole) // 2], parquet_of(0, 1) + parquet_of(2, 3)):
        (tmp_path / "b.arrow").write_bytes(content)
        assert "the table is damaged" in add(tmp_path, tmp_path / "b.arrow").skipped[-1][1]
    cut = parquet_of(0, 1)[:-20]
    (tmp_path / "c.parquet").write_bytes(cut)
    assert "the table is damaged" in add(tmp_path, tmp_path / "c.parquet").skipped[-1][1]


# ---- folders ----


@pytest.fixture
def hurdles(tmp_path):
    """A folder with everything that once ended a walk."""
    folder = tmp_path / "hurdles"
    (folder / "deep" / "er").mkdir(parents=True)
    for number, name in enumerate(("a.png", "deep/b.png", "deep/er/c.png", "z.png")):
        (folder / name).write_bytes(encoded(number))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.png").write_bytes(encoded(7))
    (folder / "broken link.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "broken link").symlink_to(tmp_path / "nowhere")
    (folder / "circle").symlink_to(folder)
    (folder / "itself.png").symlink_to(folder / "itself.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "pipe.png")
    (folder / "cut.jpg").write_bytes(encoded(5, "JPEG")[:200])
    return folder


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
def test_nothing_ends_the_walk_of_a_folder(hurdles, tmp_path, monkeypatch):
    listed, scandir = os.listdir, os.scandir

    def denied(function):
        def call(path="."):
            if str(path).endswith("er"):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path)

        return call

    result = add(tmp_path, hurdles)
    assert result.added == 5
    failed = {os.path.relpath(path, hurdles).rstrip("/") for path, _ in result.skipped}
    assert failed == {"broken link.png", "broken link", "itself.png", "pipe", "pipe.png", "cut.jpg"}
    assert result.not_looked_at == {"folders that were read already": 1}
    monkeypatch.setattr(os, "scandir", denied(scandir))
    monkeypatch.setattr(os, "listdir", denied(listed))
    result = add(tmp_path, hurdles)
    assert result.added == 4
    assert ("Permission denied") in dict(result.skipped)[str(hurdles / "deep" / "er")]
    loaded, skipped = load_images(hurdles)
    assert [name for name, *_ in loaded] == ["a", "deep/b", "linked/d", "z"]
    assert len(skipped) == 7


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
def test_verify_and_evaluate_walk_as_protect_does(hurdles, tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    protected.add(torch.full((1, 4, 2, 2), 9.0), ["far"], 1.0)
    result = CliRunner().invoke(app, ["verify", str(hurdles), "--protect", str(tmp_path / "set"), "--json"])
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert (found["n"], len(found["skipped"])) == (5, 6)
    assert "broken link.png" in result.stderr
    for number in range(3):
        (hurdles / f"more{number}.jfif").write_bytes(encoded(20 + number, "JPEG"))
    result = CliRunner().invoke(app, ["evaluate", str(hurdles), str(hurdles), "--json", "-k", "3"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["generated"] == 8
    assert result.stderr.count("skipped ") == 12


# ---- colour profiles ----


def profile(primaries, gamma):
    """Make a matrix profile of RGB, white D65 (ICC.1:2001), from xy of its primaries; Bradford to D50."""

    def xyz(x, y):
        return np.array([x / y, 1, (1 - x - y) / y])

    columns, white = np.stack([xyz(*p) for p in primaries], 1), xyz(0.3127, 0.329)
    cone = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1, 0.8249])
    adapted = np.linalg.inv(cone) @ np.diag((cone @ d50) / (cone @ white)) @ cone
    matrix = adapted @ (columns * np.linalg.solve(columns, white))

    def fixed(values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(d50), b"cprt": b"text\0\0\0\0none\0"}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    for column, name in enumerate(b"rgb"):
        tags[bytes([name]) + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(matrix[:, column])
        tags[bytes([name]) + b"TRC"] = b"curv\0\0\0\0" + struct.pack(">IH", 1, int(gamma * 256))
    start, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I", start + len(body)) + b"lcms\2\x10\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    return head + fixed(d50) + bytes(48) + table + body


PROFILES = {
    "Adobe RGB": profile([(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)], 2.2),
    "Display P3": profile([(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)], 2.2),
    "Rec. 2020": profile([(0.708, 0.292), (0.17, 0.797), (0.131, 0.046)], 2.4),
    "swapped": profile([(0.15, 0.06), (0.64, 0.33), (0.3, 0.6)], 2.2),
}


@pytest.fixture(scope="module")
def colours():
    ramp = np.stack(np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * 3), -1).reshape(64, 64, 3)
    return Image.fromarray(ramp)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("name", PROFILES)
def test_a_picture_is_the_same_in_every_profile(colours, name, kind):
    icc = PROFILES[name]
    srgb, given = ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(icc))
    converted = ImageCms.profileToProfile(colours, srgb, given, outputMode="RGB")
    buffer = io.BytesIO()
    converted.save(buffer, kind, icc_profile=icc, **({"lossless": True} if kind == "WEBP" else {}))
    back = to_rgb(Image.open(buffer))
    assert "icc_profile" not in back.info
    expected = ImageCms.profileToProfile(converted, given, srgb, outputMode="RGB")
    difference = np.abs(np.asarray(back).astype(int) - np.asarray(expected)).max()
    assert difference <= 2
    assert np.abs(np.asarray(back).astype(int) - np.asarray(colours)).mean() < 2  # the rounding of 8 bits, twice
    assert np.array_equal(np.asarray(to_rgb(back)), np.asarray(back))  # once
    assert np.abs(np.asarray(converted).astype(int) - np.asarray(colours)).mean() > 2


@pytest.mark.parametrize("icc", [ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"nothing", b""])
def test_srgb_and_unreadable_profiles_change_nothing(colours, icc):
    buffer = io.BytesIO()
    colours.save(buffer, "PNG", icc_profile=icc)
    assert np.array_equal(np.asarray(to_rgb(Image.open(buffer))), np.asarray(colours))


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "CMYK"])
def test_profiles_of_other_modes(colours, mode):
    """Palettes and transparency take the profile of their colours; a profile of other channels is passed over."""
    icc, buffer = PROFILES["Adobe RGB"], io.BytesIO()
    picture = colours.convert(mode)
    picture.save(buffer, "TIFF" if mode == "CMYK" else "PNG", icc_profile=icc)
    found, plain = np.asarray(to_rgb(Image.open(buffer))).astype(int), np.asarray(to_rgb(picture)).astype(int)
    if mode in ("RGBA", "P"):
        given = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        expected = ImageCms.profileToProfile(
            picture.convert("RGB"), given, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
        assert np.abs(found - np.asarray(expected)).max() <= 2
    else:
        assert np.abs(found - plain).max() <= 1


def test_counts_match_what_is_read(folder, tmp_path):
    (folder / "notes.txt").write_text("words")
    assert sources.count_pictures(folder) == sum(picture.passed is None for picture in sources.pictures(folder))
