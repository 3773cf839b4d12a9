"""Small random models in diffusers' own pipelines, one entry per family, without text encoders and without network.

Each pipeline has the scheduler, with the options, that its published model comes with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor

SEEDS = (0, 1, 2, 3)  # two prompts with two images each
SIZE = 16  # of the images, in pixels; Sana and LTX want a multiple of 32. The autoencoders halve it
_SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


class Tiny(NamedTuple):
    """A pipeline, the arguments of its call but for generator and output_type, and the name of its denoiser."""

    pipe: Any
    options: dict[str, Any]

    @property
    def denoiser(self) -> str:
        return "unet" if hasattr(self.pipe, "unet") else "transformer"


def run(tiny: Tiny, seeds: tuple[int, ...] = SEEDS, output_type: str = "latent", **options: Any) -> Any:
    """What the pipeline returns; an image for each seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return tiny.pipe(generator=generators, output_type=output_type, **{**tiny.options, **options})[0]


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_diffusers(name: str) -> Any:
    """A class of diffusers; the test is skipped if the installed version does not have it yet."""
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)


def model(cls: str, seed: int = 0, **config: Any) -> Any:
    """A randomly initialised model; weights that start at zero would make it output nothing, so they are drawn too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = of_diffusers(cls)(**config).eval()
        with torch.no_grad():
            for weight in made.parameters():
                if not weight.any():
                    weight.normal_(std=0.05)
    return made


def kl(cls: str = "AutoencoderKL", seed: int = 0, **config: Any) -> Any:
    return model(
        cls,
        seed,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        **{"latent_channels": 4, "scaling_factor": 0.18215, **config} if cls == "AutoencoderKL" else config,
    )


def unet(sample_size: Any = 8, **config: Any) -> Any:
    return model(
        "UNet2DConditionModel",
        sample_size=sample_size,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
        **config,
    )


def pipeline(cls: str, **parts: Any) -> Any:
    """The pipeline with these parts and none of the others that it would have."""
    cls = of_diffusers(cls)
    missing = set(cls._get_signature_keys(cls)[0]) - parts.keys()
    pipe = cls(**dict.fromkeys(missing), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Stable Diffusion ------------------------------------------------------------------------------------------------


def stable_diffusion(cls: str = "StableDiffusionPipeline", scheduler: Any = None, **parts: Any) -> Tiny:
    default = diffusers.PNDMScheduler(**_SD, skip_prk_steps=True, set_alpha_to_one=False)
    parts = {"vae": kl(), "unet": unet(), "scheduler": scheduler or default, **parts}
    pipe = pipeline(cls, **parts, requires_safety_checker=False)
    embeds = {"prompt_embeds": randn(2, 4, 8), "negative_prompt_embeds": randn(2, 4, 8, seed=2)}
    return Tiny(pipe, {**embeds, "num_images_per_prompt": 2, "num_inference_steps": 5, "guidance_scale": 3.0})


def sd2() -> Tiny:
    scheduler = diffusers.DDIMScheduler(
        **_SD, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False
    )
    return stable_diffusion(scheduler=scheduler)


def lcm() -> Tiny:
    tiny = stable_diffusion(unet=unet(time_cond_proj_dim=8), scheduler=diffusers.LCMScheduler(**_SD))
    return Tiny(tiny.pipe, {**tiny.options, "num_inference_steps": 4})


def sd_turbo() -> Tiny:
    tiny = stable_diffusion(scheduler=diffusers.EulerDiscreteScheduler(**_SD, timestep_spacing="trailing"))
    return Tiny(tiny.pipe, {**tiny.options, "num_inference_steps": 1, "guidance_scale": 0.0})


def img2img() -> Tiny:
    tiny = stable_diffusion("StableDiffusionImg2ImgPipeline")
    image = randn(1, 3, SIZE, SIZE, seed=3).clamp(-1, 1)
    return Tiny(tiny.pipe, {**tiny.options, "image": image, "strength": 0.6})


def hole() -> Tensor:
    """The right half of the image, in pixels (1, 1, H, W): what inpainting makes anew."""
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., SIZE // 2 :] = 1
    return mask


def inpaint() -> Tiny:
    tiny = stable_diffusion("StableDiffusionInpaintPipeline")
    image = randn(1, 3, SIZE, SIZE, seed=3).clamp(-1, 1)
    options = {"image": image, "mask_image": hole(), "height": SIZE, "width": SIZE, "strength": 1.0}
    return Tiny(tiny.pipe, {**tiny.options, **options})


def controlnet() -> Tiny:
    control = model(
        "ControlNetModel",
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
        conditioning_embedding_out_channels=(4, 8),
    )
    tiny = stable_diffusion("StableDiffusionControlNetPipeline", controlnet=control)
    return Tiny(tiny.pipe, {**tiny.options, "image": randn(1, 3, SIZE, SIZE, seed=3).clamp(0, 1)})


def sdxl(scheduler: Any = None, vae: Any = None) -> Tiny:
    denoiser = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 + 6 * 8,
        transformer_layers_per_block=1,
        use_linear_projection=True,
    )
    default = diffusers.EulerDiscreteScheduler(**_SD, timestep_spacing="leading")
    pipe = pipeline(
        "StableDiffusionXLPipeline",
        vae=vae or kl(scaling_factor=0.13025),
        unet=denoiser,
        scheduler=scheduler or default,
        add_watermarker=False,
    )
    options = {
        "prompt_embeds": randn(2, 4, 8),
        "negative_prompt_embeds": randn(2, 4, 8, seed=2),
        "pooled_prompt_embeds": randn(2, 8),
        "negative_pooled_prompt_embeds": randn(2, 8, seed=2),
        "num_images_per_prompt": 2,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
    }
    return Tiny(pipe, options)


def sdxl_turbo() -> Tiny:
    tiny = sdxl(diffusers.EulerAncestralDiscreteScheduler(**_SD, timestep_spacing="trailing"))
    return Tiny(tiny.pipe, {**tiny.options, "num_inference_steps": 2, "guidance_scale": 0.0})


# Transformers on latents as they are -----------------------------------------------------------------------------


def sd3(vae: Any = None) -> Tiny:
    transformer = model(
        "SD3Transformer2DModel",
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
        pos_embed_max_size=8,
    )
    pipe = pipeline(
        "StableDiffusion3Pipeline",
        vae=vae or kl(scaling_factor=1.5305, shift_factor=0.0609),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    options = {
        "prompt_embeds": randn(4, 4, 8),  # num_images_per_prompt does not repeat the pooled embeddings
        "negative_prompt_embeds": randn(4, 4, 8, seed=2),
        "pooled_prompt_embeds": randn(4, 8),
        "negative_pooled_prompt_embeds": randn(4, 8, seed=2),
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
    }
    return Tiny(pipe, options)


def dit() -> Tiny:
    transformer = model(
        "DiTTransformer2DModel",
        sample_size=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        norm_num_groups=2,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    pipe = pipeline("DiTPipeline", transformer=transformer, vae=kl(), scheduler=scheduler)
    options = {"class_labels": [207, 207, 360, 360], "num_inference_steps": 5, "guidance_scale": 3.0}
    return Tiny(pipe, options)


def pixart_sigma() -> Tiny:
    transformer = model(
        "PixArtTransformer2DModel",
        sample_size=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        cross_attention_dim=8,
        caption_channels=8,
        norm_num_groups=2,
        use_additional_conditions=False,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    pipe = pipeline("PixArtSigmaPipeline", transformer=transformer, vae=kl(scaling_factor=0.13025), scheduler=scheduler)
    return Tiny(pipe, _masked_prompts({"num_inference_steps": 5, "use_resolution_binning": False}))


def sana() -> Tiny:
    transformer = model(
        "SanaTransformer2DModel",
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        cross_attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_dim=8,
        caption_channels=8,
    )
    vae = model(
        "AutoencoderDC",
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41407,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = pipeline("SanaPipeline", transformer=transformer, vae=vae, scheduler=scheduler)
    options = {"num_inference_steps": 5, "use_resolution_binning": False, "height": 32, "width": 32}
    return Tiny(pipe, _masked_prompts(options))


def _masked_prompts(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt_embeds": randn(2, 4, 8),
        "prompt_attention_mask": torch.ones(2, 4),
        "negative_prompt": None,
        "negative_prompt_embeds": randn(2, 4, 8, seed=2),
        "negative_prompt_attention_mask": torch.ones(2, 4),
        "num_images_per_prompt": 2,
        "guidance_scale": 3.0,
        **options,
    }


def z_image() -> Tiny:
    transformer = model(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 2, 2],
        axes_lens=[256, 32, 32],
    )
    pipe = pipeline(
        "ZImagePipeline",
        vae=kl(scaling_factor=0.3611, shift_factor=0.1159),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    options = {
        "prompt_embeds": list(randn(2, 4, 8)),
        "negative_prompt_embeds": list(randn(2, 4, 8, seed=2)),
        "num_images_per_prompt": 2,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
    }
    return Tiny(pipe, options)


# Transformers on tokens ------------------------------------------------------------------------------------------


def _dynamic_shift() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def flux(cls: str = "FluxPipeline", scheduler: Any = None, **options: Any) -> Tiny:
    transformer = model(
        "FluxTransformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    vae = kl(scaling_factor=0.3611, shift_factor=0.1159)
    pipe = pipeline(cls, vae=vae, transformer=transformer, scheduler=scheduler or _dynamic_shift())
    embeds = {"prompt_embeds": randn(4, 4, 8), "pooled_prompt_embeds": randn(4, 8)}
    size = {"height": SIZE, "width": SIZE}
    return Tiny(pipe, {**embeds, **size, "num_inference_steps": 5, "guidance_scale": 3.0, **options})


def flux_schnell() -> Tiny:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    return flux(scheduler=scheduler, num_inference_steps=2, guidance_scale=0.0)


def flux2() -> Tiny:
    transformer = model(
        "Flux2Transformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
    )
    vae = kl("AutoencoderKLFlux2", latent_channels=4)
    vae.bn.running_mean.copy_(randn(16, seed=4))
    vae.bn.running_var.copy_(randn(16, seed=5).square() + 0.1)
    pipe = pipeline("Flux2Pipeline", vae=vae, transformer=transformer, scheduler=_dynamic_shift())
    options = {"prompt_embeds": randn(2, 4, 8), "num_images_per_prompt": 2, "height": SIZE, "width": SIZE}
    return Tiny(pipe, {**options, "num_inference_steps": 5, "guidance_scale": 3.0})


def qwen_image() -> Tiny:
    transformer = model(
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = pipeline(
        "QwenImagePipeline",
        vae=causal("AutoencoderKLQwenImage", temperal_downsample=[False], dim_mult=[1, 1]),
        transformer=transformer,
        scheduler=_dynamic_shift(),
    )
    options = {
        "prompt_embeds": randn(2, 4, 8),
        "prompt_embeds_mask": torch.ones(2, 4, dtype=torch.long),
        "negative_prompt_embeds": randn(2, 4, 8, seed=2),
        "negative_prompt_embeds_mask": torch.ones(2, 4, dtype=torch.long),
        "num_images_per_prompt": 2,
        "num_inference_steps": 5,
        "true_cfg_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
    }
    return Tiny(pipe, options)


# Video -----------------------------------------------------------------------------------------------------------


def causal(cls: str, **config: Any) -> Any:
    """The causal video autoencoder of Wan and Qwen-Image, with statistics per channel."""
    statistics = {"latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [0.5, 1.0, 1.5, 2.0]}
    return model(cls, base_dim=4, z_dim=4, num_res_blocks=1, attn_scales=[], **statistics, **config)


def wan() -> Tiny:
    transformer = model(
        "WanTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=8,
        num_layers=1,
        rope_max_seq_len=16,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    vae = causal(
        "AutoencoderKLWan",
        dim_mult=[1, 1],
        temperal_downsample=[True],
        scale_factor_spatial=2,
        scale_factor_temporal=2,
    )
    pipe = pipeline("WanPipeline", vae=vae, transformer=transformer, scheduler=scheduler)
    options = {
        "prompt_embeds": randn(4, 4, 8),
        "negative_prompt_embeds": randn(4, 4, 8, seed=2),
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "num_frames": 5,
        "height": SIZE,
        "width": SIZE,
    }
    return Tiny(pipe, options)


def ltx(**config: Any) -> Tiny:
    transformer = model(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        num_layers=1,
    )
    vae = model(
        "AutoencoderKLLTXVideo",
        latent_channels=4,
        block_out_channels=(4, 4),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(4, 4),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv",) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1, 1),
        patch_size=1,
        **config,
    )
    vae.latents_mean.copy_(randn(4, seed=4))
    vae.latents_std.copy_(randn(4, seed=5).abs() + 0.1)
    pipe = pipeline("LTXPipeline", vae=vae, transformer=transformer, scheduler=_dynamic_shift())
    options = {
        "prompt_embeds": randn(4, 4, 8),  # num_videos_per_prompt does not repeat the masks
        "prompt_attention_mask": torch.ones(4, 4),
        "negative_prompt_embeds": randn(4, 4, 8, seed=2),
        "negative_prompt_attention_mask": torch.ones(4, 4),
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "num_frames": 5,
        "height": 32,
        "width": 32,
    }
    return Tiny(pipe, options)


PIPELINES: dict[str, Callable[[], Tiny]] = {
    "sd15": stable_diffusion,
    "sd2": sd2,
    "lcm": lcm,
    "sd-turbo": sd_turbo,
    "img2img": img2img,
    "inpaint": inpaint,
    "controlnet": controlnet,
    "sdxl": sdxl,
    "sdxl-turbo": sdxl_turbo,
    "sd3": sd3,
    "dit": dit,
    "pixart-sigma": pixart_sigma,
    "sana": sana,
    "z-image": z_image,
    "flux": flux,
    "flux-schnell": flux_schnell,
    "flux2": flux2,
    "qwen-image": qwen_image,
    "wan": wan,
    "ltx": ltx,
}


@functools.cache
def tiny(name: str) -> Tiny:
    """One of `PIPELINES`, built once; leave it as it was."""
    return PIPELINES[name]()
