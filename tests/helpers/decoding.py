"""Every pipeline class of diffusers around a tiny autoencoder, and its own statements between sampler and decoder."""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import inspect
import textwrap
import typing
import warnings
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from helpers.pipelines import causal, kl, model, of_diffusers, randn, tiny
from shielded.latent_space import LatentSpace, families

SIZE, SIDES = (32, 64), ("height", "width")
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [0.5, 1.0, 1.5, 2.0]}


def _video(cls: str, block: str, depth: int = 2, **config: Any) -> Any:
    blocks = {"up_block_types": (block.replace("Down", "Up"),) * depth, "down_block_types": (block,) * depth}
    sizes = {"latent_channels": 4, "block_out_channels": (4,) * depth, "norm_num_groups": 2, "layers_per_block": 1}
    return model(cls, **blocks, **sizes, **config)


def _asymmetric() -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    channels = {"down_block_out_channels": (4, 8), "up_block_out_channels": (4, 8)}
    return model("AsymmetricAutoencoderKL", latent_channels=4, norm_num_groups=2, **blocks, **channels)


def _mochi() -> Any:
    return model(
        "AutoencoderKLMochi",
        encoder_block_out_channels=(32, 32),
        decoder_block_out_channels=(32, 32),
        layers_per_block=(1, 1, 1),
        temporal_expansions=(2,),
        spatial_expansions=(2,),
        add_attention_block=(False, False, False),
        scaling_factor=0.7,
    )


def _ltx2() -> Any:
    made = model(
        "AutoencoderKLLTX2Video",
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial", "temporal"),
        upsample_type=("spatiotemporal",),
        upsample_residual=(True,),
        upsample_factor=(2,),
        patch_size=1,
        spatial_compression_ratio=2,
        temporal_compression_ratio=2,
        scaling_factor=0.8,
    )
    made.latents_mean.copy_(randn(4, seed=4))
    made.latents_std.copy_(randn(4, seed=5).abs() + 0.1)
    return made


def _tiny() -> Any:
    channels = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    return model(
        "AutoencoderTiny", num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=0.7, **channels
    )


AUTOENCODERS = {
    "AutoencoderKL": lambda: kl(scaling_factor=0.7, shift_factor=0.2, **STATISTICS),
    "AutoencoderTiny": _tiny,
    "AutoencoderDC": lambda: tiny("sana").pipe.vae,
    "AutoencoderKLFlux2": lambda: tiny("flux2").pipe.vae,
    "AutoencoderKLQwenImage": lambda: tiny("qwen-image").pipe.vae,
    "AutoencoderKLWan": lambda: tiny("wan").pipe.vae,
    "AutoencoderKLLTXVideo": lambda: tiny("ltx").pipe.vae,
    "AutoencoderKLLTX2Video": _ltx2,
    "AutoencoderKLQwenImage21": lambda: causal("AutoencoderKLQwenImage21", temperal_downsample=[True], dim_mult=[1, 1]),
    "AutoencoderKLCogVideoX": lambda: _video(
        "AutoencoderKLCogVideoX", "CogVideoXDownBlock3D", temporal_compression_ratio=1
    ),
    "AutoencoderKLMochi": _mochi,
    "AutoencoderKLHunyuanVideo": lambda: _video(
        "AutoencoderKLHunyuanVideo", "HunyuanVideoDownBlock3D", 4, spatial_compression_ratio=4
    ),
    "AutoencoderKLMagvit": lambda: _video("AutoencoderKLMagvit", "SpatialDownBlock3D"),
    "AutoencoderKLHunyuanVideo15": lambda: model(
        "AutoencoderKLHunyuanVideo15",
        latent_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        spatial_compression_ratio=2,
        temporal_compression_ratio=1,
    ),
    "AutoencoderKLHunyuanImage": lambda: model(
        "AutoencoderKLHunyuanImage",
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.7,
    ),
    "AutoencoderKLTemporalDecoder": lambda: model(
        "AutoencoderKLTemporalDecoder", block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2
    ),
    "AsymmetricAutoencoderKL": _asymmetric,
}


@functools.cache
def autoencoder(name: str) -> Any:
    """A tiny one of this class, built once."""
    return AUTOENCODERS[name]()


