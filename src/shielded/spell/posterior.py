"""The posterior radius: energy of a model's latents and its denoising error, known or measured."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shielded._extras import show_progress
from shielded.files import write_json
from shielded.models.calls import accepted, conditioning, step_option
from shielded.samplers import attach
from shielded.samplers.coefficients import step_state

FULL_RADIUS_BELOW = 0.2  # noise level t = σ/(α + σ) from which on shields have their full radius, whatever is estimated


@dataclass
class Calibration:
    """An estimate of tr Cov(X_0|x_t), by which the posterior radius shrinks.

    By the law of total variance E tr Cov(X_0|x_t) = E‖X_0‖² − E‖x0‖², so for one image about `energy` − ‖x0‖². Alone
    this would let a picture of little energy slip through: its estimate stays positive to the end. So the smaller of it
    and a bound that vanishes with the noise counts: the measured denoising error E‖X_0 − x0‖² at this noise level, or,
    where none was measured, energy·t², and nothing below t = 0.2.

    Args:
        energy: mean ‖X_0‖² of clean latents.
        levels: ascending noise levels t = σ/(α + σ), above 0, at which `error` was measured. Between them, and from
            the lowest down to no error at t = 0, it is interpolated linearly; above the highest it stays the same.
        error: mean ‖X_0 − x0‖² there.
        space: fingerprint of the latent space that it was measured in; None: not known.

    Raises:
        ValueError: levels and errors that do not fit each other, or numbers out of range.
    """

    energy: float
    levels: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    space: str | None = None

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.error):
            raise ValueError(f"{len(self.levels)} noise levels but {len(self.error)} errors; give one error per level.")
        if not all(low < high for low, high in pairwise([0.0, *self.levels])) or max(self.levels, default=0) > 1:
            raise ValueError("noise levels must ascend and lie between 0 (not included) and 1.")
        if not all(0 <= value < math.inf for value in (self.energy, *self.error)):
            raise ValueError("energy and errors must be finite and not negative.")

    def posterior_variance(self, energy: Tensor, level: float) -> Tensor:
        """Estimate tr Cov (B,), not negative, for images with ‖x0‖² = `energy` (B,) at noise level t."""
        if level < FULL_RADIUS_BELOW:
            return energy.new_zeros(energy.shape)
        return (self.energy - energy).clamp(min=0, max=self.bound(level))

    def bound(self, level: float) -> float:
        """Return the upper bound of tr Cov at noise level t."""
        if not self.levels:
            return self.energy * level**2
        return float(np.interp(level, [0.0, *self.levels], [0.0, *self.error]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` or `shielded calibrate` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else.
        """
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no calibration ({error}); `shielded calibrate` writes one.") from None


