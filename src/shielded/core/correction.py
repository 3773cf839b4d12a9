"""Sparse repellency on tensors: the paper's sum, and the smallest move that leaves every shield.

Kirchhof et al., "Shielded Diffusion: Generating Novel and Diverse Images using Sparse Repellency", ICML 2025:

    Δ = Σ_k (r_k − d_k)₊ u_k,   d_k = ‖x0 − z_k‖,   u_k = (x0 − z_k)/d_k

The smallest move replaces the sum where shields overlap; `shielded.core.projection` derives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from shielded.core.directions import COINCIDENT, push_direction
from shielded.core.distances import PRECISION, block_elements, column_blocks, distances_of, squared_distances
from shielded.core.inputs import float_tensor
from shielded.core.projection import smallest_move, stays_inside, way_out
from shielded.core.references import Hits, References, TensorReferences, deepest, merge, rank_within_query, unknown
from shielded.core.rounds import FEW_REFERENCES, Gaps, KnownMoves
from shielded.core.straight import entered, go_straight

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64

Overlap = Literal["sum", "project"]

_MAX_ROUNDS = 12  # of solving for the active shields and searching again where the move led
_MAX_NEW_SHIELDS = 128  # per round and image; fewer need more rounds, each with a search, more make larger systems
_ROUNDS_OF_FEWER = 4  # until which the rounds after the first add half as many
_PROMISED = 1e-3  # share of the radius by which rounding may leave a row of `repellency` inside a shield
_MAX_ELEMENTS = 1 << 27  # elements of references in memory at once: 512 MiB in float32
_GROUP_COST = 1e7  # multiplications that take as long as the overhead of one more group of images


def sum_correction(
    x0: Float[Tensor, "b d"], references: References, hits: Hits, noise: Float[Tensor, "b d"]
) -> Float[Tensor, "b d"]:
    """Compute the paper's Δ (B, D) for the active shields.

    Args:
        x0: (B, D).
        references: where the vectors of the references are.
        hits: the active shields.
        noise: (B, D), not zero: the direction where x0 equals a reference.
    """
    delta = torch.zeros_like(x0)
    block = rank_within_query(hits) // max(1, _MAX_ELEMENTS // x0.shape[1])
    for n in range(int(block.max()) + 1 if len(hits) else 0):
        for shields in _groups(hits[block == n], x0.shape[1], pairs=False):
            group = _Group(x0, references, shields, noise)
            depth = shields.radius - shields.distance
            coincident = shields.distance <= COINCIDENT * shields.radius
            group.weight[group.image, group.column] = torch.where(coincident, 0, depth / shields.distance)
            if coincident.any():
                group.along.index_add_(0, group.image, torch.where(coincident, depth, 0))
                group.along /= group.noise_length
            group.add_move(delta)
    return delta


def project_correction(
    x0: Float[Tensor, "b d"],
    references: References,
    hits: Hits,
    noise: Float[Tensor, "b d"],
    shrink: Float[Tensor, " b"] | None = None,
) -> tuple[Float[Tensor, "b d"], Bool[Tensor, " b"]]:
    """Compute the smallest move after which no row of x0 is inside a shield.

    Up to 12 rounds add the shields that the move itself enters and those that were not among the deepest; each round
    solves for all of them from the original x0. In few dimensions, where shields can close the way of the smallest
    move, the rows that are left go straight out: along a line every shield ends, but that need not be the shortest way.

    Args:
        x0: (B, D).
        references: searched again where the move led.
        hits: the active shields of x0.
        noise: (B, D), not zero: the direction where x0 equals a reference.
        shrink: (B,) subtracted from the squared radii of each row (posterior radius).

    Returns:
        The move (B, D), and (B,) bool: rows that are still inside a shield, because x0 + move is rounded by more than
        the radius.
    """
    delta = torch.zeros_like(x0)
    inside = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
    inside[hits.query] = True
    exact = torch.zeros_like(inside)
    chosen, found, known, gaps = hits[:0], hits, KnownMoves(len(x0), x0.device), Gaps()
    for attempt in range(_MAX_ROUNDS):
        few = 0 < attempt < _ROUNDS_OF_FEWER  # most moves touch few of the shields that they enter
        fresh = deepest(unknown(found, chosen), _MAX_NEW_SHIELDS // 2 if few else _MAX_NEW_SHIELDS)
        new = torch.zeros_like(inside)
        new[fresh.query] = True
        # Rows in shields that were solved for: large multipliers amplify the rounding of matrix products.
        imprecise = inside & ~new & ~exact
        exact |= imprecise
        solved = new | imprecise
        rows = solved.nonzero().flatten()
        if not len(rows):
            break
        chosen = merge(chosen, fresh)
        for group_hits in _groups(chosen[solved[chosen.query]], x0.shape[1], pairs=True):
            group = _Group(x0, references, group_hits, noise, gaps)
            if attempt:  # new shields were measured from where the move led
                group_hits.distance = group.distances()
            for shields in _padded(group, group_hits):
                _solve(group, shields, exact[group.query[shields.image]], known)
            delta[group.query] = 0
            group.add_move(delta)
        moved = delta[rows].add_(x0[rows])
        found = entered(references, moved, None if shrink is None else shrink[rows])
        found.query = rows[found.query]
        inside[rows] = False
        inside[found.query] = True
    if inside.any():
        rows = inside.nonzero().flatten()
        ways = delta[rows], -delta[rows], noise[rows], -noise[rows]
        inside[rows] = go_straight(x0, references, rows, ways, shrink, delta)
    return delta, inside


def overcompensated(
    x0: Float[Tensor, "b d"],
    move: Float[Tensor, "b d"],
    references: References,
    strength: float,
    shrink: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, "b d"]:
    """Multiply a move out of all shields by λ, except for the rows that this leads into another shield.

    Args:
        x0: (B, D).
        move: (B, D), of `project_correction`.
        references: searched where the longer move leads.
        strength: λ, at least 1 to have an effect.
        shrink: (B,) subtracted from the squared radii of each row (posterior radius).
    """
    scaled = strength * move
    if strength > 1:
        # Going on beyond the shell cannot lead back into these shields, but it can lead into others.
        found = references.scan(x0 + scaled, shrink).hits()
        rows = found.query[found.distance < (1 - 1e-5) * found.radius].unique()
        scaled[rows] = move[rows]
    return scaled


def _groups(hits: Hits, dim: int, pairs: bool) -> Iterator[Hits]:
    """Split hits into groups of images, of the size that costs least.

    The images of a group share one matrix product over all references of the group. That is fast where they lie in the
    same shields, as blurred images do, and wasteful where they lie in different ones.

    Args:
        hits: in order of the images.
        dim: D.
        pairs: whether products between references are needed as well.

    Yields:
        The hits of one group.
    """
    if not len(hits):
        return
    image = hits.query.unique_consecutive(return_inverse=True)[1]
    count, stride = int(image[-1]) + 1, int(hits.row.max()) + 1
    cheapest, best = float("inf"), 1
    for size in (count, *(size for size in (64, 16, 4, 1) if size < count)):
        references = torch.bincount((image // size * stride + hits.row).unique() // stride)
        if size > 1 and int(references.max()) * dim > _MAX_ELEMENTS:
            continue
        cost = int((references * (2 * size + (references if pairs else 0))).sum()) * dim + _GROUP_COST * len(references)
        if cost < cheapest:
            cheapest, best = cost, size
        if cost < 16 * _GROUP_COST:
            break
    for first in range(0, count, best):
        yield hits[(image >= first) & (image < first + best)]


class _Group:
    """Images that share their matrix products, and the references z whose shields they are in.

    Their moves are Σ_k weight_k (x − z_k) + along · noise.

    Args:
        x0: (B, D).
        references: where the vectors of the references are; each is read once.
        hits: (P,) the active shields of the group.
        noise: (B, D), not zero.
        gaps: distances between references, those of earlier groups.
    """

    def __init__(self, x0: Tensor, references: References, hits: Hits, noise: Tensor, gaps: Gaps | None = None) -> None:
        self.query, self.image = hits.query.unique_consecutive(return_inverse=True)  # (n,) rows of x0; (P,)
        self.rows, self.column = hits.row.unique(return_inverse=True)  # (m,); (P,)
        self.x = x0 if len(self.query) == len(x0) else x0[self.query]  # (n, D)
        self.z = references.vectors(self.rows)  # (m, D)
        self.weight = torch.zeros(len(self.query), len(self.rows), dtype=torch.float64, device=x0.device)
        self.along = self.weight.new_zeros(len(self.query))
        self._noise, self._gaps = noise, gaps or Gaps()

    @cached_property
    def noise(self) -> Tensor:
        """The noise of the group's images, (n, D)."""
        return self._noise if len(self.query) == len(self._noise) else self._noise[self.query]

    @cached_property
    def noise_length(self) -> Tensor:
        """‖noise‖, (n,) float64."""
        return torch.linalg.vector_norm(self.noise, dim=1, dtype=torch.float64)

    @cached_property
    def noise_across(self) -> Tensor:
        """noise · (x − z_k), (n, m) float64."""
        result = torch.zeros_like(self.weight)
        for part, x, z in self._blocks(self.z):
            noise = self.noise[:, part].double()
            result += (noise * x).sum(dim=1, keepdim=True) - noise @ z.T
        return result

    @cached_property
    def between(self) -> tuple[Tensor, float]:
        """Squared distances between the references (m, m) float64, and the largest error bound among them."""
        return self._gaps.of(self.rows, self.z)

    def distances(self) -> Tensor:
        """Compute ‖x − z‖ (P,) float64 of the hits."""
        return distances_of(self.x, self.z, self.image, self.column, *squared_distances(self.x, self.z))

    def add_move(self, delta: Tensor) -> None:
        """Add the moves to delta (B, D), in float64: deep among the references large weights nearly cancel."""
        total, pushed = self.weight.sum(dim=1, keepdim=True), bool(self.along.any())
        weight, z_used = self.weight, self.z
        if len(z_used) > FEW_REFERENCES:
            used = (weight != 0).any(dim=0).nonzero().flatten()
            if len(used) < len(z_used):
                weight, z_used = weight[:, used], z_used[used]
        for part, x, z in self._blocks(z_used):
            move = total * x - weight @ z
            if pushed:
                move += self.along[:, None] * self.noise[:, part]
            delta[self.query, part] += move.to(delta.dtype)

    def _blocks(self, z: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield blocks of columns, with x and the references z there in float64 relative to the mean of x."""
        for part in column_blocks(self.x, len(self.x) + len(z)):
            x = self.x[:, part].double()
            centre = x.mean(dim=0)
            yield part, x - centre, z[:, part].double() - centre


@dataclass
class _Shields:
    """The active shields of n images of a group, padded to the same number A.

    Args:
        image: (n,) index into the group's images.
        column: (n, A) index into the group's references.
        distance: (n, A) float64, 0 where there is no direction.
        radius: (n, A) float64.
        valid: (n, A) bool, False marks padding.
        directed: (n, A) bool, valid and x0 differs from the reference; otherwise any direction leads away.
    """

    image: Tensor
    column: Tensor
    distance: Tensor
    radius: Tensor
    valid: Tensor
    directed: Tensor


def _padded(group: _Group, hits: Hits) -> Iterator[_Shields]:
    """Pad the shields of a group, in batches of bounded size of images with similar numbers of shields."""
    counts = torch.bincount(group.image)
    starts = counts.cumsum(0) - counts
    counts, order = counts.sort(stable=True)
    sizes = counts.tolist()
    first = 0
    while first < len(sizes):
        last = first + 1
        while last < len(sizes) and sizes[last] ** 2 * (last + 1 - first) <= block_elements(counts.device):
            if sizes[last] > 1 and sizes[first] == 1:  # one shield has a closed form
                break
            last += 1
        image, number = order[first:last], torch.arange(sizes[last - 1], device=counts.device)
        valid = number < counts[first:last, None]
        index = torch.where(valid, starts[image, None] + number, starts[image, None])
        distance, radius = hits.distance[index], hits.radius[index]
        directed = valid & (distance > COINCIDENT * radius)
        yield _Shields(image, group.column[index], torch.where(directed, distance, 0), radius, valid, directed)
        first = last


def _solve(group: _Group, shields: _Shields, exact: Tensor, known: KnownMoves) -> None:
    """Set the group's weights to the smallest moves out of the given shields; use what is known, and add to it."""
    image, distance, radius, directed = shields.image, shields.distance, shields.radius, shields.directed
    if distance.shape[1] == 1:  # the formula itself: a projection onto the shell
        multipliers = radius - distance
        if not directed.all():
            group.along[image] = torch.where(directed, 0, multipliers)[:, 0] / group.noise_length[image]
    else:
        radius = radius * (1 + 3e-6)  # margin for the rounding of x0 + h in float32
        gram = _normals(group, shields, exact)
        query, row = group.query[image], group.rows[shields.column]
        guess, least = known.of(query, row)
        multipliers, least = smallest_move(gram, distance, radius, shields.valid, directed, guess, least)
        known.add(query, row, multipliers > 0, least)
        stuck = stays_inside(gram, multipliers, distance, radius, shields.valid).nonzero().flatten()
        if len(stuck):
            noise = torch.where(directed, group.noise_across[image[:, None], shields.column] / distance, 0)
            multipliers[stuck], group.along[image[stuck]] = way_out(
                gram[stuck],
                multipliers[stuck],
                distance[stuck],
                radius[stuck],
                shields.valid[stuck],
                noise[stuck],
                group.noise_length[image[stuck]],
            )
    weight = torch.where(directed, multipliers / distance, 0)
    group.weight.index_put_((image[:, None], shields.column), weight, accumulate=True)  # padding adds zero


def _normals(group: _Group, shields: _Shields, exact: Tensor) -> Tensor:
    """Compute u_k·u_l (n, A, A) float64, zero for shields without a direction.

    The products follow from the distances between the references, which all images share. Next to a reference, where
    these are too imprecise, and for the `exact` (n,) images, they are computed from the offsets themselves.
    """
    column, squared = shields.column, shields.distance.square()
    scale = torch.where(shields.directed, 1 / shields.distance, 0)
    between, error = group.between
    gram = squared[:, :, None] + squared[:, None, :] - between[column[:, :, None], column[:, None, :]]
    gram *= 0.5 * scale[:, :, None] * scale[:, None, :]
    nearest = torch.where(shields.directed, squared, torch.inf).amin(dim=1)
    direct = (exact | (PRECISION * nearest < error)).nonzero().flatten()
    if len(direct):
        for rows in direct.split(max(1, block_elements(direct.device) // (128 * column.shape[1]))):
            products = torch.zeros_like(gram[rows])
            for part in column_blocks(group.x, column[rows].numel()):
                offset = group.x[shields.image[rows], None, part].double() - group.z[column[rows], part].double()
                products += offset @ offset.transpose(1, 2)
            gram[rows] = products * (scale[rows, :, None] * scale[rows, None, :])
    return gram


def repellency(
    x0: Float[Tensor, "b *s"],
    references: Float[Tensor, "k *s"],
    radius: float | Float[Tensor, " k"],
    *,
    overcompensation: float = 1.0,
    overlap: Overlap = "sum",
    noise: Float[Tensor, "b *s"] | None = None,
) -> Float[Tensor, "b *s"]:
    """Compute the correction λΔ that pushes x0 out of the shields around the references.

    Args:
        x0: (B, *S) predicted clean samples.
        references: (K, *S).
        radius: L2 distance in the space of x0; one number, or (K,).
        overcompensation: λ; 1 ends on the shell of the shield, more goes beyond it (paper: 1.6).
        overlap: "sum", the paper's formula, which need not leave shields that overlap, or "project": a move that leaves
            every shield, the smallest one where there are more dimensions than shields. With "project", a row that
            overcompensation would lead into another shield stops at the shell.
        noise: (B, *S) predicted noise, the direction of the push where x0 equals a reference; None: a fixed direction.

    Returns:
        (B, *S) of x0's dtype, exactly zero in rows outside all shields.

    Raises:
        TypeError: x0 or the references are no floating-point numbers.
        ValueError: shapes that do not fit, a radius that is not positive, NaN or infinity in x0 (as float32), the
            references or the noise, or, with "project", rows that stay inside a shield, because x0 is so large
            that float32 rounds x0 + Δ by more than the radius.

    Example:
        >>> x0, z = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
        >>> repellency(x0, z, radius=10.0)  # at distance 5, pushed by 5
        tensor([[3., 4.]])
    """
    x0, references = float_tensor(x0, "x0"), float_tensor(references, "references")
    if x0.dim() < 2 or references.shape[1:] != x0.shape[1:]:
        shapes = f"x0 (B, *S) has shape {tuple(x0.shape)} and references (K, *S) {tuple(references.shape)}"
        raise ValueError(f"{shapes}: all but the first axis must be the same.")
    radius = check_radius(radius, len(references))
    if overlap not in ("sum", "project"):
        raise ValueError(f"overlap={overlap!r} is not known; use 'sum' or 'project'.")
    flat, vectors = x0.detach().float().flatten(1), references.detach().float().to(x0.device).flatten(1)
    direction = None if noise is None else noise.float().flatten(1)
    for name, values in (("x0", flat), ("references", vectors), ("noise", direction)):
        if values is not None and not torch.isfinite(values).all():
            raise ValueError(f"{name} contains NaN or infinity, or numbers too large for float32.")
    direction = push_direction(flat, direction)
    shields = TensorReferences(vectors, radius)
    hits = shields.scan(flat).hits()
    if overlap == "sum":
        delta = overcompensation * sum_correction(flat, shields, hits, direction)
    else:
        delta, inside = project_correction(flat, shields, hits, direction)
        delta = overcompensated(flat, delta, shields, overcompensation)
        found = shields.scan(flat + delta).hits()
        inside[found.query[found.distance < (1 - _PROMISED) * found.radius]] = True
        if inside.any():
            raise ValueError(
                f"rows {inside.nonzero().flatten().tolist()} of x0 stay inside a shield: float32 rounds x0 by more "
                "than the radius; subtract the mean of the references from both."
            )
    return delta.to(x0.dtype).view_as(x0)


def check_radius(radius: float | Float[Tensor, " k"], count: int) -> float | Float64[Tensor, " k"]:
    """Return the radius as a number or (count,) float64; refuse one that is not positive and finite.

    Raises:
        ValueError: a value out of range, or neither one number nor one per reference.
    """
    values = torch.as_tensor(radius, dtype=torch.float64)
    if values.dim() and values.shape != (count,):
        raise ValueError(f"radius has shape {tuple(values.shape)}; give one number or one per reference, ({count},).")
    if not (torch.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"radius must be positive and finite, not {radius}; it is an L2 distance in the latent space.")
    return values if values.dim() else float(values)
