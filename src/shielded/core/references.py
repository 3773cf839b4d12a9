"""What x0 is kept away from: a tensor, a protected set, finished images, or several of these at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shielded.core.distances import distances_of, squared_distances


@dataclass
class Hits:
    """Active shields: image `query[p]` lies `distance[p]` from reference `row[p]`, inside its radius `radius[p]`."""

    query: Tensor  # (P,) int64, ascending
    row: Tensor  # (P,) int64
    distance: Tensor  # (P,) float64
    radius: Tensor  # (P,) float64

    def __len__(self) -> int:
        return len(self.query)

    def __getitem__(self, keep: Tensor | slice) -> Hits:
        return Hits(self.query[keep], self.row[keep], self.distance[keep], self.radius[keep])


@dataclass
class Scan:
    """The first half of a search, which leaves everything on the device.

    Args:
        some: () bool: whether a shield may be active. Reading it is the only thing that the host has to wait for in a
            step in which none is.
        hits: the second half: the active shields.
    """

    some: Tensor
    hits: Callable[[], Hits]


class References(Protocol):
    """What x0 is kept away from. `shrink` (B,) shortens the squared radii per image (posterior radius)."""

    def scan(self, x0: Tensor, shrink: Tensor | None = None) -> Scan: ...

    def vectors(self, rows: Tensor) -> Tensor: ...


class TensorReferences:
    """References held as one tensor (K, D) with a radius each; only the `nearest` ones of each image, if given."""

    def __init__(self, vectors: Tensor, radius: float | Tensor, nearest: int | None = None) -> None:
        self._vectors = vectors.float()
        self._nearest = nearest
        self.radius = torch.as_tensor(radius, dtype=torch.float64, device=vectors.device).expand(len(vectors))

    def vectors(self, rows: Tensor) -> Tensor:
        return self._vectors[rows]

    def scan(self, x0: Tensor, shrink: Tensor | None = None) -> Scan:
        squared = self.radius.square().expand(len(x0), -1)
        if shrink is not None:
            squared = squared - shrink.double()[:, None]
        limit = squared.clamp(min=0).sqrt()
        squared, error = squared_distances(x0, self._vectors)
        near = squared - error < limit.square()
        if self._nearest is not None and self._nearest < len(self._vectors):
            few = squared.topk(self._nearest, largest=False).indices
            near &= torch.zeros_like(near).scatter(1, few, True)

        def hits() -> Hits:
            query, row = torch.nonzero(near, as_tuple=True)
            radius = limit[query, row]
            found = Hits(query, row, distances_of(x0, self._vectors, query, row, squared, error, radius), radius)
            return found[found.distance < found.radius]

        return Scan(near.any(), hits)


class Joined:
    """Several sets of references as one; rows of the second follow those of the first."""

    def __init__(self, parts: Sequence[References], sizes: Sequence[int]) -> None:
        self._parts = parts
        self._starts = [sum(sizes[:n]) for n in range(len(sizes) + 1)]

    def vectors(self, rows: Tensor) -> Tensor:
        parts = []
        for part, start, end in zip(self._parts, self._starts, self._starts[1:], strict=False):
            own = (rows >= start) & (rows < end)
            parts.append((own.nonzero().flatten(), part.vectors(rows[own] - start)))
        joined = torch.cat([vectors for _, vectors in parts])
        result = torch.empty_like(joined)
        result[torch.cat([index for index, _ in parts])] = joined
        return result

    def scan(self, x0: Tensor, shrink: Tensor | None = None) -> Scan:
        scans = [part.scan(x0, shrink) for part in self._parts]
        return Scan(torch.stack([scan.some for scan in scans]).any(), lambda: self._join([s.hits() for s in scans]))

    def _join(self, found: list[Hits]) -> Hits:
        query = torch.cat([hits.query for hits in found])
        row = torch.cat([hits.row + start for hits, start in zip(found, self._starts, strict=False)])
        joined = Hits(
            query, row, torch.cat([hits.distance for hits in found]), torch.cat([hits.radius for hits in found])
        )
        return joined[torch.argsort(query, stable=True)]


def rank_within_query(hits: Hits) -> Tensor:
    """0, 1, 2, ... for the hits of each image."""
    return torch.arange(len(hits), device=hits.query.device) - torch.searchsorted(hits.query, hits.query)


def closest(hits: Hits, k: int) -> Hits:
    """The k nearest hits of each image."""
    return _first(hits, hits.distance, k)


def deepest(hits: Hits, k: int) -> Hits:
    """The k hits of each image that are farthest inside their shields."""
    return _first(hits, hits.distance - hits.radius, k)


def _first(hits: Hits, key: Tensor, k: int) -> Hits:
    if len(hits) <= k:
        return hits
    order = torch.argsort(key, stable=True)
    ordered = hits[order[torch.argsort(hits.query[order], stable=True)]]
    return ordered[rank_within_query(ordered) < k]


def unknown(found: Hits, known: Hits) -> Hits:
    """What was found and is not known yet."""
    if not (len(found) and len(known)):
        return found
    stride = int(max(found.row.max(), known.row.max())) + 1
    return found[~torch.isin(found.query * stride + found.row, known.query * stride + known.row)]


def merge(old: Hits, new: Hits) -> Hits:
    """Both together, in order of the images."""
    if not len(old):
        return new
    names = ("query", "row", "distance", "radius")
    both = Hits(*(torch.cat([getattr(old, name), getattr(new, name)]) for name in names))
    return both[torch.argsort(both.query, stable=True)]
