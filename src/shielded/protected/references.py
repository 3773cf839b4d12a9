"""Let a Spell ask a protected set for the references near x0."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shielded.core.references import Hits, Scan
from shielded.protected.protected_set import ProtectedSet, hit_radii


class SetReferences:
    """References in a protected set, found by its exact search.

    Args:
        protected: the set.
        radius: one number or (K,).
        device: of the vectors.
        nearest: repel from only so many references of each image, the nearest ones; None: all.
    """

    def __init__(
        self, protected: ProtectedSet, radius: float | Tensor, device: torch.device, nearest: int | None = None
    ) -> None:
        self._protected = protected
        self._radius = torch.as_tensor(radius, dtype=torch.float64)
        self._device = device
        self._nearest = nearest

    def vectors(self, rows: Tensor) -> Tensor:
        """Read the vectors (P, D) of the rows (P,)."""
        return self._protected.vectors(rows.cpu()).flatten(1).to(self._device)

    def scan(self, x0: Tensor, shrink: Tensor | None = None) -> Scan:
        """Defer the whole search to the second half, since it runs on the host."""
        return Scan(torch.ones((), dtype=torch.bool, device=x0.device), lambda: self._search(x0, shrink))

    def _search(self, x0: Tensor, shrink: Tensor | None) -> Hits:
        x = x0.view(len(x0), *self._protected.space.shape)
        if self._nearest is None or not self._radius.ndim:
            return self._protected.within(x, self._radius, shrink, self._nearest)
        # Which references are nearest does not depend on their radii, so the search asks for those within the largest.
        found = self._protected.within(x, self._radius.max(), shrink, self._nearest)
        query, row = found.query.cpu().numpy(), found.row.cpu().numpy()
        reduction = None if shrink is None else shrink.detach().cpu().double().numpy()
        applied = hit_radii(self._radius.detach().cpu().numpy(), reduction, query, row)
        hits = replace(found, radius=torch.from_numpy(applied).to(found.distance))
        return hits[hits.distance < hits.radius]
