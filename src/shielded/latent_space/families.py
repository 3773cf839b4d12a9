"""Autoencoders of diffusers: sizes, statistics, digests, and how their latents become those of a sampler.

Autoencoders and denoisers are typed `Any`: their `config` and methods depend on the class.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shielded._extras import RequestError
from shielded.latent_space.decoding import Decoding, read, source, works_on_videos
from shielded.latent_space.layouts import PATCHES, TOKENS

# Pipelines of diffusers whose sampler works on pixels in [-1, 1], by class; not those that enlarge images.
PIXELS = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ConsistencyModelPipeline", "IFPipeline")


def pixel_shape(pipe: Any) -> tuple[int, int, int] | None:
    """Return the shape (C, height, width) of the pixels that a pipeline's sampler sees; None if it sees latents."""
    if not any(cls.__name__ in PIXELS for cls in type(pipe).__mro__):
        return None
    unet = getattr(pipe.unet, "_orig_mod", pipe.unet)
    channels, size = unet.config.in_channels, unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return (channels, height, width) if channels in (1, 3) else None


def parts(pipe: Any) -> tuple[Any, Any, Decoding]:
    """Return the autoencoder and the denoiser of a pipeline, and how it brings latents to its decoder.

    Both modules come without the wrappers of torch.compile.

    Raises:
        TypeError: if the pipeline is of a kind that is not supported.
    """
    name = type(pipe).__name__
    denoisers = (getattr(pipe, role, None) for role in ("unet", "transformer", "transformer_2"))
    denoiser = next((module for module in denoisers if module is not None), None)
    vae = getattr(pipe, "vae", None)
    vae, denoiser = getattr(vae, "_orig_mod", vae), getattr(denoiser, "_orig_mod", denoiser)
    try:
        decoding = decoding_of(pipe, vae)
    except TypeError as why:
        hint = "LatentSpace(shape) describes any space by its shape, LatentSpace.pixels(shape) one of pixels."
        raise TypeError(f"LatentSpace.of does not know the latents of {name}: {why}. {hint}") from None
    return vae, denoiser, decoding


def decoding_of(pipe: Any, vae: Any) -> Decoding:
    """Read how a pipeline brings latents to its decoder, and whether its autoencoder is one that encodes pictures.

    Raises:
        TypeError: says what is not known.
    """
    if type(vae).__name__ in _UNKNOWN:
        raise TypeError(_UNKNOWN[type(vae).__name__])
    if not hasattr(vae, "encoder"):
        raise TypeError("it has no autoencoder as its `vae`")
    channels = vae.config.get("out_channels", 3)
    if channels != 3:
        raise TypeError(f"its autoencoder makes {channels} channels, pictures have 3")
    return read(pipe, vae, spatial_factor(vae))


_UNKNOWN = {  # autoencoders, and why
    "AutoencoderKLCosmos": "the statistics of its autoencoder differ from frame to frame",
    "AutoencoderKLAllegro": "its autoencoder works in tiles alone",
}


def patch_of(denoiser: Any, decoding: Decoding) -> int:
    """Return the number of latents, on each side, that an image is a multiple of."""
    given = getattr(denoiser, "config", {}).get("patch_size") or getattr(denoiser, "config", {}).get("all_patch_size")
    return max(decoding.patch, given if isinstance(given, int) else given[-1] if given else 1)


def default_size(pipe: Any, vae: Any, denoiser: Any) -> tuple[int, int]:
    """Return the default height and width of a pipeline's images, in pixels.

    Raises:
        ValueError: it does not say.
    """
    call = type(pipe).__call__
    given = inspect.signature(call).parameters
    if "height" in given and given["height"].default not in (None, inspect.Parameter.empty):
        return given["height"].default, given["width"].default
    if getattr(pipe, "default_height", None):
        return pipe.default_height, pipe.default_width
    config = getattr(denoiser, "config", {})
    sample_size = getattr(pipe, "default_sample_size", None) or config.get("sample_size")
    if config.get("sample_height"):
        sample_size = config["sample_height"], config["sample_width"]
    if sample_size is None:
        return _written_size(pipe)
    rows, columns = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size[-2:]
    return rows * spatial_factor(vae), columns * spatial_factor(vae)


