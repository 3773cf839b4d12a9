"""Sparse repellency: tensors in, correction out.

Kirchhof et al., "Shielded Diffusion: Generating Novel and Diverse Images using Sparse Repellency", ICML 2025:

    Δ = Σ_k (r_k − d_k)₊ u_k,   d_k = ‖x0 − z_k‖,   u_k = (x0 − z_k)/d_k

and its overlap-safe form, the smallest move that leaves every shield (`shielded.projection`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shielded.projection import escape_length, separate, smallest_move
from shielded.references import CHUNK, Hits, References, TensorReferences, pair_distances

Overlap = Literal["sum", "project"]

_COINCIDENT = 1e-6  # closer than this share of the radius, the direction x0 − z is rounding noise
_ROUNDS = 12
_DEEPEST = 64  # shields added to the projection per round and image


def tie_break(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Fixed unit vectors, one a row: the direction where none is defined. Same on every call and machine."""
    generator = torch.Generator().manual_seed(20250713)
    directions = torch.randn(shape, generator=generator)
    return (directions / directions.norm(dim=1, keepdim=True)).to(device)


def away(x: Tensor, z: Tensor, distance: Tensor, radius: Tensor, noise: Tensor) -> Tensor:
    """Unit vectors (A, D) from references z (A, D) to one image x (D,); along `noise` where the two coincide."""
    offset = x - z
    length = distance.to(offset.dtype)
    coincident = distance <= _COINCIDENT * radius
    unit = offset / torch.where(coincident, 1, length)[:, None]
    return torch.where(coincident[:, None], noise / noise.norm(), unit)


def sum_correction(x0: Tensor, references: References, hits: Hits, noise: Tensor) -> Tensor:
    """The paper's Δ (its equation for the repellency term) for the active shields. (B, D)"""
    delta = torch.zeros_like(x0)
    for i, own in _by_query(hits):
        for part in _pieces(own, x0.shape[1]):
            unit = away(x0[i], references.vectors(part.row), part.distance, part.radius, noise[i])
            delta[i] += (part.radius - part.distance).to(unit.dtype) @ unit
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
    chosen: dict[int, Hits] = {}
    pending = {i: own for i, own in _by_query(hits)}
    for _ in range(_ROUNDS):
        if not pending:
            break
        for i, own in pending.items():
            depth = own.radius - own.distance
            new = own[depth.topk(min(_DEEPEST, len(own))).indices.sort().values]
            chosen[i] = _merge(chosen[i], new) if i in chosen else new
        rows = list(pending)
        _solve(x0, references, {i: chosen[i] for i in rows}, noise, delta)
        index = torch.tensor(rows, device=x0.device)
        found = references.active(x0[index] + delta[index], None if shrink is None else shrink[index])
        # The solution touches its shields; rounding of x0 + h may leave it a hair inside, which is not entering.
        hair = 2e-6 * found.radius + 2e-7 * x0[index].norm(dim=1).double()[found.query]
        found = found[found.distance < found.radius - hair]
        pending = {rows[j]: own for j, own in _by_query(found)}
    inside = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
    inside[list(pending)] = True
    return delta, inside


