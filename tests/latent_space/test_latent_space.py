import hashlib
import json
import types
import warnings

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image
from torch import nn

from helpers.pipelines import PIPELINES, kl, ltx, model, pipeline, randn, run, sd3, sdxl, tiny, unet
from helpers.pipelines import stable_diffusion as tiny_stable_diffusion
from shielded.generation.sampling import Watch
from shielded.latent_space import LatentSpace, to_rgb
from shielded.samplers import attach


def tiny_vae(seed=0):
    return model(
        "AutoencoderTiny",
        seed,
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=0.7,
    )


def stable_diffusion(vae, sample_size=8):
    return tiny_stable_diffusion(vae=vae, unet=unet(sample_size), scheduler=DDIMScheduler(clip_sample=False)).pipe


def stable_diffusion_xl(vae):
    return sdxl(vae=vae).pipe


def stable_diffusion_3(vae):
    return sd3(vae=vae).pipe


def pictures(n, size=(16, 16), seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(n)]


def pixels(images):
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]).float() / 255 * 2 - 1


def test_shape_alone():
    space = LatentSpace((4, 64, 64))
    assert space == LatentSpace(shape=[4, 64, 64])
    assert space.dim == 16384
    assert space.fingerprint == LatentSpace((4, 64, 64)).fingerprint != LatentSpace((4, 64, 32)).fingerprint
    for call in (space.encode, space.decode):
        with pytest.raises(ValueError, match=r"LatentSpace\.of"):
            call(pictures(1))


@pytest.mark.parametrize("shape", [(), (4, 0, 8), (4, -1), (4, 2.5)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match="positive integers"):
        LatentSpace(shape)


def test_reads_size_off_the_pipeline():
    pipe = stable_diffusion(kl())
    space = LatentSpace.of(pipe)
    assert space.shape == (4, 8, 8)
    assert space.image_size == (16, 16)
    assert LatentSpace.of(pipe, height=32, width=20).shape == (4, 16, 10)
    assert LatentSpace.of(stable_diffusion(kl(), sample_size=(8, 6))).image_size == (16, 12)
    with pytest.raises(ValueError, match="multiple of 2"):
        LatentSpace.of(pipe, height=31)
    with pytest.raises(ValueError, match="multiple of 4"):
        LatentSpace.of(stable_diffusion_3(kl()), height=18)


def test_size_is_that_of_the_latents_the_pipeline_makes():
    pipe = stable_diffusion(kl())
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.zeros(1, 4, 8)
    latents = pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, num_inference_steps=1, output_type="latent")
    assert tuple(latents.images.shape[1:]) == LatentSpace.of(pipe).shape


@pytest.mark.parametrize(
    ("pipe", "latent"),
    [
        (stable_diffusion(kl()), lambda vae, x: vae.encode(x).latent_dist.mode() * 0.18215),
        (stable_diffusion(tiny_vae()), lambda vae, x: vae.encode(x).latents * 0.7),
        (
            stable_diffusion_3(kl(scaling_factor=1.5305, shift_factor=0.0609)),
            lambda vae, x: (vae.encode(x).latent_dist.mode() - 0.0609) * 1.5305,
        ),
        (
            stable_diffusion_xl(kl(scaling_factor=0.5, latents_mean=[1.0, 2, 3, 4], latents_std=[1.0, 2, 4, 8])),
            lambda vae, x: (
                (vae.encode(x).latent_dist.mode() - torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1))
                * 0.5
                / torch.tensor([1.0, 2, 4, 8]).view(1, 4, 1, 1)
            ),
        ),
    ],
    ids=["sd", "tiny", "sd3", "sdxl"],
)
def test_encode_is_the_vae_called_by_hand(pipe, latent):
    space = LatentSpace.of(pipe)
    images = pictures(5)
    with torch.no_grad():
        expected = latent(pipe.vae, pixels(images))
    for given in (images, pixels(images)):
        latents = space.encode(given, batch_size=2)
        assert latents.dtype == torch.float32
        assert tuple(latents.shape) == (5, *space.shape)
        torch.testing.assert_close(latents, expected, atol=2e-5, rtol=1e-4)
    assert space.encode([]).shape == (0, *space.shape)


