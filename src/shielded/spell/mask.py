"""Latents as rows of numbers, restricted to the part of the image that is generated (inpainting)."""

from __future__ import annotations

import torch
from torch import Tensor


def flatten(x: Tensor, mask: Tensor | None) -> Tensor:
    """Flatten (B, *S) to float32 (B, D), D counting what the mask keeps.

    Args:
        x: (B, *S).
        mask: broadcasts to *S, zero where the image is given; None keeps everything.
    """
    flat = x.detach().float()
    return flat.flatten(1) if mask is None else flat[:, _kept(mask, x)]


def unflatten(flat: Tensor, like: Tensor, mask: Tensor | None) -> Tensor:
    """Undo `flatten`: bring (B, D) to the shape and dtype of `like` (B, *S), zero where the mask is."""
    if mask is None:
        return flat.to(like.dtype).view_as(like)
    full = torch.zeros_like(like)
    full[:, _kept(mask, like)] = flat.to(like.dtype)
    return full


def _kept(mask: Tensor, x: Tensor) -> Tensor:
    return mask.to(x.device).expand(x.shape[1:]) != 0
