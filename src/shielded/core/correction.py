"""Sparse repellency: tensors in, correction out.

Kirchhof et al., "Shielded Diffusion: Generating Novel and Diverse Images using Sparse Repellency", ICML 2025:

    Δ = Σ_k (r_k − d_k)₊ u_k,   d_k = ‖x0 − z_k‖,   u_k = (x0 − z_k)/d_k

and its overlap-safe form, the smallest move that leaves every shield (`shielded.core.projection`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from shielded.core.directions import COINCIDENT, push_direction
from shielded.core.distances import PRECISION, at_once, column_blocks, distances_of, squared_distances
from shielded.core.projection import smallest_move, stays_inside, way_out
from shielded.core.references import Hits, References, TensorReferences, deepest, merge, rank_within_query, unknown

Overlap = Literal["sum", "project"]

_ROUNDS = 12
_DEEPEST = 128  # shields added per round and image; fewer make more rounds, each with a search, more larger systems
_HELD = 1 << 27  # elements of references that are held at once: 512 MiB in float32
_GROUP = 1e7  # products of numbers that take as long as handling one more group of images


def sum_correction(x0: Tensor, references: References, hits: Hits, noise: Tensor) -> Tensor:
    """The paper's Δ for the active shields. (B, D)"""
    delta = torch.zeros_like(x0)
    block = rank_within_query(hits) // max(1, _HELD // x0.shape[1])
    for n in range(int(block.max()) + 1 if len(hits) else 0):
        for own in _together(hits[block == n], x0.shape[1], pairs=False):
            group = _Group(x0, references, own, noise)
            depth = own.radius - own.distance
            coincident = own.distance <= COINCIDENT * own.radius
            group.weight[group.image, group.place] = torch.where(coincident, 0, depth / own.distance)
            if coincident.any():
                group.along.index_add_(0, group.image, torch.where(coincident, depth, 0))
                group.along /= group.noise_length
            group.add_move(delta)
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
    inside = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
    inside[hits.query] = True
    exact = torch.zeros_like(inside)
    chosen, found = hits[:0], hits
    for attempt in range(_ROUNDS):
        fresh = deepest(unknown(found, chosen), _DEEPEST)
        entered = torch.zeros_like(inside)
        entered[fresh.query] = True
        # Still in shields that were solved for: large multipliers have made the rounding of matrix products count.
        again = inside & ~entered & ~exact
        exact |= again
        solved = entered | again
        rows = solved.nonzero().flatten()
        if not len(rows):
            break
        chosen = merge(chosen, fresh)
        for own in _together(chosen[solved[chosen.query]], x0.shape[1], pairs=True):
            group = _Group(x0, references, own, noise)
            if attempt:  # new shields were measured from where the move led
                own.distance = group.distances()
            for shields in _padded(group, own):
                _leave(group, shields, exact[group.query[shields.own]])
            delta[group.query] = 0
            group.add_move(delta)
        moved = delta[rows].add_(x0[rows])
        found = references.scan(moved, None if shrink is None else shrink[rows]).hits()
        # The solution touches its shields; rounding of x0 + h may leave it a hair inside, which is not entering.
        hair = 2e-6 * found.radius + 2e-7 * moved.norm(dim=1).double()[found.query]
        found = found[found.distance < found.radius - hair]
        found.query = rows[found.query]
        inside[rows] = False
        inside[found.query] = True
    return delta, inside


