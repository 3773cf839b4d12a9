"""A protected set as references of a Spell."""

from __future__ import annotations

import torch
from torch import Tensor

from shielded.core.references import Hits, Scan
from shielded.protected.protected_set import ProtectedSet


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
