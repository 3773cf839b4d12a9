"""Distances between rows: matrix products with bounded errors find pairs, subtraction in float64 decides about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64

MAX_ELEMENTS = 1 << 24  # elements of differences in memory at once: 64 MiB in float32
# Components that are summed in float32 before the sum goes on in float64. A float32 inner product of n terms is off
# by at most n u / (1 - n u) |x| |z| with u = 2^-24, in whatever order it is summed (Higham, Accuracy and Stability of
# Numerical Algorithms, section 3.1).
_MAX_FLOAT32_TERMS = 512
_ROWS_PER_PRODUCT = 256  # whose sums stay in a processor's cache
_ROWS_PER_GAP = 96  # of one product between references
_MAX_PAIRS_PER_ROW = 4  # pairs of a row above which a float64 product is faster than subtraction
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
        x_part, z_part = (values[:, part].to(torch.float64, copy=True) for values in (x, z))
        origin = x_part.mean(dim=0)
        # In place: writing further arrays takes longer than the product.
        x_part.sub_(origin)
        z_part.sub_(origin)
        product.addmm_(x_part, z_part.T)
        squared_x += x_part.square().sum(dim=1, keepdim=True)
        squared_z += z_part.square_().sum(dim=1)
        widest, blocks = max(widest, x_part.shape[1]), blocks + 1
    error = _rounding(widest, blocks) * (squared_x.sqrt() + squared_z.sqrt()).square()
    return squared_x + squared_z - 2 * product, error


def _rounding(widest: int, blocks: int) -> float:
    """Bound the relative error of float64 sums of `blocks` sums of `widest` products."""
    # Each addition rounds, within a block and over the blocks (Higham 2002, section 3.1); doubled for safety.
    return 2 * (widest + blocks + 8) * 2.0**-53


def squared_gaps(z: Float[Tensor, "k d"]) -> tuple[Float64[Tensor, "k k"], float]:
    """Compute ‖z_i − z_j‖² of all pairs of rows of z (K, D), with the largest bound on their errors.

    Like `squared_distances(z, z)`, but each number is converted once, and each pair multiplied once.
    """
    product = torch.zeros(len(z), len(z), dtype=torch.float64, device=z.device)
    widest = blocks = 0
    for part in column_blocks(z, len(z)):
        values = z[:, part].double()
        values = values - values.mean(dim=0)
        for start in range(0, len(z), _ROWS_PER_GAP):
            product[start : start + _ROWS_PER_GAP, start:].addmm_(
                values[start : start + _ROWS_PER_GAP], values[start:].T
            )
        widest, blocks = max(widest, values.shape[1]), blocks + 1
    product = product.triu_() + product.triu(1).T
    squared = product.diagonal().clone()
    error = _rounding(widest, blocks) * 4 * float(squared.max())
    return (squared[:, None] + squared).sub_(product, alpha=2), error


def squared_norms(z: Float[Tensor, "k d"]) -> Float64[Tensor, " k"]:
    """Compute ‖z‖² of each row (K, D), summed in float64."""
    parts = z.split(max(1, block_elements(z.device) // max(1, z.shape[1])))
    return torch.cat([part.double().square().sum(dim=1) for part in parts])


def bounded_squares(
    x: Float[Tensor, "b d"], z: Float[Tensor, "k d"], norms: Float64[Tensor, " k"]
) -> tuple[Float64[Tensor, "b k"], Float64[Tensor, "b k"]]:
    """Compute ‖x − z‖² of all pairs as fast as the device allows, with a bound on the error of each.

    On a CPU this is a float32 product, whose error is below 1e-4 of ‖x‖² + ‖z‖²; for other dtypes and devices, and
    where torch is set to multiply float32 with fewer bits, it is `squared_distances`.

    Args:
        x: (B, D).
        z: (K, D).
        norms: ‖z‖² (K,), of `squared_norms`.

    Returns:
        Squared distances and their error bounds, (B, K) float64 each; infinite bounds where float32 overflows.
    """
    if x.device.type == "cpu" and x.dtype == z.dtype == torch.float32 and _full_float32():
        dim, scale = x.shape[1], squared_norms(x)[:, None] + norms
        product = torch.zeros(len(z), len(x), dtype=torch.float64)
        with torch.autocast("cpu", enabled=False):
            for sums, rows in zip(product.split(_ROWS_PER_PRODUCT), z.split(_ROWS_PER_PRODUCT), strict=True):
                for start in range(0, dim, _MAX_FLOAT32_TERMS):
                    terms = slice(start, start + _MAX_FLOAT32_TERMS)
                    sums += rows[:, terms] @ x[:, terms].T
        squared = scale.sub(product.T, alpha=2)
        # 2 |x| |z| <= |x|² + |z|². The further terms are the float64 sums, generously, and float32 underflow.
        relative = 1.01 * min(dim, _MAX_FLOAT32_TERMS) * 2.0**-24 + dim * 2.0**-50 + 1e-12
        error = scale.mul_(relative).add_(dim * 2.0**-125)
    else:
        squared, error = squared_distances(x, z)
    overflow = ~squared.isfinite()
    return squared.masked_fill_(overflow, 0), error.masked_fill_(overflow, torch.inf)


def _full_float32() -> bool:
    """Say whether torch multiplies float32 matrices on a CPU without rounding their entries to fewer bits."""
    matmul = getattr(getattr(torch.backends, "mkldnn", None), "matmul", None)
    precision = getattr(matmul, "fp32_precision", None)  # since torch 2.9
    if precision is None:
        return torch.get_float32_matmul_precision() == "highest"
    return precision in ("none", "ieee")


def pair_distances(
    x: Float[Tensor, "b d"], z: Float[Tensor, "k d"], query: Int64[Tensor, " p"], row: Int64[Tensor, " p"]
) -> Float64[Tensor, " p"]:
    """Compute ‖x[query] − z[row]‖ (P,) in float64 by subtraction, with bounded memory."""
    step = max(1, block_elements(x.device) // max(1, x.shape[1]))
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


def measured_distances(
    x: Float[Tensor, "b d"],
    z: Float[Tensor, "k d"],
    query: Int64[Tensor, " p"],
    row: Int64[Tensor, " p"],
    radius: Float64[Tensor, " p"],
) -> Float64[Tensor, " p"]:
    """Compute ‖x[query] − z[row]‖ (P,) float64: few pairs by subtraction, many by `squared_distances` of their rows.

    Subtraction decides wherever the product leaves open on which side of the radius (P,) a distance lies.
    """
    rows, column = row.unique(return_inverse=True)
    if len(row) <= _MAX_PAIRS_PER_ROW * len(rows):
        return pair_distances(x, z, query, row)
    queries, image = query.unique(return_inverse=True)
    x, z = x if len(queries) == len(x) else x[queries], z if len(rows) == len(z) else z[rows]
    return distances_of(x, z, image, column, *squared_distances(x, z), radius)
