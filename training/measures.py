"""What the parts are judged by, in training and afterwards."""

from __future__ import annotations

from typing import Protocol

import torch
from data import STYLES, Emoji
from torch import Tensor


class Autoencoder(Protocol):
    encoder: torch.nn.Module
    decoder: torch.nn.Module


def pixels_of(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1], channels last in memory."""
    return images.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def written(pixels: Tensor) -> Tensor:
    """Return decoded pixels as a picture file keeps them: clamped, in steps of 1/255."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image of [-1, 1], in dB."""
    error = ((images.clamp(-1, 1) - target) / 2).square().mean(dim=(1, 2, 3))
    return -10 * error.log10()


@torch.no_grad()
def autoencoder_figures(vae: Autoencoder, data: Emoji, scaling: float = 1.0, seed: int = 0) -> dict[str, float]:
    """Measure pictures against their decoded latents, and latents against their decoded pictures.

    Args:
        vae: the autoencoder.
        data: pictures, all styles among them.
        scaling: what the latents are multiplied by before the denoiser sees them.
        seed: of the random change.

    Returns:
        PSNR of all pictures and of each style in dB; how far a latent lies from the encoding of its own picture,
        divided by its norm; of a random change by a quarter of the norm, the share of its length that is left after
        decoding and encoding again, and the cosine between what is left and the change.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {"psnr": [], "error": [], "kept": [], "cosine": []}
    for batch in data.images.split(50):
        target = pixels_of(batch)
        latents = scaling * vae.encoder(target)
        change = torch.randn(latents.shape, generator=generator)
        change *= 0.25 * (latents.flatten(1).norm(dim=1) / change.flatten(1).norm(dim=1))[:, None, None, None]
        pictures = vae.decoder(latents / scaling)
        again = scaling * vae.encoder(written(pictures))
        moved = scaling * vae.encoder(written(vae.decoder((latents + change) / scaling))) - again
        moved, change, error, latents = (x.flatten(1) for x in (moved, change, again - latents, latents))
        found["psnr"].append(psnr(pictures, target))
        found["error"].append(error.norm(dim=1) / latents.norm(dim=1))
        found["kept"].append(moved.norm(dim=1) / change.norm(dim=1))
        found["cosine"].append(torch.cosine_similarity(moved, change))
    each = {name: torch.cat(values) for name, values in found.items()}
    styles = torch.tensor([STYLES.index(style) for style in data.styles])
    return {
        "psnr_db": each["psnr"].mean().item(),
        **{f"psnr_db_{style}": each["psnr"][styles == i].mean().item() for i, style in enumerate(STYLES)},
        "latent_error_after_decoding_and_encoding": each["error"].mean().item(),
        "random_change_kept_length": each["kept"].mean().item(),
        "random_change_cosine": each["cosine"].mean().item(),
    }
