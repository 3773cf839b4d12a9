"""Encode images into latents as a LATENT wire carries them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from shielded.latent_space import to_pixels
from shielded.protected import find_images, load_images


def encode(images: Iterable[Image.Image], vae: Any, size: tuple[int, int], node: str) -> Tensor:
    """Encode images one by one, after resizing the short side and cropping the centre.

    Args:
        images: images of any size and mode.
        vae: ComfyUI's VAE.
        size: (height, width) in pixels.
        node: display name of the node, for errors.

    Returns:
        latents (K, *S) on the CPU, not yet scaled for the sampler.

    Raises:
        ValueError: if a latent contains NaN or infinity.
    """
    pixels = (to_pixels(image, size).movedim(0, -1)[None] / 2 + 0.5 for image in images)
    latents = torch.cat([vae.encode(image).float().cpu() for image in pixels])
    broken = (~torch.isfinite(latents.flatten(1)).all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"{node}: the VAE on the input 'vae' encodes {len(broken)} of {len(latents)} images as NaN or infinity, "
            f"first number {broken[0] + 1}. Usually the VAE runs in half precision and overflows: start ComfyUI with "
            "--fp32-vae or --bf16-vae, or load a VAE that is made for half precision."
        )
    return latents


def from_tensor(images: Tensor) -> list[Image.Image]:
    """Convert an IMAGE (B, height, width, 3) with values in [0, 1] to PIL images."""
    array = (images[..., :3] * 255).round().clamp(0, 255).byte().cpu().numpy()
    return [Image.fromarray(image) for image in array]


def from_folder(folder: Path) -> Iterable[Image.Image]:
    """Yield the images of a folder and its subfolders; log the files that cannot be read.

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it.
        ValueError: if none of the images can be read.
    """
    found = 0
    for _, path in tqdm(find_images(folder), desc="SPELL: encoding", unit="image"):
        loaded, skipped = load_images(path)
        for name, reason in skipped:
            logging.warning(f"SPELL: skipped {name}, which cannot be read: {reason}")
        for _, image, _, _ in loaded:
            found += 1
            yield image
    if not found:
        raise ValueError(f"None of the images in {folder} can be read.")


def size_of(latent: dict[str, Any], vae: Any) -> tuple[int, int]:
    """Return the size (height, width) in pixels of the image that a LATENT encodes."""
    factor = vae.spacial_compression_encode()
    height, width = latent["samples"].shape[-2:]
    return height * factor, width * factor