def measure_calibration(
    pipe: Any,
    latents: Tensor,
    prompts: Sequence[str] | None = None,
    steps: int = 25,
    seed: int = 0,
    batch_size: int = 16,
    space: str | None = None,
    progress: bool = False,
) -> Calibration:
    """Measure energy and denoising error of a pipeline's model.

    The pipeline itself is run, without guidance, on noised versions of the given latents: at each step x0 is compared
    with what the state was made from, and then replaced by it, so that the scheduler's own step leads to another noised
    version of it. So every supported scheduler and every conditioning works, and the noise levels are those of the
    sampler. Guidance is left out because it moves x0 away from the mean that the posterior variance is about.

    Args:
        pipe: a diffusers pipeline with a supported scheduler that takes `latents`.
        latents: (N, *S) clean latents in the sampler's space, such as protected images.
        prompts: N texts, best the captions; None: the empty prompt for all, which makes the error larger.
        steps: of the sampler, which decide the noise levels.
        seed: of the noise.
        batch_size: images at once.
        space: fingerprint of the latent space, kept in the result.
        progress: whether a progress bar is shown.

    Returns:
        Mean error per noise level over the N latents.

    Raises:
        TypeError: the scheduler is not supported.
        ValueError: no latents, not one prompt per latent, or a sampler whose states are not alpha·X_0 + sigma·noise, as
            with one that clips x0.
    """
    if not len(latents):
        raise ValueError("there are no latents to measure the denoising error with; give at least one.")
    prompts = [""] * len(latents) if prompts is None else list(prompts)
    if len(prompts) != len(latents):
        raise ValueError(f"{len(latents)} latents but {len(prompts)} prompts; give one prompt per latent.")
    latents = latents.detach().float().cpu()
    generator = torch.Generator().manual_seed(seed)
    sums: dict[float, float] = {}
    counts: dict[float, int] = {}
    for first in show_progress(range(0, len(latents), batch_size), desc="denoise", unit="batch", shown=progress):
        clean = latents[first : first + batch_size]
        teacher = _Teacher(clean)
        with attach(pipe, teacher):
            options: dict[str, Any] = {"guidance_scale": 1.0, "output_type": "latent"}
            # Without `latents` the sampler starts from pure noise, which its first state is, but for α of the data.
            options["latents"] = _first_state(pipe, clean, steps, generator)
            options["generator"] = [torch.Generator().manual_seed(seed + first + i) for i in range(len(clean))]
            told = conditioning(pipe, prompts[first : first + batch_size])
            pipe(**told, **step_option(pipe, steps), **accepted(pipe, options))
        for level, error in teacher.errors:
            sums[level] = sums.get(level, 0.0) + error.sum().item()
            counts[level] = counts.get(level, 0) + len(error)
    levels = sorted(sums)
    energy = latents.double().flatten(1).square().sum(dim=1).mean().item()
    return Calibration(energy, levels, [sums[level] / counts[level] for level in levels], space)


class _Teacher:
    """A correction that moves x0 to the known clean latents at every evaluation, and records the distance."""

    def __init__(self, clean: Tensor) -> None:
        self.clean = clean
        self.errors: list[tuple[float, Tensor]] = []  # noise level, ‖X_0 − x0‖² (B,)

    def __call__(self, x0: Tensor, *, noise: Tensor, alpha: float, sigma: float, last: bool) -> Tensor:
        clean = self.clean.to(x0.device)
        if sigma > 0:
            # Both splits of the state: alpha x0 + sigma noise = alpha X_0 + sigma · what was really added.
            added = noise + alpha / sigma * (x0 - clean)
            _check_unit_variance(added, sigma / (alpha + sigma))
            self.errors.append((sigma / (alpha + sigma), (clean - x0).double().flatten(1).square().sum(dim=1)))
        return clean - x0

    def start(self) -> None:
        pass

    def finish(self, latents: Tensor) -> None:
        pass


def _check_unit_variance(noise: Tensor, level: float) -> None:
    square = noise.square().mean().item()
    if abs(square - 1) > 0.2 + 6 * math.sqrt(2 / noise.numel()):
        raise ValueError(
            f"at noise level {level:.3g} this sampler's state holds {square:.3g} times the noise power that its "
            "schedule states, so no denoising error can be measured; use a text-to-image pipeline with DDIMScheduler "
            "or EulerDiscreteScheduler, without clip_sample and thresholding."
        )


def _first_state(pipe: Any, clean: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Make the `latents` argument with which the sampler starts from noised clean latents."""
    scheduler = pipe.scheduler
    # How far a resolution shifts the schedule (mu) does not matter here: the first state is pure noise either way.
    shifted = scheduler.config.get("use_dynamic_shifting", False)
    scheduler.set_timesteps(steps, **({"mu": 1.0} if shifted else {}))
    state = step_state(scheduler, scheduler.timesteps[0], 0 if hasattr(scheduler, "step_index") else None)
    noised = state.alpha * clean + state.sigma * torch.randn(clean.shape, generator=generator)
    noised = noised / getattr(scheduler, "init_noise_sigma", 1.0)  # which pipelines multiply by
    return noised.to(getattr(pipe, "device", "cpu"), getattr(pipe, "dtype", torch.float32))
