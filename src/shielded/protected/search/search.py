"""Former path of `Search`, until everything imports it from `shielded.protected.search`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shielded.protected.search.choose import MEMORY_BYTES as MEMORY
from shielded.protected.search.choose import Search
from shielded.protected.search.interface import sorted_pairs

__all__ = ["MEMORY", "Hits", "Search", "sorted_pairs"]


@dataclass(frozen=True)
class Hits:
    """References within a radius, sorted by query, then by row.

    Args:
        query: (P,) int64, index into the batch.
        row: (P,) int64, index into the protected set.
        distance: (P,) float64, L2.
    """

    query: Tensor
    row: Tensor
    distance: Tensor

    def __len__(self) -> int:
        return len(self.row)
