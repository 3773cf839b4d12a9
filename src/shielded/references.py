"""What x0 is kept away from: a tensor, a protected set, finished images, or several of these at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shielded.protected import ProtectedSet

CHUNK = 1 << 24  # elements of differences held at once: 64 MiB in float32


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


class References(Protocol):
    """What x0 is kept away from. `shrink` (B,) shortens the squared radii per image (posterior radius)."""

    def active(self, x0: Tensor, shrink: Tensor | None = None) -> Hits: ...

    def vectors(self, rows: Tensor) -> Tensor: ...


class TensorReferences:
    """References held as one tensor (K, D) with a radius each."""

    def __init__(self, vectors: Tensor, radius: float | Tensor) -> None:
        self._vectors = vectors.float()
        self.radius = torch.as_tensor(radius, dtype=torch.float64, device=vectors.device).expand(len(vectors))

    def vectors(self, rows: Tensor) -> Tensor:
        return self._vectors[rows]

    def active(self, x0: Tensor, shrink: Tensor | None = None) -> Hits:
        squared = self.radius.square().expand(len(x0), -1)
        if shrink is not None:
            squared = squared - shrink.double()[:, None]
        limit = squared.clamp(min=0).sqrt()
        # Distances by subtraction, not by the matmul shortcut, which cancels for small ones. float32 sums of D terms
        # are off by at most D·2⁻²⁴; the candidates so found are measured again in float64.
        rough = torch.cdist(x0, self._vectors, compute_mode="donot_use_mm_for_euclid_dist")
        query, row = torch.nonzero(rough < (limit * (1 + x0.shape[1] * 2.0**-23)).float(), as_tuple=True)
        distance = pair_distances(x0, self._vectors, query, row)
        hits = Hits(query, row, distance, limit[query, row])
        return hits[hits.distance < hits.radius]


class SetReferences:
    """A protected set on disk, searched by its own exact search."""

    def __init__(self, protected: ProtectedSet, radius: float | Tensor, device: torch.device) -> None:
        self._protected = protected
        self._radius = torch.as_tensor(radius, dtype=torch.float64).expand(len(protected))
        self._device = device

    def vectors(self, rows: Tensor) -> Tensor:
        return self._protected.vectors(rows.cpu()).to(self._device)

    def active(self, x0: Tensor, shrink: Tensor | None = None) -> Hits:
        radius = self._radius
        if shrink is not None:
            radius = (radius.square() - shrink.double().cpu()[:, None]).clamp(min=0).sqrt()
        found = self._protected.within(x0.view(len(x0), *self._protected.space.shape), radius)
        own = self._radius.to(x0.device)[found.row]
        if shrink is not None:
            own = (own.square() - shrink.double()[found.query]).clamp(min=0).sqrt()
        hits = Hits(found.query, found.row, found.distance.double(), own)
        return hits[hits.distance < hits.radius]


class Nearest:
    """Only the k nearest active references of each image (the paper's SPELL-k)."""

    def __init__(self, references: References, k: int) -> None:
        self.vectors = references.vectors
        self._references = references
        self._k = k

    def active(self, x0: Tensor, shrink: Tensor | None = None) -> Hits:
        return closest(self._references.active(x0, shrink), self._k)


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

    def active(self, x0: Tensor, shrink: Tensor | None = None) -> Hits:
        found = [part.active(x0, shrink) for part in self._parts]
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
    order = torch.argsort(key, stable=True)
    ordered = hits[order[torch.argsort(hits.query[order], stable=True)]]
    return ordered[rank_within_query(ordered) < k]


def merge(old: Hits, new: Hits) -> Hits:
    """Both together, without the new ones that are among the old, in order of the images."""
    if len(old):
        stride = int(max(old.row.max(), new.row.max())) + 1
        new = new[~torch.isin(new.query * stride + new.row, old.query * stride + old.row)]
    names = ("query", "row", "distance", "radius")
    both = Hits(*(torch.cat([getattr(old, name), getattr(new, name)]) for name in names))
    return both[torch.argsort(both.query, stable=True)]


def pair_distances(x: Tensor, z: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """‖x[query] − z[row]‖ in float64 by direct subtraction, a bounded piece at a time. (P,)"""
    step = max(1, CHUNK // max(1, x.shape[1]))
    parts = [
        (x[q].double() - z[k].double()).norm(dim=1)
        for q, k in zip(query.split(step), row.split(step), strict=True)
    ]  # fmt: skip
    return torch.cat(parts) if parts else x.new_zeros(0, dtype=torch.float64)
