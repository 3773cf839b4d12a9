"""Directions for a push where x0 equals its reference, so that x0 − z gives none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Float32

COINCIDENT = 1e-6  # share of the radius below which the direction of x0 − z is rounding noise


def tie_break(count: int, dim: int, device: torch.device) -> Float32[Tensor, "{count} {dim}"]:
    """Draw fixed vectors, one per row, the same on every call and machine.

    Their lengths rise from 1 to almost 2, so that no two are equal, not even in one dimension.
    """
    generator = torch.Generator().manual_seed(20250713)
    directions = torch.randn(count, dim, generator=generator)
    lengths = 1 + torch.arange(count)[:, None] / max(1, count)
    return (lengths * directions / directions.norm(dim=1, keepdim=True)).to(device)


def push_direction(x0: Float[Tensor, "b d"], noise: Float[Tensor, "b d"] | None) -> Float[Tensor, "b d"]:
    """Return the predicted noise (B, D), or a fixed direction in rows without any (last step of some samplers).

    Args:
        x0: (B, D).
        noise: (B, D); None: no row has noise.
    """
    fixed = tie_break(1, x0.shape[1], x0.device)
    return fixed.expand_as(x0) if noise is None else torch.where(noise.any(dim=1, keepdim=True), noise, fixed)
