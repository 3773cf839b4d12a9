"""Kernel force in an early window, after Safety-Guided Flow."""

from __future__ import annotations

import torch
from torch import Tensor

from shielded.evaluation.baselines.plain import Plain, pairwise, weighted_offsets


class SafetyGuidedFlow(Plain):
    """Push the images of a batch apart by the gradient of an MMD energy, only early in sampling.

    Kim et al., "Safety-Guided Flow (SGF): A Unified Framework for Negative Guidance in Safe Generation", ICLR 2026.
    Of the squared maximum mean discrepancy, with the other images of the batch as the set to stay away from, the cross
    term with a Gaussian kernel of fixed bandwidth is kept; with w_ij = exp(−‖x_i − x_j‖²/(2 b² D)) its gradient is

        δ_i = s / (n − 1) Σ_j w_ij (x_i − x_j)

    up to a constant that s absorbs. This is the energy and the window of that paper, applied to diversity, not a copy
    of its code; the paper steers away from a set of unsafe images as well.

    Args:
        strength: s; at 1, an image among close copies moves as far as it is from their mean.
        bandwidth: b, of the kernel per √dimension.
        window: noise levels t = σ/(α + σ), from and to, in which it acts.
        groups: (B,) ids; only images of one group act on each other. None: all.
    """

    def __init__(
        self,
        strength: float,
        bandwidth: float = 0.5,
        window: tuple[float, float] = (1.0, 0.78),
        groups: Tensor | None = None,
    ) -> None:
        self.strength = strength
        self.bandwidth = bandwidth
        self.window = window
        self.groups = groups

    def __call__(self, x0: Tensor, *, noise: Tensor, alpha: float, sigma: float, last: bool = False) -> Tensor:
        if not self.window[1] <= sigma / (alpha + sigma) <= self.window[0]:
            return torch.zeros_like(x0)
        x = x0.flatten(1)
        squared, interacting = pairwise(x, self.groups)
        kernel = (-squared / (2 * self.bandwidth**2 * x.shape[1])).exp()
        weights = interacting * kernel / interacting.sum(dim=1, keepdim=True).clamp(min=1)
        return (self.strength * weighted_offsets(x, weights)).view_as(x0)
