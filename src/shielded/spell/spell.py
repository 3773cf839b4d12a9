"""Spell: which references repel, within which radius at this noise level, and what it did."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from shielded.core.correction import Overlap, overcompensated, project_correction, sum_correction
from shielded.core.directions import push_direction
from shielded.core.inputs import float_tensor
from shielded.core.pairs import sum_pairs
from shielded.core.references import Hits, References, closest
from shielded.latent_space import LatentSpace
from shielded.protected import ProtectedSet
from shielded.samplers.diffusers import attach
from shielded.samplers.rows import select_rows
from shielded.spell import options
from shielded.spell.history import History
from shielded.spell.mask import flatten, unflatten
from shielded.spell.posterior import Calibration
from shielded.spell.returned import Call, check_returned
from shielded.spell.shields import Active, BatchShields, outward
from shielded.spell.static import StaticReferences
from shielded.spell.trace import Push, rows_of_step, write_csv

_ALTERNATIONS = 4  # between leaving the static shields and separating the batch, each of which can undo the other
_PAIR_TOLERANCE = 1e-5  # share of the radius by which finished images may be closer to each other
_MAX_PAIR_MARGIN = 0.01  # share of the radius added for a pair that rounding keeps too close
_FINAL_MARGINS = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3, 1.0)  # radii beyond the shell, until rounding stays outside


class Spell:
    """Sparse repellency for one sampling run after another (Kirchhof et al., ICML 2025).

    Args:
        protected: static references: a ProtectedSet, a tensor (K, *S) in the sampler's latent space, or None.
        radius: L2 distance in the latent space; one number, or (K,) for the protected references alone. None: the
            protected set's own radii. Needed for batch and history.
        overcompensation: λ, which multiplies the correction (paper: 1.6). At 1 an image ends on the shell of a single
            shield.
        batch: the other images of the batch are references, renewed at each step.
        history: finished images of earlier calls are references. True keeps the last 1,024; a number sets that bound;
            a History is shared, loaded from a file, or lives in a folder (`History.open`).
        nearest: only the k nearest protected references of each image (the paper's SPELL-k); None: all.
        overlap: "project" is the smallest move that leaves all shields, "sum" the paper's formula.
        window: noise levels t = σ/(α + σ) at which it may act, from and to: 1 is noise, 0 a clean image, with every
            sampler and any number of steps. Rectified-flow models call this number the time, so (1.0, 0.6) means the
            same for all models.
        radius_schedule: "constant", or "posterior": r_t² = r² − tr Cov(X_0|x_t), small while x0 is a blurred mean.
            See `shielded.spell.posterior`. None: "posterior" for protected references, so that early, blurred x0 are
            left alone, and "constant" for batch and history. With a mask, or in a call without a noise level, None is
            "constant" for all.
        groups: (B,) ids, numbers or names; batch references repel only within a group.
        mask: broadcasts to *S, non-zero where the image is generated (inpainting). Distance and push are restricted to
            that part.
        calibration: measured energy and denoising error of a model, for the posterior radius. None: estimated from the
            protected references.
        release: noise level down to which guidance is let go: above it, an image whose guided x0 lies in an active
            shield takes the prediction at `release_scale`. Under guidance x0 is drawn back to one picture, and the push
            has to go across what the decoder sees. None: never, as in the paper.
        release_scale: the guidance scale that such an image then has; 1 is none.
        margin: share of the radius by which the shields of protected references are wider than what is to be kept, so
            that a picture is still outside after decoding. Certificates measure the radius without it.

    Attributes:
        guidance: after a run, how the pipeline's guidance was released ("batched", "separate", "embedded"), or why it
            was not; None if no image asked for it.
        finished: the last finished latents (B, *S).
        returned: the latents that the pipeline went on with after its last step, where it returned them
            (`output_type="latent"`); `finished` and the history are then these.

    Raises:
        TypeError: references that are neither a ProtectedSet nor numbers, groups that are no ids.
        ValueError: a radius that is missing where it is needed or not positive, an empty protected set, or options that
            do not fit each other.
    """

    def __init__(
        self,
        protected: ProtectedSet | Tensor | None = None,
        radius: float | Tensor | None = None,
        overcompensation: float = 1.6,
        batch: bool = True,
        history: bool | int | History = False,
        nearest: int | None = None,
        overlap: Overlap = "project",
        window: tuple[float, float] = (1.0, 0.0),
        radius_schedule: Literal["constant", "posterior"] | None = None,
        groups: Tensor | Sequence[int | str] | None = None,
        mask: Tensor | None = None,
        calibration: Calibration | None = None,
        release: float | None = 0.5,
        release_scale: float = 1.0,
        margin: float = 0.0,
    ) -> None:
        protected = options.checked_protected(protected)
        radius = options.checked_radius(protected, radius, batch, history)
        options.check_options(
            overcompensation, overlap, radius_schedule, nearest, window, release, release_scale, margin
        )
        if radius_schedule == "posterior" and mask is not None:
            raise ValueError("radius_schedule='posterior' does not work with a mask: energies are of whole images.")
        if radius_schedule == "posterior" and protected is None and calibration is None:
            raise ValueError("radius_schedule='posterior' without a protected set needs calibration=...")
        self.protected = protected
        self.radius = radius
        self.overcompensation = overcompensation
        self.batch = batch
        self.nearest = nearest
        self.overlap = overlap
        self.window = (float(window[0]), float(window[1]))
        self.radius_schedule = radius_schedule
        self.groups = options.checked_groups(groups)
        self.mask = mask
        self.calibration = calibration
        self.release = release
        self.release_scale = release_scale
        self.margin = margin
        self.guidance: str | None = None
        self.history = options.history_of(history)
        self.finished: Tensor | None = None
        self.trace: list[dict[str, Any]] = []
        self._run = 0
        self._step = 0
        self._known: tuple[Tensor, Active] | None = None
        self.returned: Tensor | None = None
        self._counted = mask  # what distance and push are restricted to
        self._call: Call | None = None  # of the pipeline, while it is under way
        self._static = self._references(mask, margin)

    # One step -----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        x0: Tensor,
        noise: Tensor | None = None,
        alpha: float | None = None,
        sigma: float | None = None,
        last: bool = False,
        released: Tensor | None = None,
    ) -> Tensor:
        """Compute the correction λΔ for one step.

        Args:
            x0: (B, *S) predicted clean samples, after guidance.
            noise: (B, *S) predicted noise (x − α x0)/σ: the direction of the push where x0 equals a reference, and what
                the trace compares the push with.
            alpha: signal coefficient of the state x = α x0 + σ ε that the model has just seen.
            sigma: its noise coefficient.
            last: whether this is the trajectory's last evaluation; the posterior radius is then the full one.
            released: (B,) bool, rows whose x0 is without its guidance (`colliding`), for the trace.

        Returns:
            (B, *S) of x0's dtype; exactly zero in rows that no shield touches.

        Raises:
            TypeError: x0 is no float tensor.
            ValueError: x0 of another shape than the references, or with NaN or infinity; a window or posterior radius
                without alpha and sigma.
        """
        x0 = float_tensor(x0, "x0")
        step, self._step = self._step, self._step + 1
        known, self._known = self._known, None
        active = known[1] if known is not None and known[0] is x0 else self._active(x0, _level(alpha, sigma), last)
        level, x = active.level, active.x
        if not active.inside_window:
            options.require_finite(active.finite, x, step)
            return torch.zeros_like(x0)
        if active.idle:
            self._record(step, level, len(x), None, released)
            return torch.zeros_like(x0)
        options.require_finite(active.finite, x, step)
        direction = push_direction(x, None if noise is None else flatten(noise, self._counted))
        references, hits, batch, close = active.references, active.hits, active.batch, active.close
        if self.overlap == "sum":
            delta = torch.zeros_like(x)
            if references is not None and hits is not None:
                delta += sum_correction(x, references, hits, direction)
            if batch is not None and close is not None:
                delta += sum_pairs(x, batch.radius, close)
            delta, unresolved = self.overcompensation * delta, None
        else:
            strength = self.overcompensation
            delta, unresolved = self._project(x, references, hits, direction, active.shrink, batch, strength)
        ratio = float(alpha) / float(sigma) if level and alpha is not None and sigma and noise is not None else None
        self._record(step, level, len(x), Push(delta, direction, hits, close, unresolved, ratio), released)
        return unflatten(delta, x0, self._counted)

    def colliding(self, x0: Tensor, *, alpha: float, sigma: float, last: bool = False) -> Tensor | None:
        """Find the images whose guidance is to be released at this step.

        Args:
            x0: (B, *S) predicted clean samples, after guidance.
            alpha: signal coefficient of the state.
            sigma: its noise coefficient.
            last: whether this is the trajectory's last evaluation.

        Returns:
            (B,) bool, rows of x0 inside an active shield; None if there are none, or at noise levels up to `release`.
        """
        level = _level(alpha, sigma)
        if self.release is None or level is None or not level > self.release:
            return None
        active = self._active(x0, level, last)
        self._known = x0, active  # for the correction of the same tensor, if no guidance is released
        if active.idle or not active.finite:  # the step itself refuses what is not finite
            return None
        rows = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
        if active.hits is not None:
            rows[active.hits.query] = True
        return rows if active.close is None else rows | active.close.any(dim=1)

    def _active(self, x0: Tensor, level: float | None, last: bool) -> Active:
        """Search for the active shields of x0."""
        if level is None and (self.window != (1.0, 0.0) or self.radius_schedule == "posterior"):
            raise ValueError("a window and the posterior radius need the noise level: pass alpha=... and sigma=...")
        x = flatten(x0, self._counted)
        active = Active(level, x, torch.isfinite(x).all())
        if level is not None and not self.window[1] <= level <= self.window[0]:
            active.inside_window = False
            return active
        active.references = self._static.at(x0)
        if level is not None and not last:
            active.shrink = self._posterior_variance(x, level)
        scan = None if active.references is None else active.references.scan(x, active.shrink)
        active.batch = self._batch_shields(x, active.shrink if self.radius_schedule == "posterior" else None)
        close = active.close = None if active.batch is None else active.batch.active(x)
        # One flag for all: reading it is the only thing that the host waits for in a step without an active shield.
        flags = [~active.finite, *([scan.some] if scan else []), *([close.any()] if close is not None else [])]
        if torch.stack(flags).any():
            active.idle = False
            if active.finite:
                active.hits = None if scan is None else scan.hits()
                crowded = close is not None and bool(close.any())
                active.idle = not (active.hits is not None and len(active.hits)) and not crowded
        return active

    def _project(
        self,
        x: Tensor,
        references: References | None,
        hits: Hits | None,
        noise: Tensor,
        shrink: Tensor | None,
        batch: BatchShields | None,
        strength: float,
    ) -> tuple[Tensor, Tensor]:
        """Compute `strength` times the smallest move out of all shields, and the rows (B,) for which none was found."""
        move = torch.zeros_like(x)
        inside = crowded = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(_ALTERNATIONS):
            if batch is not None and batch.active(x + move).any():
                apart, crowded = batch.apart(x + move)
                move = move + apart
                hits = None  # measured before the images moved
            if references is None:
                break
            if hits is None:
                hits = references.scan(x + move, shrink).hits()
            # The protected references have the last word.
            leave, inside = project_correction(x + move, references, hits, noise, shrink)
            move, hits = move + leave, None
            if batch is None:
                break
            crowded = batch.active(x + move, margin=1e-4).any(dim=1)
            if not crowded.any():
                break
        if references is None:
            return strength * move, crowded
        return overcompensated(x, move, references, strength, shrink), inside | crowded

    # A sampling run -----------------------------------------------------------------------------------------------

    @contextmanager
    def attach(self, pipe: Any, through: Any = None) -> Iterator[Spell]:
        """Correct every step of `pipe`, any object with a supported `.scheduler`, until the context is left.

        `trace` starts anew. `finished` holds the last call's final latents; a history remembers them.

        Args:
            pipe: a diffusers pipeline.
            through: a wrapper of this Spell that the sampler calls in its place (`generation.distributed.Gathered`).

        Raises:
            TypeError: no scheduler, or one that is not supported (named, with the reason).
            ValueError: the protected set or the calibration was made for another latent space.
            RuntimeError: on leaving, if the pipeline was not called or its scheduler was exchanged.
        """
        protected = self.protected  # a set described by its shape alone is compared by shape alone, at the first step
        if protected is not None and not isinstance(protected, Tensor) and protected.space.vae_sha256 is not None:
            protected.space.require_same_encoder(LatentSpace.of(pipe))
        measured_in = None if self.calibration is None else self.calibration.space
        if measured_in is not None and measured_in != LatentSpace.of(pipe).fingerprint:
            raise ValueError("the calibration was measured in another latent space; run `shielded calibrate` for it.")
        self.trace = []
        self._run = 0
        with attach(pipe, self if through is None else through):
            yield self

    def start(self) -> None:
        """Begin a new trajectory."""
        self._run, self._step = self._run + 1, 0
        if self.history is not None:
            self.history.refresh()
        if self._counted is not self.mask:
            self._counted, self._static = self.mask, self._references(self.mask, self.margin)

    def restrict(self, mask: Tensor) -> None:
        """Restrict distance and push to a part of the latents until the next trajectory; the sampler replaces the rest.

        Args:
            mask: broadcasts to *S, non-zero where the sampler's result is kept. It narrows down `mask`.
        """
        if self._counted is not None:
            mask = mask * (self._counted.to(mask) != 0)
        if mask.any() and (self._counted is None or not torch.equal(mask != 0, self._counted.to(mask) != 0)):
            self._counted, self._static = mask, self._references(mask, self.margin)

    def begin_call(self, one_image: bool = False) -> None:
        """Begin a call of a pipeline.

        Args:
            one_image: its trajectories are passes for the same images (FreeInit), so the history takes the last one.
        """
        self._call, self.returned = Call(one_image), None

    def end_call(self, returned: Tensor | None) -> None:
        """End a call of a pipeline, which returned these latents (B, *S), or None if it returned none.

        Raises:
            RuntimeError: they are not those of `finish`, and lie inside a shield.
        """
        call, self._call = self._call, None
        if call is None or not call.finished:
            return
        if returned is not None and self.finished is not None and returned.shape == self.finished.shape:
            self.returned = returned.detach()
            if not torch.equal(self.returned.to(self.finished), self.finished):
                promised = self.overlap == "project" and self.window[1] == 0
                # What is asked of a returned image is the radius alone; the margin is a means to it.
                check_returned(self.returned, call.unresolved, self._references(self.mask, 0.0), self.mask, promised)
                self.finished = call.finished[-1] = self.returned
        if self.history is not None:
            for latents in call.kept:
                self.history.add(latents)

    def finish(self, latents: Tensor) -> Tensor:
        """End a trajectory with these latents (B, *S).

        Returns:
            The latents that replace them, see `leave`. With overlap="sum", the paper's method, and with a window that
            closes before the end, they stay as they are.
        """
        unresolved = torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
        if self.overlap == "project" and self.window[1] == 0:
            latents, unresolved = self._left(latents)
            if unresolved.any():  # the last word on these images, so it belongs in the trace
                self._record(self._step, 0.0, len(latents), self._unresolved(latents, unresolved), None)
        self.finished = latents.detach()
        self._static.compare(self.finished)
        if self._call is not None:
            self._call.finished.append(self.finished)
            self._call.unresolved = unresolved
        elif self.history is not None:
            self.history.add(self.finished)
        return latents

    def leave(self, latents: Tensor) -> Tensor:
        """Move finished latents (B, *S) out of every shield by the smallest move (λ = 1, full radius).

        They are measured again after rounding to their dtype. Images outside every shield keep their bits; if none
        moves, the same tensor is returned. The protected references have the last word: where both cannot be had,
        images of the batch stay closer than the radius to each other, and `finish` says so in the trace.
        """
        return self._left(latents)[0]

    def _left(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Move latents (B, *S) out of every shield; also return the rows (B,) that are still too close to something."""
        batch = self._batch_shields(latents, None)
        references = self._static.at(latents)
        for margin in _FINAL_MARGINS:
            x = flatten(latents, self._counted)
            hits = None if references is None else references.scan(x).hits()
            inside = hits is not None and len(hits) > 0
            crowded = batch is not None and bool(batch.active(x, margin=_PAIR_TOLERANCE).any())
            if not inside and not crowded:
                break
            direction = push_direction(x, None)
            # Pairs share their move, so a small margin is enough for them; they get it only while it is one.
            wider = batch.wider(1 + margin) if crowded and batch is not None and margin <= _MAX_PAIR_MARGIN else None
            if not inside and wider is None:
                break
            move, _ = self._project(x, references, hits, direction, None, wider, 1.0)
            if references is not None and hits is not None and len(hits):
                move = move + margin * outward(x, move, direction, references, closest(hits, 1))
            moved = (latents.float() + unflatten(move, latents.float(), self._counted)).to(latents.dtype)
            latents = select_rows((move != 0).any(dim=1), moved, latents)
        x = flatten(latents, self._counted)
        unresolved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if references is not None:
            unresolved[references.scan(x).hits().query] = True
        if batch is not None:
            unresolved |= batch.active(x, margin=10 * _PAIR_TOLERANCE).any(dim=1)
        return latents, unresolved

    def _unresolved(self, latents: Tensor, unresolved: Tensor) -> Push:
        """Describe finished latents (B, *S) of which some rows (B,) are too close to something, for the trace."""
        x = flatten(latents, self._counted)
        references, batch = self._static.at(latents), self._batch_shields(latents, None)
        hits = None if references is None else references.scan(x).hits()
        close = None if batch is None else batch.active(x)
        return Push(torch.zeros_like(x), push_direction(x, None), hits, close, unresolved, None)

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as a CSV table, one row per step and image."""
        write_csv(self.trace, path)

    def _references(self, mask: Tensor | None, margin: float) -> StaticReferences:
        constant_history = self.radius_schedule is None
        return StaticReferences(self.protected, self.history, self.radius, self.nearest, mask, margin, constant_history)

    def _posterior_variance(self, x: Tensor, level: float) -> Tensor | None:
        """Estimate tr Cov(X_0|x_t) (B,), by which squared radii shrink; None where they are constant."""
        if self.radius_schedule == "constant" or self._counted is not None:
            return None
        if self.calibration is None and self.protected is not None:
            self.calibration = Calibration(energy=options.energy_of(self.protected))
        return None if self.calibration is None else self.calibration.posterior_variance(x.square().sum(dim=1), level)

    def _batch_shields(self, x: Tensor, shrink: Tensor | None) -> BatchShields | None:
        """The shields that the images of the batch are to each other; None if they do not repel."""
        if not self.batch or len(x) < 2:
            return None
        assert isinstance(self.radius, float)  # checked in __init__
        return BatchShields.of(x, self.radius, self.groups, shrink)

    def _record(self, step: int, level: float | None, count: int, push: Push | None, released: Tensor | None) -> None:
        self.trace += rows_of_step(self._run, step, level, count, push, released, self._static.name)


def _level(alpha: float | None, sigma: float | None) -> float | None:
    """Noise level t = σ/(α + σ)."""
    return None if alpha is None or sigma is None else float(sigma) / (float(alpha) + float(sigma))
