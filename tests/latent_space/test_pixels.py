"""The space of samplers that work on pixels: the same numbers that a model is trained on, and no others."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.pipelines import model, randn
from shielded import LatentSpace, ProtectedSet, Spell
from shielded.protected import add_images


def pictures(n, size=(8, 8), seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(n)]


def unet(sample_size=8, channels=3, **config):
    return model(
        "UNet2DModel",
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        **config,
    )


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 1), (0, 255), (-0.5, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_encoding_is_an_affine_map_of_bytes_that_decoding_undoes(channels, low, high):
    space, given = LatentSpace.pixels((channels, 8, 8), (low, high)), pictures(3)
    if channels == 1:
        given = [image.convert("L") for image in given]
    expected = np.stack([np.asarray(image, np.float64).reshape(8, 8, channels) for image in given])
    z = space.encode(given)
    assert z.shape == (3, channels, 8, 8)
    assert z.dtype == torch.float32
    np.testing.assert_allclose(z.permute(0, 2, 3, 1), low + (high - low) * expected / 255, atol=2e-5 * (high - low))
    for image, again in zip(given, space.decode(z), strict=True):
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(again))


def test_tensors_and_pictures_are_the_same():
    space, given = LatentSpace.pixels((3, 8, 8), (0, 1)), pictures(2)
    tensor = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in given]).float() / 127.5 - 1
    assert torch.equal(space.encode(given), space.encode(tensor))
    grey = LatentSpace.pixels((1, 8, 8))
    torch.testing.assert_close(grey.encode(tensor[:, :1]), tensor[:, :1])


@pytest.mark.parametrize(
    ("shape", "around", "message"),
    [
        ((4, 8, 8), (-1, 1), "height, width"),
        ((3, 8), (-1, 1), "height, width"),
        ((3, 2, 8, 8), (-1, 1), "height, width"),
        ((3, 8, 8), (1, -1), "black and white"),
        ((3, 8, 8), (0, float("nan")), "black and white"),
        ((3, 8, 8), "ab", "black and white"),
        ((3, 8, 8), (0, 1, 2), "black and white"),
    ],
)
def test_what_is_no_space_of_pixels(shape, around, message):
    with pytest.raises(ValueError, match=message):
        LatentSpace.pixels(shape, around)


def test_spaces_of_another_range_or_kind_are_told_apart(tmp_path):
    one, other, bare = LatentSpace.pixels((3, 8, 8)), LatentSpace.pixels((3, 8, 8), (0, 1)), LatentSpace((3, 8, 8))
    latents = LatentSpace((3, 8, 8), vae_class="AutoencoderKL", vae_sha256="0" * 64)
    assert len({space.fingerprint for space in (one, other, bare, latents)}) == 4
    one.require_same(LatentSpace.from_json(one.to_json()))
    one.require_same(bare)
    with pytest.raises(ValueError, match=r"pixel_range \(-1\.0, 1\.0\) against \(0\.0, 1\.0\)"):
        one.require_same(other)
    with pytest.raises(ValueError, match="vae_class"):
        one.require_same(latents)
    assert ProtectedSet.create(tmp_path / "set", other).space == ProtectedSet.open(tmp_path / "set").space == other


@pytest.mark.parametrize("cls", ["DDPMPipeline", "DDIMPipeline"])
def test_of_diffusers_pipelines(cls):
    import diffusers

    pipe = getattr(diffusers, cls)(unet((8, 16)), diffusers.DDIMScheduler())
    assert LatentSpace.of(pipe) == LatentSpace.pixels((3, 8, 16)) == LatentSpace.of(pipe, 8, 16)
    with pytest.raises(ValueError, match="8x16 pixels"):
        LatentSpace.of(pipe, 16, 16)
    # What the pipeline returns, encoded, are the sampler's own values but for clipping and the rounding to bytes.
    spell = Spell(randn(1, 3, 8, 16) + 100, radius=1e-3, batch=False)
    with spell.attach(pipe):
        images = pipe(batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert (LatentSpace.of(pipe).encode(images) - spell.finished.clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-6


def test_a_folder_in_a_set_that_was_opened(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, picture in enumerate(pictures(3, (10, 12))):
        picture.save(tmp_path / "photos" / f"{i}.png")
    ProtectedSet.create(tmp_path / "set", LatentSpace.pixels((3, 8, 8), (0, 1)))
    protected = ProtectedSet.open(tmp_path / "set")  # pixels need no model
    add_images(protected, tmp_path / "photos", progress=False)
    protected.add(pictures(1), ["another"])
    assert protected.vectors([0, 1, 2, 3]).shape == (4, 3, 8, 8)


# Another range ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [255 * torch.rand(2, 3, 8, 8), 3 * randn(2, 3, 8, 8)])
def test_a_set_refuses_pixels_of_another_range(values, tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace.pixels((3, 8, 8)))
    with pytest.raises(ValueError, match=r"pixels in \[-1, 1\]"):
        protected.add(values, ["a", "b"])
    protected.add(1.05 * values.clamp(-1, 1), ["a", "b"])  # as samplers overshoot


@pytest.mark.filterwarnings("error:the values of the protected:UserWarning")
@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize(
    ("references", "message"),
    [
        (5.5 * randn(20, 4, 8, 8), "5.* times as large"),  # latents of Stable Diffusion, not scaled
        (0.3 * randn(20, 4, 8, 8), "0.3.* times as large"),
        (torch.rand(20, 4, 8, 8), "no value of the protected references is negative"),
        (randn(20, 4, 8, 8), None),
        (2 * randn(20, 4, 8, 8), None),
    ],
)
def test_references_of_another_range_are_noticed_once(references, message, on_disk, tmp_path, recwarn):
    if on_disk:
        protected = ProtectedSet.create(tmp_path / "set", LatentSpace((4, 8, 8)))
        protected.add(references, list(range(20)))
    else:
        protected = references
    spell = Spell(protected, radius=1e-3, batch=False)
    samples = randn(4, 4, 8, 8, seed=2)
    if message is None:
        spell.finish(samples)
    else:
        with pytest.warns(UserWarning, match=message):
            spell.finish(samples)
    assert torch.equal(spell.finish(samples), samples)
    assert not recwarn.list
