"""diffusers: correct x0 inside `scheduler.step`, for any pipeline and without a fork of it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from shielded.samplers.coefficients import bounded_x0, family_of, last_index, position_of, step_state


class Correction(Protocol):
    """What `attach` needs of a Spell."""

    def __call__(self, x0: Tensor, *, noise: Tensor, alpha: float, sigma: float, last: bool) -> Tensor:
        """The correction (B, *S) in float32, already multiplied by its strength, for x0 (B, *S) in float32."""

    def start(self) -> None:
        """A new trajectory begins."""

    def finish(self, latents: Tensor) -> None:
        """A trajectory came to its end with these latents (B, *S), as the scheduler returned them."""


@contextlib.contextmanager
def attach(pipe: Any, correct: Correction) -> Iterator[None]:
    """Add a correction to x0 at every step that `pipe.scheduler` takes inside the context.

    The predicted noise or velocity is changed such that the scheduler itself derives x0 + correction, and its own step
    is called once per call, with the caller's dtype and generator. Images without a correction keep their model output
    bit for bit. Where the scheduler clips or thresholds x0, it is the bounded x0 that is corrected, and the scheduler
    bounds the result again: distances are then not guaranteed, so switch `clip_sample` and `thresholding` off.

    A deep copy of the scheduler that a pipeline makes for itself (an audio track, say) steps uncorrected.

    Args:
        pipe: any object with a supported `.scheduler`.
        correct: called with x0, noise (B, *S), alpha, sigma and last; see `Correction`. `last` is true where the
            timestep is the last one of the schedule. `start` is called before the first step of each trajectory and
            `finish` after the last one; a trajectory that stops early is not finished.

    Raises:
        TypeError: `pipe` has no scheduler, or one that does not predict an x0 to correct.
        ValueError: x0 is not finite, or an option changes the state behind the model's back.
        RuntimeError: the scheduler is already attached to, was exchanged inside the context, or never stepped.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise TypeError(f"{type(pipe).__name__} has no scheduler; pass a diffusers pipeline.")
    family_of(scheduler)
    if "DiffusionForcing" in type(pipe).__name__:
        raise TypeError(
            f"{type(pipe).__name__} steps copies of its scheduler, one per frame, uncorrected; use a pipeline "
            "that denoises all frames together, like SkyReelsV2Pipeline."
        )
    before = vars(scheduler).get("step")
    if getattr(before, "attached_to", None) is scheduler:
        raise RuntimeError("the scheduler is already attached to; leave the first context, or use one Spell for both.")

    run = _Run(scheduler, correct)
    step = types.MethodType(_corrected_step(run), scheduler)
    scheduler.step = step
    try:
        yield
        exchanged = pipe.scheduler is not scheduler or vars(scheduler).get("step") is not step
    finally:
        if before is None:
            vars(scheduler).pop("step", None)
        else:
            scheduler.step = before
    # Only reached without an exception in flight, which these must not mask.
    if exchanged:
        raise RuntimeError(
            "the scheduler was exchanged inside the context, so steps went uncorrected; set pipe.scheduler before "
            "attaching."
        )
    if not run.stepped:
        raise RuntimeError(
            "the scheduler never stepped inside the context, so nothing was corrected; call the pipeline inside it, "
            "and check that this pipeline calls scheduler.step."
        )


def _corrected_step(run: _Run) -> Any:
    plain = run.scheduler.step  # bound: the class's own, or somebody's patch

    @functools.wraps(type(run.scheduler).step)  # pipelines read its signature to see what it accepts
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self is not run.scheduler:  # a deep copy, to which deepcopy has bound this method
            return type(self).step(self, model_output, timestep, sample, *args, **kwargs)
        run.stepped = True
        _check_arguments(self, inspect.signature(plain).bind(model_output, timestep, sample, *args, **kwargs).arguments)
        position = run.advance(timestep)
        corrected = run.corrected(model_output, timestep, sample, position)
        result = plain(corrected, timestep, sample, *args, **kwargs)
        if position == run.last:
            run.correct.finish(result[0])
        return result

    step.attached_to = run.scheduler
    return step


