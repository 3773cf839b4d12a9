"""CADS: prompt embeddings with noise that is annealed away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shielded.evaluation.baselines.plain import Plain, denoiser_of, timestep_of

_CONDITIONS = ("encoder_hidden_states", "pooled_projections", "text_embeds")


class CADS(Plain):
    """Add noise to the prompt embeddings early in sampling, so that images follow the prompt only later.

    Sadat et al., "CADS: Unleashing the Diversity of Diffusion Models through Condition-Annealed Sampling", ICLR 2024,
    Section 3.1. With t the share of the training timesteps still to go,

        γ(t) = 1 for t ≤ τ1,  (τ2 − t)/(τ2 − τ1) in between,  0 for t ≥ τ2
        ŷ = √γ y + s √(1 − γ) n,   n fresh at each step
        y ← ψ rescaled(ŷ) + (1 − ψ) ŷ,   rescaled: with the mean and standard deviation of y

    The embeddings of the negative prompt are not changed.

    Args:
        strength: s, the noise scale.
        tau: (τ1, τ2).
        mixing: ψ.
        seed: seed of the noise; successive runs of one object draw different noise.
    """

    def __init__(
        self, strength: float, tau: tuple[float, float] = (0.6, 0.9), mixing: float = 1.0, seed: int = 0
    ) -> None:
        if not 0 <= tau[0] < tau[1] <= 1:
            raise ValueError(f"tau={tau} must be two rising shares of the schedule, like (0.6, 0.9).")
        self.strength = strength
        self.tau = tau
        self.mixing = mixing
        self.generator = torch.Generator().manual_seed(seed)

    def kept(self, t: float) -> float:
        """Return γ, the share of the prompt at time t."""
        low, high = self.tau
        return min(1.0, max(0.0, (high - t) / (high - low)))

    def anneal(self, y: Tensor, gamma: float) -> Tensor:
        """Add noise to the embeddings y (B, *S), each row separately."""
        noise = torch.randn(y.shape, generator=self.generator).to(y.device, y.dtype)
        noisy = gamma**0.5 * y + self.strength * (1 - gamma) ** 0.5 * noise
        axes = tuple(range(1, y.ndim))
        centred = (noisy - noisy.mean(axes, keepdim=True)) / noisy.std(axes, keepdim=True)
        rescaled = centred * y.std(axes, keepdim=True) + y.mean(axes, keepdim=True)
        return self.mixing * rescaled + (1 - self.mixing) * noisy

    @contextmanager
    def hooks(self, pipe: Any) -> Iterator[None]:
        """Change the embeddings that the denoiser is called with."""
        steps = pipe.scheduler.config.num_train_timesteps

        def change(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            gamma = self.kept(float(timestep_of(args, kwargs)) / steps)
            if self.strength == 0 or gamma == 1:
                return None
            guided = getattr(pipe, "do_classifier_free_guidance", False)
            changed: dict[str, Any] = dict(self._with_noise(kwargs, gamma, guided))
            if added := kwargs.get("added_cond_kwargs"):
                changed["added_cond_kwargs"] = {**added, **self._with_noise(added, gamma, guided)}
            if "encoder_hidden_states" not in changed:
                raise TypeError(f"{type(pipe).__name__} hands its denoiser no prompt embeddings for CADS to change.")
            return args, {**kwargs, **changed}

        handle = denoiser_of(pipe).register_forward_pre_hook(change, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _with_noise(self, conditions: dict[str, Any], gamma: float, guided: bool) -> dict[str, Tensor]:
        changed = {}
        for name in _CONDITIONS:
            y = conditions.get(name)
            if isinstance(y, Tensor):
                first = len(y) // 2 if guided else 0  # the rows of the negative prompt come first
                changed[name] = torch.cat([y[:first], self.anneal(y[first:], gamma)])
        return changed
