"""What a round of the smallest move hands on to the next one: distances between references, and the move so far."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shielded.core.distances import squared_distances, squared_gaps

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int64

FEW_REFERENCES = 128  # up to which nothing is saved by keeping products, or by leaving out unused references


class KnownMoves:
    """What the moves out of some shields tell of those out of more: how long they are, and which shields they touch.

    Args:
        count: B.
        device: of the tensors.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._least = torch.zeros(count, dtype=torch.float64, device=device)
        self._touched = torch.zeros(0, dtype=torch.int64, device=device)

    def of(
        self, query: Int64[Tensor, " n"], row: Int64[Tensor, "n a"]
    ) -> tuple[Bool[Tensor, "n a"] | None, Float64[Tensor, " n"] | None]:
        """Guess which of the shields (n, A) of images (n,) are touched, and bound ‖h‖² (n,) from below."""
        if not len(self._touched):
            return None, None
        return torch.isin(self._key(query, row), self._touched), self._least[query]

    def add(
        self,
        query: Int64[Tensor, " n"],
        row: Int64[Tensor, "n a"],
        touched: Bool[Tensor, "n a"],
        least: Float64[Tensor, " n"],
    ) -> None:
        """Keep which of the shields (n, A) are touched, and the bound (n,)."""
        self._touched = torch.cat([self._touched, self._key(query, row)[touched]])
        self._least[query] = least

    @staticmethod
    def _key(query: Tensor, row: Tensor) -> Tensor:
        return (query[:, None] << 32) + row


class Gaps:
    """Squared distances between the references of a group of images; the next round has most of these again."""

    def __init__(self) -> None:
        self._rows, self._squared, self._error = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0), 0.0

    def of(self, rows: Int64[Tensor, " m"], z: Float[Tensor, "m d"]) -> tuple[Float64[Tensor, "m m"], float]:
        """Return ‖z_i − z_j‖² (m, m) float64, and the largest error bound among them.

        Args:
            rows: (m,) which references they are, ascending.
            z: (m, D) the references.
        """
        if len(rows) <= FEW_REFERENCES:
            squared, error = squared_distances(z, z)
            return squared, float(error.max())
        kept = torch.isin(rows, self._rows.to(rows))
        old, fresh = kept.nonzero().flatten(), (~kept).nonzero().flatten()
        if len(old) < len(fresh):
            squared, error = squared_gaps(z)
        else:
            at = torch.searchsorted(self._rows, rows[old])
            squared, error = torch.empty(len(rows), len(rows), dtype=torch.float64, device=z.device), self._error
            squared[old[:, None], old] = self._squared[at[:, None], at]
            if len(fresh):
                lines, errors = squared_distances(z[fresh], z)
                squared[fresh], squared[:, fresh] = lines, lines.T
                error = max(error, float(errors.max()))
        self._rows, self._squared, self._error = rows, squared, error
        return squared, error
