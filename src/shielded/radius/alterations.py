"""Alter an image lightly, as copies of it are altered in circulation, to see how far its latents move."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def jpeg(quality: int) -> Change:
    """Compress as JPEG with this quality, and decode again."""

    def change(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return change


def resize(share: float) -> Change:
    """Shrink to this share of width and height, and enlarge to the size before."""

    def change(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        small = max(1, round(share * image.width)), max(1, round(share * image.height))
        return image.resize(small, Image.Resampling.LANCZOS).resize(image.size, Image.Resampling.BICUBIC)

    return change


def crop(share: float) -> Change:
    """Cut off this share of the side at each edge, at least a pixel, and enlarge to the size before."""

    def change(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        x, y = max(1, round(share * image.width)), max(1, round(share * image.height))
        inner = image.crop((x, y, image.width - x, image.height - y))
        return inner.resize(image.size, Image.Resampling.LANCZOS)

    return change


def shift(share: float) -> Change:
    """Move right by this share of the width, at least a pixel, and repeat the left edge."""

    def change(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        pixels = max(1, round(share * image.width))
        padded = np.pad(np.asarray(image), ((0, 0), (pixels, 0), (0, 0)), "edge")
        return Image.fromarray(np.ascontiguousarray(padded[:, : image.width]))

    return change


def rotate(degrees: float) -> Change:
    """Turn around the centre, with black corners."""
    return lambda image, rng: image.rotate(degrees, Image.Resampling.BICUBIC)


def chain(*changes: Change) -> Change:
    """Make several changes, one after the other."""

    def change(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for one in changes:
            image = one(image, rng)
        return image

    return change


def mirror(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirror left to right."""
    return ImageOps.mirror(image)


def brightness(factor: float) -> Change:
    """Multiply all values by a factor."""
    return lambda image, rng: ImageEnhance.Brightness(image).enhance(factor)


def contrast(factor: float) -> Change:
    """Multiply the differences from the mean grey by a factor."""
    return lambda image, rng: ImageEnhance.Contrast(image).enhance(factor)


def noise(deviation: float) -> Change:
    """Add Gaussian noise of this standard deviation, as a share of the value range, to each pixel and channel."""

    def change(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        values = np.asarray(image) + rng.normal(0, 255 * deviation, (image.height, image.width, 3))
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))

    return change


CHANGES: dict[str, Change] = {
    "JPEG 90": jpeg(90),
    "JPEG 75": jpeg(75),
    "JPEG 50": jpeg(50),
    "half size": resize(1 / 2),
    "quarter size": resize(1 / 4),
    "noise 2 %": noise(0.02),
    "noise 5 %": noise(0.05),
    "brightness +10 %": brightness(1.1),
    "brightness -10 %": brightness(0.9),
    "contrast +25 %": contrast(1.25),
    "contrast -25 %": contrast(0.75),
    "shift 1 %": shift(0.01),
    "shift 3 %": shift(0.03),
    "crop 1 %": crop(0.01),
    "crop 5 %": crop(0.05),
    "mirrored": mirror,
}
# Changes that are too large for a distance in the latent space; `shielded.copies` is measured on them too.
LARGE_CHANGES: dict[str, Change] = {
    "crop 12 %": crop(0.12),
    "shift 8 %": shift(0.08),
    "rotated 5°": rotate(5),
    "mirrored, cropped 5 %, JPEG 50": chain(mirror, crop(0.05), jpeg(50)),
}
