"""Correct x0 inside `scheduler.step` of diffusers, for any pipeline and without a fork of it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from shielded.samplers.coefficients import State, bounded_x0, family_of, last_index, position_of, step_state
from shielded.samplers.guidance import Guidance, releases
from shielded.samplers.pipelines import (
    has_second_track,
    keeps_first_frame,
    refuse_pipeline,
    repeats_passes,
    unchanged,
    without_first_frame,
)
from shielded.samplers.rows import select_rows
from shielded.samplers.watch import no_plain_steps, watched_call


class Correction(Protocol):
    """What `attach` needs of a Spell."""

    def __call__(self, x0: Tensor, *, noise: Tensor, alpha: float, sigma: float, last: bool) -> Tensor:
        """Compute the correction (B, *S) in float32, already multiplied by its strength, for x0 (B, *S) in float32."""
        ...

    def start(self) -> None:
        """Begin a new trajectory."""

    def finish(self, latents: Tensor) -> Tensor | None:
        """End a trajectory with these latents (B, *S), as the scheduler returned them.

        Returns:
            The latents that the pipeline goes on with; the same tensor, or None, changes nothing.
        """
        ...


class Releasing(Correction, Protocol):
    """A correction that also lets guidance go, for the images whose guided x0 lies in a shield."""

    release: float | None
    release_scale: float
    guidance: str | None

    def __call__(
        self, x0: Tensor, *, noise: Tensor, alpha: float, sigma: float, last: bool, released: Tensor | None = None
    ) -> Tensor:
        """Compute the correction as above; `released` (B,) bool marks rows of x0 without their guidance."""
        ...

    def colliding(self, x0: Tensor, *, alpha: float, sigma: float, last: bool) -> Tensor | None:
        """Find the rows (B,) of the guided x0 (B, *S) whose guidance is to be released; None: no row."""
        ...


@contextlib.contextmanager
def attach(pipe: Any, correct: Correction | Releasing) -> Iterator[None]:
    """Add a correction to x0 at every step that `pipe.scheduler` takes inside the context.

    The predicted noise or velocity is changed such that the scheduler itself derives x0 + correction, and its own step
    is called once per call, with the caller's dtype and generator. Images without a correction keep their model output
    bit for bit. Where the scheduler clips or thresholds x0, it is the bounded x0 that is corrected, and the scheduler
    bounds the result again: distances are then not guaranteed, so switch `clip_sample` and `thresholding` off.

    If the pipeline replaces a part of the latents between its steps or after the last one (inpainting, the first frame
    of a video), `correct.restrict` is told which part it leaves alone. A deep copy of the scheduler that the pipeline
    steps in its place is corrected like the scheduler; any other scheduler that it steps is an error, apart from those
    of tracks without shields (sound).

    Args:
        pipe: any object with a supported `.scheduler`.
        correct: called with x0, noise (B, *S), alpha, sigma and last; see `Correction`. `last` is true where the
            timestep is the last one of the schedule. `start` is called before the first step of each trajectory and
            `finish` after the last one; a trajectory that stops early is not finished. If its `release` is
            not None, guidance is released in the rows that `colliding` names; see `Releasing`.

    Raises:
        TypeError: `pipe` has no scheduler, or one that does not predict an x0 to correct, or is a pipeline whose steps
            cannot all be corrected.
        ValueError: an option changes the state behind the model's back.
        RuntimeError: the scheduler is already attached to, was exchanged inside the context, or never stepped; a step
            would go uncorrected; or the pipeline changed its latents after the last step so that they are inside a
            shield.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise TypeError(f"{type(pipe).__name__} has no scheduler; pass a diffusers pipeline.")
    family_of(scheduler)
    refuse_pipeline(pipe)
    before = vars(scheduler).get("step")
    if getattr(before, "attached_to", None) is scheduler:
        raise RuntimeError("the scheduler is already attached to; leave the first context, or use one Spell for both.")

    twice = any(cls.__name__ == "DiTPipeline" for cls in type(pipe).__mro__)
    guidance = Guidance(pipe, twice) if releases(correct) else None
    run = _Run(scheduler, _OncePerImage(correct) if twice else correct, guidance)
    run.first_frame_is_kept = keeps_first_frame(pipe)
    run.second_track = has_second_track(pipe)
    step = types.MethodType(_corrected_step(run), scheduler)
    scheduler.step = step
    begin, end = getattr(correct, "begin_call", _nothing), getattr(correct, "end_call", _nothing)
    one_image = repeats_passes(pipe)

    def corrected(other: Any) -> bool:
        if other is scheduler:
            return vars(scheduler).get("step") is step
        own = getattr(vars(other).get("step"), "__func__", None)
        return getattr(own, "attached_to", None) is scheduler or other in _other_schedulers(pipe)

    try:
        with (
            contextlib.nullcontext() if guidance is None else guidance.watch(),
            no_plain_steps(pipe, corrected),
            watched_call(pipe, lambda: begin(one_image), end),
        ):
            yield
        exchanged = pipe.scheduler is not scheduler or vars(scheduler).get("step") is not step
    finally:
        if before is None:
            vars(scheduler).pop("step", None)
        else:
            scheduler.step = before
        if getattr(pipe, "scheduler", None) is not scheduler:
            pipe.scheduler = scheduler
        if guidance is not None:
            cast("Releasing", correct).guidance = guidance.way
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
        # A deep copy has this method, too, bound to itself.
        own = plain if self is run.scheduler else functools.partial(type(self).step, self)
        if self is not run.scheduler and run.second_track:
            return own(model_output, timestep, sample, *args, **kwargs)
        run.follow(self)
        run.stepped = True
        _check_arguments(self, inspect.signature(own).bind(model_output, timestep, sample, *args, **kwargs).arguments)
        position = run.advance(timestep)
        run.compare(sample, position)
        corrected = run.corrected(model_output, timestep, sample, position)
        result = own(corrected, timestep, sample, *args, **kwargs)
        if run.guidance is not None:
            run.guidance.forget()
        if position == run.last:
            result = _with_sample(result, run.correct.finish(result[0]))
        run.returned = result[0]
        return result

    vars(step)["attached_to"] = run.scheduler
    return step


