"""Find the pictures that are copies of protected ones, finished or still being sampled, and lead away from those.

The descriptor of the set says which picture is copied, and when it is let go; SPELL moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from shielded.latent_space import LatentSpace
from shielded.protected import ProtectedSet, parts_of
from shielded.samplers.through import Through
from shielded.spell import Spell

GROWTH = 1.15  # factor of the radius around a copied picture, each time that it is found again
LEVELS = (0.5, 0.3)  # noise levels at which x0 is compared; before them it is blurred, after them it moves little
BLUR = 0.1  # times t²: by how much less similar x0 at noise level t is taken to be than the picture that it becomes
FARTHEST = 0.1  # below the threshold; x0 that is less similar at the first level is not compared at the next
NEARLY = 1.5  # radii around a protected image within which its shield is nearly active


@dataclass(frozen=True)
class Copied:
    """A picture that the descriptor of a set calls a copy.

    Args:
        id: the protected image.
        row: of that image in the set.
        similarity: to it.
        threshold: of the set.
    """

    id: str
    row: int
    similarity: float
    threshold: float


def find_copies(images: Sequence[Image.Image], protected: ProtectedSet) -> list[Copied | None]:
    """Compare pictures with a set by its descriptor; None for each that is no copy, or if the set has no threshold."""
    found = most_similar(images, protected)
    return [copy if copy is not None and copy.similarity >= copy.threshold else None for copy in found]


def most_similar(images: Sequence[Image.Image], protected: ProtectedSet) -> list[Copied | None]:
    """Find the protected image that each picture comes nearest to being a copy of; None without a threshold."""
    found: list[Copied | None] = [None] * len(images)
    start = 0
    for part in parts_of(protected):
        threshold = part.copy_threshold
        if threshold is not None and images:
            similarities, rows = part.copy_rows(images)
            for i, (similarity, row) in enumerate(zip(similarities[:, 0].tolist(), rows[:, 0].tolist(), strict=True)):
                before = found[i]
                if before is None or similarity - threshold > before.similarity - before.threshold:
                    found[i] = Copied(str(protected.ids[start + row]), start + row, similarity, threshold)
        start += len(part)
    return found


def grown_radii(
    radius: float | Tensor, copied: Mapping[int, Copied], latents: Tensor, protected: ProtectedSet, restarts: int
) -> float | Tensor:
    """Enlarge the shields of copied pictures beyond the latents of their copies.

    Args:
        radius: one number or (K,).
        copied: batch row -> what it is a copy of.
        latents: (B, *S) of the batch.
        protected: the set, with K rows.
        restarts: how many there have been, this one included; the radius grows with each.

    Returns:
        `radius` if nothing is copied, else (K,) float64.
    """
    if not copied:
        return radius
    radii = torch.as_tensor(radius, dtype=torch.float64).expand(len(protected)).clone()
    for i, copy in copied.items():
        reference = protected.vectors([copy.row])[0].double()
        distance = (latents[i].double().cpu() - reference).norm().item()
        radii[copy.row] = max(radii[copy.row].item(), distance) * GROWTH**restarts
    return radii


def away_from_copies(correct: Any, space: LatentSpace | None, log: Callable[..., None] | None) -> Any:
    """Wrap a Spell whose protected set has a copy threshold; return every other correction as it is.

    Args:
        correct: a correction, or None.
        space: with the autoencoder; None: nothing is decoded, so nothing is compared.
        log: see `AwayFromCopies`.
    """
    protected = correct.protected if isinstance(correct, Spell) else None
    if space is None or not isinstance(protected, ProtectedSet) or correct.mask is not None:
        return correct
    if all(part.copy_threshold is None for part in parts_of(protected)):
        return correct
    return AwayFromCopies(correct, protected, space, log)


@dataclass
class _Pursued:
    """The protected image (*S) that a batch row is a copy of, and the radius of the shield that it has for this row."""

    reference: Tensor
    row: int
    radius: float


class AwayFromCopies(Through):
    """The correction of a Spell, and a shield around each protected picture that an x0 is becoming a copy of.

    At the first step at or below each of `LEVELS`, x0 of the images in or near a shield is decoded and compared by the
    descriptor of the set. A copy gets a shield of its own around the copied picture, which reaches beyond its x0 and
    grows at each comparison that finds it again; its guidance is released as in any shield. So an image near a shield
    costs one decoding more, and another one if it is not far from being a copy.

    Args:
        spell: with a `ProtectedSet`.
        protected: that set, which has a copy threshold.
        space: with the autoencoder.
        log: called with "copying", the batch row, the copied image's id, the similarity and the noise level.
    """

    def __init__(
        self, spell: Spell, protected: ProtectedSet, space: LatentSpace, log: Callable[..., None] | None
    ) -> None:
        super().__init__(spell)
        self._protected, self._space, self._log = protected, space, log
        self.restrict, self.end_call = spell.restrict, spell.end_call
        self._pursued: dict[int, _Pursued] = {}
        self._coming = list(LEVELS)
        self._far: set[int] = set()  # rows that cannot become copies any more

    @property
    def finished(self) -> Tensor | None:
        """The last finished latents (B, *S)."""
        return self.spell.finished

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[AwayFromCopies]:
        """Correct every step of a pipeline, like `Spell.attach`."""
        with self.spell.attach(pipe, through=self):
            yield self

    def start(self) -> None:
        """Begin a new trajectory."""
        super().start()
        self._pursued, self._coming, self._far = {}, list(LEVELS), set()

    def colliding(self, x0: Tensor, *, alpha: float, sigma: float, last: bool = False) -> Tensor | None:
        """Find the rows (B,) of the guided x0 (B, *S) whose guidance is to be released; see `Spell`."""
        rows = self.spell.colliding(x0, alpha=alpha, sigma=sigma, last=last)
        if self.release is None or not sigma / (alpha + sigma) > self.release:
            return rows
        move = self._move(x0)
        if move is None:
            return rows
        moved = move.flatten(1).any(dim=1)
        return moved if rows is None else rows | moved

    def __call__(
        self, x0: Tensor, *, noise: Tensor, alpha: float, sigma: float, last: bool, released: Tensor | None = None
    ) -> Tensor:
        """Compute the correction (B, *S); see `Spell`."""
        level = sigma / (alpha + sigma)
        if self._coming and level <= self._coming[0]:
            self._coming = [later for later in self._coming if later < level]
            self._compare(x0, level)
        move = self._move(x0)
        state: dict[str, Any] = {"noise": noise, "alpha": alpha, "sigma": sigma, "last": last, "released": released}
        return self.spell(x0, **state) if move is None else move + self.spell(x0 + move, **state)

    def finish(self, latents: Tensor) -> Tensor:
        """End a trajectory with these latents (B, *S); see `Spell`."""
        return self.spell.finish(latents)

    def _compare(self, x0: Tensor, level: float) -> None:
        """Decode x0 of the images in or near a shield, and give a shield to those that are copies."""
        radius = self._protected.radii if self.spell.radius is None else self.spell.radius
        near = set(self._protected.within(x0, NEARLY * radius, nearest=1).query.tolist())
        rows = sorted((near | self._pursued.keys()) - self._far)
        if not rows:
            return
        for row, copy in zip(rows, most_similar(self._space.decode(x0[rows]), self._protected), strict=True):
            assert copy is not None  # the set has a threshold
            if copy.similarity < copy.threshold - FARTHEST:
                self._far.add(row)
            if copy.similarity < copy.threshold - BLUR * level**2:
                continue
            known = self._pursued.get(row)
            reference = self._protected.vectors([copy.row])[0].to(x0)
            reach = (x0[row] - reference).norm().item()
            if known is not None and known.row == copy.row:
                reach = max(reach, known.radius)
            self._pursued[row] = _Pursued(reference, copy.row, GROWTH * reach)
            if self._log is not None:
                self._log("copying", row=row, copy_id=copy.id, copy_similarity=copy.similarity, noise_level=level)

    def _move(self, x0: Tensor) -> Tensor | None:
        """Compute λ times the move (B, *S) of pursued rows out of their shields; None if all are outside."""
        move = None
        for row, pursued in self._pursued.items():
            away = x0[row] - pursued.reference
            distance = away.norm().item()
            if 0 < distance < pursued.radius:
                move = torch.zeros_like(x0) if move is None else move
                move[row] = self.spell.overcompensation * (pursued.radius / distance - 1) * away
        return move