def test_encode_decode_undo_the_same_normalisation():
    """With an identity for an autoencoder, decode(encode(x)) is x up to the rounding to 8 bits."""

    class Identity(nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def encode(self, x):
            return type("Output", (), {"latents": x})

        def decode(self, z):
            return type("Output", (), {"sample": z})

    space = LatentSpace((3, 8, 8), (8, 8), scaling=0.3, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), vae=Identity())
    images = pictures(3, (8, 8))
    for image, back in zip(images, space.decode(space.encode(images)), strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(back))


# Every pipeline -----------------------------------------------------------------------------------------------------


def wide(name):
    """The pipeline, arguments for images that are not square where it takes a size, and their space."""
    made = tiny(name)
    size = {"height": made.options["height"], "width": 2 * made.options["height"]} if "height" in made.options else {}
    if name == "inpaint":
        size = {"height": made.options["height"], "width": made.options["width"]}
    frames = {"num_frames": made.options["num_frames"]} if "num_frames" in made.options else {}
    return made, size, LatentSpace.of(made.pipe, **size, **frames)


def finished(made, **options):
    """What the pipeline returns and the latents that its sampler ended with."""
    watch = Watch()
    with attach(made.pipe, watch):
        output = run(made, **options)
    return output, watch.finished


@pytest.mark.parametrize("name", PIPELINES)
def test_encoding_what_the_pipeline_decodes_gives_the_samplers_latents(name, monkeypatch):
    """The pipeline's own way from latents to the decoder, backwards: scale, statistics, packing, frames."""
    made, size, space = wide(name)
    seen = []
    decode = made.pipe.vae.decode
    monkeypatch.setattr(
        made.pipe.vae, "decode", lambda z, *args, **kwargs: (seen.append(z), decode(z, *args, **kwargs))[1]
    )
    _, latents = finished(made, output_type="pt", **size)
    assert tuple(latents.shape[1:]) == space.shape
    if name == "inpaint":  # it pastes the known half into what the sampler ended with
        latents = run(made, **size)
    monkeypatch.setattr(made.pipe.vae, "encode", lambda pixels: types.SimpleNamespace(latents=torch.cat(seen)))
    pixels = torch.zeros(len(latents), 3, *space.image_size)
    torch.testing.assert_close(space.encode(pixels), latents.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PIPELINES)
def test_decode_is_the_pipelines_own(name):
    made, size, space = wide(name)
    theirs, latents = finished(made, output_type="pil", **size)
    if name == "inpaint":
        latents = run(made, **size)
    for ours, their in zip(space.decode(latents, batch_size=3), theirs, strict=True):
        assert isinstance(ours, list) == (space.num_frames is not None)
        difference = np.abs(np.asarray(frames(ours), int) - np.asarray(frames(their), int))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01
    with pytest.raises(ValueError, match="latents must have the shape"):
        space.decode(torch.zeros(1, *space.shape[:-1], space.shape[-1] + 1))


def frames(clip):
    return [np.asarray(frame) for frame in (clip if isinstance(clip, list) else [clip])]


def certain(vae):
    """The autoencoder with (almost) no spread: what the pipelines sample from it is its mode."""
    if type(vae).__name__ == "AutoencoderKLLTXVideo":
        last = vae.encoder.conv_out.conv
        with torch.no_grad():
            last.weight[-1:], last.bias[-1:] = 0, -60
    else:
        half = vae.quant_conv.weight.shape[0] // 2
        with torch.no_grad():
            vae.quant_conv.weight[half:], vae.quant_conv.bias[half:] = 0, -60
    return vae


def relative(name, cls):
    """Another pipeline of the same family, with the parts of the tiny one."""
    made = PIPELINES[name]()
    certain(made.pipe.vae)
    parts = {part: getattr(made.pipe, part) for part in ("vae", made.denoiser, "scheduler")}
    return made.pipe, pipeline(cls, **parts)


def flux_latents(pipe, x, generator):
    z = pipe._encode_vae_image(x, generator)
    return pipe._pack_latents(z, *z.shape)


def qwen_latents(pipe, x, generator):
    z = pipe._encode_vae_image(x.unsqueeze(2), generator).transpose(1, 2)
    return pipe._pack_latents(z, len(z), *z.shape[2:])


