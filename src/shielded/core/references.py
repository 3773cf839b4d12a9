"""References that x0 is kept away from, and the shields that a search among them finds active."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from shielded.core.distances import bounded_squares, measured_distances, pair_distances, squared_norms
from shielded.core.sketch import Sketch, pays

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int64

_MAX_OPEN_SHARE = 0.25  # of the references that sketches may leave open for the others to be left out


@dataclass
class Hits:
    """Active shields: batch row `query[p]` lies `distance[p]` from reference `row[p]`, within its `radius[p]`.

    Args:
        query: (P,) int64, index into the batch, ascending.
        row: (P,) int64, index into the references.
        distance: (P,) float64, L2.
        radius: (P,) float64, L2.
    """

    query: Int64[Tensor, " p"]
    row: Int64[Tensor, " p"]
    distance: Float64[Tensor, " p"]
    radius: Float64[Tensor, " p"]

    def __len__(self) -> int:
        return len(self.query)

    def __getitem__(self, keep: Tensor | slice) -> Hits:
        return Hits(self.query[keep], self.row[keep], self.distance[keep], self.radius[keep])


@dataclass
class Scan:
    """The first half of a search, which keeps everything on the device.

    Args:
        some: () bool, whether a shield may be active. In a step without an active shield, reading it is the only thing
            that the host waits for.
        hits: runs the second half and returns the active shields.
    """

    some: Bool[Tensor, ""]
    hits: Callable[[], Hits]


@runtime_checkable
class References(Protocol):
    """Points that x0 is kept away from, each with a radius."""

    def scan(self, x0: Float[Tensor, "b d"], shrink: Float[Tensor, " b"] | None = None) -> Scan:
        """Search for the active shields of x0 (B, D); `shrink` (B,) is subtracted from each row's squared radii."""
        ...

    def vectors(self, rows: Int64[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """Return the references `rows` (P,) as (P, D) float32."""
        ...


class TensorReferences:
    """References in one tensor.

    Args:
        vectors: (K, D).
        radius: L2, one number or (K,).
        nearest: only so many references of each batch row, the nearest ones; None: all.
    """

    def __init__(
        self, vectors: Float[Tensor, "k d"], radius: float | Float[Tensor, " k"], nearest: int | None = None
    ) -> None:
        self._vectors = vectors.float()
        self._nearest = nearest
        self.radius = torch.as_tensor(radius, dtype=torch.float64, device=vectors.device).expand(len(vectors))

    @cached_property
    def _norms(self) -> Float64[Tensor, " k"]:
        return squared_norms(self._vectors)

    def vectors(self, rows: Int64[Tensor, " m"]) -> Float[Tensor, "m d"]:
        return self._vectors[rows]

    @cached_property
    def _sketch(self) -> Sketch | None:
        return Sketch(self._vectors) if pays(self._vectors) else None

    def scan(self, x0: Float[Tensor, "b d"], shrink: Float[Tensor, " b"] | None = None) -> Scan:
        limit = self.radius.square().expand(len(x0), -1)
        if shrink is not None:
            limit = limit - shrink.double()[:, None]
        limit = limit.clamp(min=0).sqrt()
        rows, vectors, norms = None, self._vectors, self._norms
        if self._sketch is not None:
            # Where one row of x0 is near, those that are nearer may have smaller radii, and count as well.
            farthest = limit if self._nearest is None else limit.amax(dim=1, keepdim=True)
            rows = (~(self._sketch.lower_bounds(x0) >= farthest)).any(dim=0).nonzero().flatten()
            if len(rows) > _MAX_OPEN_SHARE * len(vectors):
                rows = None  # copying them costs more than the product with the others
            else:
                vectors, norms, limit = vectors[rows], norms[rows], limit[:, rows]
        squared, error = bounded_squares(x0, vectors, norms)
        near = squared - error < limit.square()

        def hits() -> Hits:
            found = self._measured(x0, vectors, limit, near, squared, error)
            return found if rows is None else replace(found, row=rows[found.row])

        return Scan(near.any(), hits)

    def _measured(self, x0: Tensor, z: Tensor, limit: Tensor, near: Tensor, squared: Tensor, error: Tensor) -> Hits:
        """Measure what may lie within the limit (B, K) of the references z (K, D)."""
        if self._nearest is None or self._nearest >= len(z):
            query, row = torch.nonzero(near, as_tuple=True)
            radius = limit[query, row]
            found = Hits(query, row, measured_distances(x0, z, query, row, radius), radius)
        else:  # which rows are nearest does not depend on their radii
            kth = (squared + error).topk(self._nearest, largest=False).values[:, -1:]
            query, row = torch.nonzero(near.any(dim=1, keepdim=True) & (squared - error <= kth), as_tuple=True)
            measured = Hits(query, row, pair_distances(x0, z, query, row), limit[query, row])
            found = closest(measured, self._nearest)
            found = found[torch.argsort(found.query * len(z) + found.row)]
        return found[found.distance < found.radius]


class Joined:
    """Several sets of references as one; the rows of each follow those of the one before.

    Args:
        parts: sets of references.
        sizes: number of rows of each.
    """

    def __init__(self, parts: Sequence[References], sizes: Sequence[int]) -> None:
        self._parts = parts
        self._starts = [sum(sizes[:n]) for n in range(len(sizes) + 1)]

    def vectors(self, rows: Int64[Tensor, " m"]) -> Float[Tensor, "m d"]:
        parts = []
        for part, start, end in zip(self._parts, self._starts, self._starts[1:], strict=False):
            inside = (rows >= start) & (rows < end)
            parts.append((inside.nonzero().flatten(), part.vectors(rows[inside] - start)))
        joined = torch.cat([vectors for _, vectors in parts])
        result = torch.empty_like(joined)
        result[torch.cat([index for index, _ in parts])] = joined
        return result

    def scan(self, x0: Float[Tensor, "b d"], shrink: Float[Tensor, " b"] | None = None) -> Scan:
        scans = [part.scan(x0, shrink) for part in self._parts]
        return Scan(torch.stack([scan.some for scan in scans]).any(), lambda: self._join([s.hits() for s in scans]))

    def _join(self, found: list[Hits]) -> Hits:
        query = torch.cat([hits.query for hits in found])
        row = torch.cat([hits.row + start for hits, start in zip(found, self._starts, strict=False)])
        joined = Hits(
            query, row, torch.cat([hits.distance for hits in found]), torch.cat([hits.radius for hits in found])
        )
        return joined[torch.argsort(query, stable=True)]


def rank_within_query(hits: Hits) -> Int64[Tensor, " p"]:
    """Number the hits of each batch row: 0, 1, 2, ... (P,)"""
    return torch.arange(len(hits), device=hits.query.device) - torch.searchsorted(hits.query, hits.query)


def closest(hits: Hits, k: int) -> Hits:
    """Keep the k nearest hits of each batch row."""
    return _first(hits, hits.distance, k)


def deepest(hits: Hits, k: int) -> Hits:
    """Keep the k hits of each batch row that lie deepest inside their shields."""
    return _first(hits, hits.distance - hits.radius, k)


def _first(hits: Hits, key: Tensor, k: int) -> Hits:
    if len(hits) <= k:
        return hits
    order = torch.argsort(key, stable=True)
    ordered = hits[order[torch.argsort(hits.query[order], stable=True)]]
    return ordered[rank_within_query(ordered) < k]


def unknown(found: Hits, known: Hits) -> Hits:
    """Drop the hits that are known already."""
    if not (len(found) and len(known)):
        return found
    stride = int(max(found.row.max(), known.row.max())) + 1
    return found[~torch.isin(found.query * stride + found.row, known.query * stride + known.row)]


def merge(old: Hits, new: Hits) -> Hits:
    """Concatenate two sets of hits, in order of the batch rows."""
    if not len(old):
        return new
    names = ("query", "row", "distance", "radius")
    both = Hits(*(torch.cat([getattr(old, name), getattr(new, name)]) for name in names))
    return both[torch.argsort(both.query, stable=True)]
