"""The unchanged pipeline, the base class of the baselines, and functions that they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor

from shielded.samplers import attach


class Plain:
    """Change nothing and keep the final latents. The baselines override the methods that they act through."""

    finished: Tensor | None = None  # (B, *S) latents of the last run, as the scheduler returned them

    def __call__(self, x0: Tensor, *, noise: Tensor, alpha: float, sigma: float, last: bool = False) -> Tensor:
        """Return what is added to x0 (B, *S) at this step."""
        return torch.zeros_like(x0)

    def start(self) -> None:
        """Begin a trajectory."""

    def finish(self, latents: Tensor) -> None:
        """End a trajectory with these latents (B, *S)."""
        self.finished = latents.detach()

    def hooks(self, pipe: Any) -> AbstractContextManager[None]:
        """Change the pipeline beyond x0; undone on exit."""
        return nullcontext()

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[Self]:
        """Act on every call of `pipe`, any diffusers pipeline with a supported scheduler, until the context is left.

        Raises:
            TypeError: the method cannot act on this pipeline.
            RuntimeError: on leaving, if the pipeline was not called.
        """
        with attach(pipe, self), self.hooks(pipe):
            yield self


def denoiser_of(pipe: Any) -> torch.nn.Module:
    """Return the network that a pipeline evaluates at each step.

    Raises:
        TypeError: the pipeline has no `transformer` or `unet`.
    """
    for name in ("transformer", "unet"):
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module):
            return module
    raise TypeError(f"{type(pipe).__name__} has neither a unet nor a transformer to act on.")


def timestep_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the timestep among the arguments of a diffusers denoiser."""
    value = kwargs["timestep"] if "timestep" in kwargs else args[1]
    return torch.as_tensor(value).flatten()[0]


def pairwise(x0: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return squared distances (B, B) of flat rows, by subtraction, and which pairs of different rows interact."""
    interacting = ~torch.eye(len(x0), dtype=torch.bool, device=x0.device)
    if groups is not None:
        groups = groups.to(x0.device)
        interacting &= groups[:, None] == groups[None, :]
    squared = torch.cdist(x0, x0, compute_mode="donot_use_mm_for_euclid_dist").square()
    return squared, interacting


def weighted_offsets(x0: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_j w_ij (x_i − x_j) for rows (B, D) and weights (B, B)."""
    return weights.sum(dim=1, keepdim=True) * x0 - weights @ x0