class _Run:
    """Where in its trajectory the attached scheduler is."""

    def __init__(self, scheduler: Any, correct: Correction) -> None:
        self.scheduler = scheduler
        self.correct = correct
        self.stepped = False
        self.timesteps: Any = None
        self.position = self.last = -1

    def advance(self, timestep: Any) -> int | None:
        """Position of the step about to be taken; announces a new trajectory."""
        fresh = self.scheduler.timesteps is not self.timesteps  # set_timesteps makes a new tensor
        position = position_of(self.scheduler, timestep, -1 if fresh else self.position)
        if fresh or (position is not None and position <= self.position):
            self.timesteps = self.scheduler.timesteps
            self.last = last_index(self.scheduler)
            self.correct.start()
        if fresh or position is not None:
            self.position = -1 if position is None else position
        return position

    def corrected(self, model_output: Tensor, timestep: Any, sample: Tensor, position: int | None) -> Tensor:
        """The model output (B, *S) from which the scheduler derives the corrected x0."""
        state = step_state(self.scheduler, timestep, getattr(self.scheduler, "step_index", None))
        if state.b == 0:
            return model_output  # x0 does not depend on the model here, so no model output can move it
        prediction, variance = _split_variance(model_output, sample)
        raw = state.a * sample.float() + state.b * prediction.float()
        x0 = bounded_x0(self.scheduler, raw)
        self._check_finite(x0)
        noise = (sample.float() - state.alpha * x0) / state.sigma if state.sigma > 0 else torch.zeros_like(x0)
        last = position is not None and bool(self.timesteps[position] == self.timesteps[self.last])
        delta = self.correct(x0, noise=noise, alpha=state.alpha, sigma=state.sigma, last=last)
        if delta.shape != x0.shape:
            raise ValueError(f"the correction has shape {tuple(delta.shape)}, but x0 has {tuple(x0.shape)}.")
        moved = (delta != 0).flatten(1).any(1)
        if not moved.any():
            return model_output
        shifted = (prediction.float() + (x0 - raw + delta) / state.b).to(prediction.dtype)
        prediction = torch.where(moved.view(-1, *[1] * (x0.ndim - 1)), shifted, prediction)
        return prediction if variance is None else torch.cat([prediction, variance], dim=1)

    def _check_finite(self, x0: Tensor) -> None:
        bad = ~torch.isfinite(x0).flatten(1).all(1)
        if bad.any():
            raise ValueError(
                f"x0 is not finite at step {self.position} in rows {bad.nonzero().flatten().tolist()}; the model "
                "overflowed, so try float32 or bfloat16."
            )


def _split_variance(model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
    """Models that learn their variance return it as a second set of channels."""
    if model_output.shape == sample.shape:
        return model_output, None
    channels = sample.shape[1]
    if model_output.shape == (sample.shape[0], 2 * channels, *sample.shape[2:]):
        return model_output[:, :channels], model_output[:, channels:]
    raise ValueError(
        f"the model output has shape {tuple(model_output.shape)} for a sample of {tuple(sample.shape)}; it must have "
        "the sample's shape, or twice its channels for a learned variance."
    )


def _check_arguments(scheduler: Any, arguments: dict[str, Any]) -> None:
    """Refuse arguments of `step` that change the state after the model has seen it."""
    name = type(scheduler).__name__
    if arguments.get("s_churn", 0) > 0:
        raise ValueError(f"{name}: s_churn adds noise that the model has not seen; use s_churn=0.")
    if arguments.get("per_token_timesteps") is not None:
        raise ValueError(f"{name}: per_token_timesteps gives each token a noise level of its own; leave it out.")
    if arguments.get("pred_original_sample") is not None:
        raise ValueError(f"{name}: pred_original_sample replaces what the model predicts; leave it out.")
