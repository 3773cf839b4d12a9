"""Searching a set of which a device, such as a GPU, holds a copy: one matrix product rules out, the rest is measured.

The product reads each reference once, in the type in which it is stored, and that is what a search costs; the bounds
made of it are squared distances less all that the product may be off by.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_NUMBERS = 1 << 26  # in the largest temporary array
_FEW = 32  # pairs of each query that are measured at first

# A product of two float16 numbers is exact in float32. Tensor cores then add with fewer guarantees than IEEE 754 gives;
# no addition was ever seen to be off by more than 2^-23 of what is added (Fasi, Higham, Mikaitis and Pranesh 2021,
# "Numerical behavior of NVIDIA tensor cores"), and twice that is allowed for.
_ADDITION = 2.0**-22
_TF32 = 2.0**-9  # of two numbers that are cut to 11 bits, which torch may be told to do with float32
_HALF = 2.0**8  # float16 queries are scaled to this, so that they lose nothing to underflow that matters


class DeviceCopy:
    """Exact search in references that are all on one device.

    Args:
        latents: references (K, dim), float32 or float16.
    """

    def __init__(self, latents: Tensor) -> None:
        self._latents = latents
        step = max(1, _NUMBERS // max(1, latents.shape[1]))
        self._squared = torch.cat([part.double().square().sum(1) for part in latents.split(step)])

    def within(self, x: Tensor, limit: Tensor, nearest: int | None) -> Iterator[tuple[np.ndarray, ...]]:
        """All pairs of a query and a row with distance < limit; only the `nearest` ones of each query, if given.

        Args:
            x: queries (B, dim) on the device.
            limit: float64 of a shape that broadcasts to (B, K), on the device.
            nearest: how many of each query; None: all.

        Yields:
            Query, row and distance of the pairs of some queries.
        """
        for first, queries in self._batches(x):
            own = limit if len(limit) == 1 else limit[first : first + len(queries)]
            lower = self._lower(queries)
            lower.masked_fill_(lower > own.square() * (1 + 1e-12), torch.inf)
            own = own.expand(lower.shape)
            if nearest is None:
                query, row = lower.isfinite().nonzero(as_tuple=True)
                radius = own[query, row]
                distance = self._measured(queries, query, row, radius)
                inside = distance < radius
            else:
                distance, row = self._closest(queries, lower, min(nearest, lower.shape[1]), own)
                query = torch.arange(len(queries), device=x.device)[:, None].expand(row.shape)
                inside = distance.isfinite()
            yield tuple(_host(part[inside]) for part in (query + first, row, distance))

    def nearest(self, x: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (B, k), nearest first; equal distances in the order of the rows."""
        found = [self._closest(queries, self._lower(queries), k) for _, queries in self._batches(x)]
        distance, row = (torch.cat(part) for part in zip(*found, strict=True))
        return _host(distance), _host(row)

    def _batches(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """As many queries at a time as there is room for; the number of the first."""
        step = max(1, _NUMBERS // len(self._latents))
        for first in range(0, len(x), step):
            yield first, x[first : first + step].double()

    def _lower(self, x: Tensor) -> Tensor:
        """(B, K) float64 lower bounds of the squared distances, not below 0."""
        length, away = x.norm(dim=1, keepdim=True), self._squared.sqrt()
        product, off = self._product(x, length)
        # The further terms: sums and products in float64, and float32 underflow.
        slack = 2 * off * away + 1e-12 * (length + away).square() + x.shape[1] * 2.0**-124
        lower = (length.square() + self._squared - 2 * product - slack).clamp_min_(0)
        return lower.nan_to_num_(0, posinf=0)  # something overflowed: no bound

    def _product(self, x: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """x·z, (B, K), and (B, 1) by how much it may be off for each ‖z‖."""
        z, dim = self._latents, self._latents.shape[1]
        rounding = (dim + 16) * _ADDITION
        if z.dtype == torch.float16 and z.is_cuda and _mixed_products():
            most = x.abs().amax(1, keepdim=True)
            scale = _HALF / torch.where(most > 0, most, 1.0)
            short = (x * scale).half()
            product = torch.mm(short, z.t(), out_dtype=torch.float32)
        else:
            scale, short, rounding = 1.0, x.float(), rounding + _TF32
            parts = z.split(max(1, _NUMBERS // dim))
            product = torch.cat([short @ part.float().t() for part in parts], dim=1)
        off = (short.double() / scale - x).norm(dim=1, keepdim=True) + 1.01 * rounding * length
        return product.double() / scale, off

    def _closest(self, x: Tensor, lower: Tensor, k: int, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances and rows (B, k) of the nearest with distance < limit; infinite distances where there are fewer.

        Args:
            x: queries (B, dim), float64.
            lower: (B, K) bounds of squared distances, infinite for pairs that are ruled out.
            k: how many.
            limit: (B, K); None: no limit.
        """
        count = lower.shape[1]
        width = min(max(_FEW, 2 * k), count)
        while True:
            bound, row = lower.topk(width, largest=False)
            row, order = row.sort(dim=1)
            query = torch.arange(len(x), device=x.device).repeat_interleave(width)
            radius = None if limit is None else limit.gather(1, row)
            distance = self._measured(x, query, row.flatten(), None if radius is None else radius.flatten())
            distance = distance.view(row.shape)
            out = bound.gather(1, order).isinf()
            distance[out if radius is None else out | ~(distance < radius)] = torch.inf
            distance, order = distance.sort(dim=1, stable=True)
            # Pairs that were not measured have at least the last of the bounds.
            last, kth = bound[:, -1], distance[:, k - 1]
            if width == count or (last.isinf() | (last > kth.square() * (1 + 1e-12))).all():
                return distance[:, :k], row.gather(1, order[:, :k])
            width = min(4 * width, count)

    def _measured(self, x: Tensor, query: Tensor, row: Tensor, limit: Tensor | None = None) -> Tensor:
        """‖x[query] − z[row]‖ in float64. At the limit it is what NumPy finds, so that all devices decide alike."""
        step = max(1, _NUMBERS // (4 * x.shape[1]))
        parts = zip(query.split(step), row.split(step), strict=True)
        distance = torch.cat([(x[q] - self._latents[r].double()).norm(dim=1) for q, r in parts])
        if limit is not None:
            at = ((distance - limit).abs() <= 1e-12 * limit).nonzero().flatten()
            difference = _host(x[query[at]]) - _host(self._latents[row[at]])
            distance[at] = torch.from_numpy(np.sqrt(np.square(difference).sum(1))).to(distance.device)
        return distance


def _mixed_products() -> bool:
    """Whether torch multiplies float16 matrices into a float32 one."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def _host(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
