"""Read the latents of a protected set from its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
        digests: SHA-256 of each file, by which an index knows its shard; None: unknown.
        check: compares a file, by its number, with its checksum and raises ValueError; called before the rows of a
            block are read for the first time.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        blocks: Sequence[np.ndarray],
        dim: int,
        alive: np.ndarray | None = None,
        digests: Sequence[str] | None = None,
        check: Callable[[int], None] | None = None,
    ) -> None:
        self.paths, self._blocks, self._dim, self.alive = list(paths), list(blocks), dim, alive
        self.digests = list(digests) if digests is not None else [""] * len(self.paths)
        self._check = check
        self._unchecked = set(range(len(self.paths))) if check else set[int]()
        self._starts = np.cumsum([0, *map(len, blocks)])
        self._dtype = np.result_type(*blocks) if len(blocks) else np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """(K, dim) with K stored rows."""
        return int(self._starts[-1]), self._dim

    def extents(self) -> list[tuple[int, int]]:
        """List (stored row of its first vector, number of rows) of each file in `paths`."""
        return [(start, len(block)) for start, block in zip(self._starts[:-1].tolist(), self._blocks, strict=True)]

    def block(self, number: int) -> np.ndarray:
        """Return the block of a file, compared with its checksum."""
        self._require([number])
        return self._blocks[number]

    def parts(self) -> list[tuple[int, np.ndarray]]:
        """List (stored row of its first vector, block) of each file in `paths`, compared with their checksums."""
        self._require(range(len(self._blocks)))
        return list(zip(self._starts[:-1].tolist(), self._blocks, strict=True))

    def take(self, stored_rows: np.ndarray) -> np.ndarray:
        """Read the vectors of the stored rows (P,), as (P, dim) float32 in their order."""
        vectors = np.empty((len(stored_rows), self._dim), self._dtype)
        part = np.searchsorted(self._starts, stored_rows, side="right") - 1
        numbers = np.unique(part)
        self._require(numbers)
        for number in numbers:
            chosen = part == number
            vectors[chosen] = self._blocks[number][stored_rows[chosen] - self._starts[number]]
        return torch.from_numpy(vectors).float().numpy()  # NumPy converts float16 several times more slowly

    def _require(self, numbers: Sequence[int] | np.ndarray) -> None:
        """Compare files with their checksums, several at a time, unless that has been done."""
        if not self._unchecked or self._check is None:
            return
        open_ones = sorted(self._unchecked.intersection(map(int, numbers)))
        if len(open_ones) == 1:
            self._check(open_ones[0])
        elif open_ones:
            with ThreadPoolExecutor(min(len(open_ones), os.cpu_count() or 1)) as pool:
                list(pool.map(self._check, open_ones))
        self._unchecked.difference_update(open_ones)
