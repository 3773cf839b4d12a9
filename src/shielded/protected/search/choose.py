"""Choose how a set is searched: every row, through an index on disk, or in a copy on the queries' device."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from shielded._extras import missing
from shielded.protected.search import device
from shielded.protected.search.interface import ExactSearch, Pairs, SearchableVectors, joined, live_rows
from shielded.protected.search.whole import WholeSearch

if TYPE_CHECKING:
    from shielded.protected.search.indexed.search import IndexedSearch

MAX_UNINDEXED_ROWS = 10_000
MEMORY_BYTES = 1 << 30


class Search:
    """Search one version of a set exactly.

    A set is searched on the GPU that the queries are on, if half of its free memory holds all rows. Otherwise at most
    10,000 rows that fit into half of `memory` are kept in memory, and larger sets are searched through indexes on disk.
    Without Numba, which these need, every search reads all rows.

    Earlier queries and what was found for them are cached, so that queries near them cost little. Queries may come in
    any order: the cache saves time and never changes a result. Several threads may search at once.

    Rows are numbered without those that have been removed.

    Args:
        vectors: the references.
        index_paths: index file of each shard, which need not exist yet.
        shape: shape of one latent.
        memory: bytes to hold at most, besides queries and answers.
    """

    def __init__(
        self,
        vectors: SearchableVectors,
        index_paths: Sequence[Path],
        shape: tuple[int, ...],
        memory: int = MEMORY_BYTES,
    ) -> None:
        self._vectors, self._paths, self._shape, self._memory = vectors, list(index_paths), tuple(shape), memory
        self._count = len(live_rows(vectors))
        self._on_devices: dict[torch.device, device.DeviceSearch] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def within(
        self,
        x: Tensor,
        radius: float | np.ndarray,
        shrink: np.ndarray | None = None,
        nearest: int | None = None,
    ) -> Pairs:
        """Find all pairs of a query and a row with distance < radius.

        Args:
            x: queries (B, dim), finite.
            radius: one number, (K,) or (B, K), not negative.
            shrink: (B,) subtracted from each query's squared radii (posterior radius); None: nothing.
            nearest: keep only this many rows of each query, the nearest ones; None: all.

        Returns:
            Query, row and distance of each pair, sorted by query, then by row.
        """
        if not len(self) or not len(x):
            return joined([])
        radius = np.broadcast_to(np.asarray(radius, np.float64), (len(x), len(self)))
        return self._choose(x).within(x, radius, shrink, nearest)

    def nearest(self, x: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest rows of each query, nearest first; equal distances in the order of the rows.

        Args:
            x: queries (B, dim), finite.
            k: neighbours per query, at most K.

        Returns:
            Distances (B, k) float64 and rows (B, k) int64.
        """
        return self._choose(x).nearest(x, k)

    def _choose(self, x: Tensor) -> ExactSearch:
        with self._lock:  # several threads share one copy and one index
            if self._on_device(x):
                if x.device not in self._on_devices:
                    self._on_devices[x.device] = device.DeviceSearch(self._vectors, x.device)
                return self._on_devices[x.device]
            return self._on_host

    def _on_device(self, x: Tensor) -> bool:
        return x.device.type == "cuda" and (x.device in self._on_devices or device.fits(self._vectors, x.device))

    @cached_property
    def _on_host(self) -> ExactSearch:
        in_memory = len(self) <= MAX_UNINDEXED_ROWS and 4 * len(self) * self._vectors.shape[1] <= self._memory / 2
        indexed = None if in_memory else _indexed_search(len(self))
        if indexed is None:
            return WholeSearch(self._vectors, in_memory)
        return indexed(self._vectors, self._paths, self._shape, self._memory)


def _indexed_search(rows: int) -> type[IndexedSearch] | None:
    """Import the compiled search; warn and return None where Numba cannot be used."""
    try:
        from shielded.protected.search.indexed.search import IndexedSearch
    except ImportError as error:
        warnings.warn(
            f"Every search reads all of the {rows:,} protected images, since Numba cannot be used ({error}). "
            + missing("Searches with an index, many times as fast,", "large"),
            stacklevel=6,
        )
        return None
    return IndexedSearch
