"""What pipelines do between sampler and decoder: read from their source, and compared with what they do."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline

from helpers.decoding import autoencoder, round_trip, stub
from helpers.pipelines import kl, model, randn, tiny, unet
from helpers.pipelines import stable_diffusion as tiny_stable_diffusion
from shielded.latent_space import LatentSpace, families

# At least one of each way to decode and of each autoencoder; benchmarks/latent_spaces.py does the same with all.
UNDERSTOOD = re.findall(
    r"\w+",
    """
    AnimateDiffPipeline AnimateDiffSDXLPipeline AnyFlowPipeline AuraFlowPipeline BriaFiboPipeline BriaPipeline
    ChromaImg2ImgPipeline ChromaPipeline ChronoEditPipeline CogVideoXImageToVideoPipeline CogVideoXPipeline
    CogView3PlusPipeline CogView4Pipeline Cosmos2TextToImagePipeline Cosmos2VideoToWorldPipeline
    Cosmos2_5_PredictBasePipeline DiTPipeline DreamLitePipeline EasyAnimatePipeline ErnieImagePipeline
    Flux2KleinPipeline Flux2Pipeline FluxControlNetInpaintPipeline FluxFillPipeline FluxKontextPipeline
    FluxPipeline GlmImagePipeline HiDreamImagePipeline HunyuanDiTPipeline HunyuanImagePipeline
    HunyuanVideo15Pipeline HunyuanVideoPipeline I2VGenXLPipeline Kandinsky5T2IPipeline Kandinsky5T2VPipeline
    Krea2Pipeline LTX2Pipeline LTXConditionPipeline LTXPipeline LatentConsistencyModelPipeline LattePipeline
    LongCatImagePipeline LucyEditPipeline Lumina2Pipeline LuminaPipeline MochiPipeline MotifVideoPipeline
    NucleusMoEImagePipeline OvisImagePipeline PixArtSigmaPipeline QwenImageEditPipeline QwenImagePipeline
    SanaControlNetPipeline SanaPipeline SanaSprintPipeline SanaVideoPipeline SkyReelsV2Pipeline
    StableDiffusion3InpaintPipeline StableDiffusion3Pipeline StableDiffusionControlNetPipeline
    StableDiffusionInpaintPipeline StableDiffusionPipeline StableDiffusionUpscalePipeline
    StableDiffusionXLAdapterPipeline StableDiffusionXLPipeline StableVideoDiffusionPipeline
    TextToVideoSDPipeline WanImageToVideoPipeline WanPipeline WanVACEPipeline ZImagePipeline
    """,
)


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_latents_reach_the_decoder_as_the_pipeline_brings_them(name):
    round_trip(name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("BriaFibo2Pipeline", "it decodes by _patchify_latents"),
        ("EasyAnimateControlPipeline", "it decodes by decode_latents"),
        ("Ideogram4Pipeline", "the order of its latents' axes is not known"),
        ("LTX2ImageToVideoPipeline", "its sampler sees noise_latents, not all that is decoded"),
        ("MarigoldDepthPipeline", "its way from the last step to the decoder cannot be read"),
        ("QwenImageLayeredPipeline", "it unpacks its tokens in an order that is not known"),
        ("KandinskyV22Pipeline", "it has no autoencoder as its `vae`"),
        ("HunyuanImageRefinerPipeline", "it decodes by _restore_image_tokens_order"),
        ("AudioLDM2Pipeline", "it makes sound"),
        ("CosmosTextToWorldPipeline", "the statistics of its autoencoder differ from frame to frame"),
    ],
)
def test_refusals_say_why(name, why):
    with pytest.raises(TypeError, match=f"does not know the latents of {name}: {re.escape(why)}"):
        LatentSpace.of(stub(name), 32, 64)


def test_the_page_lists_them():
    page = (Path(__file__).parents[2] / "docs/latent_spaces.md").read_text()
    accepted, refused = page.split("classes refused:")
    assert set(UNDERSTOOD) <= set(re.findall(r"\w+", accepted))
    rows = [row for row in refused.splitlines() if row.startswith("| ")]
    assert any("BriaFibo2Pipeline" in row and "_patchify_latents" in row for row in rows)
    assert int(re.search(r"(\d+) pipeline classes accepted", page)[1]) >= 50


def test_statistics_that_the_pipeline_does_not_use_are_none_of_its_space():
    vae = kl(shift_factor=0.1, latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    plain = LatentSpace.of(tiny_stable_diffusion(vae=vae).pipe)
    assert (plain.shift, plain.mean, plain.std) == (0.0, None, None)


def test_sprint_samples_at_the_scale_of_its_data():
    space = LatentSpace.of(stub("SanaSprintPipeline"), 32, 64)
    assert space.scaling == pytest.approx(0.5 * autoencoder("AutoencoderDC").config.scaling_factor)


class Subclass(StableDiffusionPipeline):
    """Its call samples by that of its parent."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Rows(FluxPipeline):
    """Packs its tokens by another order."""

    @staticmethod
    def _unpack_latents(latents, height, width, vae_scale_factor):
        return FluxPipeline._unpack_latents(latents.flip(1), height, width, vae_scale_factor)