def _written_size(pipe: Any) -> tuple[int, int]:
    """Return the size that the code of a pipeline's call falls back on."""
    call = source(type(pipe))
    found = [re.search(rf"{side} = {side} or (\d+)", call) for side in ("height", "width")]
    if None in found:
        raise RequestError(f"{type(pipe).__name__} has no default size; give height and width.")
    return tuple(int(match[1]) for match in found if match)  # pyright: ignore[reportReturnType]


def default_num_frames(pipe: Any, denoiser: Any) -> int:
    """Return the default number of frames of a pipeline, or Wan's 81 where the given video decides."""
    given = inspect.signature(type(pipe).__call__).parameters
    name = next((name for name in ("num_frames", "video_length") if name in given), None)
    if name is None:
        return 81 if "video" in given else 1
    config = getattr(denoiser, "config", {})
    return given[name].default or config.get("num_frames") or config.get("sample_frames") or 81


def spatial_factor(vae: Any) -> int:
    """Return the number of pixels per latent, on each side."""
    factor = _first(vae, "scale_factor_spatial", "spatial_compression_ratio")
    return factor or 2 ** (len(vae.config.block_out_channels) - 1)


def temporal_factor(vae: Any) -> int:
    """Return the number of frames per latent frame, apart from the first; 1 where each frame is encoded alone."""
    if not works_on_videos(vae):
        return 1
    factor = _first(vae, "scale_factor_temporal", "temporal_compression_ratio")
    return factor or 2 ** sum(vae.config.get("temperal_downsample") or ())


def _first(vae: Any, *names: str) -> int | None:
    """Return the first of these numbers that the autoencoder has, of its configuration or computed from it."""
    values = (config.get(name) for name in names for config in (vae.config, vars(vae)))
    return next((int(value) for value in values if value), None)