class _Run:
    """The position of the attached scheduler in its trajectory."""

    def __init__(self, scheduler: Any, correct: Any, guidance: Guidance | None) -> None:
        self.scheduler = scheduler
        self.correct = correct
        self.guidance = guidance
        self.current = scheduler  # or the copy of it that steps in its place
        self.first_frame_is_kept = self.second_track = self.stepped = False
        self.returned: Tensor | None = None  # by the last step
        self.compared = self.framed = False
        self.timesteps: Any = None
        self.position = self.last = -1

    def follow(self, scheduler: Any) -> None:
        """Go on with a copy of the scheduler, between two trajectories.

        Raises:
            RuntimeError: a trajectory is under way, so that two schedulers step by turns.
        """
        if scheduler is self.current:
            return
        if self.position not in (-1, self.last):
            raise RuntimeError(
                f"two copies of a {type(scheduler).__name__} step by turns, and their batches cannot be told apart; "
                "attach to a pipeline that steps one scheduler."
            )
        self.current, self.timesteps = scheduler, None

    def compare(self, sample: Tensor, position: int | None) -> None:
        """Compare a sample (B, *S) with what the step before returned: a pipeline may have replaced a part of it."""
        restrict = getattr(self.correct, "restrict", None)
        before, self.returned = self.returned, None
        if restrict is not None and self.first_frame_is_kept and sample.ndim == 5 and not self.framed:
            restrict(without_first_frame(sample))
        self.framed = True
        if restrict is None or before is None or (self.compared and position != self.last):
            return
        self.compared = True
        mask = unchanged(before, sample)
        if mask is not None:
            restrict(mask)

    def advance(self, timestep: Any) -> int | None:
        """Find the position of the step about to be taken; announce a new trajectory."""
        fresh = self.current.timesteps is not self.timesteps  # set_timesteps makes a new tensor
        position = position_of(self.current, timestep, -1 if fresh else self.position)
        if fresh or (position is not None and position <= self.position):
            self.timesteps = self.current.timesteps
            self.last = last_index(self.current)
            self.returned, self.compared, self.framed = None, False, False
            self.correct.start()
        if fresh or position is not None:
            self.position = -1 if position is None else position
        return position

    def corrected(self, model_output: Tensor, timestep: Any, sample: Tensor, position: int | None) -> Tensor:
        """Compute the model output (B, *S) from which the scheduler derives the corrected x0."""
        state = step_state(self.current, timestep, getattr(self.current, "step_index", None))
        if state.b == 0:
            return model_output  # x0 does not depend on the model here, so no model output can move it
        prediction, variance = _split_variance(model_output, sample)
        last = position is not None and bool(self.timesteps[position] == self.timesteps[self.last])
        raw, x0 = self._x0(state, prediction, sample)
        options: dict[str, Any] = {"alpha": state.alpha, "sigma": state.sigma, "last": last}
        if self.guidance is not None:
            rows = self.correct.colliding(x0, **options)
            released = None if rows is None else self.guidance.at_scale(prediction, rows, self.correct.release_scale)
            if released is not None:
                prediction = released
                raw, x0 = self._x0(state, prediction, sample)
                options["released"] = rows
        noise = (sample.float() - state.alpha * x0) / state.sigma if state.sigma > 0 else torch.zeros_like(x0)
        delta = self.correct(x0, noise=noise, **options)
        if delta.shape != x0.shape:
            raise ValueError(f"the correction has shape {tuple(delta.shape)}, but x0 has {tuple(x0.shape)}.")
        # By `where` and not by `if`: the host does not wait, and what did not move keeps its bits.
        moved = (delta != 0).flatten(1).any(1)
        shifted = (prediction.float() + (x0 - raw + delta) / state.b).to(prediction.dtype)
        prediction = select_rows(moved, shifted, prediction)
        return prediction if variance is None else torch.cat([prediction, variance], dim=1)

    def _x0(self, state: State, prediction: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Compute x0 (B, *S) as the model predicts it, and as the scheduler bounds it."""
        raw = state.a * sample.float() + state.b * prediction.float()
        return raw, bounded_x0(self.current, raw)


def _nothing(*_: Any) -> None:
    pass


def _other_schedulers(pipe: Any) -> list[Any]:
    """List the schedulers of a pipeline that are not its `scheduler`, such as that of a prior."""
    return [part for name, part in vars(pipe).items() if name != "scheduler" and hasattr(part, "timesteps")]


class _OncePerImage:
    """A correction for DiT's pipeline, which steps both halves of its guidance batch: the second repeats the images."""

    def __init__(self, correct: Any) -> None:
        self.correct = correct
        self.start = correct.start
        self.release_scale = getattr(correct, "release_scale", 1.0)
        self.twice = False

    def __call__(self, x0: Tensor, *, noise: Tensor, released: Tensor | None = None, **options: Any) -> Tensor:
        half = len(x0) // 2
        self.twice = torch.equal(x0[:half], x0[half:])  # not so without guidance
        if released is not None:
            options["released"] = released[:half] if self.twice else released
        if not self.twice:
            return self.correct(x0, noise=noise, **options)
        delta = self.correct(x0[:half], noise=noise[:half], **options)
        return torch.cat([delta, delta])

    def colliding(self, x0: Tensor, **options: Any) -> Tensor | None:
        half = len(x0) // 2
        if not torch.equal(x0[:half], x0[half:]):
            return self.correct.colliding(x0, **options)
        rows = self.correct.colliding(x0[:half], **options)
        return None if rows is None else torch.cat([rows, rows])

    def finish(self, latents: Tensor) -> Tensor | None:
        if not self.twice:
            return self.correct.finish(latents)
        half = latents[: len(latents) // 2]
        finished = self.correct.finish(half)
        return None if finished is None or finished is half else torch.cat([finished, finished])


def _with_sample(output: Any, sample: Tensor | None) -> Any:
    """Replace the sample in a step's output (tuple or dataclass); LCM lists the last sample as `denoised`, too."""
    before = output[0]
    if sample is None or sample is before:
        return output
    if isinstance(output, tuple):
        return tuple(sample if value is before else value for value in output)
    for name, value in list(output.items()):
        if value is before:
            setattr(output, name, sample)
    return output


def _split_variance(model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split off the second set of channels, in which models return a learned variance."""
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
    timestep = arguments.get("timestep")
    if isinstance(timestep, Tensor) and timestep.numel() > 1 and bool((timestep != timestep.flatten()[0]).any()):
        raise ValueError(
            f"{name}: timestep must be one number for the whole batch; rows of other noise levels step apart, each "
            "request with a scheduler of its own."
        )
    if arguments.get("pred_original_sample") is not None:
        raise ValueError(f"{name}: pred_original_sample replaces what the model predicts; leave it out.")
