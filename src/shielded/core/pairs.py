"""Corrections that keep the images of a batch apart: the paper's sum, and the smallest joint move."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shielded.core.directions import COINCIDENT, tie_break
from shielded.core.distances import MAX_ELEMENTS, pair_distances
from shielded.core.projection import separate
from shielded.core.references import Hits

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def active_pairs(
    x0: Float[Tensor, "b d"], radius: Float[Tensor, "b b"], repels: Bool[Tensor, "b b"]
) -> Bool[Tensor, "b b"]:
    """Find the pairs of rows that repel each other and lie closer than their radius.

    Args:
        x0: (B, D).
        radius: (B, B), L2.
        repels: (B, B) bool, pairs that repel each other; the diagonal does not count.

    Returns:
        (B, B) bool.
    """
    distance = torch.cdist(x0, x0, compute_mode="donot_use_mm_for_euclid_dist")
    itself = torch.eye(len(x0), dtype=torch.bool, device=x0.device)  # by index: duplicates do repel
    return repels & ~itself & (distance < radius)


def sum_pairs(
    x0: Float[Tensor, "b d"], radius: Float[Tensor, "b b"], close: Bool[Tensor, "b b"]
) -> Float[Tensor, "b d"]:
    """Compute the paper's Δ (B, D) with the other images of the batch as references.

    Args:
        x0: (B, D).
        radius: (B, B), L2.
        close: (B, B) bool, the active pairs (`active_pairs`).
    """
    query, row = torch.nonzero(close, as_tuple=True)
    distance = pair_distances(x0, x0, query, row)
    hits = Hits(query, row, distance, radius[query, row].double())
    # Equal rows also have equal noise; the difference of two fixed vectors has opposite signs for the two rows.
    fixed = tie_break(len(x0), x0.shape[1], x0.device)
    delta = torch.zeros_like(x0)
    size = max(1, MAX_ELEMENTS // x0.shape[1])
    for part in (hits[index] for index in torch.arange(len(hits), device=x0.device).split(size)):
        offset = x0[part.query] - x0[part.row]
        coincident = part.distance <= COINCIDENT * part.radius
        offset = torch.where(coincident[:, None], fixed[part.query] - fixed[part.row], offset)
        length = torch.where(coincident, offset.norm(dim=1).double(), part.distance)
        weight = ((part.radius - part.distance) / length).to(offset.dtype)
        delta.index_add_(0, part.query, weight[:, None] * offset)
    return delta


def project_pairs(
    x0: Float[Tensor, "b d"], radius: Float[Tensor, "b b"], repels: Bool[Tensor, "b b"]
) -> tuple[Float[Tensor, "b d"], Bool[Tensor, " b"]]:
    """Compute the smallest joint move after which no pair is closer than its radius; both sides of a pair share it.

    Args:
        x0: (B, D).
        radius: (B, B), L2.
        repels: (B, B) bool, pairs that repel each other.

    Returns:
        The move (B, D), and (B,) bool: rows that are still too close to another one.
    """
    close = active_pairs(x0, radius, repels)
    if not close.any():
        return torch.zeros_like(x0), close.any(dim=1)
    start = x0.double()
    near = active_pairs(x0, COINCIDENT * radius, repels).any(dim=1)
    if near.any():
        start = start + near[:, None] * 1e-4 * radius.max() * tie_break(len(x0), x0.shape[1], x0.device)
    # Coordinates in the span of the rows: B numbers per row instead of D.
    origin = start[close.any(dim=1)].mean(dim=0)
    centred = start - origin
    gram = torch.zeros(len(x0), len(x0), dtype=torch.float64, device=x0.device)
    for part in centred.split(max(1, MAX_ELEMENTS // (2 * len(x0))), dim=1):
        gram += part @ part.T
    values, basis = torch.linalg.eigh(gram)
    kept = values > 1e-14 * values[-1]
    root = values[kept].sqrt()
    points = basis[:, kept] * root
    move, unresolved = separate(points, radius.double(), repels)
    weights = (move / root) @ basis[:, kept].T
    return (start - x0 + weights @ centred).to(x0.dtype), unresolved
