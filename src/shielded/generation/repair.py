"""After sampling: measure what came out, repair what lies inside a shield, refuse what cannot be repaired.

Decoding is not injective, so encoding the decoded picture again can undo part of the push out of a shield. Both the
finished latents and the encoded picture are therefore measured. An image that fails either is

- restarted: noised to a middle noise level and sampled again, with the shields applied to what x0 decodes to and with
  a wider radius (restart sampling: Xu et al., "Restart Sampling for Improving Generative Processes", 2023),
- pushed: the finished latents are moved until the picture that they decode to is outside, as far as that works,
- refused.

In a set with a descriptor, a picture that it calls a copy fails too: the shield of the copied picture grows beyond the
copy's latents at each restart, and what remains a copy is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor

from shielded._extras import RequestError
from shielded.certificates.certificate import Measured, measure
from shielded.generation.copies import Copied, find_copies, grown_radii
from shielded.generation.generated import Generated
from shielded.latent_space import LatentSpace
from shielded.protected import ProtectedSet
from shielded.spell import Spell

OnLeak = Literal["restart", "push", "refuse", "report"]

RESTART_LEVEL = 0.8  # share of the sampler's steps that a restart takes again
WIDER = 0.05  # share of the radius added at each restart
PUSHES = 10  # rounds of decoding, encoding and moving
PUSH_GAIN = 1.5  # the encoded picture moves less than the latents do
PUSH_MARGIN = 0.005  # share of the radius to move beyond the shell, so that moves do not shrink towards zero
_MAX_ROWS_SAMPLED = 1024  # protected images that `farthest` reads


class ThroughPictures:
    """The correction of a Spell, computed on the picture that x0 decodes to, encoded again.

    It runs the autoencoder twice per step, so restarts use it and the first sampling does not.
    """

    def __init__(self, spell: Spell, space: LatentSpace) -> None:
        self.spell = spell
        self.space = space
        self.start = spell.start
        self.restrict = spell.restrict
        self.release, self.release_scale = spell.release, spell.release_scale
        self.colliding = spell.colliding
        self.guidance: str | None = None
        self.finished: Tensor | None = None

    def __call__(
        self, x0: Tensor, *, noise: Tensor, alpha: float, sigma: float, last: bool, released: Tensor | None = None
    ) -> Tensor:
        delta = self.spell(x0, noise=noise, alpha=alpha, sigma=sigma, last=last, released=released)
        encoded = self.space.encode(self.space.decode(x0 + delta)).to(x0)
        return delta + self.spell(encoded, noise=noise, alpha=alpha, sigma=sigma, last=last)

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
        raise RequestError(
            f"the radius {reach:g} cannot be kept: the latents of this model are at most {limit:.1f} away from the "
            "protected images on average (root mean square); choose a smaller one."
        )


def farthest(protected: ProtectedSet) -> float:
    """Bound the distance that latents can keep from all protected images, given that none is longer than the longest.

    For ‖x‖ ≤ m the mean of ‖x − z_k‖² is ‖x‖² − 2 x·z̄ + mean ‖z_k‖² ≤ m² + 2 m ‖z̄‖ + mean ‖z_k‖², and the smallest
    distance is not above the mean. This holds for any part of the set, so at most 1,024 images are read.
    """
    step = -(-len(protected) // _MAX_ROWS_SAMPLED)
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
) -> Generated:
    """Measure the images of one batch and bring each one that lies inside a shield out of it.

    Args:
        spell: with a ProtectedSet.
        space: with the autoencoder.
        images: decoded.
        latents: (B, *S) float32 on the CPU, what they were decoded from.
        resample: (wider Spell, batch rows, their images) -> images and latents of a restart.
        on_leak: "restart" samples failed images again, then pushes; "push" only pushes; "refuse" does neither.
        attempts: limit on how often an image is sampled, the first time included.
        log: called with the event and its content, for every image and attempt.

    Returns:
        The images with their measurements; those still inside a shield are marked as refused.
    """
    made = Generated(images, latents, decoded=space.encode(images))
    failed = _failed(spell, made, range(len(images)), "sampled", log)
    for i, found in failed.items():
        made.causes[i] = _evidence(found, made.copied[i], past=True)
    for attempt in range(2, attempts + 1 if on_leak == "restart" else 0):
        if not failed:
            break
        rows = list(failed)
        copied = {i: copy for i in rows if (copy := made.copied[i]) is not None}
        radius = grown_radii(_radii(spell), copied, made.latents, _protected(spell), attempt - 1)
        wider = _shields(spell, spell.overcompensation, 1 + WIDER * (attempt - 1), radius, spell.margin)
        again, finished = resample(ThroughPictures(wider, space), rows, [made.images[i] for i in rows])
        _replace(made, rows, again, finished, space.encode(again), "restart")
        for i in rows:
            made.attempts[i] = attempt
        failed = _failed(spell, made, rows, "restarted", log)
    inside = [i for i, found in failed.items() if any(measured.leak for measured in found)]  # others are copies alone
    if inside and on_leak in ("restart", "push"):
        pushed = push(_shields(spell), space, made.latents[inside], _decoded(made)[inside])
        _replace(made, inside, *pushed, "push")
        others = {i: found for i, found in failed.items() if i not in inside}
        failed = others | _failed(spell, made, inside, "pushed", log)
    for i, found in failed.items():
        made.refused[i] = _reason(found, made, i)
    return made


def push(
    spell: Spell, space: LatentSpace, latents: Tensor, decoded: Tensor
) -> tuple[list[Image.Image], Tensor, Tensor]:
    """Move latents until they and the pictures that they decode to are outside every shield, or `PUSHES` rounds passed.

    Each round moves the encoded picture out of its shields; the latents follow that move and are decoded again.

    Args:
        spell: with the shields, and λ = 1.
        space: with the autoencoder.
        latents: (n, *S).
        decoded: (n, *S), the encoded pictures.

    Returns:
        images, latents and the images encoded again.
    """
    latents, decoded = spell.leave(latents), decoded.clone()
    images: dict[int, Image.Image] = {}
    inside = list(range(len(latents)))
    for _ in range(PUSHES):
        move = spell.leave(decoded[inside]) - decoded[inside]
        length = move.flatten(1).norm(dim=1).view(-1, *[1] * (move.ndim - 1))
        beyond = torch.where(length > 0, PUSH_MARGIN * _radius(spell) / length.clamp(min=1e-12), 0)
        latents[inside] = spell.leave(latents[inside] + move * (PUSH_GAIN + beyond))
        pictures = space.decode(latents[inside])
        decoded[inside] = space.encode(pictures)
        images.update(zip(inside, pictures, strict=True))
        found = measure(decoded[inside], _protected(spell), spell.radius)
        inside = [i for i, measured in zip(inside, found, strict=True) if measured.leak]
        if not inside:
            break
    return [images[i] for i in range(len(latents))], latents, decoded


def _protected(spell: Spell) -> ProtectedSet:
    return cast(ProtectedSet, spell.protected)  # `check_on_leak` has refused everything else


def _decoded(made: Generated) -> Tensor:
    return cast(Tensor, made.decoded)  # `repair` has encoded the images


def _radii(spell: Spell) -> float | Tensor:
    """Return the radii of the protected images: one number, or (K,)."""
    return _protected(spell).radii if spell.radius is None else spell.radius


def _shields(
    spell: Spell,
    overcompensation: float = 1.0,
    wider: float = 1.0,
    radius: float | Tensor | None = None,
    margin: float = 0.0,
) -> Spell:
    """Keep the protected images of a Spell alone, at `radius`, else the full one, or wider by a factor."""
    return Spell(
        spell.protected,
        wider * (_radii(spell) if radius is None else radius),
        overcompensation,
        batch=False,
        mask=spell.mask,
        radius_schedule="constant",
        release=spell.release,
        release_scale=spell.release_scale,
        margin=margin,
    )


def _radius(spell: Spell) -> float:
    return float(torch.as_tensor(spell.radius).max())


def _failed(
    spell: Spell, made: Generated, rows: Sequence[int], event: str, log: Callable[..., None]
) -> dict[int, tuple[Measured, Measured]]:
    """Measure these batch rows; return those in a shield, by latents or picture, or that are copies, and where."""
    rows, protected = list(rows), _protected(spell)
    finished = measure(made.latents[rows], protected, spell.radius)
    decoded = measure(_decoded(made)[rows], protected, spell.radius)
    made.measured = made.measured or list(zip(finished, decoded, strict=True))  # the first call measures all rows
    copies = find_copies([made.images[i] for i in rows], protected)
    failed = {}
    for i, copy in zip(rows, copies, strict=True):
        made.copied[i] = copy
    for i, latents, picture in zip(rows, finished, decoded, strict=True):
        inside = bool(latents.leak or picture.leak)
        log(
            event,
            row=i,
            attempt=made.attempts[i],
            nearest_id=latents.id,
            nearest_distance=latents.distance,
            decoded_id=picture.id,
            decoded_distance=picture.distance,
            inside=inside,
            **_logged(made.copied[i]),
        )
        made.measured[i] = latents, picture
        if inside or made.copied[i] is not None:
            failed[i] = latents, picture
    return failed


def _logged(copy: Copied | None) -> dict[str, Any]:
    return {} if copy is None else {"copy_id": copy.id, "copy_similarity": copy.similarity}


def _replace(
    made: Generated, rows: Sequence[int], images: list[Image.Image], latents: Tensor, decoded: Tensor, how: str
) -> None:
    rows = list(rows)
    made.latents[rows], _decoded(made)[rows] = latents, decoded
    for i, image in zip(rows, images, strict=True):
        made.images[i], made.repair[i] = image, how


def _reason(found: tuple[Measured, Measured], made: Generated, row: int) -> str:
    times = "once" if made.attempts[row] == 1 else f"{made.attempts[row]} times"
    pushed = " and pushed" if made.repair[row] == "push" else ""
    return f"sampled {times}{pushed}, {_evidence(found, made.copied[row])}"


def _evidence(found: tuple[Measured, Measured], copy: Copied | None, past: bool = False) -> str:
    latents, picture = found
    is_, are = ("was", "were") if past else ("is", "are")
    if copy is not None and not latents.leak and not picture.leak:
        return f"it {is_} a copy of {copy.id}: its similarity {is_} {copy.similarity:.3f}"
    what, measured = (f"latents {are}", latents) if latents.leak else (f"picture {is_}", picture)
    name, distance, radius = measured.evidence
    return f"its {what} {distance:.2f} from {name}, inside the radius {radius:g}"
