"""Read the latents of a protected set from its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


class Vectors:
    """Latents for the search to read: one block per shard, including rows that have been removed.

    Rows are counted over all blocks ("stored rows"). The blocks are memory-mapped and read-only, so what is read from
    them is in the system's cache and not in the memory of the process.

    Args:
        paths: the file of each block. A file name is never used again for other content.
        blocks: (n, dim) float16 or float32 each.
        dim: numbers per row.
        alive: (K,) bool, False for the rows that have been removed; None: none has.
    """

    def __init__(
        self, paths: Sequence[Path], blocks: Sequence[np.ndarray], dim: int, alive: np.ndarray | None = None
    ) -> None:
        self.paths, self._blocks, self._dim, self.alive = list(paths), list(blocks), dim, alive
        self._starts = np.cumsum([0, *map(len, blocks)])
        self._dtype = np.result_type(*blocks) if len(blocks) else np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """(K, dim) with K stored rows."""
        return int(self._starts[-1]), self._dim

    def parts(self) -> list[tuple[int, np.ndarray]]:
        """List (stored row of its first vector, block) of each file in `paths`."""
        return list(zip(self._starts[:-1].tolist(), self._blocks, strict=True))

    def take(self, stored_rows: np.ndarray) -> np.ndarray:
        """Read the vectors of the stored rows (P,), as (P, dim) float32 in their order."""
        vectors = np.empty((len(stored_rows), self._dim), self._dtype)
        part = np.searchsorted(self._starts, stored_rows, side="right") - 1
        for number in np.unique(part):
            chosen = part == number
            vectors[chosen] = self._blocks[number][stored_rows[chosen] - self._starts[number]]
        return torch.from_numpy(vectors).float().numpy()  # NumPy converts float16 several times more slowly
