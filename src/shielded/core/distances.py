"""Distances between rows, in float64: by matrix products to find, by subtraction to decide and to push."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 24  # elements of differences held at once: 64 MiB in float32
PRECISION = 1e-8  # squared distances that may be off by more than this share are measured again by subtraction


def at_once(device: torch.device) -> int:
    """How many float64 numbers are worked on at once: on a CPU what stays in a cache."""
    return 1 << 18 if device.type == "cpu" else CHUNK // 4


def column_blocks(x: Tensor, rows: int) -> Iterator[slice]:
    """Columns of x to work on at once in float64, together with those of `rows` rows."""
    width = max(128, min(4096, at_once(x.device) // rows))
    return (slice(start, start + width) for start in range(0, x.shape[1], width))


def squared_distances(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """‖x − z‖² of all pairs by matrix products, and a bound on how far each of them is off.

    The products cancel for small distances. In float64, and with the origin moved to the middle of x, this leaves all
    digits that matter unless a distance is a thousandth of the norms; the bound says where.

    Args:
        x: (B, D). With a single row nothing cancels.
        z: (K, D).

    Returns:
        squared distances and error bounds, (B, K) float64 each.
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
    # Sums within a block, then of the blocks, each step rounded (Higham 2002, section 3.1); twice that, to be sure.
    rounding = 2 * (widest + blocks + 8) * 2.0**-53
    error = rounding * (squared_x.sqrt() + squared_z.sqrt()).square()
    return squared_x + squared_z - 2 * product, error


def pair_distances(x: Tensor, z: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """‖x[query] − z[row]‖ in float64 by direct subtraction, a bounded piece at a time. (P,)"""
    step = max(1, CHUNK // max(1, x.shape[1]))
    parts = [
        (x[q].double() - z[k].double()).norm(dim=1)
        for q, k in zip(query.split(step), row.split(step), strict=True)
    ]  # fmt: skip
    return torch.cat(parts) if parts else x.new_zeros(0, dtype=torch.float64)


def distances_of(
    x: Tensor, z: Tensor, query: Tensor, row: Tensor, squared: Tensor, error: Tensor, radius: Tensor | None = None
) -> Tensor:
    """‖x[query] − z[row]‖ (P,) float64 from `squared_distances`, by subtraction where these say too little.

    That is next to a reference, and where only an exact distance can tell which side of the radius (P,) it is on.
    """
    squared, error = squared[query, row], error[query, row]
    unsure = error > PRECISION * squared
    if radius is not None:
        unsure |= (squared - radius.square()).abs() <= error
    distance = squared.clamp(min=0).sqrt()
    unsure = unsure.nonzero().flatten()
    distance[unsure] = pair_distances(x, z, query[unsure], row[unsure])
    return distance
