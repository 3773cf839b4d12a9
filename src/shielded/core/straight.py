"""A straight way out of all shields, for rows that the smallest move leaves inside one.

In few dimensions shields can close the way of the smallest move. A line leaves each ball for good, so walking along it
from the end of one shield to the end of the next gets outside, though not by the shortest way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shielded.core.references import Hits, References, deepest

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

_MAX_SHIELDS = 128  # per row and stride, the deepest ones
_MAX_STRIDES = 64  # of a way, each with a search
_EXACT_STRIDES = 32  # of them that end where the shields end; later ones grow, so that the way ends at all


def entered(references: References, moved: Float[Tensor, "n d"], shrink: Float[Tensor, " n"] | None) -> Hits:
    """Find the shields that rows (n, D) are inside by more than the rounding of x0 + h explains."""
    found = references.scan(moved, shrink).hits()
    tolerance = 2e-6 * found.radius + 2e-7 * moved.double().norm(dim=1)[found.query]
    return found[found.distance < found.radius - tolerance]


def go_straight(
    x0: Float[Tensor, "b d"],
    references: References,
    rows: Int64[Tensor, " n"],
    ways: tuple[Float[Tensor, "n d"], ...],
    shrink: Float[Tensor, " b"] | None,
    delta: Float[Tensor, "b d"],
) -> Bool[Tensor, " n"]:
    """Lead rows straight out of all shields, the shortest of several ways, and write these moves into delta (B, D).

    A line leaves each ball for good, so walking from the end of one shield to the end of the next one gets outside.

    Args:
        x0: (B, D).
        references: searched after each stride.
        rows: (n,) batch rows.
        ways: directions (n, D) to try.
        shrink: (B,) subtracted from squared radii.
        delta: (B, D).

    Returns:
        (n,) bool: rows for which no way ended outside; their moves are kept.
    """
    start, count = x0[rows].repeat(len(ways), 1), len(rows)  # way by way
    unit = torch.cat(ways).double()
    length = unit.norm(dim=1, keepdim=True)
    unit /= torch.where(length > 0, length, 1)
    shrink = None if shrink is None else shrink[rows].repeat(len(ways))
    far = torch.zeros(len(start), dtype=torch.float64, device=x0.device)
    open_rows = (length[:, 0] > 0).nonzero().flatten()
    far[length[:, 0] == 0] = torch.inf
    for stride in range(_MAX_STRIDES):
        moved = (start[open_rows].double() + far[open_rows, None] * unit[open_rows]).to(x0.dtype)
        found = deepest(entered(references, moved, None if shrink is None else shrink[open_rows]), _MAX_SHIELDS)
        ends = torch.zeros_like(far[open_rows])
        for part in (found[index] for index in torch.arange(len(found), device=x0.device).split(_MAX_SHIELDS)):
            at = open_rows[part.query]
            offset = start[at].double() - references.vectors(part.row).double()
            along = (offset * unit[at]).sum(dim=1)
            # The tolerance of `entered` is far below this margin.
            end = (along.square() + (part.radius * (1 + 1e-5)).square() - offset.square().sum(dim=1)).clamp(min=0)
            ends.scatter_reduce_(0, part.query, end.sqrt() - along, "amax")
        inside = torch.zeros_like(open_rows, dtype=torch.bool)
        inside[found.query] = True
        open_rows, ends = open_rows[inside], ends[inside]
        if not len(open_rows):
            break
        growth = 1.0 if stride < _EXACT_STRIDES else 1.25
        far[open_rows] = torch.maximum(ends, far[open_rows] * (1 + 1e-6)) * growth
    far[open_rows] = torch.inf
    shortest, way = far.view(len(ways), count).min(dim=0)
    out = shortest.isfinite()
    chosen = way[out] * count + torch.arange(count, device=x0.device)[out]
    delta[rows[out]] = (far[chosen, None] * unit[chosen]).to(delta.dtype)
    return ~out
