"""Several protected sets searched as one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from shielded._extras import RequestError
from shielded.protected.columns import Column
from shielded.protected.protected_set import ProtectedSet
from shielded.protected.search.interface import Pairs


def open_sets(paths: Sequence[str | os.PathLike[str]]) -> ProtectedSet:
    """Open one or several sets of one latent space, to read and to search as one.

    The rows of each follow those of the one before; ids are `folder/id`, where there are several. Changes, descriptors
    and history belong to each of `parts_of`.

    Raises:
        FileNotFoundError: there is no set at a path.
        RequestError: a set is given twice, is empty, or is of another latent space than the first.
    """
    sets = [ProtectedSet.open(os.fspath(path)) for path in paths]
    folders = [one.path.resolve() for one in sets]
    for one, folder in zip(sets, folders, strict=True):
        if folders.count(folder) > 1:
            raise RequestError(f"the protected set {one.path} is given twice.")
        if not len(one):
            raise RequestError(f"the protected set at {one.path} is empty; add images to it, or leave it out.")
        sets[0].require_space(one.space)
    return sets[0] if len(sets) == 1 else ProtectedSet(JoinedReader(sets))


def parts_of(protected: ProtectedSet) -> list[ProtectedSet]:
    """List the sets that `open_sets` has joined, in order of their rows; a set alone is its only part."""
    reader = protected._reader
    return reader.sets if isinstance(reader, JoinedReader) else [protected]


class JoinedReader:
    """A `Reader` of several sets.

    Args:
        sets: of one latent space; none of them is empty.
    """

    def __init__(self, sets: list[ProtectedSet]) -> None:
        self.sets = sets
        self.path: Path = sets[0].path
        self.space = sets[0].space
        self.manifest: dict[str, Any] = {}
        self.version = sum(one.version for one in sets)
        self._starts = np.cumsum([0, *map(len, sets)])
        names = [one.path.resolve().name for one in sets]
        same = [names[:i].count(name) for i, name in enumerate(names)]
        labels = [name if not n else f"{name}-{n + 1}" for name, n in zip(names, same, strict=True)]
        self.ids: Column = JoinedColumn([one.ids for one in sets], labels)
        self.sources: Column = JoinedColumn([one.sources for one in sets])
        self.sha256: Column = JoinedColumn([one.sha256 for one in sets])
        self._radii = torch.cat([one.radii for one in sets])

    @property
    def radii(self) -> Tensor:
        """(K,) float64: radius of each row's shield, NaN where it has none."""
        return self._radii

    @property
    def energy(self) -> float:
        """Mean of ‖z‖² over the rows."""
        return sum(one.energy * len(one) for one in self.sets) / len(self)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Read the vectors (P, dim) float32 of the rows (P,)."""
        found = np.empty((len(rows), self.space.dim), np.float32)
        for one, start, end in self._parts():
            inside = np.flatnonzero((rows >= start) & (rows < end))
            found[inside] = one._reader.take(rows[inside] - start)
        return found

    def within(self, x: Tensor, radius: np.ndarray | None, shrink: np.ndarray | None, nearest: int | None) -> Pairs:
        """Find all pairs with distance < radius; see `Reader`."""
        found = []
        for one, start, end in self._parts():
            own = radius if radius is None or not radius.ndim else radius[..., start:end]
            query, row, distance = one._reader.within(x, own, shrink, nearest)
            found.append((query, row + start, distance))
        query, row, distance = (np.concatenate(column) for column in zip(*found, strict=True))
        if nearest is not None:  # the nearest of each set; keep the nearest of all
            order = np.lexsort((row, distance, query))
            query, row, distance = query[order], row[order], distance[order]
            kept = np.arange(len(query)) - np.searchsorted(query, query) < nearest
            query, row, distance = query[kept], row[kept], distance[kept]
        order = np.lexsort((row, query))
        return query[order], row[order], distance[order]

    def nearest(self, x: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find distances and rows (B, k) of the k nearest rows; see `Reader`."""
        found = []
        for one, start, end in self._parts():
            distance, row = one._reader.nearest(x, min(k, end - start))
            found.append((distance, row + start))
        distance, row = (np.concatenate(column, axis=1) for column in zip(*found, strict=True))
        order = np.argsort(distance, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(distance, order, 1), np.take_along_axis(row, order, 1)

    def take_descriptors(self, rows: np.ndarray) -> NoReturn:
        """Refuse: descriptors belong to each set."""
        raise RuntimeError("several sets have no descriptor in common; ask each of parts_of(protected).")

    def similar(self, queries: np.ndarray, k: int) -> NoReturn:
        """Refuse: descriptors belong to each set."""
        self.take_descriptors(queries)

    def _parts(self) -> Iterator[tuple[ProtectedSet, int, int]]:
        for one, (start, end) in zip(self.sets, itertools.pairwise(self._starts.tolist()), strict=True):
            yield one, start, end


class JoinedColumn(Column):
    """Columns of several sets, one after the other.

    Args:
        columns: of the sets.
        labels: text in front of the values of each set; None: they stay as they are.
    """

    def __init__(self, columns: Sequence[Column], labels: Sequence[str] | None = None) -> None:
        self._columns, self._labels = columns, labels
        self._starts = np.cumsum([0, *map(len, columns)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: np.ndarray) -> list[Any]:
        """Read the values of the rows (P,)."""
        found: list[Any] = [None] * len(rows)
        for number, column in enumerate(self._columns):
            inside = np.flatnonzero((rows >= self._starts[number]) & (rows < self._starts[number + 1]))
            for place, value in zip(inside.tolist(), column.take(rows[inside] - self._starts[number]), strict=True):
                found[place] = value if self._labels is None else f"{self._labels[number]}/{value}"
        return found