# Pipelines ---------------------------------------------------------------------------------------------------------


@functools.cache
def classes() -> list[str]:
    """Every pipeline class of the installed diffusers, by name."""
    found = []
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if "Pipeline" in name else None
        if inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline):
            found.append(name)
    base = ("DiffusionPipeline", "FlaxDiffusionPipeline", "ModularPipeline")
    return sorted(name for name in found if name not in base and not name.startswith(("AutoPipeline", "Onnx")))


def part(cls: str, *roles: str) -> str | None:
    """The class of a part that a pipeline class asks for, by the annotation of its parameter: the last it names."""
    parameters = inspect.signature(getattr(diffusers, cls).__init__).parameters
    for role in roles:
        if role in parameters:
            annotation = parameters[role].annotation
            kinds = [annotation] if isinstance(annotation, str) else typing.get_args(annotation) or [annotation]
            kind = [kind for kind in kinds if kind is not type(None)][-1]
            return kind.split("|")[0].strip() if isinstance(kind, str) else kind.__name__
    return None


class Denoiser(nn.Module):
    """In the place of a denoiser: its class's default configuration, which is all that is asked of it here."""

    def __init__(self, cls: str | None) -> None:
        super().__init__()
        made = getattr(diffusers, cls or "", None)
        parameters = inspect.signature(made.__init__).parameters if inspect.isclass(made) else {}
        given = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        given["sample_size"] = given.get("sample_size") or 64
        self.config = FrozenDict({"in_channels": 4, **given})
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.transformer_blocks = self.single_transformer_blocks = ()


def _unknown(cls: str) -> Any:
    """In the place of an autoencoder that is in no pipeline which is understood."""
    made = type(cls, (nn.Module,), {"config": FrozenDict(block_out_channels=(4, 8))})()
    made.encoder = nn.Identity()
    return made


def stub(name: str) -> Any:
    """A pipeline of this class with a tiny autoencoder and a scheduler, and nothing that denoises."""
    cls = of_diffusers(name)
    parts: dict[str, Any] = dict.fromkeys(cls._get_signature_keys(cls)[0])
    vae = part(name, "vae")
    if vae is not None:
        known = vae in AUTOENCODERS
        parts["vae"] = autoencoder(vae) if known else _unknown(vae)
    for role in ("unet", "transformer"):
        if role in parts:
            parts[role] = Denoiser(part(name, role))
    if "scheduler" in parts:
        sigma_data = 0.5 if "Sprint" in name else 2.0
        parts["scheduler"] = diffusers.SCMScheduler(sigma_data=sigma_data)
    others = {name: mock.MagicMock() if made is None else made for name, made in parts.items()}
    pipe = None
    for given in (parts, others):
        with (
            warnings.catch_warnings(),
            contextlib.suppress(AttributeError, TypeError, ImportError, NameError, ValueError),
        ):
            warnings.simplefilter("ignore")
            pipe = pipe or cls(**given)
    if pipe is None:  # it asks its other parts too much
        pipe = cls.__new__(cls)
        for name, made in parts.items():
            object.__setattr__(pipe, name, made)
    if vae in AUTOENCODERS:
        for name in ("vae_scale_factor", "vae_scale_factor_spatial"):
            if hasattr(pipe, name) and getattr(pipe, name) in (8, 16, 32):  # written into its code
                setattr(pipe, name, families.spatial_factor(parts["vae"]))
    return pipe


# Decoding ----------------------------------------------------------------------------------------------------------


class Reached(Exception):
    """The decoder was called with these latents."""