def grid(vae: Any, size: tuple[int, int], num_frames: int | None) -> tuple[int, ...]:
    """Return the shape (C, H, W) of the latent of an image, (C, F, H, W) of a video, as the autoencoder has it."""
    channels = vae.config.get("latent_channels") or vae.config.z_dim
    frames = () if num_frames is None else ((num_frames - 1) // temporal_factor(vae) + 1,)
    return channels, *frames, *(side // spatial_factor(vae) for side in size)


def statistics(pipe: Any, vae: Any, decoding: Decoding) -> dict[str, Any]:
    """Read how latents are normalised: `scaling` with `shift`, or with `mean` and `std` per channel of the sampler."""
    config = vae.config
    sigma_data = float(pipe.scheduler.config.sigma_data) if decoding.sigma_data else 1.0
    scaling = sigma_data * float((decoding.scaling and config.get("scaling_factor")) or 1.0)
    if decoding.norm:  # FLUX.2 normalises tokens
        eps = config.batch_norm_eps if decoding.norm_eps is None else decoding.norm_eps
        mean, std = vae.bn.running_mean, (vae.bn.running_var + eps).sqrt()
        return {"mean": tuple(mean.tolist()), "std": tuple(std.tolist())}
    buffers = dict(vae.named_buffers(recurse=False))  # LTX
    mean, std = (buffers.get(name, config.get(name)) for name in ("latents_mean", "latents_std"))
    if not decoding.statistics or mean is None or std is None:
        return {"scaling": scaling, "shift": float((decoding.shift and config.get("shift_factor")) or 0.0)}
    repeats = decoding.patch**2 if decoding.layout in (TOKENS, PATCHES) else 1
    mean, std = (torch.as_tensor(x).float().repeat_interleave(repeats).tolist() for x in (mean, std))
    return {"scaling": scaling, "mean": tuple(mean), "std": tuple(std)}


def vae_encode(vae: Any, pixels: Tensor) -> Tensor:
    """Encode pixels (B, 3, [F,] height, width) as the mode (B, C, [F,] h, w) of the encoder's distribution.

    An autoencoder of images encodes the frames of videos one by one; one of videos, images as videos of one frame.
    """
    videos, frames = works_on_videos(vae), pixels.shape[2] if pixels.ndim == 5 else None
    image = videos and frames is None
    if frames is not None and not videos:
        pixels = pixels.transpose(1, 2).flatten(0, 1)
    output = vae.encode(pixels.unsqueeze(2) if image else pixels)
    if hasattr(output, "latent_dist"):
        z = output.latent_dist.mode()
    else:
        z = output.latents if hasattr(output, "latents") else output.latent
    if frames is not None and not videos:
        return z.unflatten(0, (-1, frames)).transpose(1, 2)
    return z.squeeze(2) if image else z


def vae_decode(vae: Any, z: Tensor) -> Tensor:
    """Decode latents (B, C, [F,] h, w) to pixels (B, 3, [F,] height, width); see `vae_encode`."""
    name, videos = type(vae).__name__, works_on_videos(vae)
    frames = z.shape[2] if z.ndim == 5 else None
    image = videos and frames is None
    # Newer decoders of LTX denoise too; the pipeline's default is time 0.
    denoises = name in ("AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video") and vae.config.timestep_conditioning
    time = (z.new_zeros(len(z)),) if denoises else ()
    if frames is not None and not videos:
        z = z.transpose(1, 2).flatten(0, 1)
        time = (frames,) if name == "AutoencoderKLTemporalDecoder" else time
    pixels = vae.decode(z.unsqueeze(2) if image else z, *time).sample
    if frames is not None and not videos:
        return pixels.unflatten(0, (-1, frames)).transpose(1, 2)
    return pixels.squeeze(2) if image else pixels


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
    # Fused projections are copies of those that they replace.
    fused = {name for name in weights if re.search(r"\.to_(added_)?q?kv\.", name)}
    if any(".to_q." in name for name in weights):
        weights = {name: value for name, value in weights.items() if name not in fused}
    if any(value.is_meta for value in weights.values()):
        raise ValueError("The VAE's weights are offloaded; read the latent space before switching that on.")
    state = tuple((name, value.data_ptr(), value._version, value.dtype) for name, value in weights.items())
    known = _digests.get(vae)
    if known is not None and known[0] == state:
        return known[1]
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        value = value.dequantize() if hasattr(value, "dequantize") and type(value) not in _PLAIN else value
        digest.update(value.detach().cpu().half().contiguous().numpy().tobytes())
    _digests[vae] = state, digest.hexdigest()
    return digest.hexdigest()


def weights_kind(vae: Any) -> str:
    """Name the kind of numbers that the encoder's weights are: a dtype, or that they are quantised."""
    weights = list(vae.encoder.parameters())
    quantised = next((w.dtype for w in weights if w.dtype.itemsize < 2 or not w.dtype.is_floating_point), None)
    return f"quantised ({str(quantised)[6:]})" if quantised else str(weights[0].dtype)[6:] if weights else "absent"


_PLAIN = (Tensor, torch.nn.Parameter)  # weights of other classes are quantised
_digests: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()  # by autoencoder


def tiling(vae: Any, size: tuple[int, int], num_frames: int | None) -> tuple[float, ...] | None:
    """Read how an encoder cuts images of this size, or videos, into tiles that it blends; None: it does not.

    Slicing and tiling of images that fit into one tile change no latents.
    """
    settings = {name: value for name, value in vars(vae).items() if name.startswith("tile_")}
    height, width = (settings.get(f"tile_sample_min_{side}") for side in ("height", "width"))
    square = settings.get("tile_sample_min_size") or size
    rows, columns = (square, square) if isinstance(square, int) else tuple(square)
    cut = getattr(vae, "use_tiling", False) and (size[0] > (height or rows) or size[1] > (width or columns))
    by_frames = getattr(vae, "use_framewise_encoding", False) or getattr(vae, "use_framewise_decoding", False)
    cut_in_time = by_frames and (num_frames or 1) > settings.get("tile_sample_min_num_frames", num_frames or 1)
    if not cut and not cut_in_time:
        return None
    return tuple(float(settings[name]) for name in sorted(settings) if isinstance(settings[name], int | float))


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