def test_subclasses_count_as_what_they_extend_unless_they_pack_otherwise():
    parent = tiny_stable_diffusion().pipe
    parts = {name: getattr(parent, name) for name in ("vae", "unet", "scheduler")}
    others = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    child = Subclass(**parts, **others, requires_safety_checker=False)
    assert LatentSpace.of(child) == LatentSpace.of(parent)
    flux = tiny("flux").pipe
    parts = {name: getattr(flux, name) for name in ("vae", "transformer", "scheduler")}
    others = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    with pytest.raises(TypeError, match="Rows: it unpacks its tokens in an order that is not known"):
        LatentSpace.of(Rows(**parts, **others))


@pytest.mark.parametrize("name", ["AutoencoderKLTemporalDecoder", "AutoencoderKLHunyuanImage", "AutoencoderKLWan"])
def test_autoencoders_take_images_and_videos(name):
    vae = autoencoder(name)
    size, frames = (16, 16), 1 + 2 * families.temporal_factor(vae)
    for shape in ((2, 3, frames, *size), *([] if "Temporal" in name else [(2, 3, *size)])):
        with torch.no_grad():
            z = families.vae_encode(vae, randn(*shape).clamp(-1, 1))
            assert families.vae_decode(vae, z).shape == shape
        assert tuple(z.shape[1:]) == families.grid(vae, size, shape[2] if len(shape) == 5 else None)
    if not families.works_on_videos(vae):  # frames one by one
        clip = randn(2, 3, frames, *size).clamp(-1, 1)
        with torch.no_grad():
            one = families.vae_encode(vae, clip[:, :, 1])
            torch.testing.assert_close(families.vae_encode(vae, clip)[:, :, 1], one, rtol=1e-4, atol=1e-5)


# The same latents, or others ---------------------------------------------------------------------------------------


def attending():
    """An autoencoder with attention, whose projections can be fused."""
    return model(
        "AutoencoderKL",
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
    )


def space_of(vae, height=32, width=32):
    return LatentSpace.of(tiny_stable_diffusion(vae=vae).pipe, height, width)


@pytest.mark.parametrize("change", ["fuse", "slicing", "channels_last", "half", "small tiles"])
def test_what_changes_no_latents_keeps_the_fingerprint(change):
    size = 16 if change == "small tiles" else 32
    before, vae = space_of(attending(), size, size), attending()
    if change == "fuse":
        vae.fuse_qkv_projections()
    elif change == "slicing":
        vae.enable_slicing()
    elif change == "channels_last":
        vae.to(memory_format=torch.channels_last)
    elif change == "half":
        vae.half()
    else:
        vae.enable_tiling()
    after = space_of(vae, size, size)
    assert after.fingerprint == before.fingerprint
    before.require_same(after)
    pixels = randn(2, 3, size, size, seed=2).clamp(-1, 1)
    bound = 5e-3 if change == "half" else 1e-5
    torch.testing.assert_close(after.encode(pixels), before.encode(pixels), rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ("tiling", "tiling of the encoder"),
        ("bfloat16", "weights .* here they are bfloat16 and float32"),
        ("float8", r"weights .* here they are float32 and quantised \(float8_e4m3fn\)"),
    ],
)
def test_what_changes_latents_changes_the_fingerprint_and_is_named(change, cause):
    before, vae = space_of(attending()), attending()
    if change == "tiling":
        vae.enable_tiling()
    elif change == "bfloat16":
        vae.to(torch.bfloat16)
    else:
        vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    after = space_of(vae)
    assert after.fingerprint != before.fingerprint
    with pytest.raises(ValueError, match=cause):
        before.require_same(after)
    pixels = randn(2, 3, 32, 32, seed=2).clamp(-1, 1)
    assert not torch.allclose(after.encode(pixels), before.encode(pixels), rtol=1e-4, atol=1e-4)


def test_a_quantised_denoiser_is_no_other_space():
    pipe = tiny_stable_diffusion(unet=unet()).pipe
    before = LatentSpace.of(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert LatentSpace.of(pipe).fingerprint == before.fingerprint


def test_tiling_switched_on_afterwards_is_noticed():
    vae = attending()
    space = space_of(vae)
    vae.enable_tiling()
    with pytest.raises(ValueError, match="tiling was switched on or off"):
        space.encode(randn(1, 3, 32, 32).clamp(-1, 1))
