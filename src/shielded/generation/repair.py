"""After sampling: measure what came out, repair what lies inside a shield, refuse what cannot be repaired.

Decoding and encoding again moves an image: an autoencoder does not tell all latents apart, and the push out of a shield
may have gone where it does not. So the finished latents are measured, and the decoded picture encoded again. What fails
either is

- restarted: noised to a middle noise level and sampled again, now with the shields around what x0 decodes to and a
  wider radius (restart sampling: Xu et al., "Restart Sampling for Improving Generative Processes", 2023),
- pushed: the finished latents are moved until the picture that they decode to is outside, as far as that works,
- refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from shielded.certificates.certificate import Measured, measure
from shielded.latent_space import LatentSpace
from shielded.protected import ProtectedSet
from shielded.spell import Spell

OnLeak = Literal["restart", "push", "refuse", "report"]

RESTART_LEVEL = 0.8  # share of the sampler's steps that a restart takes again
WIDER = 0.05  # of the radius, added at each restart
PUSHES = 10  # rounds of decoding, encoding and moving
PUSH_GAIN = 1.5  # the encoded picture moves less than the latents do
PUSH_MARGIN = 0.005  # of the radius, beyond the shell, so that the last moves are not ever smaller
_SAMPLE = 1024  # protected images that `farthest` looks at


@dataclass
class Finished:
    """Finished images of one batch.

    Args:
        images: decoded.
        latents: (B, *S) what they were decoded from.
        decoded: (B, *S) the images, encoded again. None: not measured.
        attempts: how often each was sampled.
        repair: "restart" or "push" for images that left their shield that way.
        refused: why an image is refused, or None.
    """

    images: list[Image.Image]
    latents: Tensor
    decoded: Tensor | None = None
    attempts: list[int] = field(init=False)
    repair: list[str | None] = field(init=False)
    refused: list[str | None] = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.images)
        self.attempts, self.repair, self.refused = [1] * count, [None] * count, [None] * count


class ThroughPictures:
    """The correction of a Spell, measured where it counts: on the picture that x0 decodes to, encoded again.

    It takes the autoencoder twice per step, so restarts have it and the first sampling has not.
    """

    def __init__(self, spell: Spell, space: LatentSpace) -> None:
        self.spell = spell
        self.space = space
        self.start = spell.start
        self.finished: Tensor | None = None

    def __call__(self, x0: Tensor, *, noise: Tensor, alpha: float, sigma: float, last: bool) -> Tensor:
        state = {"noise": noise, "alpha": alpha, "sigma": sigma, "last": last}
        delta = self.spell(x0, **state)
        seen = self.space.encode(self.space.decode(x0 + delta)).to(x0)
        return delta + self.spell(seen, **state)

    def finish(self, latents: Tensor) -> Tensor:
        self.finished = self.spell.finish(latents)
        return self.finished


def check_on_leak(on_leak: OnLeak, attempts: int, spell: Spell | None) -> None:
    """Refuse settings with which nothing could be repaired.

    Raises:
        ValueError: an unknown mode, fewer than one attempt, no protected set, or a radius that nothing can keep.
    """
    if on_leak not in ("restart", "push", "refuse", "report"):
        raise ValueError(f"on_leak={on_leak!r} is not known; use 'restart', 'push', 'refuse' or 'report'.")
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, not {attempts}; the first sampling counts.")
    if on_leak == "report":
        return
    if spell is None or not isinstance(spell.protected, ProtectedSet):
        raise ValueError(f"on_leak={on_leak!r} needs a Spell with a ProtectedSet to measure against.")
    radius = spell.protected.radii if spell.radius is None else torch.as_tensor(spell.radius, dtype=torch.float64)
    reach = radius.square().mean().sqrt().item()
    limit = farthest(spell.protected)
    if reach > limit:
        raise ValueError(
            f"the radius {reach:g} cannot be kept: the latents of this model are at most {limit:.1f} away from the "
            "protected images on average (root mean square); choose a smaller one."
        )


def farthest(protected: ProtectedSet) -> float:
    """A distance that no latents can keep from all protected images, if they are no longer than the longest of these.

    For ‖x‖ ≤ m the mean of ‖x − z_k‖² is ‖x‖² − 2 x·z̄ + mean ‖z_k‖² ≤ m² + 2 m ‖z̄‖ + mean ‖z_k‖², and the smallest
    distance is not above the mean. It holds for any part of the set, so at most 1,024 images are looked at.
    """
    step = -(-len(protected) // _SAMPLE)
    z = protected.vectors(torch.arange(0, len(protected), step)).flatten(1).double()
    squared = z.square().sum(dim=1)
    return (squared.max() + 2 * squared.max().sqrt() * z.mean(dim=0).norm() + squared.mean()).sqrt().item()


def repair(
    spell: Spell,
    space: LatentSpace,
    images: list[Image.Image],
    latents: Tensor,
    resample: Callable[[ThroughPictures, list[int], list[Image.Image]], tuple[list[Image.Image], Tensor]],
    on_leak: OnLeak,
    attempts: int,
    log: Callable[..., None],
) -> Finished:
    """Measure the images of one batch and bring those inside a shield out of it, each for itself.

    Args:
        spell: with a ProtectedSet.
        space: with the autoencoder.
        images: decoded.
        latents: (B, *S) float32 on the CPU, what they were decoded from.
        resample: (a wider spell, rows, their images) -> images and latents of a restart.
        on_leak: "restart" samples failed images again, then pushes; "push" only pushes; "refuse" does neither.
        attempts: how often an image is sampled at most, the first time included.
        log: called with the event and its content, for every image and attempt.

    Returns:
        The images; those that are inside a shield all the same are marked as refused.
    """
    made = Finished(images, latents, space.encode(images))
    failed = _failed(spell, made, range(len(images)), "sampled", log)
    for attempt in range(2, attempts + 1 if on_leak == "restart" else 0):
        if not failed:
            break
        wider = ThroughPictures(_shields(spell, spell.overcompensation, 1 + WIDER * (attempt - 1)), space)
        rows = list(failed)
        again, finished = resample(wider, rows, [made.images[i] for i in rows])
        _replace(made, rows, again, finished, space.encode(again), "restart")
        for i in rows:
            made.attempts[i] = attempt
        failed = _failed(spell, made, rows, "restarted", log)
    if failed and on_leak in ("restart", "push"):
        rows = list(failed)
        _replace(made, rows, *push(_shields(spell), space, made.latents[rows], made.decoded[rows]), "push")
        failed = _failed(spell, made, rows, "pushed", log)
    for i, found in failed.items():
        made.refused[i] = _reason(found, made, i)
    return made


def push(
    spell: Spell, space: LatentSpace, latents: Tensor, decoded: Tensor
) -> tuple[list[Image.Image], Tensor, Tensor]:
    """Move latents until they and the pictures that they decode to are outside every shield, as far as that works.

    The encoded picture is moved out of its shields; the latents follow that move, and are decoded again.

    Args:
        spell: its shields; with λ = 1.
        space: with the autoencoder.
        latents: (n, *S).
        decoded: (n, *S), the pictures encoded.

    Returns:
        images, latents and the images encoded again.
    """
    latents, decoded = spell.leave(latents), decoded.clone()
    images: list[Image.Image] = [None] * len(latents)
    left = list(range(len(latents)))
    for _ in range(PUSHES):
        move = spell.leave(decoded[left]) - decoded[left]
        length = move.flatten(1).norm(dim=1).view(-1, *[1] * (move.ndim - 1))
        beyond = torch.where(length > 0, PUSH_MARGIN * _radius(spell) / length.clamp(min=1e-12), 0)
        latents[left] = spell.leave(latents[left] + move * (PUSH_GAIN + beyond))
        pictures = space.decode(latents[left])
        decoded[left] = space.encode(pictures)
        for i, picture in zip(left, pictures, strict=True):
            images[i] = picture
        found = measure(decoded[left], spell.protected, spell.radius)
        left = [i for i, here in zip(left, found, strict=True) if here.leak]
        if not left:
            break
    return images, latents, decoded


def _shields(spell: Spell, overcompensation: float = 1.0, wider: float = 1.0) -> Spell:
    """The protected images of a Spell alone, at the full radius or a wider one."""
    radius = wider * (spell.protected.radii if spell.radius is None else spell.radius)
    return Spell(spell.protected, radius, overcompensation, batch=False, mask=spell.mask)


def _radius(spell: Spell) -> float:
    return float(torch.as_tensor(spell.radius).max())


def _failed(
    spell: Spell, made: Finished, rows: Sequence[int], event: str, log: Callable[..., None]
) -> dict[int, tuple[Measured, Measured]]:
    """Of these rows, those inside a shield by their latents or by their picture, and where they lie."""
    rows = list(rows)
    finished = measure(made.latents[rows], spell.protected, spell.radius)
    decoded = measure(made.decoded[rows], spell.protected, spell.radius)
    failed = {}
    for i, here, there in zip(rows, finished, decoded, strict=True):
        inside = bool(here.leak or there.leak)
        log(
            event,
            row=i,
            attempt=made.attempts[i],
            nearest_id=here.id,
            nearest_distance=here.distance,
            decoded_id=there.id,
            decoded_distance=there.distance,
            inside=inside,
        )
        if inside:
            failed[i] = here, there
    return failed


def _replace(
    made: Finished, rows: Sequence[int], images: list[Image.Image], latents: Tensor, decoded: Tensor, how: str
) -> None:
    rows = list(rows)
    made.latents[rows], made.decoded[rows] = latents, decoded
    for i, image in zip(rows, images, strict=True):
        made.images[i], made.repair[i] = image, how


def _reason(found: tuple[Measured, Measured], made: Finished, row: int) -> str:
    here, there = found
    what, (name, distance, radius) = ("latents", here.leak) if here.leak else ("picture", there.leak)
    times = "once" if made.attempts[row] == 1 else f"{made.attempts[row]} times"
    pushed = " and pushed" if made.repair[row] == "push" else ""
    return f"sampled {times}{pushed}, its {what} is {distance:.2f} from {name}, inside the radius {radius:g}"