def z_image_latents(pipe, x, generator):
    pipe.scheduler.scale_noise = lambda sample, *_: sample  # no noise
    return pipe.prepare_latents(x, None, len(x), 4, *x.shape[2:], x.dtype, x.device, generator)


def wan_latents(pipe, x, generator):
    pipe.scheduler.add_noise = lambda sample, *_: sample
    return pipe.prepare_latents(x, len(x), 4, *x.shape[3:], x.dtype, x.device, generator, None, torch.zeros(1))


def ltx_latents(pipe, x, generator):
    z = pipe.vae.encode(x).latent_dist.mode()
    z = pipe._normalize_latents(z, pipe.vae.latents_mean, pipe.vae.latents_std)
    return pipe._pack_latents(z, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size)


@pytest.mark.parametrize(
    ("name", "cls", "encode"),
    [
        ("sd15", "StableDiffusionInpaintPipeline", lambda pipe, x, g: pipe._encode_vae_image(x, g)),
        ("sdxl", "StableDiffusionXLInpaintPipeline", lambda pipe, x, g: pipe._encode_vae_image(x, g)),
        ("sd3", "StableDiffusion3InpaintPipeline", lambda pipe, x, g: pipe._encode_vae_image(x, g)),
        ("flux", "FluxImg2ImgPipeline", flux_latents),
        ("flux2", "Flux2Pipeline", lambda pipe, x, g: pipe._pack_latents(pipe._encode_vae_image(x, g))),
        ("qwen-image", "QwenImageImg2ImgPipeline", qwen_latents),
        ("z-image", "ZImageImg2ImgPipeline", z_image_latents),
        ("wan", "WanVideoToVideoPipeline", wan_latents),
        ("ltx", "LTXImageToVideoPipeline", ltx_latents),
    ],
)
def test_encode_is_what_image_to_image_does(name, cls, encode):
    made, theirs = relative(name, cls)
    size = (32, 64) if name == "ltx" else (16, 24)
    count = 5 if name in ("wan", "ltx") else None
    space = LatentSpace.of(made, *size, num_frames=count)
    x = randn(2, 3, *([count] if count else []), *size, seed=6).clamp(-1, 1)
    with torch.no_grad():
        expected = encode(theirs, x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(space.encode(x), expected, rtol=1e-4, atol=1e-5)
    assert tuple(expected.shape[1:]) == space.shape


def test_a_still_is_a_video_that_does_not_move():
    made, _, space = wide("wan")
    image = pictures(1, space.image_size)[0]
    expected = space.encode([[image] * space.num_frames])
    for given in ([image], pixels([image])):
        torch.testing.assert_close(space.encode(given), expected)
    back = space.decode(expected)
    assert len(back) == 1
    assert len(back[0]) == space.num_frames
    with pytest.raises(ValueError, match="A video has 3 frames, this latent space 5"):
        space.encode([[image] * 3])
    with pytest.raises(TypeError, match="videos as lists of 5 of them"):
        space.encode([["a.png"] * 5])
    with pytest.raises(ValueError, match=r"\(B, 3, 16, 32\) or \(B, 3, 5, 16, 32\)"):
        space.encode(torch.zeros(1, 3, 3, *space.image_size))
    one = LatentSpace.of(made.pipe, 16, 32, num_frames=1)
    assert one.shape == (4, 1, 8, 16)
    assert one.encode([image]).shape == (1, *one.shape)


def test_default_sizes_are_those_of_the_pipelines():
    assert LatentSpace.of(tiny("wan").pipe).shape == (4, 41, 240, 416)  # 81 frames of 480x832, halved on all axes
    assert LatentSpace.of(tiny("ltx").pipe).image_size == (512, 704)
    assert LatentSpace.of(tiny("ltx").pipe).num_frames == 161
    assert LatentSpace.of(tiny("sana").pipe).image_size == (1024, 1024)
    assert LatentSpace.of(tiny("z-image").pipe).image_size == (1024, 1024)
    assert LatentSpace.of(tiny("flux").pipe).image_size == (256, 256)
    assert LatentSpace.of(tiny("dit").pipe).image_size == (16, 16)
    video = tiny("wan").pipe
    parts = {part: getattr(video, part) for part in ("vae", "transformer", "scheduler")}
    assert LatentSpace.of(pipeline("WanVideoToVideoPipeline", **parts)).num_frames == 81
    parts["transformer_2"] = parts.pop("transformer")  # the low-noise expert alone
    assert LatentSpace.of(pipeline("WanPipeline", **parts)) == LatentSpace.of(video)
    with pytest.raises(ValueError, match="WanPipeline needs one frame more than a multiple of 2; got 4"):
        LatentSpace.of(video, num_frames=4)
    with pytest.raises(ValueError, match="FluxPipeline makes images"):
        LatentSpace.of(tiny("flux").pipe, num_frames=5)
    with pytest.raises(ValueError, match="FluxPipeline needs a multiple of 4 pixels; got 16x18"):
        LatentSpace.of(tiny("flux").pipe, 16, 18)


def test_tokens_of_two_sizes_may_have_one_shape():
    pipe = tiny("flux").pipe
    tall, flat = LatentSpace.of(pipe, 32, 16), LatentSpace.of(pipe, 16, 32)
    assert tall.shape == flat.shape
    assert tall.fingerprint != flat.fingerprint
    with pytest.raises(ValueError, match=r"image_size \(32, 16\) against \(16, 32\)"):
        tall.require_same(flat)
    tall.require_same_encoder(flat)
    tall.require_same(LatentSpace(flat.shape))


def test_statistics_of_the_batch_norm_count():
    pipe = PIPELINES["flux2"]().pipe
    space = LatentSpace.of(pipe, 16, 16)
    pipe.vae.bn.running_mean[0] += 1
    with pytest.raises(ValueError, match="nothing: mean"):
        space.require_same(LatentSpace.of(pipe, 16, 16))


def test_decoder_of_ltx_that_denoises():
    made = ltx(timestep_conditioning=True)
    space = LatentSpace.of(made.pipe, 32, 32, num_frames=5)
    theirs, latents = finished(made, output_type="pil")
    for ours, their in zip(space.decode(latents), theirs, strict=True):
        assert np.abs(np.asarray(frames(ours), int) - np.asarray(frames(their), int)).max() <= 1


# Images -------------------------------------------------------------------------------------------------------------


def test_images_are_cut_out_of_the_centre():
    space = LatentSpace.of(stable_diffusion(tiny_vae()))
    wide = Image.new("RGB", (64, 16), "red")
    wide.paste((10, 200, 30), (20, 0, 44, 16))
    plain = Image.new("RGB", (16, 16), (10, 200, 30))
    torch.testing.assert_close(space.encode([wide]), space.encode([plain]))
    torch.testing.assert_close(space.encode([plain.resize((50, 40))]), space.encode([plain]))


def test_to_rgb():
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert to_rgb(half).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 0)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)
    deep = Image.fromarray(np.array([[0, 128 * 257, 65535]], dtype=np.uint16))
    assert np.asarray(to_rgb(deep))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(ValueError, match="range"):
        to_rgb(Image.new("F", (1, 1)))


