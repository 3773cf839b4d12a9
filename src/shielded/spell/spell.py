"""Spell: which references, which radius at this noise level, and the trace of what happened."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from shielded.core.correction import Overlap, check_radius, project_correction, sum_correction
from shielded.core.directions import push_direction
from shielded.core.pairs import active_pairs, project_pairs, sum_pairs
from shielded.core.references import Hits, Joined, References, TensorReferences, closest
from shielded.files import replacing
from shielded.latent_space import LatentSpace
from shielded.protected import ProtectedSet
from shielded.protected.references import SetReferences
from shielded.spell.history import History
from shielded.spell.posterior import Calibration

_ALTERNATIONS = 4  # between leaving the static shields and separating the batch, each of which can undo the other
_FINAL_MARGINS = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3, 1.0)  # radii beyond the shell, until rounding stays outside


class Spell:
    """Sparse repellency for one sampling run after another.

    Args:
        protected: what x0 is kept away from: a ProtectedSet, a tensor (K, *S) in the sampler's latent space, or None.
        radius: L2 distance in the latent space; one number, or (K,) for the protected references alone. None: the
            protected set's own radii. Needed for batch and history.
        overcompensation: λ, which multiplies the correction (paper: 1.6). At 1 a single shield is left exactly to its
            shell.
        batch: the other images of the batch are references, renewed at each step.
        history: finished images of earlier calls are references. True keeps the last 1,024; a number sets that bound;
            a History is shared or loaded from disk.
        nearest: only the k nearest protected references of each image (the paper's SPELL-k); None: all.
        overlap: "project" is the smallest move that leaves all shields, "sum" the paper's formula.
        window: share of the noise schedule in which it may act, from and to, as t = σ/(α + σ): 1 is noise, 0 a clean
            image, with every sampler and any number of steps. Rectified-flow models call this number the time, so
            (1.0, 0.6) means the same for all models.
        radius_schedule: "constant", or "posterior": r_t² = r² − tr Cov(X_0|x_t), small while x0 is a blurred mean.
            See `shielded.spell.posterior`.
        groups: (B,) ids; batch references repel only within a group.
        mask: of a shape that broadcasts to *S, non-zero where the image is generated (inpainting): distance and push
            count only there.
        calibration: measured energy and denoising error of a model, for the posterior radius. None: estimated from the
            protected references.

    Raises:
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
        radius_schedule: Literal["constant", "posterior"] = "constant",
        groups: Tensor | None = None,
        mask: Tensor | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        if protected is not None and len(protected) == 0:
            raise ValueError("the protected set is empty; add images to it, or pass protected=None.")
        if protected is None and not batch and history is False:
            raise ValueError("nothing to repel from: give a protected set, or batch=True, or history=True.")
        if radius is None and (batch or history is not False):
            raise ValueError(
                "radius is needed for batch and history references; pass radius=..., or batch=False and history=False "
                "to use the protected set's own radii."
            )
        if radius is not None:
            radius = check_radius(radius, -1 if protected is None else len(protected))
        if isinstance(radius, Tensor) and (batch or history is not False):
            raise ValueError("batch and history references need one radius; a radius per image works with batch=False.")
        if isinstance(protected, ProtectedSet) and radius is None:
            _require_radii(protected.radii)
        if isinstance(protected, Tensor) and radius is None:
            raise ValueError("a tensor of protected references has no radii of its own; pass radius=...")
        if not overcompensation > 0 or overcompensation == float("inf"):
            raise ValueError(f"overcompensation must be positive and finite, not {overcompensation}.")
        if overlap not in ("sum", "project"):
            raise ValueError(f"overlap={overlap!r} is not known; use 'sum' or 'project'.")
        if radius_schedule not in ("constant", "posterior"):
            raise ValueError(f"radius_schedule={radius_schedule!r} is not known; use 'constant' or 'posterior'.")
        if nearest is not None and nearest < 1:
            raise ValueError(f"nearest must be at least 1, not {nearest}; None means all protected references.")
        start, end = window
        if not 1 >= start > end >= 0:
            raise ValueError(f"window={window} must run from the noisy end to the clean one, like (1.0, 0.6).")
        if radius_schedule == "posterior":
            if mask is not None:
                raise ValueError("radius_schedule='posterior' does not work with a mask: energies are of whole images.")
            if calibration is None:
                if protected is None:
                    raise ValueError("radius_schedule='posterior' without a protected set needs calibration=...")
                calibration = Calibration(energy=_energy(protected))
        self.protected = protected
        self.radius = radius
        self.overcompensation = overcompensation
        self.batch = batch
        self.nearest = nearest
        self.overlap = overlap
        self.window = (float(start), float(end))
        self.radius_schedule = radius_schedule
        self.groups = groups
        self.mask = mask
        self.calibration = calibration
        self.history = _history_of(history)
        self.finished: Tensor | None = None
        self.trace: list[dict[str, Any]] = []
        self._run = 0
        self._step = 0
        self._static: tuple[tuple[Any, ...], References | None] | None = None

    # One step -----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        x0: Tensor,
        noise: Tensor | None = None,
        alpha: float | None = None,
        sigma: float | None = None,
        last: bool = False,
    ) -> Tensor:
        """The correction λΔ for one step.

        Args:
            x0: (B, *S) predicted clean samples, after guidance.
            noise: (B, *S) predicted noise (x − α x0)/σ: the direction of the push where x0 equals a reference, and what
                the push is compared with in the trace.
            alpha: of the state x = α x0 + σ ε that the model has just seen.
            sigma: likewise.
            last: this is the trajectory's last evaluation; the posterior radius is then the full one.

        Returns:
            (B, *S) of x0's dtype; exactly zero in rows that no shield touches.

        Raises:
            ValueError: x0 of another shape than the references, or with NaN or infinity; a window or posterior radius
                without alpha and sigma.
        """
        step, self._step = self._step, self._step + 1
        level = None if alpha is None or sigma is None else float(sigma) / (float(alpha) + float(sigma))
        if level is None and (self.window != (1.0, 0.0) or self.radius_schedule == "posterior"):
            raise ValueError("a window and the posterior radius need the noise level: pass alpha=... and sigma=...")
        x = self._flat(x0)
        finite = torch.isfinite(x).all()
        if level is not None and not self.window[1] <= level <= self.window[0]:
            self._require(finite, x, step)
            return torch.zeros_like(x0)
        together = self._together(x) if self.batch and len(x) > 1 else None
        references = self._references(x0)
        shrink = None
        if self.radius_schedule == "posterior" and level is not None and not last:
            shrink = self.calibration.posterior_variance(x.square().sum(dim=1), level)
        scan = references.scan(x, shrink) if references is not None else None
        pair_radius = close = None
        if together is not None:
            pair_radius = _pair_radius(float(self.radius), len(x), shrink, x.device)
            close = active_pairs(x, pair_radius, together)
        # The only thing that the host waits for in a step in which nothing is active.
        flags = [~finite, *([scan.some] if scan else []), *([close.any()] if close is not None else [])]
        idle = not torch.stack(flags).any()
        hits = None
        if not idle:
            self._require(finite, x, step)
            hits = scan.hits() if scan is not None else None
            idle = not (hits is not None and len(hits)) and not (close is not None and close.any())
        if idle:
            self._record(step, level, None, x)
            return torch.zeros_like(x0)
        direction = push_direction(x, None if noise is None else self._flat(noise))
        if self.overlap == "sum":
            delta = torch.zeros_like(x)
            if hits is not None:
                delta += sum_correction(x, references, hits, direction)
            if close is not None:
                delta += sum_pairs(x, pair_radius, close)
            delta, unresolved = self.overcompensation * delta, None
        else:
            delta, unresolved = self._project(
                x, references, hits, direction, shrink, pair_radius, together, self.overcompensation
            )
        # The push as a share of the score: (α/σ²)λΔ against −ε/σ.
        ratio = float(alpha) / float(sigma) if level and noise is not None else None
        self._record(step, level, ratio, x, hits, close, delta, direction, unresolved)
        return self._unflat(delta, x0)

    def _project(
        self,
        x: Tensor,
        references: References | None,
        hits: Hits | None,
        noise: Tensor,
        shrink: Tensor | None,
        pair_radius: Tensor | None,
        together: Tensor | None,
        strength: float,
    ) -> tuple[Tensor, Tensor]:
        """λ times the smallest move out of all shields, and the rows for which none was found."""
        move = torch.zeros_like(x)
        inside = crowded = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(_ALTERNATIONS):
            if together is not None and active_pairs(x + move, pair_radius, together).any():
                apart, crowded = project_pairs(x + move, pair_radius, together)
                move = move + apart
                hits = None  # found before the images moved
            if references is None:
                break
            if hits is None:
                hits = references.scan(x + move, shrink).hits()
            # The protected references have the last word.
            leave, inside = project_correction(x + move, references, hits, noise, shrink)
            move, hits = move + leave, None
            if together is None:
                break
            crowded = active_pairs(x + move, pair_radius * (1 - 1e-4), together).any(dim=1)
            if not crowded.any():
                break
        scaled = strength * move
        if references is not None and strength > 1:
            # Walking on beyond the shell cannot lead back into these shields, but into others.
            found = references.scan(x + scaled, shrink).hits()
            scaled[found.query[found.distance < (1 - 1e-5) * found.radius]] /= strength
        return scaled, inside | crowded

    # A sampling run -----------------------------------------------------------------------------------------------

    @contextmanager
    def attach(self, pipe: Any, through: Any = None) -> Iterator[Spell]:
        """Correct every step of `pipe`, any object with a supported `.scheduler`, until the context is left.

        `trace` starts anew. `finished` holds the last call's final latents; with history on they are remembered.

        Args:
            pipe: a diffusers pipeline.
            through: what the sampler calls in place of this Spell, and what calls it (`distributed.Gathered`).

        Raises:
            TypeError: no scheduler, or one that is not supported (named, with the reason).
            ValueError: the protected set or the calibration was made for another latent space.
            RuntimeError: on leaving, if the pipeline was not called or its scheduler was exchanged.
        """
        from shielded.samplers import attach

        # A set by shape alone can be compared by shape only, which the first step does.
        if isinstance(self.protected, ProtectedSet) and self.protected.space.vae_sha256 is not None:
            self.protected.space.require_same_encoder(LatentSpace.of(pipe))
        measured_in = None if self.calibration is None else self.calibration.space
        if measured_in is not None and measured_in != LatentSpace.of(pipe).fingerprint:
            raise ValueError("the calibration was measured in another latent space; run `shielded calibrate` for it.")
        self.trace = []
        self._run = 0
        with attach(pipe, self if through is None else through):
            yield self

    def start(self) -> None:
        """A new trajectory begins."""
        self._run += 1
        self._step = 0

    def finish(self, latents: Tensor) -> Tensor:
        """A trajectory ended with these latents (B, *S).

        Returns:
            What takes their place: see `leave`. With overlap="sum", which is the paper's method and no more, and with a
            window that closes before the end, they stay as they are.
        """
        if self.overlap == "project" and self.window[1] == 0:
            latents = self.leave(latents)
        self.finished = latents.detach()
        if self.history is not None:
            self.history.add(self.finished)
        return latents

    def leave(self, latents: Tensor) -> Tensor:
        """Finished latents (B, *S), moved out of every shield by the smallest move (λ = 1, full radius).

        They are measured again after rounding to their dtype. Images outside every shield keep their bits; if none
        moves, it is the same tensor.
        """
        together = self._together(latents) if self.batch and len(latents) > 1 else None
        radius = None if together is None else _pair_radius(float(self.radius), len(latents), None, latents.device)
        references = self._references(latents)
        for margin in _FINAL_MARGINS:
            x = self._flat(latents)
            hits = None if references is None else references.scan(x).hits()
            inside = hits is not None and len(hits) > 0
            crowded = together is not None and bool(active_pairs(x, radius * (1 - 1e-5), together).any())
            if not inside and not crowded:
                break
            direction = push_direction(x, None)
            move, _ = self._project(x, references, hits, direction, None, radius, together if crowded else None, 1.0)
            if inside:
                move = move + margin * _outward(x, move, references, closest(hits, 1))
            together = None  # pairs once: the protected references have the last word
            moved = (latents.float() + self._unflat(move, latents.float())).to(latents.dtype)
            latents = torch.where((move != 0).any(dim=1).view(-1, *[1] * (latents.ndim - 1)), moved, latents)
        return latents

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as a CSV table, one row per step and image."""
        with replacing(path) as draft, draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.trace[0]) if self.trace else ["step"])
            writer.writeheader()
            writer.writerows(self.trace)

    # Parts --------------------------------------------------------------------------------------------------------

    def _require(self, finite: Tensor, x: Tensor, step: int) -> None:
        if not finite:
            rows = (~torch.isfinite(x).all(dim=1)).nonzero().flatten().tolist()
            raise ValueError(
                f"x0 contains NaN or infinity at step {step}, images {rows}; the model overflowed, so try float32 or "
                "bfloat16."
            )

    def _flat(self, x: Tensor) -> Tensor:
        flat = x.detach().float()
        if self.mask is None:
            return flat.flatten(1)
        hole = self.mask.to(x.device).expand(x.shape[1:]) != 0
        return flat[:, hole]

    def _unflat(self, delta: Tensor, x0: Tensor) -> Tensor:
        if self.mask is None:
            return delta.to(x0.dtype).view_as(x0)
        full = torch.zeros_like(x0)
        full[:, self.mask.to(x0.device).expand(x0.shape[1:]) != 0] = delta.to(x0.dtype)
        return full

    def _together(self, x: Tensor) -> Tensor:
        if self.groups is None:
            return torch.ones(len(x), len(x), dtype=torch.bool, device=x.device)
        if len(self.groups) != len(x):
            raise ValueError(f"groups has {len(self.groups)} ids, but the batch has {len(x)} images; give one id each.")
        groups = self.groups.to(x.device)
        return groups[:, None] == groups[None, :]

    def _references(self, x0: Tensor) -> References | None:
        """Protected set and history as one set of references; kept until one of them changes."""
        version = self.protected.version if isinstance(self.protected, ProtectedSet) else 0
        key = (version, self.history.version if self.history else 0, x0.shape[1:], x0.device)
        if self._static is None or self._static[0] != key:
            parts: list[References] = []
            sizes: list[int] = []
            if self.protected is not None:
                parts.append(self._protected_references(x0))
                sizes.append(len(self.protected))
            if self.history is not None and len(self.history):
                latents = _fitting(self.history.latents, x0, "remembered images")
                parts.append(TensorReferences(self._flat(latents), self.radius))
                sizes.append(len(latents))
            joined = Joined(parts, sizes) if len(parts) > 1 else parts[0] if parts else None
            self._static = key, joined
        return self._static[1]

    def _protected_references(self, x0: Tensor) -> References:
        if isinstance(self.protected, Tensor):
            vectors = self._flat(_fitting(self.protected, x0, "protected references"))
            return TensorReferences(vectors, self.radius, self.nearest)
        if tuple(self.protected.space.shape) != tuple(x0.shape[1:]):
            raise ValueError(
                f"the protected set holds latents of shape {tuple(self.protected.space.shape)}, the sampler works on "
                f"{tuple(x0.shape[1:])}; protect the images at the size that is generated."
            )
        radius = self.protected.radii if self.radius is None else self.radius
        _require_radii(radius)
        if self.mask is None:
            return SetReferences(self.protected, radius, x0.device, self.nearest)
        vectors = self.protected.vectors(torch.arange(len(self.protected)))
        return TensorReferences(self._flat(vectors.to(x0.device)), radius, self.nearest)

    def _name(self, row: int) -> str:
        """The id of a static reference, for the trace."""
        known = 0 if self.protected is None else len(self.protected)
        if row >= known:
            return f"history {row - known}"
        return str(self.protected.ids[row]) if isinstance(self.protected, ProtectedSet) else str(row)

    def _record(
        self,
        step: int,
        level: float | None,
        ratio: float | None,
        x: Tensor,
        hits: Hits | None = None,
        close: Tensor | None = None,
        delta: Tensor | None = None,
        noise: Tensor | None = None,
        unresolved: Tensor | None = None,
    ) -> None:
        """One row per image. Nothing is read back from the device unless something was active."""
        count = len(x)
        active, push, share, failed = [0] * count, [0.0] * count, [0.0] * count, [False] * count
        nearest: dict[int, tuple[float, str, float]] = {}
        if delta is not None:
            number = torch.zeros(count, device=x.device) if close is None else close.sum(dim=1).float()
            if hits is not None:
                number = number + torch.bincount(hits.query, minlength=count)
                first = closest(hits, 1)
                for query, row, distance, radius in zip(
                    first.query.tolist(),
                    first.row.tolist(),
                    first.distance.tolist(),
                    first.radius.tolist(),
                    strict=True,
                ):
                    nearest[query] = distance, self._name(row), radius
            length = delta.norm(dim=1)
            active, push = number.int().tolist(), length.tolist()
            if ratio is not None and noise is not None:
                share = (ratio * length / noise.norm(dim=1).clamp(min=1e-12)).tolist()
            if unresolved is not None:
                failed = unresolved.tolist()
        for i in range(count):
            distance, name, radius = nearest.get(i, (None, None, None))
            self.trace.append(
                {
                    "run": self._run,
                    "step": step,
                    "image": i,
                    "noise_level": level,
                    "active": active[i],
                    "push": push[i],
                    "score_ratio": share[i],
                    "nearest_id": name,
                    "nearest_distance": distance,
                    "radius": radius,
                    "unresolved": failed[i],
                }
            )


def _outward(x: Tensor, move: Tensor, references: References, nearest: Hits) -> Tensor:
    """(B, D): one radius along the move, for the images that are inside a shield.

    Where an image is inside by a rounding error alone it has no move to follow and goes straight away.
    """
    along = move[nearest.query]
    away = x[nearest.query] - references.vectors(nearest.row)
    along = torch.where((along != 0).any(dim=1, keepdim=True), along, away)
    result = torch.zeros_like(x)
    result[nearest.query] = nearest.radius[:, None].to(x.dtype) * along / along.norm(dim=1, keepdim=True)
    return result


def _fitting(references: Tensor, x0: Tensor, name: str) -> Tensor:
    if references.shape[1:] != x0.shape[1:]:
        raise ValueError(
            f"the {name} have shape {tuple(references.shape[1:])} each, x0 has {tuple(x0.shape[1:])}; "
            "references must be in the sampler's latent space at the generated size."
        )
    if not references.is_floating_point():
        raise ValueError(f"the {name} are {references.dtype}; latents are floating point, so these are something else.")
    if not torch.isfinite(references).all():
        raise ValueError(f"the {name} contain NaN or infinity.")
    return references.to(x0.device)


def _require_radii(radius: float | Tensor) -> None:
    if isinstance(radius, Tensor) and radius.isnan().any():
        raise ValueError(
            "some protected images have no radius of their own; pass radius=... to Spell, or --radius to a command."
        )


def _pair_radius(radius: float, count: int, shrink: Tensor | None, device: torch.device) -> Tensor:
    """(B, B). Both ends of a pair are uncertain, so both variances shorten it."""
    squared = torch.full((count, count), radius**2, device=device)
    if shrink is not None:
        squared = squared - shrink[:, None] - shrink[None, :]
    return squared.clamp(min=0).sqrt()


def _energy(protected: ProtectedSet | Tensor) -> float:
    if isinstance(protected, Tensor):
        return protected.float().flatten(1).square().sum(dim=1).mean().item()
    return protected.energy


def _history_of(history: bool | int | History) -> History | None:
    if isinstance(history, History):
        return history
    if history is False:
        return None
    return History() if history is True else History(history)