def _together(hits: Hits, dim: int, pairs: bool) -> Iterator[Hits]:
    """The hits of as many images at a time as is cheapest.

    The images of a group share one matrix product over all references of the group. That is fast where they are in the
    same shields, as blurred images are, and wasteful where each has shields of its own.

    Args:
        hits: in order of the images.
        dim: D.
        pairs: whether products between references are needed as well.
    """
    if not len(hits):
        return
    image = hits.query.unique_consecutive(return_inverse=True)[1]
    count, stride = int(image[-1]) + 1, int(hits.row.max()) + 1
    cheapest, best = float("inf"), 1
    for size in (count, *(size for size in (64, 16, 4, 1) if size < count)):
        references = torch.bincount((image // size * stride + hits.row).unique() // stride)
        if size > 1 and int(references.max()) * dim > _HELD:
            continue
        cost = int((references * (2 * size + (references if pairs else 0))).sum()) * dim + _GROUP * len(references)
        if cost < cheapest:
            cheapest, best = cost, size
        if cost < 16 * _GROUP:
            break
    for first in range(0, count, best):
        yield hits[(image >= first) & (image < first + best)]


class _Group:
    """Images that are solved together, and the references z whose shields they are in.

    Their moves are Σ_k weight_k (x − z_k) + along · noise.

    Args:
        x0: (B, D).
        references: where to find the vectors of the references; each is asked for once.
        hits: (P,) the active shields of some of the images.
        noise: (B, D), not zero.
    """

    def __init__(self, x0: Tensor, references: References, hits: Hits, noise: Tensor) -> None:
        self.query, self.image = hits.query.unique_consecutive(return_inverse=True)  # (n,) rows of x0; (P,)
        rows, self.place = hits.row.unique(return_inverse=True)  # (m,); (P,)
        self.x = x0 if len(self.query) == len(x0) else x0[self.query]  # (n, D)
        self.z = references.vectors(rows)  # (m, D)
        self.weight = torch.zeros(len(self.query), len(rows), dtype=torch.float64, device=x0.device)
        self.along = self.weight.new_zeros(len(self.query))
        self._noise = noise

    @cached_property
    def noise(self) -> Tensor:
        """(n, D)"""
        return self._noise if len(self.query) == len(self._noise) else self._noise[self.query]

    @cached_property
    def noise_length(self) -> Tensor:
        """(n,) float64"""
        return torch.linalg.vector_norm(self.noise, dim=1, dtype=torch.float64)

    @cached_property
    def noise_across(self) -> Tensor:
        """noise · (x − z_k), (n, m) float64."""
        result = torch.zeros_like(self.weight)
        for part, x, z in self._blocks():
            noise = self.noise[:, part].double()
            result += (noise * x).sum(dim=1, keepdim=True) - noise @ z.T
        return result

    @cached_property
    def between(self) -> tuple[Tensor, float]:
        """Squared distances between the references (m, m) float64, and how far they may be off."""
        squared, error = squared_distances(self.z, self.z)
        return squared, float(error.max())

    def distances(self) -> Tensor:
        """‖x − z‖ of the hits, (P,) float64."""
        return distances_of(self.x, self.z, self.image, self.place, *squared_distances(self.x, self.z))

    def add_move(self, delta: Tensor) -> None:
        """Add the moves to delta (B, D). In float64: deep among the references large weights nearly cancel."""
        total, pushed = self.weight.sum(dim=1, keepdim=True), bool(self.along.any())
        for part, x, z in self._blocks():
            move = total * x - self.weight @ z
            if pushed:
                move += self.along[:, None] * self.noise[:, part]
            delta[self.query, part] += move.to(delta.dtype)

    def _blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Columns, and x and z there in float64 with the origin in the middle of x."""
        for part in column_blocks(self.x, len(self.x) + len(self.z)):
            x = self.x[:, part].double()
            centre = x.mean(dim=0)
            yield part, x - centre, self.z[:, part].double() - centre


@dataclass
class _Shields:
    """The active shields of n images of a group, padded to the same number A."""

    own: Tensor  # (n,) which of the group's images
    place: Tensor  # (n, A) which of its references
    distance: Tensor  # (n, A) float64; 0 where there is no direction
    radius: Tensor  # (n, A) float64
    valid: Tensor  # (n, A) bool, False marks padding
    directed: Tensor  # (n, A) bool: valid, and x0 does not equal the reference, from which any direction leads away


def _padded(group: _Group, hits: Hits) -> Iterator[_Shields]:
    """The shields of a group, images with similar numbers of them together, a bounded piece at a time."""
    counts = torch.bincount(group.image)
    starts = counts.cumsum(0) - counts
    counts, order = counts.sort(stable=True)
    sizes = counts.tolist()
    first = 0
    while first < len(sizes):
        last = first + 1
        while last < len(sizes) and sizes[last] ** 2 * (last + 1 - first) <= at_once(counts.device):
            if sizes[last] > 1 and sizes[first] == 1:  # one shield has a closed form
                break
            last += 1
        own, number = order[first:last], torch.arange(sizes[last - 1], device=counts.device)
        valid = number < counts[first:last, None]
        index = torch.where(valid, starts[own, None] + number, starts[own, None])
        distance, radius = hits.distance[index], hits.radius[index]
        directed = valid & (distance > COINCIDENT * radius)
        yield _Shields(own, group.place[index], torch.where(directed, distance, 0), radius, valid, directed)
        first = last


def _leave(group: _Group, shields: _Shields, exact: Tensor) -> None:
    """Set the group's weights to the smallest moves out of the given shields."""
    own, distance, radius, directed = shields.own, shields.distance, shields.radius, shields.directed
    if distance.shape[1] == 1:  # the formula itself: a projection onto the shell
        multipliers = radius - distance
        if not directed.all():
            group.along[own] = torch.where(directed, 0, multipliers)[:, 0] / group.noise_length[own]
    else:
        radius = radius * (1 + 3e-6)  # room for the rounding of x0 + h in float32
        gram = _normals(group, shields, exact)
        multipliers = smallest_move(gram, distance, radius, shields.valid, directed)
        stuck = stays_inside(gram, multipliers, distance, radius, shields.valid).nonzero().flatten()
        if len(stuck):
            noise = torch.where(directed, group.noise_across[own[:, None], shields.place] / distance, 0)
            multipliers[stuck], group.along[own[stuck]] = way_out(
                gram[stuck],
                multipliers[stuck],
                distance[stuck],
                radius[stuck],
                shields.valid[stuck],
                noise[stuck],
                group.noise_length[own[stuck]],
            )
    weight = torch.where(directed, multipliers / distance, 0)
    group.weight.index_put_((own[:, None], shields.place), weight, accumulate=True)  # padding adds zero


def _normals(group: _Group, shields: _Shields, exact: Tensor) -> Tensor:
    """u_k·u_l (n, A, A) float64; zero for shields without a direction.

    The products follow from the distances between the references, which all images share. Next to a reference, where
    these say too little, and for the `exact` (n,) images, they are those of the offsets themselves.
    """
    place, squared = shields.place, shields.distance.square()
    scale = torch.where(shields.directed, 1 / shields.distance, 0)
    between, error = group.between
    gram = squared[:, :, None] + squared[:, None, :] - between[place[:, :, None], place[:, None, :]]
    gram *= 0.5 * scale[:, :, None] * scale[:, None, :]
    nearest = torch.where(shields.directed, squared, torch.inf).amin(dim=1)
    direct = (exact | (PRECISION * nearest < error)).nonzero().flatten()
    if len(direct):
        for rows in direct.split(max(1, at_once(direct.device) // (128 * place.shape[1]))):
            products = torch.zeros_like(gram[rows])
            for part in column_blocks(group.x, place[rows].numel()):
                offset = group.x[shields.own[rows], None, part].double() - group.z[place[rows], part].double()
                products += offset @ offset.transpose(1, 2)
            gram[rows] = products * (scale[rows, :, None] * scale[rows, None, :])
    return gram


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
    direction = push_direction(flat, None if noise is None else noise.float().flatten(1))
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
