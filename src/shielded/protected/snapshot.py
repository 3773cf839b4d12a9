"""Read one version of a protected set: its rows, mapped from disk, and the exact search among them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shielded.copies import Bank
from shielded.latent_space import LatentSpace
from shielded.protected import store
from shielded.protected.columns import Column, Ids, Rows, StoredColumn
from shielded.protected.search import MEMORY_BYTES, Pairs, Search
from shielded.protected.search.indexed.index import index_path
from shielded.protected.vectors import Vectors

DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Reader(Protocol):
    """One version of a set to read and to search, on this machine (`Snapshot`) or on a cluster (`ClusterSnapshot`).

    Arguments are checked before they come here: queries have the shape of the set and are finite, rows exist.
    """

    path: Path
    space: LatentSpace
    manifest: store.Manifest
    version: int

    @property
    def ids(self) -> Column: ...

    @property
    def sources(self) -> Column: ...

    @property
    def sha256(self) -> Column: ...

    @property
    def radii(self) -> Tensor:
        """(K,) float64, NaN where a row has none; the same tensor each time."""
        ...

    @property
    def energy(self) -> float: ...

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Read the vectors (P, dim) float32 of the rows (P,)."""
        ...

    def within(self, x: Tensor, radius: np.ndarray | None, shrink: np.ndarray | None, nearest: int | None) -> Pairs:
        """Find all pairs with distance < radius.

        Args:
            x: queries (B, dim).
            radius: (), (K,) or (B, K) float64; None: `radii`.
            shrink: (B,) subtracted from the squared radii of each query; None: nothing.
            nearest: keep only so many pairs of each query, the nearest ones; None: all.

        Returns:
            Query, row and distance of each pair, sorted by query, then by row.
        """
        ...

    def nearest(self, x: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find distances and rows (B, k) of the k nearest rows, nearest first; ties in the order of the rows."""
        ...

    def take_descriptors(self, rows: np.ndarray) -> np.ndarray:
        """Read the descriptors (P, d) float32 of the rows (P,), in a set with a descriptor."""
        ...

    def similar(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find similarities and rows (B, k) of the k rows whose descriptors are most similar to queries (B, d).

        Only for a set with a descriptor; ties in the order of the rows.
        """
        ...


class Snapshot:
    """One version of a set on this machine. Latents, ids, sources and digests are mapped, not read.

    Args:
        path: the set's folder.
        manifest: which files make up the version, or a later one.
        space: the space of the latents.
        missing: stored rows that the version does not hold; see `missing_rows`.
        version: number of the version; None: that of the manifest.
        memory: bytes that the search may hold besides queries and answers; None: 1 GiB.
        mapped: shards that are mapped already, by file name.
    """

    def __init__(
        self,
        path: Path,
        manifest: store.Manifest,
        space: LatentSpace,
        missing: np.ndarray,
        version: int | None = None,
        memory: int | None = None,
        mapped: Mapping[str, Rows] | None = None,
    ) -> None:
        self.path, self.manifest, self.space = path, manifest, space
        self.version: int = manifest["version"] if version is None else version
        self.dtype = DTYPES[manifest["dtype"]]
        self.memory = MEMORY_BYTES if memory is None else memory
        self._files: dict[str, Rows] = {
            entry["file"]: (mapped or {}).get(entry["file"])
            or store.read_shard(path, entry, space.dim, manifest["dtype"])
            for entry in manifest["shards"]
        }
        self.shards = list(self._files.values())
        alive = None
        if len(missing):
            alive = np.ones(sum(map(len, self.shards)), bool)
            alive[missing] = False
        self._live = None if alive is None else np.flatnonzero(alive)
        self._lock = threading.Lock()
        files = [path / name for name in self._files]
        self.vectors = Vectors(
            files,
            [rows.latents for rows in self.shards],
            space.dim,
            alive,
            [entry["sha256"] for entry in manifest["shards"]],
            lambda number: store.require_intact(path, manifest["shards"][number]),
        )
        self._search = Search(self.vectors, [index_path(file) for file in files], space.shape, self.memory)
        self.ids = Ids(self.shards, self._live, alive)
        self.sources = StoredColumn([rows.sources for rows in self.shards], self._live)
        self.sha256 = StoredColumn([rows.sha256 for rows in self.shards], self._live)

    @classmethod
    def read(
        cls,
        path: Path,
        manifest: store.Manifest,
        space: LatentSpace,
        version: int | None = None,
        memory: int | None = None,
    ) -> Snapshot:
        """Map a version of a set; None: that of the manifest."""
        return cls(path, manifest, space, missing_rows(path, manifest, version), version, memory)

    def at(self, manifest: store.Manifest) -> Snapshot:
        """Map the version of another manifest of the same set; shards in both stay mapped."""
        missing = missing_rows(self.path, manifest)
        return Snapshot(self.path, manifest, self.space, missing, memory=self.memory, mapped=self._files)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def radii(self) -> Tensor:
        """(K,) float64: radius of each row's shield, NaN where it has none."""
        with self._lock:  # several threads get the same tensor
            return self._radii

    @cached_property
    def _radii(self) -> Tensor:
        return torch.from_numpy(self._live_values([rows.radii for rows in self.shards]))

    @property
    def energy(self) -> float:
        """Mean of ‖z‖² over the rows, 0 if there are none."""
        return float(self._live_values([rows.norms for rows in self.shards]).mean()) if len(self) else 0.0

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Read the vectors (P, dim) float32 of the rows (P,)."""
        vectors = self.vectors.take(rows if self._live is None else self._live[rows])
        if not np.isfinite(vectors).all():
            raise ValueError(f"The protected set at {self.path} is damaged: a row is not finite.")
        return vectors

    def within(self, x: Tensor, radius: np.ndarray | None, shrink: np.ndarray | None, nearest: int | None) -> Pairs:
        """Find all pairs with distance < radius; see `Reader`."""
        return self._search.within(x, self.radii.numpy() if radius is None else radius, shrink, nearest)

    def nearest(self, x: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find distances and rows of the k nearest rows; see `Reader`."""
        return self._search.nearest(x, k)

    def take_descriptors(self, rows: np.ndarray) -> np.ndarray:
        """Read the descriptors (P, d) float32 of the rows (P,)."""
        with self._lock:
            bank = self._bank
        return bank.take(rows if self._live is None else self._live[rows]).astype(np.float32)

    def similar(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find similarities and rows of the k rows with the most similar descriptors; see `Reader`."""
        with self._lock:
            bank = self._bank
        similarities, stored = bank.nearest(queries, k)
        return similarities, stored if self._live is None else np.searchsorted(self._live, stored)

    @cached_property
    def _bank(self) -> Bank:
        self.vectors.parts()  # compares the shards with their checksums
        blocks = [rows.descriptors for rows in self.shards if rows.descriptors is not None]
        if len(blocks) < len(self.shards):
            raise ValueError(f"The protected set at {self.path} is damaged: a shard has no descriptors.")
        return Bank(blocks, self.vectors.alive)

    def _live_values(self, parts: list[np.ndarray]) -> np.ndarray:
        values = np.concatenate([np.empty(0), *parts])
        return values if self._live is None else values[self._live]


def missing_rows(path: Path, manifest: store.Manifest, version: int | None = None) -> np.ndarray:
    """Find the stored rows that a version does not hold: removed by then, or added later.

    Args:
        path: the set's folder.
        manifest: of the newest version.
        version: an earlier version; None: the newest.

    Raises:
        ValueError: there is no such version, or it no longer exists.
    """
    rows, versions = store.read_removed(path, manifest["removed"])
    stored = sum(entry["rows"] for entry in manifest["shards"])
    if len(rows) and (rows[-1] >= stored or versions.min() < 1 or versions.max() > manifest["version"]):
        raise ValueError(f"{path / manifest['removed']['file']} is damaged: its rows are not those of the set.")
    if version is None:
        return rows
    return np.append(rows[versions <= version], np.arange(_stored_at(path, manifest, version), stored))


def _stored_at(path: Path, manifest: store.Manifest, version: int) -> int:
    """Count the rows that were stored in a version, including those removed by then."""
    newest, oldest = manifest["version"], manifest["oldest"]
    history = store.read_history(path, manifest)
    if not 1 <= version <= newest:
        raise ValueError(f"The protected set at {path} has no version {version}; the newest is {newest}.")
    if version < oldest:
        event = history[oldest - 1]
        raise ValueError(
            f"Version {version} of the protected set at {path} no longer exists: version {oldest} "
            f"({event['action']}, {event['time']}) replaced it; {oldest} to {newest} can be opened."
        )
    start = history[oldest - 1]["count"]
    return start + sum(event["count"] for event in history[oldest:version] if event["action"] == "add")
