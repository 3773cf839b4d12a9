"""Exact search in a copy of the set on a GPU: one matrix product rules rows out, the rest is measured.

The product reads each reference once, in the type in which it is stored, and that is what a search costs. The lower
bounds are squared distances less the largest possible error of the product.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from shielded.protected.search.interface import (
    Pairs,
    SearchableVectors,
    joined,
    live_rows,
    require_finite,
    shrunk,
    sorted_pairs,
)

_MAX_ARRAY_NUMBERS = 1 << 26  # numbers in the largest temporary array
_MIN_MEASURED_PAIRS = 32  # pairs of each query that a nearest-neighbour search measures first
_MAX_MEMORY_SHARE = 0.5  # share of a device's free memory that a copy may take

# A product of two float16 numbers is exact in float32. Tensor cores then add with fewer guarantees than IEEE 754 gives;
# no addition was ever seen to be off by more than 2^-23 of the summands (Fasi, Higham, Mikaitis and Pranesh 2021,
# "Numerical behavior of NVIDIA tensor cores"); the bounds allow for twice that.
_ADDITION_ERROR = 2.0**-22
_TF32_ERROR = 2.0**-9  # relative, of a product whose factors are cut to 11 bits, which torch may do with float32
_FLOAT16_MAGNITUDE = 2.0**8  # float16 queries are scaled to this, so that they lose nothing relevant to underflow


class DeviceSearch:
    """Search a copy of all references on one device.

    Args:
        vectors: the references, float32 or float16.
        device: holds the copy, and the queries of each search.
    """

    def __init__(self, vectors: SearchableVectors, device: torch.device) -> None:
        self._latents = _copied(vectors, device)
        step = max(1, _MAX_ARRAY_NUMBERS // max(1, self._latents.shape[1]))
        self._squared = torch.cat([part.double().square().sum(1) for part in self._latents.split(step)])
        require_finite(_numpy(self._squared))

    def within(self, x: Tensor, radius: np.ndarray, shrink: np.ndarray | None, nearest: int | None) -> Pairs:
        """Find all pairs with distance < radius: see `ExactSearch`."""
        limit = _radius_on(x.device, radius, shrink)
        return sorted_pairs(joined(self._within_batches(x, limit, nearest)), nearest)

    def _within_batches(self, x: Tensor, limit: Tensor, nearest: int | None) -> Iterator[Pairs]:
        for first, queries in self._batches(x):
            radii = limit if len(limit) == 1 else limit[first : first + len(queries)]
            lower = self._lower_bounds(queries)
            lower.masked_fill_(lower > radii.square() * (1 + 1e-12), torch.inf)
            radii = radii.expand(lower.shape)
            if nearest is None:
                query, row = lower.isfinite().nonzero(as_tuple=True)
                radius = radii[query, row]
                distance = self._distances(queries, query, row, radius)
                inside = distance < radius
            else:
                distance, row = self._nearest(queries, lower, min(nearest, lower.shape[1]), radii)
                query = torch.arange(len(queries), device=x.device)[:, None].expand(row.shape)
                inside = distance.isfinite()
            yield _numpy((query + first)[inside]), _numpy(row[inside]), _numpy(distance[inside])

    def nearest(self, x: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest rows of each query: see `ExactSearch`."""
        found = [self._nearest(queries, self._lower_bounds(queries), k) for _, queries in self._batches(x)]
        distance, row = (torch.cat(part) for part in zip(*found, strict=True))
        return _numpy(distance), _numpy(row)

    def _batches(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (first query, float64 queries), as many at a time as fit into the largest temporary array."""
        step = max(1, _MAX_ARRAY_NUMBERS // len(self._latents))
        for first in range(0, len(x), step):
            yield first, x[first : first + step].double()

    def _lower_bounds(self, x: Tensor) -> Tensor:
        """Bound the squared distances (B, K) from below, in float64, not below 0."""
        x_norm, z_norm = x.norm(dim=1, keepdim=True), self._squared.sqrt()
        product, error = self._product(x, x_norm)
        # The further terms: sums and products in float64, and float32 underflow.
        slack = 2 * error * z_norm + 1e-12 * (x_norm + z_norm).square() + x.shape[1] * 2.0**-124
        lower = (x_norm.square() + self._squared - 2 * product - slack).clamp_min_(0)
        return lower.nan_to_num_(0, posinf=0)  # something overflowed: no bound

    def _product(self, x: Tensor, x_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Compute x·z (B, K) and the largest error (B, 1) of each query's products per unit of ‖z‖."""
        z, dim = self._latents, self._latents.shape[1]
        rounding = (dim + 16) * _ADDITION_ERROR
        if z.dtype == torch.float16 and z.is_cuda and _has_mixed_products():
            largest = x.abs().amax(1, keepdim=True)
            scale = _FLOAT16_MAGNITUDE / torch.where(largest > 0, largest, 1.0)
            rounded = (x * scale).half()
            product = torch.mm(rounded, z.t(), out_dtype=torch.float32)
        else:
            scale, rounded, rounding = 1.0, x.float(), rounding + _TF32_ERROR
            parts = z.split(max(1, _MAX_ARRAY_NUMBERS // dim))
            product = torch.cat([rounded @ part.float().t() for part in parts], dim=1)
        error = (rounded.double() / scale - x).norm(dim=1, keepdim=True) + 1.01 * rounding * x_norm
        return product.double() / scale, error

    def _nearest(self, x: Tensor, lower: Tensor, k: int, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the k nearest rows with distance < limit.

        Args:
            x: queries (B, dim), float64.
            lower: (B, K) lower bounds of squared distances, infinite for pairs that are ruled out.
            k: neighbours per query.
            limit: (B, K); None: no limit.

        Returns:
            Distances and rows (B, k); distances are infinite where fewer rows lie within the limit.
        """
        count = lower.shape[1]
        width = min(max(_MIN_MEASURED_PAIRS, 2 * k), count)
        while True:
            bound, row = lower.topk(width, largest=False)
            row, order = row.sort(dim=1)
            query = torch.arange(len(x), device=x.device).repeat_interleave(width)
            radius = None if limit is None else limit.gather(1, row)
            distance = self._distances(x, query, row.flatten(), None if radius is None else radius.flatten())
            distance = distance.view(row.shape)
            outside = bound.gather(1, order).isinf()
            distance[outside if radius is None else outside | ~(distance < radius)] = torch.inf
            distance, order = distance.sort(dim=1, stable=True)
            # Pairs that were not measured have at least the last of the bounds.
            last, kth = bound[:, -1], distance[:, k - 1]
            if width == count or (last.isinf() | (last > kth.square() * (1 + 1e-12))).all():
                return distance[:, :k], row.gather(1, order[:, :k])
            width = min(4 * width, count)

    def _distances(self, x: Tensor, query: Tensor, row: Tensor, limit: Tensor | None = None) -> Tensor:
        """Compute ‖x[query] − z[row]‖ in float64; NumPy computes those at the limit, so that all devices agree."""
        step = max(1, _MAX_ARRAY_NUMBERS // (4 * x.shape[1]))
        parts = zip(query.split(step), row.split(step), strict=True)
        distance = torch.cat([(x[q] - self._latents[r].double()).norm(dim=1) for q, r in parts])
        if limit is not None:
            at_limit = (((distance - limit).abs() <= 1e-12 * limit) & limit.isfinite()).nonzero().flatten()
            difference = _numpy(x[query[at_limit]]) - _numpy(self._latents[row[at_limit]])
            distance[at_limit] = torch.from_numpy(np.sqrt(np.square(difference).sum(1))).to(distance.device)
        return distance


def fits(vectors: SearchableVectors, device: torch.device) -> bool:
    """Say whether a CUDA device has room for a copy of the references."""
    size = len(live_rows(vectors)) * vectors.shape[1] * vectors.block(0).itemsize
    return size <= _MAX_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]


def _copied(vectors: SearchableVectors, device: torch.device) -> Tensor:
    """Copy the rows that have not been removed to a device, shard by shard."""
    parts = vectors.parts()
    dtype = torch.from_numpy(np.empty(0, parts[0][1].dtype)).dtype
    latents = torch.empty(len(live_rows(vectors)), vectors.shape[1], dtype=dtype, device=device)
    start = 0
    for first, part in parts:
        alive = None if vectors.alive is None else vectors.alive[first : first + len(part)]
        rows = torch.from_numpy(part.copy() if alive is None else part[alive])
        latents[start : start + len(rows)] = rows
        start += len(rows)
    return latents


def _radius_on(device: torch.device, radius: np.ndarray, shrink: np.ndarray | None) -> Tensor:
    """Copy `shrunk` radii to a device, once where all queries or all rows share them."""
    radius = radius[:1] if radius.strides[0] == 0 and shrink is None else radius
    radius = radius[:, :1] if radius.strides[1] == 0 else radius
    return torch.from_numpy(shrunk(radius, shrink).copy()).to(device)


def _has_mixed_products() -> bool:
    """Say whether torch multiplies float16 matrices into a float32 one."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def _numpy(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
