"""Order of a sampler's latents: the autoencoder's own, patches as channels or as tokens, frames or channels elsewhere.

Every layout holds the same numbers, so distances do not depend on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

FRAMES_FIRST, CHANNELS_LAST, PATCHES, TOKENS = "frames first", "channels last", "patches", "tokens"


def arrange(z: Tensor, layout: str | None, patch: int) -> Tensor:
    """Bring latents of an autoencoder to the order of a sampler.

    Args:
        z: (B, C, [F,] H, W).
        layout: None: as they are; "tokens": (B, F · H/patch · W/patch, C · patch²), as FLUX, Qwen-Image and LTX;
            "patches": (B, C · patch², H/patch, W/patch); "frames first": (B, F, C, H, W); "channels last":
            (B, F, H, W, C).
        patch: side of the patches of tokens and patches.
    """
    if layout is None:
        return z
    if layout == FRAMES_FIRST:
        return z.transpose(1, 2)
    if layout == CHANNELS_LAST:
        return (z.unsqueeze(2) if z.ndim == 4 else z).movedim(1, -1)
    if layout == PATCHES:
        b, c, h, w = z.shape
        z = z.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 1, 3, 5, 2, 4)
        return z.reshape(b, c * patch**2, h // patch, w // patch)
    z = z.unsqueeze(2) if z.ndim == 4 else z
    b, c, f, h, w = z.shape
    z = z.reshape(b, c, f, h // patch, patch, w // patch, patch).permute(0, 2, 3, 5, 1, 4, 6)
    return z.reshape(b, f * (h // patch) * (w // patch), c * patch**2)


def restore(latents: Tensor, layout: str | None, patch: int, shape: tuple[int, ...]) -> Tensor:
    """Undo `arrange`; shape is that of one latent of the autoencoder, (C, [F,] H, W)."""
    if layout is None:
        return latents
    b, c, h, w = len(latents), shape[0], *shape[-2:]
    if layout == FRAMES_FIRST:
        z = latents.transpose(1, 2)
    elif layout == CHANNELS_LAST:
        z = latents.movedim(-1, 1)
    elif layout == PATCHES:
        z = latents.reshape(b, c, patch, patch, h // patch, w // patch).permute(0, 1, 4, 2, 5, 3)
    else:
        z = latents.reshape(b, -1, h // patch, w // patch, c, patch, patch).permute(0, 4, 1, 2, 5, 3, 6)
    return z.reshape(b, *shape)


def channel_axis(layout: str | None) -> int:
    """Return the axis of a batch of arranged latents that statistics per channel belong to."""
    return {FRAMES_FIRST: 2, CHANNELS_LAST: -1, TOKENS: -1}.get(layout or "", 1)


def arranged_shape(shape: tuple[int, ...], layout: str | None, patch: int) -> tuple[int, ...]:
    """Return the shape that one latent (C, [F,] H, W) has once it is arranged."""
    return tuple(arrange(torch.empty(1, *shape, device="meta"), layout, patch).shape[1:])
