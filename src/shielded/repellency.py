"""Sparse repellency: tensors in, correction out.

Kirchhof et al., "Shielded Diffusion: Generating Novel and Diverse Images using Sparse Repellency", ICML 2025:

    Δ = Σ_k (r_k − d_k)₊ u_k,   d_k = ‖x0 − z_k‖,   u_k = (x0 − z_k)/d_k

and its overlap-safe form, the smallest move that leaves every shield (`shielded.projection`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shielded.projection import escape_length, separate, smallest_move
from shielded.references import (
    CHUNK,
    Hits,
    References,
    TensorReferences,
    deepest,
    merge,
    pair_distances,
    rank_within_query,
)

Overlap = Literal["sum", "project"]

_COINCIDENT = 1e-6  # closer than this share of the radius, the direction x0 − z is rounding noise
_ROUNDS = 12
_DEEPEST = 128  # shields added to the projection per round and image; measured: 2.4 times as fast as 32


def tie_break(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Fixed unit vectors, one a row: the direction where none is defined. Same on every call and machine."""
    generator = torch.Generator().manual_seed(20250713)
    directions = torch.randn(shape, generator=generator)
    return (directions / directions.norm(dim=1, keepdim=True)).to(device)


@dataclass
class Shields:
    """The active shields of n images, padded to the same number A."""

    query: Tensor  # (n,) rows of x0
    unit: Tensor  # (n, A, D) from the references to x0; along the noise where the two coincide
    distance: Tensor  # (n, A) float64
    radius: Tensor  # (n, A) float64
    valid: Tensor  # (n, A) bool, False marks padding
    coincident: Tensor  # (n, A) bool: x0 equals the reference, any direction leads away


def gather(x0: Tensor, references: References, hits: Hits, noise: Tensor) -> Iterator[Shields]:
    """Shields of the images with hits, images with similar numbers of them together, a bounded piece at a time."""
    queries, counts = hits.query.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    counts, order = counts.sort(stable=True)
    first = 0
    sizes = counts.tolist()
    while first < len(sizes):
        last = first + 1
        while last < len(sizes) and sizes[last] * (last + 1 - first) * x0.shape[1] <= CHUNK:
            if sizes[last] > 1 and sizes[first] == 1:  # one shield has a closed form
                break
            last += 1
        own, size = order[first:last], sizes[last - 1]
        place = torch.arange(size, device=x0.device)
        valid = place < counts[first:last, None]
        index = torch.where(valid, starts[own, None] + place, starts[own, None])
        query = queries[own]
        offset = x0[query, None] - references.vectors(hits.row[index.flatten()]).view(len(query), size, -1)
        distance = torch.linalg.vector_norm(offset, dim=2, dtype=torch.float64)
        radius = hits.radius[index]
        coincident = distance <= _COINCIDENT * radius
        unit = offset / torch.where(coincident, 1, distance).to(offset.dtype)[:, :, None]
        if coincident.any():
            along = noise[query] / noise[query].norm(dim=1, keepdim=True)
            unit = torch.where(coincident[:, :, None], along[:, None], unit)
        yield Shields(query, unit, distance, radius, valid, coincident)
        first = last