def round_trip(name: str) -> tuple[str, LatentSpace]:
    """Read the space off a pipeline of this class and compare both of its directions with the pipeline's own code.

    Returns:
        the order of its latents, and the space.

    Raises:
        AssertionError: they differ.
        TypeError: the space is refused.
    """
    pipe = stub(name)
    height, width = SIZE
    space = LatentSpace.of(pipe, height, width)
    vae, count = pipe.vae, 2
    grid = families.grid(vae, SIZE, space.num_frames)
    z = randn(count, *grid, seed=3)
    if families.works_on_videos(vae):
        z = z.unsqueeze(2) if space.num_frames is None else z
    elif space.num_frames is not None:  # frame by frame
        z = z.transpose(1, 2).flatten(0, 1)
    with mock.patch.object(vae, "encode", return_value=SimpleNamespace(latents=z)):
        latents = space.encode(torch.zeros(count, 3, height, width))
    assert latents.shape[1:] == space.shape
    theirs = decoder_input(pipe, latents, **_values(pipe, space, latents, grid))
    # Some decode image by image, of which the first is seen.
    torch.testing.assert_close(theirs, z[: len(theirs)], rtol=1e-4, atol=1e-4)
    assert len(theirs) in (1, len(z))
    with mock.patch.object(vae, "decode", _decode), pytest.raises(Reached) as reached:
        space.decode(latents)
    torch.testing.assert_close(reached.value.args[0], z, rtol=1e-4, atol=1e-4)
    return space.layout or ("latents" if space.patch is None else "tokens"), space


def _values(pipe: Any, space: LatentSpace, latents: Tensor, grid: tuple[int, ...]) -> dict[str, Any]:
    """What the statements after the sampling loop read, as the pipeline's call would have set it."""
    frames, given = space.num_frames, dict(zip(SIDES, SIZE, strict=True))
    sides = {"latent_height": grid[-2], "latent_width": grid[-1], "latent_num_frames": grid[1] if frames else 1}
    sizes = {f"{which}{side}": n for which in ("", "global_", "calculated_") for side, n in given.items()}
    same = ("denoised", "latent_model_input", "prompt_embeds", "connector_prompt_embeds", "init_image")
    same += ("mask_condition", "masked_image_latents", "init_latents_orig")
    values = sides | sizes | dict.fromkeys(same, latents)
    values |= {"num_frames": frames, "video_length": frames, "batch_size": len(latents), "guidance_scale": 1.0}
    values |= {"num_images_per_prompt": 1, "num_videos_per_prompt": 1, "num_channels_latents": grid[0]}
    values |= {"additional_frames": 0, "extra_conditioning_num_latents": 0, "base_token_count": space.shape[0]}
    values |= {"decode_chunk_size": 1000, "decode_timestep": 0.0, "patch_size": 2, "mask": torch.zeros(1)}
    values |= {"kv_caches": mock.MagicMock()}
    if hasattr(pipe, "_prepare_latent_ids"):
        ids = pipe._prepare_latent_ids(torch.zeros(len(latents), 1, grid[-2] // 2, grid[-1] // 2))
        values |= {"latent_ids": ids, "latent_image_ids": ids}
    return values


def _decode(z: Tensor, *_: Any, **__: Any) -> None:
    raise Reached(z)


def decoder_input(pipe: Any, latents: Tensor, **values: Any) -> Tensor:
    """What the pipeline's decoder is given when its sampler ends with these latents.

    Runs the statements of its `__call__` that follow the sampling loop. Names that they use and nobody gives are None.
    """
    function = inspect.unwrap(type(pipe).__call__)
    body = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body
    last = max(number for number, statement in enumerate(body) if "scheduler.step(" in ast.unparse(statement))
    after = ast.Module(body[last + 1 :], [])
    names = {node.id for node in ast.walk(after) if isinstance(node, ast.Name)}
    names -= {*vars(builtins), *function.__globals__}
    values = {"self": pipe, "latents": latents, "output_type": "pt", "device": latents.device, **values}
    arguments = ", ".join(f"{name}=None" for name in sorted(names | values.keys()))
    code = ast.parse(f"def after({arguments}): pass")
    code.body[0].body = after.body
    space: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(code), type(pipe).__name__, "exec"), function.__globals__, space)

    if hasattr(pipe, "_encode_vae_image"):
        pipe._encode_vae_image = lambda image, **_: image
    for sound in ("_denormalize_audio_latents", "_unpack_audio_latents"):
        if hasattr(pipe, sound):
            setattr(pipe, sound, lambda latents, *_, **__: latents)
    if getattr(pipe, "audio_vae", 0) is None:
        pipe.audio_vae = mock.MagicMock()
    with mock.patch.object(pipe.vae, "decode", _decode), pytest.raises(Reached) as reached, torch.no_grad():
        space["after"](**values)
    return reached.value.args[0]
