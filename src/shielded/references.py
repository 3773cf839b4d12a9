"""What x0 is kept away from: a tensor, a protected set, finished images, or several of these at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shielded.protected import ProtectedSet

CHUNK = 1 << 24  # elements of differences held at once: 64 MiB in float32
PRECISION = 1e-8  # squared distances that may be off by more than this share are measured again by subtraction


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


class SetReferences:
    """A protected set on disk, searched by its own exact search; only the `nearest` ones of each image, if given."""

    def __init__(
        self, protected: ProtectedSet, radius: float | Tensor, device: torch.device, nearest: int | None = None
    ) -> None:
        self._protected = protected
        self._radius = torch.as_tensor(radius, dtype=torch.float64)
        self._device = device
        self._nearest = nearest

    def vectors(self, rows: Tensor) -> Tensor:
        return self._protected.vectors(rows.cpu()).flatten(1).to(self._device)

    def scan(self, x0: Tensor, shrink: Tensor | None = None) -> Scan:
        # The search runs on the host, so there is nothing to say before it.
        return Scan(torch.ones((), dtype=torch.bool, device=x0.device), lambda: self._search(x0, shrink))

    def _search(self, x0: Tensor, shrink: Tensor | None) -> Hits:
        x = x0.view(len(x0), *self._protected.space.shape)
        # Which references are nearest does not depend on their radii, so those within the largest radius are asked for.
        radius = self._radius if self._nearest is None else self._radius.max()
        found = self._protected.within(x, radius, shrink, nearest=self._nearest)
        query, row, distance = found.query, found.row, found.distance
        radius = self._radius.to(x0.device)
        radius = radius[row] if radius.dim() else radius.expand(len(row))
        if shrink is not None:
            radius = (radius.square() - shrink.double()[query]).clamp(min=0).sqrt()
        hits = Hits(query, row, distance.double(), radius)
        return hits[hits.distance < hits.radius]


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


# Distances ------------------------------------------------------------------------------------------------------------


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
