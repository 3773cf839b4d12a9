"""Exact search for the most similar unit vectors among millions of them, on disk.

Each vector is kept twice: as float32, and as bytes with a scale per vector. A pass over the bytes bounds every
similarity from both sides; the few vectors that the bounds leave open are compared in float64. So the answer is that of
a comparison of all of them in float64, ties included.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

_MAX_CODE = 127
_SLACK = 1e-5  # covers rounding of bounds and scales in float32
_MAX_FLOAT64_NUMBERS = 1 << 22  # converted to float64 at once
_MIN_CODED_ROWS = 2048  # fewer rows are compared in float64 without a pass over their bytes


@dataclass(frozen=True)
class Descriptors:
    """Unit vectors of images, in memory or mapped from disk.

    Args:
        vectors: (n, d) float32.
        codes: (n, d) int8, the vectors divided by their scales and rounded.
        scales: (n,) float32.
    """

    vectors: np.ndarray
    codes: np.ndarray
    scales: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray) -> Descriptors:
        """Encode vectors (n, d)."""
        vectors = np.ascontiguousarray(vectors, np.float32)
        scales = np.abs(vectors).max(axis=1, initial=1e-12) / _MAX_CODE
        codes = np.rint(vectors / scales[:, None]).clip(-_MAX_CODE, _MAX_CODE).astype(np.int8)
        return cls(vectors, codes, scales.astype(np.float32))

    def __len__(self) -> int:
        return len(self.vectors)

    def take(self, rows: np.ndarray) -> Descriptors:
        return Descriptors(self.vectors[rows], self.codes[rows], self.scales[rows])

    @staticmethod
    def concatenate(parts: Sequence[Descriptors]) -> Descriptors:
        return Descriptors(
            np.concatenate([part.vectors for part in parts]),
            np.concatenate([part.codes for part in parts]),
            np.concatenate([part.scales for part in parts]),
        )


class Bank:
    """Search among the vectors of several files.

    Rows are counted over all blocks, as they are stored.

    Args:
        blocks: vectors of each file, all of one dimension.
        alive: (K,) bool, False for the rows that have been removed; None: none has.
    """

    def __init__(self, blocks: Sequence[Descriptors], alive: np.ndarray | None = None) -> None:
        self._blocks = list(blocks)
        self._starts = np.cumsum([0, *map(len, blocks)])
        self._alive = alive

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k most similar rows of each query; of equal similarities the earlier row comes first.

        Args:
            queries: (B, d) unit vectors.
            k: at most the number of rows that have not been removed.

        Returns:
            Similarities (B, k) float64, as of the stored vectors, and stored rows (B, k).
        """
        wide = queries.astype(np.float64)
        similarities, rows = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
        open_rows = self._open_rows(wide, k) if self._starts[-1] > _MIN_CODED_ROWS else [self._live] * len(queries)
        for i, (query, candidates) in enumerate(zip(wide, open_rows, strict=True)):
            values = self._similarities(candidates, query)
            best = np.lexsort((candidates, -values))[:k]
            similarities[i], rows[i] = values[best], candidates[best]
        return similarities, rows

    @property
    def _live(self) -> np.ndarray:
        return np.arange(self._starts[-1]) if self._alive is None else np.flatnonzero(self._alive)

    def _open_rows(self, queries: np.ndarray, k: int) -> list[np.ndarray]:
        """List, for each query, the stored rows that may be among its k most similar ones, ascending."""
        coded = Descriptors.of(queries.astype(np.float32))
        restored = coded.codes * coded.scales[:, None].astype(np.float64)
        query_error = np.linalg.norm(queries - restored, axis=1)
        # |q·v - q'·v'| ≤ ‖q - q'‖ ‖v‖ + ‖q'‖ ‖v - v'‖, where ‖v‖ = 1 and ‖v - v'‖ ≤ √d scale / 2
        weight = np.linalg.norm(restored, axis=1) * np.sqrt(queries.shape[1]) / 2
        middle = np.empty((len(queries), self._starts[-1]), np.float32)
        scales = np.empty(self._starts[-1], np.float32)
        for start, block in zip(self._starts, self._blocks, strict=False):
            part = slice(start, start + len(block))
            middle[:, part] = byte_products(block.codes, coded.codes).T  # below 2²⁴, so exact in float32
            scales[part] = block.scales
        found = []
        for values, scale, own, times in zip(middle, coded.scales, query_error, weight, strict=True):
            values *= scale
            if self._alive is not None:
                values[~self._alive] = -np.inf
            margin = np.float32(times)
            lower = (values - margin) * scales
            kth = np.partition(lower, len(lower) - k)[len(lower) - k] if k > 1 else lower.max()
            values += margin
            values *= scales
            found.append(np.flatnonzero(values >= kth - 2 * (own * 1.001 + _SLACK)))
        return found

    def _similarities(self, rows: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Compute q·v (P,) of stored rows (P,) in float64, equal vectors always alike."""
        values = np.empty(len(rows))
        step = max(1, _MAX_FLOAT64_NUMBERS // len(query))
        for first in range(0, len(rows), step):
            chosen = rows[first : first + step]
            values[first : first + step] = (self.take(chosen) * query).sum(axis=1)
        return values

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Read the vectors (P, d) of stored rows (P,), in float64."""
        vectors = np.empty((len(rows), self._blocks[0].vectors.shape[1] if self._blocks else 0))
        blocks = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(blocks):
            chosen = blocks == number
            vectors[chosen] = self._blocks[number].vectors[rows[chosen] - self._starts[number]]
        return vectors


def byte_products(codes: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Multiply codes (n, d) with queries (B, d), both int8 in -127..127; return (n, B) int32 or exact float32."""
    if _integer_products_work() and len(codes):
        return _int_mm(_tensor(codes), _tensor(np.ascontiguousarray(queries.T))).numpy()
    products = np.empty((len(codes), len(queries)), np.float32)
    step = max(1, _MAX_FLOAT64_NUMBERS // max(1, codes.shape[1]))
    wide = queries.T.astype(np.float32)
    for first in range(0, len(codes), step):  # sums of up to 1,024 products of bytes are exact in float32
        products[first : first + step] = codes[first : first + step].astype(np.float32) @ wide
    return products


@cache
def _integer_products_work() -> bool:
    """Tell whether torch multiplies bytes here, exactly also where sums are largest.

    Without VNNI some libraries add neighbouring products in 16 bits, which overflow.
    """
    one = np.full((32, 64), _MAX_CODE, np.int8)
    one[::3] = -_MAX_CODE
    one[:, ::5] = 1
    try:
        product = _int_mm(_tensor(one), _tensor(np.ascontiguousarray(one[:17].T))).numpy()
    except (AttributeError, RuntimeError):  # torch has no such function, or not for this processor
        return False
    return bool((product == one.astype(np.int64) @ one[:17].T.astype(np.int64)).all())


def _int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply int8 matrices to int32."""
    return getattr(torch, "_int_mm")(a, b)  # noqa: B009 (type checkers do not know it)


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Wrap an int8 array that is only read, and outlives the tensor; torch would warn of mapped ones."""
    if array.flags.writeable:
        return torch.from_numpy(array)
    address = (ctypes.c_int8 * array.size).from_address(array.ctypes.data)
    return torch.frombuffer(address, dtype=torch.int8).view(array.shape)