def test_encode_refuses_other_input():
    space = LatentSpace.of(stable_diffusion(tiny_vae()))
    for wrong in (torch.zeros(1, 3, 8, 8), torch.zeros(3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="Expected a float tensor"):
            space.encode(wrong)
    for wrong in (255.0, -1.5, float("nan")):
        with pytest.raises(ValueError, match=r"\[-1, 1\]"):
            space.encode(torch.full((1, 3, 16, 16), wrong))
    for wrong in (pictures(1)[0], [None], 3):
        with pytest.raises(TypeError, match="list of PIL images"):
            space.encode(wrong)
    with pytest.warns(UserWarning, match=r"\[0, 1\]"):
        space.encode(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        space.encode(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def test_fingerprint_of_half_precision_load(tmp_path):
    kl().save_pretrained(tmp_path)
    spaces = [
        LatentSpace.of(stable_diffusion(AutoencoderKL.from_pretrained(tmp_path, torch_dtype=dtype)))
        for dtype in (torch.float32, torch.float16)
    ]
    assert spaces[0].fingerprint == spaces[1].fingerprint
    spaces[0].require_same(spaces[1])
    image = pictures(1)
    full, half = (space.encode(image) for space in spaces)
    torch.testing.assert_close(full, half, atol=2e-3, rtol=2e-3)
    assert spaces[1].vae.dtype == torch.float16  # encode runs in float32 (force_upcast) and puts it back


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (LatentSpace.of(stable_diffusion(kl()), height=32), "shape"),
        (LatentSpace.of(stable_diffusion(kl(scaling_factor=0.13025))), r"scaling 0\.18215 against 0\.13025"),
        (LatentSpace.of(stable_diffusion_3(kl(shift_factor=0.1))), "shift"),
        (LatentSpace.of(stable_diffusion_xl(kl(latents_mean=[0.0] * 4, latents_std=[1.0] * 4))), "mean"),
        (LatentSpace.of(stable_diffusion(kl(seed=1))), "weights"),
        (LatentSpace.of(stable_diffusion(tiny_vae())), "vae_class AutoencoderKL against AutoencoderTiny"),
        (LatentSpace((4, 8, 9)), "shape"),
    ],
)
def test_require_same_names_what_differs(other, named):
    space = LatentSpace.of(stable_diffusion(kl()))
    assert space.fingerprint != other.fingerprint
    with pytest.raises(ValueError, match=named):
        space.require_same(other)


def test_the_same_encoder_at_another_size():
    space, larger = LatentSpace.of(stable_diffusion(kl())), LatentSpace.of(stable_diffusion(kl()), height=32)
    space.require_same_encoder(larger)
    space.require_same_encoder(LatentSpace((1,)))
    with pytest.raises(ValueError, match="weights"):
        space.require_same_encoder(LatentSpace.of(stable_diffusion(kl(seed=1))))


def test_only_the_way_to_the_latents_counts():
    space, vae = LatentSpace.of(stable_diffusion(kl())), kl()
    with torch.no_grad():
        vae.decoder.conv_in.weight += 1
    assert LatentSpace.of(stable_diffusion(vae)).fingerprint == space.fingerprint
    with torch.no_grad():
        vae.quant_conv.weight += 1
    assert LatentSpace.of(stable_diffusion(vae)).fingerprint != space.fingerprint
    space.require_same(LatentSpace((4, 8, 8)))  # says nothing about an autoencoder


def test_json_round_trip():
    vae = kl(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    for space in (LatentSpace.of(stable_diffusion_xl(vae)), LatentSpace.of(tiny("ltx").pipe), LatentSpace((7,))):
        back = LatentSpace.from_json(json.loads(json.dumps(space.to_json())))
        assert back == space
        assert back.fingerprint == space.fingerprint
        assert back.vae is None


def test_compiled_modules_are_seen_through():
    pipe = stable_diffusion(kl())
    expected = LatentSpace.of(pipe)
    pipe.unet = torch.compile(pipe.unet)
    assert LatentSpace.of(pipe) == expected


def test_refuses_what_it_does_not_understand():
    without = stable_diffusion(kl())
    without.vae = None
    with pytest.raises(TypeError, match="latents of StableDiffusionPipeline: it has no autoencoder as its `vae`"):
        LatentSpace.of(without)
    of_depth_too = stable_diffusion(kl(out_channels=6))
    with pytest.raises(TypeError, match="its autoencoder makes 6 channels, pictures have 3"):
        LatentSpace.of(of_depth_too)
    parts = {name: getattr(tiny("ltx").pipe, name) for name in ("vae", "transformer", "scheduler")}
    with pytest.raises(TypeError, match="LTXImageToVideoPipeline: its sampler sees noise_latents, not all"):
        LatentSpace.of(pipeline("LTXImageToVideoPipeline", **parts))
    offloaded = stable_diffusion(kl())
    offloaded.vae.to("meta")
    with pytest.raises(ValueError, match="offloaded"):
        LatentSpace.of(offloaded)


def test_weights_are_hashed_once_until_they_change(monkeypatch):
    pipe = stable_diffusion(kl())
    first = LatentSpace.of(pipe).vae_sha256
    hashed = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda *data: hashed.append(1) or sha256(*data))
    assert LatentSpace.of(pipe).vae_sha256 == first
    assert not hashed
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(2)
    assert LatentSpace.of(pipe).vae_sha256 != first
    assert hashed == [1]
