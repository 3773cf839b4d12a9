"""The direction of a push where x0 equals its reference, so that x0 − z has none."""

from __future__ import annotations

import torch
from torch import Tensor

COINCIDENT = 1e-6  # closer than this share of the radius, the direction x0 − z is rounding noise


def tie_break(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Fixed unit vectors, one a row: the direction where none is defined. Same on every call and machine."""
    generator = torch.Generator().manual_seed(20250713)
    directions = torch.randn(shape, generator=generator)
    return (directions / directions.norm(dim=1, keepdim=True)).to(device)


def push_direction(x0: Tensor, noise: Tensor | None) -> Tensor:
    """(B, D) the predicted noise; a fixed direction where there is none, as in the last step of some samplers."""
    fixed = tie_break((1, x0.shape[1]), x0.device)
    return fixed.expand_as(x0) if noise is None else torch.where(noise.any(dim=1, keepdim=True), noise, fixed)
