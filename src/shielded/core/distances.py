"""Distances between rows in float64: matrix products find pairs, subtraction decides about them and pushes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64

MAX_ELEMENTS = 1 << 24  # elements of differences in memory at once: 64 MiB in float32
PRECISION = 1e-8  # relative error bound above which a squared distance is measured again by subtraction


def block_elements(device: torch.device) -> int:
    """Return how many float64 elements to process at a time; on a CPU, what fits into its cache."""
    return 1 << 18 if device.type == "cpu" else MAX_ELEMENTS // 4


def column_blocks(x: Float[Tensor, "b d"], rows: int) -> Iterator[slice]:
    """Split the columns of x (B, D) into blocks whose float64 copies of `rows` rows fit `block_elements`."""
    width = max(128, min(4096, block_elements(x.device) // rows))
    return (slice(start, start + width) for start in range(0, x.shape[1], width))


def squared_distances(
    x: Float[Tensor, "b d"], z: Float[Tensor, "k d"]
) -> tuple[Float64[Tensor, "b k"], Float64[Tensor, "b k"]]:
    """Compute ‖x − z‖² of all pairs by matrix products, with a bound on the error of each.

    The products cancel for small distances. In float64, with the origin moved to the mean of x, enough digits remain
    unless a distance is below a thousandth of the norms; the bound tells where.

    Args:
        x: (B, D); with a single row nothing cancels.
        z: (K, D).

    Returns:
        Squared distances and their error bounds, (B, K) float64 each.
    """
    product = torch.zeros(len(x), len(z), dtype=torch.float64, device=x.device)
    squared_x = torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)
    squared_z = torch.zeros(len(z), dtype=torch.float64, device=x.device)
    widest = blocks = 0
    for part in column_blocks(x, len(x) + len(z)):
        x_part, z_part = x[:, part].double(), z[:, part].double()
        origin = x_part.mean(dim=0)
        x_part, z_part = x_part - origin, z_part - origin
        product.addmm_(x_part, z_part.T)
        squared_x += x_part.square().sum(dim=1, keepdim=True)
        squared_z += z_part.square().sum(dim=1)
        widest, blocks = max(widest, x_part.shape[1]), blocks + 1
    # Each addition rounds, within a block and over the blocks (Higham 2002, section 3.1); doubled for safety.
    rounding = 2 * (widest + blocks + 8) * 2.0**-53
    error = rounding * (squared_x.sqrt() + squared_z.sqrt()).square()
    return squared_x + squared_z - 2 * product, error


def pair_distances(
    x: Float[Tensor, "b d"], z: Float[Tensor, "k d"], query: Int64[Tensor, " p"], row: Int64[Tensor, " p"]
) -> Float64[Tensor, " p"]:
    """Compute ‖x[query] − z[row]‖ (P,) in float64 by subtraction, with bounded memory."""
    step = max(1, MAX_ELEMENTS // max(1, x.shape[1]))
    parts = [
        (x[q].double() - z[k].double()).norm(dim=1)
        for q, k in zip(query.split(step), row.split(step), strict=True)
    ]  # fmt: skip
    return torch.cat(parts) if parts else x.new_zeros(0, dtype=torch.float64)


def distances_of(
    x: Float[Tensor, "b d"],
    z: Float[Tensor, "k d"],
    query: Int64[Tensor, " p"],
    row: Int64[Tensor, " p"],
    squared: Float64[Tensor, "b k"],
    error: Float64[Tensor, "b k"],
    radius: Float64[Tensor, " p"] | None = None,
) -> Float64[Tensor, " p"]:
    """Compute ‖x[query] − z[row]‖ (P,) float64 from `squared_distances`, by subtraction where their error is too large.

    It is too large next to a reference, and where it hides on which side of the radius (P,) the distance lies.
    """
    squared, error = squared[query, row], error[query, row]
    uncertain = error > PRECISION * squared
    if radius is not None:
        uncertain |= (squared - radius.square()).abs() <= error
    distance = squared.clamp(min=0).sqrt()
    uncertain = uncertain.nonzero().flatten()
    distance[uncertain] = pair_distances(x, z, query[uncertain], row[uncertain])
    return distance
