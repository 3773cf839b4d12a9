"""Initial noise chosen to be far apart within a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shielded.evaluation.baselines.plain import Plain

_GRID_SIZE = 4  # cells per side of the means that distances are measured between


class FarthestNoise(Plain):
    """Start each image from the one of several noises that is farthest from those of the images before it.

    It is the simple relative of methods that optimise the initial noise ("Diverse Text-to-Image Generation via
    Contrastive Noise Optimization", arXiv 2510.03813): each noise is still a Gaussian draw, and nothing is
    differentiated. Distances are between means over 4x4 cells, since the low frequencies of the noise decide the
    layout. The candidates come from the caller's generators; the first is the plain pipeline's noise.

    Args:
        strength: number of additional candidates per image, a whole number; 0 changes nothing.
    """

    def __init__(self, strength: float) -> None:
        if strength != int(strength):
            raise ValueError(f"the strength of the initial noise is a number of candidates, not {strength}.")
        self.candidates = 1 + int(strength)

    @contextmanager
    def hooks(self, pipe: Any) -> Iterator[None]:
        """Choose the initial noise among several draws."""
        plain = getattr(pipe, "prepare_latents", None)
        if plain is None:
            raise TypeError(f"{type(pipe).__name__} has no prepare_latents to choose the initial noise in.")

        def prepare_latents(*args: Any, **kwargs: Any) -> Tensor:
            drawn = [plain(*args, **kwargs) for _ in range(self.candidates)]
            if not isinstance(drawn[0], Tensor) or drawn[0].ndim != 4:
                raise TypeError(f"{type(pipe).__name__} does not start from (B, C, H, W) noise alone.")
            return farthest_candidates(torch.stack(drawn, dim=1))

        pipe.prepare_latents = prepare_latents
        try:
            yield
        finally:
            del pipe.prepare_latents


def farthest_candidates(candidates: Tensor) -> Tensor:
    """Choose one of M candidates per row: the first row's first one, then greedily the farthest from those chosen.

    Args:
        candidates: (B, M, C, H, W).

    Returns:
        (B, C, H, W).
    """
    coarse = (
        F.adaptive_avg_pool2d(candidates.flatten(0, 1).float(), _GRID_SIZE)
        .flatten(1)
        .unflatten(0, candidates.shape[:2])
    )
    chosen = [0]
    for row in range(1, len(candidates)):
        others = coarse[torch.arange(row, device=coarse.device), chosen]
        chosen.append(int(torch.cdist(coarse[row], others).amin(dim=1).argmax()))
    return candidates[torch.arange(len(candidates), device=candidates.device), chosen]
