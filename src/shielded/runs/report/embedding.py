"""Pictures inside the page, at a size and quality that keep the page small however many there are."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

MAX_BYTES = 8_000_000  # of all pictures of a page, as base64: a browser takes a second for 10 MB
_METHOD = 2  # of WebP: half the time of the default for files that are a tenth larger
_SAMPLE = 24  # pictures that the choice of a level looks at


@dataclass(frozen=True)
class Level:
    """How pictures are stored.

    Args:
        pixels: longest side; larger pictures are scaled down.
        quality: of WebP.
        lossless: longest side up to which pictures keep every pixel.
    """

    pixels: int
    quality: int
    lossless: int = 0


LEVELS = [Level(512, 90, lossless=128), Level(512, 88), Level(384, 85), Level(256, 82), Level(192, 75), Level(128, 65)]


def choose_level(images: Sequence[Image.Image]) -> Level:
    """Choose the best level at which these pictures fit into `MAX_BYTES`, judged by a few of them."""
    sample = images[:: max(1, len(images) // _SAMPLE)][:_SAMPLE]
    for level in LEVELS[:-1]:
        size = sum(len(_encoded(image, level)[0]) for image in sample) * len(images) / max(1, len(sample))
        if size <= MAX_BYTES:
            return level
    return LEVELS[-1]


def embedded(image: Image.Image, level: Level) -> dict[str, object]:
    """Return size and data URI of a picture, and whether it is reduced."""
    data, size = _encoded(image, level)
    return {
        "width": size[0],
        "height": size[1],
        "reduced": size != image.size,
        "source": f"data:image/webp;base64,{data}",
    }


def _encoded(image: Image.Image, level: Level) -> tuple[str, tuple[int, int]]:
    small = image.convert("RGBA" if image.mode in ("RGBA", "LA", "P", "PA") else "RGB")
    small.thumbnail((level.pixels, level.pixels), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", lossless=max(small.size) <= level.lossless, quality=level.quality, method=_METHOD)
    return base64.b64encode(buffer.getvalue()).decode("ascii"), small.size
