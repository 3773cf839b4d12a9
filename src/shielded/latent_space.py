"""The space a sampler works in: which autoencoder, how it is scaled, how large."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

# Denoisers whose pipelines sample unpacked (B, C, H, W) latents of an image autoencoder: SD 1/2, SDXL and SD3.
_DENOISERS = ("UNet2DConditionModel", "SD3Transformer2DModel")


@dataclass(frozen=True)
class LatentSpace:
    """A latent space as a sampler sees it, with the encoder that leads into it.

    Distances only mean something between latents of one space, so whatever is stored carries the `fingerprint` of
    the space it was made for. `LatentSpace(shape)` describes a space by its shape alone; `LatentSpace.of(pipe)` reads
    everything off a pipeline.

    A latent is `(z - shift) * scaling` for the mode z of the encoder's distribution, or `(z - mean) * scaling / std`
    where the autoencoder has statistics per channel.

    Args:
        shape: shape of one latent, without the batch axis.
        image_size: (height, width) in pixels of the images that the space stands for.
        scaling: the autoencoder's `scaling_factor`.
        shift: the autoencoder's `shift_factor`.
        mean: the autoencoder's `latents_mean`, one number per channel.
        std: the autoencoder's `latents_std`, one number per channel.
        vae_class: class name of the autoencoder.
        vae_sha256: digest of the weights of its encoder, as float16.
        vae: the autoencoder itself. It is neither stored nor compared.
    """

    shape: tuple[int, ...]
    image_size: tuple[int, int] | None = None
    scaling: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    vae_class: str | None = None
    vae_sha256: str | None = None
    vae: nn.Module | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        shape = tuple(self.shape)
        if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(
                f"shape must be positive integers such as (4, 64, 64), without the batch axis; got {shape}."
            )
        object.__setattr__(self, "shape", shape)

    @classmethod
    def of(cls, pipe: Any, height: int | None = None, width: int | None = None) -> LatentSpace:
        """Reads the latent space off a diffusers pipeline.

        Args:
            pipe: a pipeline with an `AutoencoderKL` or `AutoencoderTiny` whose sampler sees unpacked (B, C, H, W)
                latents: Stable Diffusion 1 and 2, SDXL, Stable Diffusion 3.
            height: height of the images in pixels; the pipeline's default if left out.
            width: width of the images in pixels; the pipeline's default if left out.

        Returns:
            The space of the latents that `pipe.scheduler.step` is given.

        Raises:
            TypeError: if the pipeline is of a kind that is not supported.
            ValueError: if height or width do not fit the pipeline, or the encoder's weights are not at hand.
        """
        vae, denoiser = _parts(pipe)
        factor = pipe.vae_scale_factor
        sample_size = denoiser.config.sample_size
        rows, columns = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        height, width = height or rows * factor, width or columns * factor
        multiple = factor * getattr(denoiser.config, "patch_size", 1)
        if height % multiple or width % multiple:
            raise ValueError(f"{type(pipe).__name__} needs a multiple of {multiple} pixels; got {height}x{width}.")
        config = vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            mean = std = None
        return cls(
            shape=(config.latent_channels, height // factor, width // factor),
            image_size=(height, width),
            scaling=float(config.scaling_factor),
            shift=float(getattr(config, "shift_factor", None) or 0.0) if mean is None else 0.0,
            mean=None if mean is None else tuple(map(float, mean)),
            std=None if std is None else tuple(map(float, std)),
            vae_class=type(vae).__name__,
            vae_sha256=_encoder_sha256(vae),
            vae=vae,
        )

    @property
    def dim(self) -> int:
        """Number of components of one latent."""
        return int(np.prod(self.shape))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that two spaces share when their latents can be compared."""
        parts: dict[str, Any] = {"shape": list(self.shape)}
        if self.vae_sha256 is not None:
            parts |= {key: value for key, value in self.to_json().items() if key != "image_size"}
            parts["distribution"] = "mode"
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Everything but the autoencoder, in JSON types; `from_json` reads it back."""
        return {
            "shape": list(self.shape),
            "image_size": None if self.image_size is None else list(self.image_size),
            "scaling": self.scaling,
            "shift": self.shift,
            "mean": None if self.mean is None else list(self.mean),
            "std": None if self.std is None else list(self.std),
            "vae_class": self.vae_class,
            "vae_sha256": self.vae_sha256,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatentSpace:
        """The space that `to_json` described. It has no autoencoder and so cannot encode."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})

    def require_same(self, other: LatentSpace) -> None:
        """Refuses a space whose latents cannot be compared with those of this one: another shape or another encoder.

        Args:
            other: the space to compare with.

        Raises:
            ValueError: naming what differs.
        """
        _refuse(self._differences(other, "shape") + self._encoder_differences(other))

    def require_same_encoder(self, other: LatentSpace) -> None:
        """Like `require_same`, for spaces whose images may differ in size.

        A space by shape alone says nothing about an encoder, so it passes.

        Args:
            other: the space to compare with.

        Raises:
            ValueError: naming what differs.
        """
        _refuse(self._encoder_differences(other))

    def _differences(self, other: LatentSpace, *names: str) -> list[str]:
        return [
            f"{name} {getattr(self, name)} against {getattr(other, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]

    def _encoder_differences(self, other: LatentSpace) -> list[str]:
        if self.vae_sha256 is None or other.vae_sha256 is None:
            return []
        different = self._differences(other, "vae_class", "scaling", "shift", "mean", "std")
        if not different and self.vae_sha256 != other.vae_sha256:
            return ["the encoder's weights (loaded as float32 or float16 they are the same, as bfloat16 they are not)"]
        return different

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image] | Tensor, batch_size: int = 16) -> Tensor:
        """Encodes images into the latents that a sampler would have to produce for them.

        Args:
            images: PIL images, which are brought to `image_size` (alpha over white, short side resized, centre cut
                out), or a float tensor (B, 3, height, width) with values in [-1, 1].
            batch_size: images per call of the encoder.

        Returns:
            Latents (B, *shape), float32, on the CPU.

        Raises:
            TypeError: if `images` is something else.
            ValueError: if the space has no autoencoder, or size or range of a tensor are wrong.
        """
        vae = self._require_vae()
        if isinstance(images, Tensor):
            self._check_pixels(images)
        else:
            images = _pil_list(images)
        mean, scale = self._normalisation()
        latents = [torch.empty(0, *self.shape)]
        with _ready(vae) as (device, dtype):
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size]
                if not isinstance(batch, Tensor):
                    batch = torch.stack([to_pixels(image, self.image_size) for image in batch])
                output = vae.encode(batch.to(device, dtype))
                z = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
                latents.append((z.float().cpu() - mean) * scale)
        return torch.cat(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 16) -> list[Image.Image]:
        """Decodes latents of the sampler.

        Args:
            latents: (B, *shape), any device.
            batch_size: latents per call of the decoder.

        Returns:
            B images of `image_size`.

        Raises:
            ValueError: if the space has no autoencoder or the shape is wrong.
        """
        vae = self._require_vae()
        if tuple(latents.shape[1:]) != self.shape:
            raise ValueError(
                f"latents must have the shape (B, {', '.join(map(str, self.shape))}); got {tuple(latents.shape)}."
            )
        mean, scale = self._normalisation()
        images = []
        with _ready(vae) as (device, dtype):
            for batch in latents.split(batch_size):
                z = batch.detach().float().cpu() / scale + mean
                pixels = vae.decode(z.to(device, dtype)).sample.float().cpu()
                array = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
                images += [Image.fromarray(picture) for picture in array]
        return images

    def _normalisation(self) -> tuple[Tensor | float, Tensor | float]:
        """(mean, scale) with latent = (z - mean) * scale."""
        if self.mean is None:
            return self.shift, self.scaling
        return torch.tensor(self.mean).view(-1, 1, 1), self.scaling / torch.tensor(self.std).view(-1, 1, 1)

    def _require_vae(self) -> nn.Module:
        if self.vae is None or self.image_size is None:
            raise ValueError("This latent space has no autoencoder; LatentSpace.of(pipe) gives one that can encode.")
        return self.vae

    def _check_pixels(self, pixels: Tensor) -> None:
        expected = (3, *self.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected or not pixels.is_floating_point():
            raise ValueError(
                f"Expected a float tensor (B, {', '.join(map(str, expected))}); got {pixels.dtype} of shape "
                f"{tuple(pixels.shape)}. PIL images of any size are resized."
            )
        if not pixels.numel():
            return
        low, high = pixels.min().item(), pixels.max().item()
        if not (low >= -1.0001 and high <= 1.0001):
            raise ValueError(f"Pixels must lie in [-1, 1]; got values from {low:g} to {high:g}.")
        if low >= 0 and high > 0:
            warnings.warn("No pixel is negative: these look like values in [0, 1], but [-1, 1] is meant.", stacklevel=3)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB; what is transparent becomes white, 16-bit grey values are scaled to 8 bits.

    Raises:
        ValueError: for images of 32-bit numbers, whose range is unknown.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"an image of mode {image.mode} has no defined range of values; convert it to RGB")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An image of any size and mode as a tensor (3, height, width) in [-1, 1]: short side resized, centre cut out."""
    height, width = size
    image = ImageOps.fit(to_rgb(image), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _refuse(differences: list[str]) -> None:
    if differences:
        raise ValueError(f"These latent spaces differ, so distances would mean nothing: {'; '.join(differences)}.")


def _pil_list(images: Any) -> list[Image.Image]:
    hint = "Expected a list of PIL images or a float tensor (B, 3, height, width) in [-1, 1]"
    if isinstance(images, Image.Image) or not hasattr(images, "__iter__"):
        raise TypeError(f"{hint}; got a single {type(images).__name__}.")
    images = list(images)
    for image in images:
        if not isinstance(image, Image.Image):
            raise TypeError(f"{hint}; got a list with {type(image).__name__}.")
    return images


def _parts(pipe: Any) -> tuple[nn.Module, nn.Module]:
    """The autoencoder and the denoiser of a supported pipeline, without the wrapper of torch.compile."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    vae, denoiser = getattr(pipe, "vae", None), getattr(pipe, "unet", getattr(pipe, "transformer", None))
    vae, denoiser = getattr(vae, "_orig_mod", vae), getattr(denoiser, "_orig_mod", denoiser)
    hint = "LatentSpace(shape) describes any space by its shape."
    if not isinstance(vae, AutoencoderKL | AutoencoderTiny):
        raise TypeError(
            f"{type(pipe).__name__} has the autoencoder {type(vae).__name__}; AutoencoderKL and AutoencoderTiny are "
            f"supported. {hint}"
        )
    if type(denoiser).__name__ not in _DENOISERS:
        raise TypeError(
            f"{type(pipe).__name__} has the denoiser {type(denoiser).__name__}; {' and '.join(_DENOISERS)} are "
            f"supported. {hint}"
        )
    return vae, denoiser


def _encoder_sha256(vae: nn.Module) -> str:
    """Digest of all weights on the way from image to latent, as float16: float32 and float16 loads agree."""
    digest = hashlib.sha256()
    for part in ("encoder", "quant_conv"):
        module = getattr(vae, part, None)
        for name, value in sorted(module.state_dict().items()) if module is not None else ():
            if value.is_meta:
                raise ValueError("The VAE's weights are offloaded; read the latent space before switching that on.")
            digest.update(f"{part}.{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _ready(vae: nn.Module) -> Iterator[tuple[torch.device, torch.dtype]]:
    """The device and dtype for inputs; an autoencoder that overflows in float16 is in float32 meanwhile."""
    # Accelerate's offloading moves the module to another device when it is called.
    device = getattr(getattr(vae, "_hf_hook", None), "execution_device", vae.device)
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    try:
        yield device, vae.dtype
    finally:
        if upcast:
            vae.to(torch.float16)
