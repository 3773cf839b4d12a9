"""A table of what diffusers pipelines do between pixels and the latents that their samplers see.

Autoencoders and denoisers are typed `Any`: their `config` and methods depend on the class.
"""

from __future__ import annotations

import hashlib
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PipelineFamily(NamedTuple):
    """What the pipelines of one class of denoiser have in common.

    Images are multiples of `patch` times the autoencoder's factor. Samplers see latents (B, C, H, W), videos
    (B, C, F, H, W), or, where they are packed, tokens of patch × patch latents each: (B, tokens, C · patch²).
    """

    patch: int = 1
    packed: bool = False
    video: bool = False


FAMILIES = {  # by class of the denoiser
    "UNet2DConditionModel": PipelineFamily(),  # Stable Diffusion 1, 2 and XL
    "SD3Transformer2DModel": PipelineFamily(patch=2),
    "DiTTransformer2DModel": PipelineFamily(patch=2),
    "PixArtTransformer2DModel": PipelineFamily(patch=2),
    "SanaTransformer2DModel": PipelineFamily(),
    "ZImageTransformer2DModel": PipelineFamily(patch=2),
    "FluxTransformer2DModel": PipelineFamily(patch=2, packed=True),
    "Flux2Transformer2DModel": PipelineFamily(patch=2, packed=True),
    "QwenImageTransformer2DModel": PipelineFamily(patch=2, packed=True),
    "WanTransformer3DModel": PipelineFamily(patch=2, video=True),
    "LTXVideoTransformer3DModel": PipelineFamily(packed=True, video=True),
}

AUTOENCODERS = {  # by class, whether it works on videos; Qwen-Image's takes images as videos of one frame
    "AutoencoderKL": False,
    "AutoencoderTiny": False,
    "AutoencoderDC": False,
    "AutoencoderKLFlux2": False,
    "AutoencoderKLQwenImage": True,
    "AutoencoderKLWan": True,
    "AutoencoderKLLTXVideo": True,
}

# Of the families above, but their samplers see other latents than the table says.
_EXCEPTIONS = {"LTXImageToVideoPipeline": "its sampler does not see the first frame"}


# Pipelines of diffusers whose sampler works on pixels in [-1, 1], by class; not those that enlarge images.
_PIXELS = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ConsistencyModelPipeline", "IFPipeline")


def pixel_shape(pipe: Any) -> tuple[int, int, int] | None:
    """Return the shape (C, height, width) of the pixels that a pipeline's sampler sees; None if it sees latents."""
    if not any(cls.__name__ in _PIXELS for cls in type(pipe).__mro__):
        return None
    unet = getattr(pipe.unet, "_orig_mod", pipe.unet)
    channels, size = unet.config.in_channels, unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return (channels, height, width) if channels in (1, 3) else None


def parts(pipe: Any) -> tuple[Any, Any, PipelineFamily]:
    """Return the autoencoder, the denoiser and the family of a pipeline, without the wrappers of torch.compile.

    Raises:
        TypeError: if the pipeline is of a kind that is not supported.
    """
    name = type(pipe).__name__
    denoisers = (getattr(pipe, role, None) for role in ("unet", "transformer", "transformer_2"))
    denoiser = next((module for module in denoisers if module is not None), None)
    vae = getattr(pipe, "vae", None)
    vae, denoiser = getattr(vae, "_orig_mod", vae), getattr(denoiser, "_orig_mod", denoiser)
    hint = "LatentSpace(shape) describes any space by its shape, LatentSpace.pixels(shape) one of pixels."
    if name in _EXCEPTIONS:
        raise TypeError(f"{name} is not supported: {_EXCEPTIONS[name]}. {hint}")
    for role, module, known in (("autoencoder", vae, AUTOENCODERS), ("denoiser", denoiser, FAMILIES)):
        if type(module).__name__ not in known:
            raise TypeError(
                f"{name} has the {role} {type(module).__name__}; supported are {', '.join(sorted(known))}. {hint}"
            )
    return vae, denoiser, FAMILIES[type(denoiser).__name__]


def default_size(pipe: Any, vae: Any, denoiser: Any) -> tuple[int, int]:
    """Return the default height and width of a pipeline's images, in pixels."""
    given = inspect.signature(type(pipe).__call__).parameters
    if "height" in given and given["height"].default is not None:
        return given["height"].default, given["width"].default
    sample_size = getattr(pipe, "default_sample_size", None) or denoiser.config.get("sample_size")
    if sample_size is None:
        return 1024, 1024  # Z-Image, whose pipeline says so in its code
    rows, columns = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return rows * spatial_factor(vae), columns * spatial_factor(vae)


def default_num_frames(pipe: Any) -> int:
    """Return the default number of frames of a pipeline, or Wan's 81 where the given video decides."""
    given = inspect.signature(type(pipe).__call__).parameters
    return given["num_frames"].default if "num_frames" in given else 81


def spatial_factor(vae: Any) -> int:
    """Return the number of pixels per latent, on each side."""
    return getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(vae.config.block_out_channels) - 1)


