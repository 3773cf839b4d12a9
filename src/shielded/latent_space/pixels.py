"""Pictures as pixels: colour modes, sizes, and tensors in [-1, 1] with a frame axis for videos."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

_SAME_LEVELS = 2  # of 255, by which a profile may differ from sRGB and count as it


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to sRGB: its colour profile applied, transparency over white, 16-bit grey scaled to 8 bits.

    A profile that cannot be read, or does not fit the image, is passed over, as browsers do.

    Raises:
        ValueError: for images of 32-bit numbers, whose range is unknown.
    """
    profile = image.info.get("icc_profile")
    if profile:
        image = _to_srgb(image, profile)
    if image.mode in ("I", "F"):
        raise ValueError(f"an image of mode {image.mode} has no defined range of values; convert it to RGB")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert colours of an embedded profile to sRGB; return an image without a profile."""
    alpha = None
    if image.mode in ("P", "PA", "RGBA", "LA") or "transparency" in image.info:
        colours = "L" if image.mode in ("L", "LA") else "RGB"
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert(colours)
    elif image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    space = _profile_space(profile)
    transform = _transform(profile, image.mode) if space == _PROFILE_SPACES.get(image.mode) else None
    if transform is not None:
        image = ImageCms.applyTransform(image, transform) or image
    image = image.copy()
    image.info.pop("icc_profile", None)
    if alpha is not None:
        image = image.convert("RGB")
        image.putalpha(alpha)
    return image


_PROFILE_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "LAB"}


def _profile_space(profile: bytes) -> str:
    return profile[16:20].decode("ascii", "replace").strip().upper()


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Make the conversion of a profile to sRGB; None if it cannot be read or is that of sRGB itself."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.NOCACHE,  # for several threads
        )
        if mode != "RGB":
            return transform
        levels = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), -1).reshape(1, -1, 3)
        converted = ImageCms.applyTransform(Image.fromarray(levels), transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    change = np.abs(np.asarray(converted).astype(int) - levels).max()
    return None if change <= _SAME_LEVELS else transform  # so that sRGB stays bit for bit what it is


def to_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Bring an image to a tensor (3, height, width) in [-1, 1]: short side resized, centre cropped."""
    height, width = size
    image = ImageOps.fit(to_rgb(image), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def clip_to_pixels(
    item: Image.Image | Sequence[Image.Image], size: tuple[int, int], num_frames: int | None = None
) -> Tensor:
    """Bring an image to (3, height, width), or frames, or a still image, to (3, num_frames, height, width)."""
    if isinstance(item, Image.Image):
        pixels = to_pixels(item, size)
        return pixels if num_frames is None else still(pixels, num_frames)
    return torch.stack([to_pixels(frame, size) for frame in item], dim=1)


def still(pixels: Tensor, num_frames: int) -> Tensor:
    """Repeat (..., 3, height, width) as a video (..., 3, num_frames, height, width)."""
    return pixels.unsqueeze(-3).expand(*pixels.shape[:-2], num_frames, *pixels.shape[-2:])


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Convert pixels (N, 3, height, width) in [-1, 1] to N images."""
    array = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in array]


def check_pixels(pixels: Tensor, size: tuple[int, int], num_frames: int | None = None) -> Tensor:
    """Return the tensor; for videos, stills (B, 3, height, width) become (B, 3, num_frames, height, width).

    Raises:
        ValueError: another shape, integers, or values outside [-1, 1].
    """
    shapes = [(3, *size)] if num_frames is None else [(3, *size), (3, num_frames, *size)]
    if tuple(pixels.shape[1:]) not in shapes or not pixels.is_floating_point():
        expected = " or ".join(f"(B, {', '.join(map(str, shape))})" for shape in shapes)
        raise ValueError(
            f"Expected a float tensor {expected}; got {pixels.dtype} of shape {tuple(pixels.shape)}. "
            "PIL images of any size are resized."
        )
    if pixels.numel():
        low, high = pixels.min().item(), pixels.max().item()
        if not (low >= -1.0001 and high <= 1.0001):
            raise ValueError(f"Pixels must lie in [-1, 1]; got values from {low:g} to {high:g}.")
        if low >= 0 and high > 0:
            warnings.warn("No pixel is negative: these look like values in [0, 1], but [-1, 1] is meant.", stacklevel=4)
    return still(pixels, num_frames) if num_frames is not None and pixels.ndim == 4 else pixels


def _from_bytes(arrays: Any) -> list[Image.Image]:
    """Read arrays (height, width[, 1 or 3]) of bytes as images.

    Raises:
        TypeError: other numbers or shapes.
    """
    found = []
    for array in arrays:
        array = np.asarray(array)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
            raise TypeError(
                f"Expected arrays (height, width, 3) of bytes; got {array.dtype} of shape {array.shape}. Other numbers "
                "go as a float tensor (B, 3, height, width) with values in [-1, 1]."
            )
        found.append(Image.fromarray(array.squeeze(2) if array.ndim == 3 and array.shape[2] == 1 else array))
    return found


def check_images(images: Any, num_frames: int | None = None) -> list[Any]:
    """Return the images as a list; for videos, each is an image or num_frames of them.

    Raises:
        TypeError: something else than PIL images or arrays of bytes.
        ValueError: a video with another number of frames.
    """
    first = images[0] if isinstance(images, list | tuple | np.ndarray) and len(images) else images
    if isinstance(first, str | Path):
        raise TypeError("Expected PIL images, not paths; `shielded.protected.load_images` reads them.")
    if isinstance(first, np.ndarray):
        images = _from_bytes(images)
    clips = "" if num_frames is None else f", videos as lists of {num_frames} of them"
    hint = f"Expected a list of PIL images{clips} or a float tensor with values in [-1, 1]"
    if isinstance(images, Image.Image) or not hasattr(images, "__iter__"):
        raise TypeError(f"{hint}; got a single {type(images).__name__}.")
    images = list(images)
    for item in images:
        frames = list(item) if num_frames is not None and isinstance(item, Sequence) else [item]
        wrong = [frame for frame in frames if not isinstance(frame, Image.Image)]
        if wrong:
            raise TypeError(f"{hint}; got a list with {type(wrong[0]).__name__}.")
        if num_frames is not None and item is not frames[0] and len(frames) != num_frames:
            raise ValueError(
                f"A video has {len(frames)} frames, this latent space {num_frames}; choose as many, or pass "
                "num_frames=... to LatentSpace.of."
            )
    return images


# A range of values other than [-1, 1] -----------------------------------------------------------------------------

_LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601), as Pillow makes grey
_OVERSHOOT = 0.25  # share of a range by which a sampler may leave it


def check_range(given: Any) -> tuple[float, float]:
    """Return the values of black and white as two numbers.

    Raises:
        ValueError: they are not two finite numbers of which the second is larger.
    """
    try:
        low, high = (float(value) for value in given)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not low < high or not np.isfinite([low, high]).all():
        raise ValueError(f"range must be the values of black and white, such as (-1, 1) or (0, 1); got {given!r}.")
    return low, high


def to_range(pixels: Tensor, channels: int, around: tuple[float, float]) -> Tensor:
    """Bring pixels (B, 3, height, width) in [-1, 1] to a range, as (B, channels, height, width)."""
    if channels == 1:
        pixels = (pixels * torch.tensor(_LUMINANCE).view(3, 1, 1)).sum(dim=1, keepdim=True)
    low, high = around
    return pixels if around == (-1.0, 1.0) else low + (high - low) * (pixels + 1) / 2


def from_range(values: Tensor, around: tuple[float, float]) -> Tensor:
    """Bring values (B, C, height, width) of a range to pixels (B, 3, height, width) in [-1, 1]."""
    low, high = around
    pixels = values if around == (-1.0, 1.0) else 2 * (values - low) / (high - low) - 1
    return pixels.expand(-1, 3, -1, -1)


def require_range(values: Tensor, around: tuple[float, float]) -> None:
    """Refuse pixels of another range.

    Args:
        values: (B, C, height, width), of a sampler too, which may leave the range a little.
        around: the range.

    Raises:
        ValueError: names both ranges.
    """
    if not values.numel():
        return
    least, most = (value.item() for value in values.aminmax())
    low, high = around
    beyond = _OVERSHOOT * (high - low)
    if least < low - beyond or most > high + beyond:
        raise ValueError(f"this space holds pixels in [{low:g}, {high:g}]; got values from {least:g} to {most:g}.")
