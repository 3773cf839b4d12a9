import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMPipeline,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from torch import nn

from shielded.latent_space import LatentSpace, to_rgb


def kl(seed=0, **config):
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        **{"latent_channels": 4, "scaling_factor": 0.18215, **config},
    ).eval()


def tiny_vae(seed=0):
    torch.manual_seed(seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=0.7,
    ).eval()


def unet(sample_size=8):
    return UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )


def stable_diffusion(vae, sample_size=8):
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet(sample_size),
        scheduler=DDIMScheduler(clip_sample=False),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(vae):
    return StableDiffusionXLPipeline(
        vae=vae,
        unet=unet(),
        scheduler=EulerDiscreteScheduler(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )


def stable_diffusion_3(vae):
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
    )
    texts = {f"{kind}{i}": None for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    return StableDiffusion3Pipeline(
        vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **texts
    )


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


@pytest.mark.parametrize("pipe", [stable_diffusion(kl()), stable_diffusion(tiny_vae())], ids=["kl", "tiny"])
def test_decode_is_the_pipelines_own(pipe):
    space = LatentSpace.of(pipe)
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.zeros(2, 4, 8)

    def run(output_type):
        generator = torch.Generator().manual_seed(0)
        return pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            num_inference_steps=1,
            output_type=output_type,
            generator=generator,
        ).images

    for ours, theirs in zip(space.decode(run("latent"), batch_size=1), run("pil"), strict=True):
        difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01
    with pytest.raises(ValueError, match="latents must have the shape"):
        space.decode(torch.zeros(1, 4, 9, 8))


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
    for wrong in (pictures(1)[0], ["a.png"], 3):
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
        (LatentSpace.of(stable_diffusion(kl(shift_factor=0.1))), "shift"),
        (LatentSpace.of(stable_diffusion(kl(latents_mean=[0.0] * 4, latents_std=[1.0] * 4))), "mean"),
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
    for space in (LatentSpace.of(stable_diffusion(vae)), LatentSpace((7,))):
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
    pixel_space = DDIMPipeline(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(4, 8),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=2,
        ),
        DDIMScheduler(),
    )
    with pytest.raises(TypeError, match="DDIMPipeline has the autoencoder NoneType"):
        LatentSpace.of(pixel_space)
    packed = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=1,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
        ),
    )
    with pytest.raises(TypeError, match="FluxPipeline has the denoiser FluxTransformer2DModel"):
        LatentSpace.of(packed)
    offloaded = stable_diffusion(kl())
    offloaded.vae.to("meta")
    with pytest.raises(ValueError, match="offloaded"):
        LatentSpace.of(offloaded)
