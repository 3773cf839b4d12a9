"""Search a protected set on a cluster: actors hold some of its shards each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shielded.latent_space import LatentSpace
from shielded.protected import store
from shielded.protected.columns import Column
from shielded.protected.ray.connection import Head, connect, results
from shielded.protected.search import Pairs, sorted_pairs
from shielded.protected.snapshot import Snapshot, missing_rows

_MAX_RETRIES = 3  # of a search whose worker died: a search that kills every worker must end
_ENTRIES_PER_QUESTION = 4096  # of a column that is iterated over


class ClusterSnapshot:
    """One version of a set whose shards are held by actors of a cluster; a `Reader` like `Snapshot`.

    Args:
        path: the set's folder, which every machine of the cluster sees.
        manifest: of the set.
        space: of the set.
        version: number of an earlier version; None: that of the manifest.
        memory: bytes that the search of each actor may hold; None: 1 GiB.
        address: of the cluster; see `connect`.
        workers: how many actors share the shards; None: one for each processor of the cluster.
    """

    def __init__(
        self,
        path: Path,
        manifest: store.Manifest,
        space: LatentSpace,
        version: int | None = None,
        memory: int | None = None,
        address: str = "auto",
        workers: int | None = None,
    ) -> None:
        ray = connect(address)
        workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.path, self.manifest, self.space = path, manifest, space
        self.version: int = manifest["version"] if version is None else version
        starts = np.cumsum([0, *(entry["rows"] for entry in manifest["shards"])])
        missing = missing_rows(path, manifest, version)
        self._head = Head()
        # Actors need memory; a processor of their own would keep other jobs off the cluster.
        options = {"max_restarts": -1, "max_task_retries": _MAX_RETRIES, "scheduling_strategy": "SPREAD"}
        actor: Any = ray.remote(num_cpus=0, **options)(ShardActor)
        folder = str(path.resolve())
        self._actors: list[Any] = []
        for low, high in pairwise(_cuts(starts, workers)):
            part = {**manifest, "shards": manifest["shards"][low:high], "removed": None}
            own = missing[(missing >= starts[low]) & (missing < starts[high])] - starts[low]
            self._actors.append(actor.remote(folder, part, own, memory))
        self._starts = np.cumsum([0, *self._ask_all("count")])
        self.ids, self.sources, self.sha256 = (ClusterColumn(self, name) for name in ("ids", "sources", "sha256"))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def radii(self) -> Tensor:
        """(K,) float64: radius of each row's shield, NaN where it has none."""
        return self._radii

    @cached_property
    def _radii(self) -> Tensor:
        return torch.from_numpy(np.concatenate([np.empty(0), *self._ask_all("radii")]))

    @property
    def energy(self) -> float:
        """Mean of ‖z‖² over the rows, 0 if there are none."""
        return self._energy

    @cached_property
    def _energy(self) -> float:
        return float(sum(self._ask_all("energy")) / len(self)) if len(self) else 0.0

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Read the vectors (P, dim) float32 of the rows (P,)."""
        vectors = np.empty((len(rows), self.space.dim), np.float32)
        for positions, answer in self.ask_for(rows, "take"):
            vectors[positions] = answer
        return vectors

    def within(self, x: Tensor, radius: np.ndarray | None, shrink: np.ndarray | None, nearest: int | None) -> Pairs:
        """Find all pairs with distance < radius; see `Reader`."""
        queries = self._put(x)
        asked = []
        for actor, (low, high) in zip(self._actors, pairwise(self._starts), strict=True):
            own = radius[..., low:high] if radius is not None and radius.ndim else radius
            asked.append(actor.within.remote(queries, own, shrink, nearest))
        found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
        for start, (query, row, distance) in zip(self._starts, results(asked, self._head), strict=False):
            found.append((query, row + start, distance))
        query, row, distance = (np.concatenate(column) for column in zip(*found, strict=True))
        return sorted_pairs((query, row, distance), nearest)

    def nearest(self, x: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find distances and rows of the k nearest rows; see `Reader`."""
        return self._smallest(self._put(x), k, "nearest")

    def take_descriptors(self, rows: np.ndarray) -> np.ndarray:
        """Read the descriptors (P, d) float32 of the rows (P,)."""
        vectors = np.empty((len(rows), self.manifest["descriptor"]["dim"]), np.float32)
        for positions, answer in self.ask_for(rows, "take_descriptors"):
            vectors[positions] = answer
        return vectors

    def similar(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find similarities and rows of the k rows with the most similar descriptors; see `Reader`."""
        opposite, rows = self._smallest(self._put(torch.from_numpy(queries)), k, "opposite")
        return -opposite, rows

    def _smallest(self, queries: Any, k: int, method: str) -> tuple[np.ndarray, np.ndarray]:
        """Ask each actor for values and rows of its k smallest; return values and rows of the k smallest of all."""
        found = results([getattr(actor, method).remote(queries, k) for actor in self._actors], self._head)
        values = np.hstack([value for value, _ in found])
        rows = np.hstack([row + start for start, (_, row) in zip(self._starts, found, strict=False)])
        order = np.lexsort((rows, values), axis=1)[:, :k]
        return np.take_along_axis(values, order, 1), np.take_along_axis(rows, order, 1)

    def ask_for(self, rows: np.ndarray, method: str, *arguments: Any) -> Iterator[tuple[np.ndarray, Any]]:
        """Ask each actor for its part of the rows (P,); yield (positions in `rows`, answer) of each."""
        part = np.searchsorted(self._starts, rows, side="right") - 1
        numbers = np.unique(part)
        positions = [np.flatnonzero(part == number) for number in numbers]
        asked = [
            getattr(self._actors[number], method).remote(rows[chosen] - self._starts[number], *arguments)
            for number, chosen in zip(numbers, positions, strict=True)
        ]
        yield from zip(positions, results(asked, self._head) if asked else [], strict=True)

    def _ask_all(self, method: str) -> list[Any]:
        asked = [getattr(actor, method).remote() for actor in self._actors]
        return results(asked, self._head) if asked else []

    def _put(self, x: Tensor) -> Any:
        """Put queries into the object store, so that each machine gets them once."""
        import ray
        from ray.exceptions import RayError

        self._head.check()  # without a head, Ray would start a cluster of its own
        try:
            return ray.put(x.detach().cpu().double().numpy())
        except (RayError, OSError):
            self._head.require()
            raise


class ShardActor:
    """Hold some of the shards of a set, and read and search them as a set of their own.

    Args:
        path: the set's folder.
        manifest: of the set, with these shards alone.
        missing: stored rows of these shards that the version does not hold.
        memory: bytes that the search may hold; None: 1 GiB.
    """

    def __init__(self, path: str, manifest: store.Manifest, missing: np.ndarray, memory: int | None) -> None:
        self._arguments = Path(path), manifest, missing, memory

    @cached_property
    def _snapshot(self) -> Snapshot:
        path, manifest, missing, memory = self._arguments
        return Snapshot(path, manifest, LatentSpace.from_json(manifest["space"]), missing, memory=memory)

    def count(self) -> int:
        return len(self._snapshot)

    def radii(self) -> np.ndarray:
        return self._snapshot.radii.numpy()

    def energy(self) -> float:
        """Sum, not mean, of ‖z‖²."""
        return self._snapshot.energy * len(self._snapshot)

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self._snapshot.take(rows.copy())

    def take_descriptors(self, rows: np.ndarray) -> np.ndarray:
        return self._snapshot.take_descriptors(rows.copy())

    def column(self, rows: np.ndarray, name: str) -> list[Any]:
        return getattr(self._snapshot, name).take(rows)

    def within(self, x: np.ndarray, radius: np.ndarray | None, shrink: np.ndarray | None, nearest: int | None) -> Pairs:
        # Arrays from the object store are read-only.
        radius, shrink = (None if array is None else array.copy() for array in (radius, shrink))
        return self._snapshot.within(torch.from_numpy(x.copy()), radius, shrink, nearest)

    def nearest(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if not len(self._snapshot):
            return np.empty((len(x), 0)), np.empty((len(x), 0), np.int64)
        return self._snapshot.nearest(torch.from_numpy(x.copy()), min(k, len(self._snapshot)))

    def opposite(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k most similar descriptors; similarities with the sign changed, so that the smallest is first."""
        if not len(self._snapshot):
            return np.empty((len(queries), 0)), np.empty((len(queries), 0), np.int64)
        similarities, rows = self._snapshot.similar(queries, min(k, len(self._snapshot)))
        return -similarities, rows


class ClusterColumn(Column):
    """A column whose entries the actors are asked for."""

    def __init__(self, snapshot: ClusterSnapshot, name: str) -> None:
        self._snapshot, self._name = snapshot, name

    def __len__(self) -> int:
        return len(self._snapshot)

    def take(self, rows: np.ndarray) -> list[Any]:
        """Read the entries of the rows (n,), in one question to each actor."""
        values: list[Any] = [None] * len(rows)
        for positions, answer in self._snapshot.ask_for(rows, "column", self._name):
            for position, value in zip(positions.tolist(), answer, strict=True):
                values[position] = value
        return values

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), _ENTRIES_PER_QUESTION):
            yield from self[start : start + _ENTRIES_PER_QUESTION]


def _cuts(starts: np.ndarray, workers: int) -> list[int]:
    """Cut the shards into at most `workers` runs with about the same number of rows; return the cuts."""
    wanted = np.linspace(0, starts[-1], workers + 1)
    return sorted({int(np.abs(starts - row).argmin()) for row in wanted})