def _solve(x0: Tensor, references: References, chosen: dict[int, Hits], noise: Tensor, delta: Tensor) -> None:
    """Write the smallest move out of the chosen shields into delta's rows."""
    single = [i for i, own in chosen.items() if len(own) == 1]
    several = [i for i, own in chosen.items() if len(own) > 1]
    for i in single:  # the formula itself, exact: a projection onto the shell
        own = chosen[i]
        distance = _distance_now(x0[i], references, own)
        unit = away(x0[i], references.vectors(own.row), distance, own.radius, noise[i])
        delta[i] = (own.radius - distance).to(unit.dtype).clamp(min=0) @ unit
    if not several:
        return
    size = max(len(chosen[i]) for i in several)
    kind = {"dtype": torch.float64, "device": x0.device}
    gram, valid = torch.zeros(len(several), size, size, **kind), torch.zeros(len(several), size, **kind).bool()
    distance, radius = torch.ones(len(several), size, **kind), torch.ones(len(several), size, **kind)
    for n, i in enumerate(several):
        own, count = chosen[i], len(chosen[i])
        d = _distance_now(x0[i], references, own)
        unit = away(x0[i], references.vectors(own.row), d, own.radius, noise[i])
        for part in unit.split(max(1, CHUNK // (2 * count)), dim=1):
            gram[n, :count, :count] += part.double() @ part.double().T
        distance[n, :count] = torch.maximum(d, _COINCIDENT * own.radius)
        radius[n, :count] = own.radius * (1 + 1e-6)
        valid[n, :count] = True
    multipliers = smallest_move(gram, distance, radius, valid)
    along = (gram @ multipliers.unsqueeze(-1)).squeeze(-1)
    energy = (multipliers * along).sum(dim=1, keepdim=True)
    deficit = radius.square() - (distance.square() + 2 * distance * along + energy)
    # In few dimensions the half-spaces may meet far away; walking straight out takes at most two radii.
    far = energy.squeeze(1) > (2 * radius.amax(dim=1)).square()
    stuck = (far | (valid & (deficit > 1e-9 * radius.square())).any(dim=1)).tolist()
    for n, i in enumerate(several):
        own, count = chosen[i], len(chosen[i])
        unit = away(x0[i], references.vectors(own.row), distance[n, :count], own.radius, noise[i])
        move = multipliers[n, :count].to(unit.dtype) @ unit
        if stuck[n]:
            own_gram, depth = gram[n, :count, :count], radius[n, :count].square() - distance[n, :count].square()
            around = move + _way_out(unit, own_gram, distance[n, :count], deficit[n, :count], move, noise[i])
            straight = _way_out(unit, own_gram, distance[n, :count], depth, torch.zeros_like(move), noise[i])
            move = around if around.norm() <= straight.norm() else straight
        delta[i] = move


def _way_out(unit: Tensor, gram: Tensor, distance: Tensor, deficit: Tensor, move: Tensor, noise: Tensor) -> Tensor:
    """A step at a right angle to all normals, along what is left of the predicted noise, until all shields are left."""
    ridge = 1e-9 * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    share = torch.linalg.solve(gram + ridge, (unit @ noise).double())
    direction = noise - share.to(unit.dtype) @ unit
    if direction.norm() < 1e-3 * noise.norm():  # as many shields as dimensions: any direction leads out in the end
        direction = noise
    direction = direction / direction.norm()
    along = distance * (unit @ direction).double() + (move @ direction).double()
    return escape_length(along, deficit).to(unit.dtype) * direction


def _distance_now(x: Tensor, references: References, own: Hits) -> Tensor:
    """Distances from x0 itself: a hit found in a later round was measured from x0 + h."""
    zero = torch.zeros(len(own), dtype=torch.int64, device=x.device)
    return pair_distances(x[None], references.vectors(own.row), zero, torch.arange(len(own), device=x.device))


def _merge(old: Hits, new: Hits) -> Hits:
    fresh = new[~torch.isin(new.row, old.row)]
    return Hits(
        *(torch.cat([getattr(old, name), getattr(fresh, name)]) for name in ("query", "row", "distance", "radius"))
    )


def _by_query(hits: Hits) -> list[tuple[int, Hits]]:
    if not len(hits):
        return []
    queries, counts = hits.query.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [
        (q, hits[torch.arange(a, b, device=hits.query.device)])
        for q, a, b in zip(queries.tolist(), starts, ends, strict=True)
    ]


def _pieces(own: Hits, dim: int) -> list[Hits]:
    index = torch.arange(len(own), device=own.row.device)
    return [own[part] for part in index.split(max(1, CHUNK // dim))]


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
    for i, own in _by_query(hits):
        offset = x0[i] - x0[own.row]
        coincident = (own.distance <= _COINCIDENT * own.radius)[:, None]
        offset = torch.where(coincident, fixed[i] - fixed[own.row], offset)
        length = torch.where(coincident[:, 0], offset.norm(dim=1).double(), own.distance)
        delta[i] = ((own.radius - own.distance) / length).to(offset.dtype) @ offset
    return delta


def project_pairs(x0: Tensor, radius: Tensor, together: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest joint move after which no pair is closer than radius (B, B); both sides share it.

    Returns:
        the move (B, D), and (B,) bool: rows that still are too close to another.
    """
    close = active_pairs(x0, radius, together)
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
    hits = shields.active(flat)
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