def temporal_factor(vae: Any) -> int:
    """Return the number of frames per latent frame, apart from the first."""
    return getattr(vae, "temporal_compression_ratio", None) or vae.config.scale_factor_temporal


def grid(vae: Any, size: tuple[int, int], num_frames: int | None) -> tuple[int, ...]:
    """Return the shape (C, H, W) of the latent of an image, (C, F, H, W) of a video, before it is packed."""
    channels = vae.config.get("latent_channels") or vae.config.z_dim
    frames = () if num_frames is None else ((num_frames - 1) // temporal_factor(vae) + 1,)
    return channels, *frames, *(side // spatial_factor(vae) for side in size)


def statistics(vae: Any, patch: int | None) -> dict[str, Any]:
    """Read how latents are normalised: `scaling` with `shift`, or with `mean` and `std` per channel of the sampler.

    Args:
        vae: the autoencoder.
        patch: side of what one token holds, for packed latents.
    """
    config = vae.config
    scaling = float(config.get("scaling_factor") or 1.0)
    if hasattr(vae, "bn"):  # FLUX.2 normalises tokens
        mean, std = vae.bn.running_mean, (vae.bn.running_var + config.batch_norm_eps).sqrt()
        return {"mean": tuple(mean.tolist()), "std": tuple(std.tolist())}
    buffers = dict(vae.named_buffers(recurse=False))  # LTX
    mean, std = (buffers.get(name, config.get(name)) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return {"scaling": scaling, "shift": float(config.get("shift_factor") or 0.0)}
    mean, std = (torch.as_tensor(x).float().repeat_interleave((patch or 1) ** 2).tolist() for x in (mean, std))
    return {"scaling": scaling, "mean": tuple(mean), "std": tuple(std)}


def vae_encode(vae: Any, pixels: Tensor) -> Tensor:
    """Encode pixels (B, 3, [F,] height, width) as the mode (B, C, [F,] h, w) of the encoder's distribution."""
    image = AUTOENCODERS.get(type(vae).__name__, False) and pixels.ndim == 4
    output = vae.encode(pixels.unsqueeze(2) if image else pixels)
    if hasattr(output, "latent_dist"):
        z = output.latent_dist.mode()
    else:
        z = output.latents if hasattr(output, "latents") else output.latent
    return z.squeeze(2) if image else z


def vae_decode(vae: Any, z: Tensor) -> Tensor:
    """Decode latents (B, C, [F,] h, w) to pixels (B, 3, [F,] height, width)."""
    name = type(vae).__name__
    image = AUTOENCODERS.get(name, False) and z.ndim == 4
    # Newer decoders of LTX denoise too; the pipeline's default is time 0.
    denoises = name == "AutoencoderKLLTXVideo" and vae.config.timestep_conditioning
    time = (z.new_zeros(len(z)),) if denoises else ()
    pixels = vae.decode(z.unsqueeze(2) if image else z, *time).sample
    return pixels.squeeze(2) if image else pixels


def pack(z: Tensor, patch: int) -> Tensor:
    """Pack (B, C, [F,] H, W) as tokens (B, F · H/patch · W/patch, C · patch²), as FLUX, Qwen-Image and LTX do."""
    if z.ndim == 4:
        z = z.unsqueeze(2)
    b, c, f, h, w = z.shape
    z = z.reshape(b, c, f, h // patch, patch, w // patch, patch).permute(0, 2, 3, 5, 1, 4, 6)
    return z.reshape(b, f * (h // patch) * (w // patch), c * patch**2)


def unpack(tokens: Tensor, patch: int, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack`; shape is that of one latent, (C, [F,] H, W)."""
    c, h, w = shape[0], *shape[-2:]
    z = tokens.reshape(len(tokens), -1, h // patch, w // patch, c, patch, patch).permute(0, 4, 1, 2, 5, 3, 6)
    return z.reshape(len(tokens), *shape)


def encoder_sha256(vae: Any) -> str:
    """Compute the digest of all weights from image to latent, as float16, so that float32 and float16 loads agree.

    It is remembered for a module until one of its weights is replaced or changed in place.

    Raises:
        ValueError: if the weights are offloaded.
    """
    weights = {
        f"{part}.{name}": value
        for part in ("encoder", "quant_conv")
        if getattr(vae, part, None) is not None
        for name, value in sorted(getattr(vae, part).state_dict().items())
    }
    if any(value.is_meta for value in weights.values()):
        raise ValueError("The VAE's weights are offloaded; read the latent space before switching that on.")
    state = tuple((name, value.data_ptr(), value._version, value.dtype) for name, value in weights.items())
    known = _digests.get(vae)
    if known is not None and known[0] == state:
        return known[1]
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().half().contiguous().numpy().tobytes())
    _digests[vae] = state, digest.hexdigest()
    return digest.hexdigest()


_digests: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()  # by autoencoder


@contextmanager
def ready(vae: Any) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Yield the device and dtype for inputs; an autoencoder that overflows in float16 is in float32 meanwhile."""
    # Accelerate's offloading moves the module to another device when it is called.
    device = getattr(getattr(vae, "_hf_hook", None), "execution_device", None) or vae.device
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield device, vae.dtype
    finally:
        if upcast:
            vae.to(torch.float16)
