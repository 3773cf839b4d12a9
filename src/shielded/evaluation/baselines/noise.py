"""Initial noises that are far apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shielded.evaluation.baselines.plain import Plain

_COARSE = 4  # cells of a side


class FarthestNoise(Plain):
    """Each image starts from the one of several noises that is farthest from those of the images before it.

    The plain relative of methods that optimise the initial noise ("Diverse Text-to-Image Generation via Contrastive
    Noise Optimization", arXiv 2510.03813): each noise is still a Gaussian draw, and nothing is differentiated.
    Distances are between means over 4x4 cells, since the coarse part of the noise decides about the layout. The
    candidates come from the caller's own generators; the first is the plain pipeline's noise.

    Args:
        strength: number of further candidates per image, a whole number; 0 changes nothing.
    """

    def __init__(self, strength: float) -> None:
        if strength != int(strength):
            raise ValueError(f"the strength of the initial noise is a number of candidates, not {strength}.")
        self.candidates = 1 + int(strength)

    @contextmanager
    def hooks(self, pipe: Any) -> Iterator[None]:
        plain = getattr(pipe, "prepare_latents", None)
        if plain is None:
            raise TypeError(f"{type(pipe).__name__} has no prepare_latents to choose the initial noise in.")

        def prepare_latents(*args: Any, **kwargs: Any) -> Tensor:
            drawn = [plain(*args, **kwargs) for _ in range(self.candidates)]
            if not isinstance(drawn[0], Tensor) or drawn[0].ndim != 4:
                raise TypeError(f"{type(pipe).__name__} does not start from (B, C, H, W) noise alone.")
            return farthest(torch.stack(drawn, dim=1))

        pipe.prepare_latents = prepare_latents
        try:
            yield
        finally:
            del pipe.prepare_latents


def farthest(candidates: Tensor) -> Tensor:
    """Of candidates (B, M, C, H, W) one a row (B, C, H, W): the first, then greedily the farthest from those taken."""
    coarse = (
        F.adaptive_avg_pool2d(candidates.flatten(0, 1).float(), _COARSE).flatten(1).unflatten(0, candidates.shape[:2])
    )
    taken = [0]
    for row in range(1, len(candidates)):
        others = coarse[torch.arange(row, device=coarse.device), taken]
        taken.append(int(torch.cdist(coarse[row], others).amin(dim=1).argmax()))
    return candidates[torch.arange(len(candidates), device=candidates.device), taken]