def sum_correction(x0: Tensor, references: References, hits: Hits, noise: Tensor) -> Tensor:
    """The paper's Δ for the active shields. (B, D)"""
    delta = torch.zeros_like(x0)
    piece = max(1, CHUNK // x0.shape[1])
    block = rank_within_query(hits) // piece
    for n in range(int(block.max()) + 1 if len(hits) else 0):
        for shields in gather(x0, references, hits[block == n], noise):
            weight = torch.where(shields.valid, shields.radius - shields.distance, 0).to(x0.dtype)
            delta[shields.query] += torch.bmm(weight[:, None], shields.unit)[:, 0]
    return delta


def project_correction(
    x0: Tensor, references: References, hits: Hits, noise: Tensor, shrink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The smallest move after which no row of x0 is inside a shield.

    Shields that the move itself enters, and those that were not among the deepest, join in up to 12 rounds; each
    round solves for all of them from the original x0.

    Returns:
        the move (B, D), and (B,) bool: rows that still are inside a shield after the last round.
    """
    delta = torch.zeros_like(x0)
    chosen, found = hits[:0], hits
    for _ in range(_ROUNDS):
        if not len(found):
            break
        known = len(chosen)
        chosen = merge(chosen, deepest(found, _DEEPEST))
        if len(chosen) == known:  # nothing new to take into account
            break
        rows = found.query.unique()
        for shields in gather(x0, references, chosen[torch.isin(chosen.query, rows)], noise):
            delta[shields.query] = _leave(shields, noise)
        found = references.scan(x0[rows] + delta[rows], None if shrink is None else shrink[rows]).hits()
        # The solution touches its shields; rounding of x0 + h may leave it a hair inside, which is not entering.
        hair = 2e-6 * found.radius + 2e-7 * x0[rows].norm(dim=1).double()[found.query]
        found = found[found.distance < found.radius - hair]
        found.query = rows[found.query]
    inside = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
    inside[found.query] = True
    return delta, inside


def _leave(shields: Shields, noise: Tensor) -> Tensor:
    """The smallest moves (n, D) out of the given shields."""
    unit, valid = shields.unit, shields.valid
    if unit.shape[1] == 1:  # the formula itself: a projection onto the shell
        return (shields.radius - shields.distance).clamp(min=0).to(unit.dtype) * unit[:, 0]
    # Where x0 equals a reference, no half-space describes the shield: any move of length r leaves it.
    unit = torch.where(shields.coincident[:, :, None], 0, unit)
    directed = valid & ~shields.coincident
    distance = torch.where(directed, shields.distance, 0)
    radius = shields.radius * (1 + 3e-6)  # room for the rounding of x0 + h in float32
    gram = torch.zeros(*valid.shape, valid.shape[1], dtype=torch.float64, device=unit.device)
    piece = max(1, CHUNK // (2 * valid.numel()))
    for part in unit.split(piece, dim=2):
        gram += part.double() @ part.double().transpose(1, 2)
    gram *= directed[:, :, None] & directed[:, None, :]
    multipliers = smallest_move(gram, distance, radius, valid, directed)
    # In float64: deep among the references large multipliers nearly cancel.
    move = torch.cat([torch.bmm(multipliers[:, None], part.double())[:, 0] for part in unit.split(piece, dim=2)], dim=1)
    along = (gram @ multipliers.unsqueeze(-1)).squeeze(-1)
    energy = (multipliers * along).sum(dim=1, keepdim=True)
    deficit = radius.square() - (distance.square() + 2 * distance * along + energy)
    # In few dimensions the half-spaces may meet far away; walking straight out takes at most two radii.
    far = energy.squeeze(1) > (2 * radius.amax(dim=1)).square()
    stuck = far | (valid & (deficit > 1e-9 * radius.square())).any(dim=1)
    for n in stuck.nonzero().flatten().tolist():
        own = valid[n]
        geometry = unit[n, own].double(), gram[n][own][:, own], distance[n, own], noise[shields.query[n]].double()
        around = move[n] + _way_out(*geometry, deficit[n, own], move[n])
        straight = _way_out(*geometry, (radius.square() - distance.square())[n, own], torch.zeros_like(move[n]))
        move[n] = around if around.norm() <= straight.norm() else straight
    return move.to(unit.dtype)


def _way_out(unit: Tensor, gram: Tensor, distance: Tensor, noise: Tensor, deficit: Tensor, move: Tensor) -> Tensor:
    """A step at a right angle to all normals, along what is left of the predicted noise, until all shields are left."""
    ridge = 1e-9 * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    direction = noise - torch.linalg.solve(gram + ridge, unit @ noise) @ unit
    if direction.norm() < 1e-3 * noise.norm():  # as many shields as dimensions: any direction leads out in the end
        direction = noise
    direction = direction / direction.norm()
    return escape_length(distance * (unit @ direction) + move @ direction, deficit) * direction


# The other images of the batch --------------------------------------------------------------------------------------


def active_pairs(x0: Tensor, radius: Tensor, together: Tensor) -> Tensor:
    """(B, B) bool: pairs of different rows that repel each other and lie closer than radius (B, B)."""
    distance = torch.cdist(x0, x0, compute_mode="donot_use_mm_for_euclid_dist")
    itself = torch.eye(len(x0), dtype=torch.bool, device=x0.device)  # by index: duplicates do repel each other
    return together & ~itself & (distance < radius)


def sum_pairs(x0: Tensor, radius: Tensor, close: Tensor) -> Tensor:
    """The paper's Δ with the other images of the batch as references, for the pairs in `close`. (B, D)"""
    query, row = torch.nonzero(close, as_tuple=True)
    distance = pair_distances(x0, x0, query, row)
    hits = Hits(query, row, distance, radius[query, row].double())
    # Two equal rows have equal noise too; a difference of fixed vectors is opposite for the two.
    fixed = tie_break(tuple(x0.shape), x0.device)
    delta = torch.zeros_like(x0)
    piece = max(1, CHUNK // x0.shape[1])
    for part in (hits[index] for index in torch.arange(len(hits), device=x0.device).split(piece)):
        offset = x0[part.query] - x0[part.row]
        coincident = part.distance <= _COINCIDENT * part.radius
        offset = torch.where(coincident[:, None], fixed[part.query] - fixed[part.row], offset)
        length = torch.where(coincident, offset.norm(dim=1).double(), part.distance)
        weight = ((part.radius - part.distance) / length).to(offset.dtype)
        delta.index_add_(0, part.query, weight[:, None] * offset)
    return delta


def project_pairs(x0: Tensor, radius: Tensor, together: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest joint move after which no pair is closer than radius (B, B); both sides share it.

    Returns:
        the move (B, D), and (B,) bool: rows that still are too close to another.
    """
    close = active_pairs(x0, radius, together)
    if not close.any():
        return torch.zeros_like(x0), close.any(dim=1)
    start = x0.double()
    near = active_pairs(x0, _COINCIDENT * radius, together).any(dim=1)
    if near.any():
        start = start + near[:, None] * 1e-4 * radius.max() * tie_break(tuple(x0.shape), x0.device)
    # Coordinates in the space that the rows span: B numbers for each instead of D.
    origin = start[close.any(dim=1)].mean(dim=0)
    centred = start - origin
    gram = torch.zeros(len(x0), len(x0), dtype=torch.float64, device=x0.device)
    for part in centred.split(max(1, CHUNK // (2 * len(x0))), dim=1):
        gram += part @ part.T
    values, basis = torch.linalg.eigh(gram)
    kept = values > 1e-14 * values[-1]
    root = values[kept].sqrt()
    points = basis[:, kept] * root
    move, unresolved = separate(points, radius.double(), together)
    weights = (move / root) @ basis[:, kept].T
    return (start - x0 + weights @ centred).to(x0.dtype), unresolved


def repellency(
    x0: Tensor,
    references: Tensor,
    radius: float | Tensor,
    *,
    overcompensation: float = 1.0,
    overlap: Overlap = "sum",
    noise: Tensor | None = None,
) -> Tensor:
    """The correction λΔ that pushes x0 out of the shields around the references.

    Args:
        x0: (B, *S) predicted clean samples.
        references: (K, *S).
        radius: L2 distance in the space of x0; one number, or (K,).
        overcompensation: λ; 1 lands on the shell, more leaves earlier (paper: 1.6).
        overlap: "sum", the paper's formula, or "project", the smallest move that leaves every shield.
        noise: (B, *S) predicted noise, the direction of the push where x0 equals a reference. Without it a fixed one.

    Returns:
        (B, *S), of x0's dtype. Exactly zero in rows outside all shields.

    Raises:
        ValueError: shapes that do not fit, a radius that is not positive, or x0 with NaN or infinity.
    """
    if x0.dim() < 2 or references.shape[1:] != x0.shape[1:]:
        raise ValueError(
            f"x0 (B, *S) has shape {tuple(x0.shape)} and references (K, *S) {tuple(references.shape)}: "
            "all but the first axis must be the same."
        )
    radius = check_radius(radius, len(references))
    if overlap not in ("sum", "project"):
        raise ValueError(f"overlap={overlap!r} is not known; use 'sum' or 'project'.")
    if not torch.isfinite(x0).all():
        raise ValueError("x0 contains NaN or infinity.")
    flat = x0.detach().float().flatten(1)
    direction = (
        tie_break((1, flat.shape[1]), flat.device).expand_as(flat) if noise is None else noise.float().flatten(1)
    )
    shields = TensorReferences(references.detach().to(flat.device).flatten(1), radius)
    hits = shields.scan(flat).hits()
    if overlap == "sum":
        delta = sum_correction(flat, shields, hits, direction)
    else:
        delta, _ = project_correction(flat, shields, hits, direction)
    return (overcompensation * delta).to(x0.dtype).view_as(x0)


def check_radius(radius: float | Tensor, count: int) -> float | Tensor:
    """Refuse a radius that is no positive number, or not one per reference."""
    values = torch.as_tensor(radius, dtype=torch.float64)
    if values.dim() and values.shape != (count,):
        raise ValueError(f"radius has shape {tuple(values.shape)}; give one number or one per reference, ({count},).")
    if not (torch.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"radius must be positive and finite, not {radius}; it is an L2 distance in the latent space.")
    return values if values.dim() else float(values)
