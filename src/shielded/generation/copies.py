"""Find the finished pictures that are copies of protected ones, and the radii that lead away from those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from shielded.protected import ProtectedSet, parts_of

GROWTH = 1.15  # factor of the radius around a copied picture at each restart


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
    found: list[Copied | None] = [None] * len(images)
    start = 0
    for part in parts_of(protected):
        threshold = part.copy_threshold
        if threshold is not None and images:
            similarities, rows = part.copy_rows(images)
            for i, (similarity, row) in enumerate(zip(similarities[:, 0].tolist(), rows[:, 0].tolist(), strict=True)):
                if similarity >= threshold and found[i] is None:
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
