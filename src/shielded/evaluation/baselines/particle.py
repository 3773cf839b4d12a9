"""Particle Guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from shielded.evaluation.baselines.plain import Plain, pairwise, weighted_offsets


class ParticleGuidance(Plain):
    """Push the images of a batch apart by the gradient of a sum of RBF kernels.

    Corso et al., "Particle Guidance: non-I.I.D. Diverse Sampling with Diffusion Models", ICLR 2024; the joint
    potential with the RBF kernel and its median bandwidth:

        log Φ = −(s/2) Σ_ij exp(−‖x_i − x_j‖²/h),   h = median² / log n

    Here the kernel is taken of the predicted clean images x0. Adding ∇ log Φ to the score moves x0 by
    Cov(X_0|x_t) ∇_x0 log Φ; no gradient goes through the network, and the covariance is that of Gaussian data of unit
    variance, σ²/(α² + σ²), so the push fades with the noise. Identical images exert no push: the kernel is flat there.

    Args:
        strength: s; 0 changes nothing.
        groups: (B,) ids; only images of one group act on each other. None: all.
    """

    def __init__(self, strength: float, groups: Tensor | None = None) -> None:
        self.strength = strength
        self.groups = groups

    def __call__(self, x0: Tensor, *, noise: Tensor, alpha: float, sigma: float, last: bool = False) -> Tensor:
        x = x0.flatten(1)
        squared, interacting = pairwise(x, self.groups)
        # Each image's median is over its group, so that a batch of several prompts acts like one batch per prompt.
        within = torch.where(interacting, squared, torch.nan)
        bandwidth = within.nanmedian(dim=1, keepdim=True).values
        bandwidth = (bandwidth + bandwidth.T) / 2  # symmetric, or the push would have no potential
        count = interacting.sum(dim=1, keepdim=True) + 1
        bandwidth = bandwidth / count.clamp(min=2).log()
        active = interacting & (bandwidth > 0)
        kernel = torch.where(active, (-squared / bandwidth).exp(), 0)
        weights = torch.where(active, 2 / bandwidth, 0) * kernel
        variance = sigma**2 / (alpha**2 + sigma**2)
        return (self.strength * variance * weighted_offsets(x, weights)).view_as(x0)
