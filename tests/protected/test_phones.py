"""Pictures as phones save them: HEIC, and JPEG files with further pictures that help to show the photo."""

import io
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, TiffImagePlugin

from helpers.averages import SPACE, encode_by_averages
from shielded import ProtectedSet
from shielded.protected import add_images, load_images
from shielded.protected.ingest import contents
from shielded.protected.ingest.pictures import count_frames, decode_picture


@pytest.fixture
def heif():
    package = pytest.importorskip("pillow_heif")
    contents.reads_heic.cache_clear()
    assert contents.reads_heic()
    return package


def photo():
    picture = Image.new("RGB", (64, 32), "white")
    ImageDraw.Draw(picture).rectangle((0, 0, 31, 15), fill="firebrick")
    return picture


def jpeg(picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".HEIC", ".heif", ""])
def test_heic_without_pillow_heif_is_named_with_what_to_install(tmp_path, monkeypatch, suffix):
    encode_by_averages(monkeypatch)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    contents.reads_heic.cache_clear()
    photo().save(tmp_path / "a.png")
    (tmp_path / f"IMG_1{suffix}").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    result = add_images(ProtectedSet.create(tmp_path / "set", SPACE), [str(tmp_path / "*")], 2.0, progress=False)
    contents.reads_heic.cache_clear()
    ((path, reason),) = [entry for entry in result.skipped if "IMG_1" in entry[0]]
    assert path.endswith(f"IMG_1{suffix}")
    assert reason == "HEIC pictures need the extra `heic`: pip install -e '.[heic]' in a checkout of shielded"
    assert result.added == 1


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "IMG_1"])
def test_heic_is_read_upright(tmp_path, heif, name):
    exif = Image.Exif()
    exif[0x112] = 6  # turned by 90° to the right when shown
    photo().rotate(90, expand=True).save(tmp_path / name, "HEIF", quality=95, exif=exif.tobytes())
    (((_, image, _, _),), skipped) = load_images(tmp_path / name)
    assert skipped == []
    assert np.abs(np.asarray(image, int) - np.asarray(photo(), int)).mean() < 3


def test_the_picture_that_viewers_show_comes_first(heif):
    file, buffer = heif.from_pillow(Image.new("RGB", (16, 16), "red")), io.BytesIO()
    file.add_from_pillow(Image.new("RGB", (16, 16), "blue"))
    file.save(buffer, primary_index=1, quality=95)
    data = buffer.getvalue()
    assert count_frames(data) == (2, None)
    colours = [decode_picture(data, frame).getpixel((8, 8)) for frame in range(2)]
    assert [int(np.argmax(colour)) for colour in colours] == [2, 0]


@pytest.mark.parametrize("mark", [b"urn:com:apple:photo:2020:aux:hdrgainmap", b"http://ns.adobe.com/hdr-gain-map/1.0/"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_gain_map_is_part_of_its_photo(mark, listed):
    gain = Image.new("L", (16, 8), 90)
    if listed:
        buffer = io.BytesIO()
        photo().save(buffer, "MPO", save_all=True, append_images=[gain])
        data = buffer.getvalue()
        at = data.rindex(b"\xff\xd8\xff") + 2
    else:
        data = jpeg(photo())
        at = len(data) + 2
        data += jpeg(gain)
    marked = data[:at] + b"\xff\xe1" + (len(mark) + 2).to_bytes(2, "big") + mark + data[at:]
    assert count_frames(marked) == (1, None)
    frames, problem = count_frames(data)
    assert (frames, problem is None) == ((2, True) if listed else (1, False))


def test_the_preview_of_a_raw_photo_does_not_stand_for_it():
    preview, buffer = TiffImagePlugin.ImageFileDirectory_v2(), io.BytesIO()
    preview[254] = 1
    photo().save(buffer, "TIFF", tiffinfo=preview)
    with pytest.raises(ValueError, match="a raw photo"):
        decode_picture(buffer.getvalue())
