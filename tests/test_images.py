import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from shielded.latent_space import LatentSpace
from shielded.protected import ProtectedSet, add_images, load_images


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

    def watched(self, images, batch_size):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.extend(images)
        return encode(self, images, batch_size)

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
