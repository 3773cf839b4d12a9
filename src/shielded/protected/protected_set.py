"""ProtectedSet: references on disk with ids and radii, and exact search among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shielded.latent_space import LatentSpace
from shielded.protected import store
from shielded.protected.columns import Column, Digests, Ids, Rows, Texts, keys
from shielded.protected.search.indexed.index import index_path
from shielded.protected.search.search import MEMORY, Hits, Search
from shielded.protected.vectors import Vectors

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_SHARD_BYTES = 1 << 26  # of latents in one file, unless a single row is larger
_CHUNK = 1 << 24  # numbers that are brought to float32 at once


class ProtectedSet:
    """The images that samples must stay away from, as latents in a folder.

    `ProtectedSet.create(path, space)` and `ProtectedSet.open(path)` make one. An open set is a snapshot: it keeps
    working while another process writes, and its own changes build on whatever is on disk by then. Latents, ids,
    sources and digests stay on disk and are mapped into memory, so a set may be far larger than that. Row numbers are
    positions in `ids` and change when rows are removed.

    Attributes:
        path: the folder.
        space: the `LatentSpace` of the references. It has no autoencoder if the set was opened.
        version: grows by one with every change.
        ids: name of each row, like a list.
        sources: where each row's image came from, or None, like a list.
        sha256: digest of each row's image file, or None, like a list.
    """

    path: Path
    space: LatentSpace
    version: int
    ids: Ids
    sources: Column
    sha256: Column

    def __init__(
        self,
        path: Path,
        manifest: store.Manifest,
        space: LatentSpace,
        version: int | None = None,
        memory: int | None = None,
    ) -> None:
        """For `create` and `open`."""
        self.path = path
        self.space = space
        self._memory = MEMORY if memory is None else memory
        self._files: dict[str, Rows] = {}
        self._load(manifest, version)

    @classmethod
    def create(
        cls, path: str | Path, space: LatentSpace, dtype: torch.dtype = torch.float32, overwrite: bool = False
    ) -> ProtectedSet:
        """Makes an empty set.

        Args:
            path: a folder that is empty or does not exist yet.
            space: the space that the references live in.
            dtype: torch.float32, or torch.float16 for half the size. Distances are those to the stored vectors, which
                float16 moves by at most 2⁻¹¹ of their norm.
            overwrite: replace a set that is already there.

        Returns:
            The new set.

        Raises:
            FileExistsError: if there is something in the folder.
            ValueError: if the dtype is another one.
        """
        path = Path(path)
        name = str(dtype).removeprefix("torch.")
        if _DTYPES.get(name) != dtype:
            raise ValueError(f"A protected set stores torch.float32 or torch.float16; got {dtype}.")
        with store.explained(path):
            path.mkdir(parents=True, exist_ok=True)
        if not all(store.is_own(file) for file in path.iterdir()):
            raise FileExistsError(f"{path} holds other files; give a protected set a folder of its own.")
        with store.writing(path):
            manifest = {"version": 0, "next_file": 1, "history": {"bytes": 0, "sha256": ""}}
            if (path / store.MANIFEST).exists():
                if not overwrite:
                    raise FileExistsError(f"{path} is a protected set already; open it, or pass overwrite=True.")
                # Numbers go on, so that no reader of the old set takes a new file for one of its own.
                manifest = store.read_manifest(path)
            manifest |= {
                "format": store.FORMAT,
                "space": space.to_json(),
                "fingerprint": space.fingerprint,
                "dtype": name,
                "shards": [],
                "removed": None,
                "oldest": manifest["version"] + 1,
            }
            manifest = _commit(path, manifest, "create", 0)
            store.delete_unused(path, manifest)
        return cls(path, manifest, space)

    @classmethod
    def open(
        cls, path: str | Path, version: int | None = None, ray: str | None = None, memory: int | None = None
    ) -> ProtectedSet:
        """Opens a set.

        Args:
            path: the folder of the set.
            version: None for the set as it is now, or the number of an earlier version, which can be opened until
                `compact` deletes what has been removed since.
            ray: address of a Ray cluster whose workers share the shards between them and search them, for a set that
                is too large for one machine; see `shielded.protected.ray`.
            memory: bytes that the search may hold besides queries and answers, in each worker with `ray`; None: 1 GiB.
                With less it takes fewer images at a time. What is mapped from disk does not count.

        Returns:
            The set.

        Raises:
            FileNotFoundError: if there is no set, or one of its files is missing.
            ValueError: if one of its files is damaged, the version does not exist or no longer does, or the memory is
                not positive.
            RuntimeError: if Ray is not installed, or no cluster answers at that address.
        """
        if memory is not None and not memory > 0:
            raise ValueError(f"memory must be a positive number of bytes, not {memory}; 1 << 30 is 1 GiB.")
        path = Path(path)
        manifest = store.read_manifest(path)
        make: Callable[..., ProtectedSet] = cls
        if ray is not None:
            from shielded.protected.ray.cluster import ClusterSet

            make = partial(ClusterSet, address=ray)
        while True:
            try:
                return make(path, manifest, LatentSpace.from_json(manifest["space"]), version, memory=memory)
            except FileNotFoundError:
                # A writer may have replaced files between the two reads; then there is a newer manifest.
                newer = store.read_manifest(path)
                if newer["version"] == manifest["version"]:
                    raise
                manifest = newer

    def add(
        self,
        latents: Tensor,
        ids: Sequence[str | int],
        radius: float | Tensor | Sequence[float] | None = None,
        sources: Sequence[str | None] | None = None,
        sha256: Sequence[str | None] | None = None,
    ) -> None:
        """Adds references: all of them or, on any error, none.

        Args:
            latents: (n, *shape), any floating dtype and device; rounded to the set's dtype.
            ids: n names that the set does not have yet.
            radius: of the shields, L2 in the latent space: one for all, (n,), or None to leave it open.
            sources: n paths or addresses of the images.
            sha256: n digests of the image files.

        Raises:
            TypeError: if latents or ids have the wrong type.
            ValueError: if shapes, values or ids are not as above.
            RuntimeError: if another process is writing.
            OSError: if the disk is full or the folder read-only.
        """
        rows = self._checked_rows(latents, ids, radius, sources, sha256)
        if not len(rows):
            return
        with store.writing(self.path):
            self._refresh()
            known = self.ids.find(list(rows.ids))
            if known:
                raise ValueError(f"{len(known)} of the ids are in the set already: {_few(known)}.")
            shards = self._manifest["shards"]
            kept = self._untouched(len(rows))
            for entry in shards[kept:]:
                store.check_file(self.path, entry)  # what is damaged must not get a new checksum
            merged = Rows.concatenate([*self._shards[kept:], rows])
            entries = self._write(merged, self._manifest["next_file"])
            self._commit("add", len(rows), [*shards[:kept], *entries])
            if kept < len(shards):
                store.delete_unused(self.path, self._manifest)

    def remove(self, ids: Sequence[str | int]) -> None:
        """Removes references from now on. Their vectors stay on disk until `compact`, their ids in the history.

        Args:
            ids: names of rows; all of them are removed or, on any error, none.

        Raises:
            KeyError: naming the ids that the set does not have.
            RuntimeError: if another process is writing.
            OSError: if the disk is full or the folder read-only.
        """
        gone = list(dict.fromkeys(_id_list(ids)))
        if not gone:
            return
        with store.writing(self.path):
            self._refresh()
            found = self.ids.find(gone)
            unknown = set(gone).difference(found)
            if unknown:
                raise KeyError(f"The protected set has no {_few(unknown)}.")
            rows = np.append(self._removed[0], list(found.values()))
            versions = np.append(self._removed[1], np.full(len(found), self.version + 1))
            order = np.argsort(rows)
            entry = store.write_removed(self.path, self._manifest["next_file"], rows[order], versions[order])
            self._commit("remove", len(gone), self._manifest["shards"], removed=entry, ids=gone)
            store.delete_unused(self.path, self._manifest)

    def compact(self) -> None:
        """Deletes the vectors of removed references from disk and joins small files; older versions go with them.

        Only files that change are written anew. The version stays the same if there is nothing to do.

        Raises:
            RuntimeError: if another process is writing.
            OSError: if the disk is full or the folder read-only.
        """
        with store.writing(self.path):
            self._refresh()
            shards = self._compacted()
            if shards != self._manifest["shards"]:
                self._commit("compact", len(self), shards, removed=None, oldest=self.version + 1)
            store.delete_unused(self.path, self._manifest)

    def verify(self) -> dict[str, Any]:
        """Checks every file of the set on disk against its checksum.

        Returns:
            `version`, `rows`, `shards` (numbers) and `fingerprint` of what is on disk.

        Raises:
            FileNotFoundError: naming a missing file.
            ValueError: naming a damaged file.
        """
        manifest = store.read_manifest(self.path)
        removed = [] if manifest["removed"] is None else [manifest["removed"]]
        for entry in [*manifest["shards"], *removed]:
            store.check_file(self.path, entry)
        store.read_history(self.path, manifest)
        if LatentSpace.from_json(manifest["space"]).fingerprint != manifest["fingerprint"]:
            raise ValueError(f"{self.path / store.MANIFEST} is damaged: its fingerprint is not that of its space.")
        return {
            "version": manifest["version"],
            "rows": sum(entry["rows"] for entry in manifest["shards"]) - sum(entry["rows"] for entry in removed),
            "shards": len(manifest["shards"]),
            "fingerprint": manifest["fingerprint"],
        }

    def require_space(self, space: LatentSpace) -> None:
        """Refuses a latent space in which the references of this set mean nothing.

        Raises:
            ValueError: naming what differs.
        """
        try:
            self.space.require_same(space)
        except ValueError as error:
            raise ValueError(f"The protected set at {self.path} was made for another latent space. {error}") from None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"ProtectedSet({str(self.path)!r}, {len(self)} rows of shape {self.space.shape}, version {self.version})"

    @cached_property
    def radii(self) -> Tensor:
        """(K,) float64 on the CPU: radius of each row's shield, NaN where none was given."""
        return torch.from_numpy(self._live_values([rows.radii for rows in self._shards]))

    @property
    def energy(self) -> float:
        """Mean of ‖z‖² over the references, 0 if there are none."""
        return float(self._norms().mean()) if len(self) else 0.0

    @property
    def history(self) -> list[dict[str, Any]]:
        """What happened up to this version, oldest first.

        Each entry has `version`, `time` (UTC), `action` (create, add, remove or compact) and `count`, how many rows
        were added or removed, or are there after compacting; entries of `remove` also have the `ids`.
        """
        events = store.read_history(self.path, self._manifest)
        return [event for event in events if event["version"] <= self.version]

    def vectors(self, rows: Tensor | Sequence[int]) -> Tensor:
        """The references of the given rows.

        Args:
            rows: (P,) row numbers.

        Returns:
            (P, *shape) float32, on the device of `rows`.

        Raises:
            IndexError: if there is no such row.
        """
        rows = torch.as_tensor(rows, dtype=torch.int64)
        numbers = rows.cpu().numpy()
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(self)):
            raise IndexError(f"The protected set has the rows 0 to {len(self) - 1}; got {numbers.tolist()[:3]}.")
        stored = numbers if self._live is None else self._live[numbers]
        return torch.from_numpy(self._vectors.take(stored)).to(rows.device).unflatten(1, self.space.shape)

    def within(
        self,
        x0: Tensor,
        radius: float | Tensor | None = None,
        shrink: Tensor | None = None,
        nearest: int | None = None,
    ) -> Hits:
        """Finds every reference that is nearer than its radius, strictly: d < r. None is missed.

        Args:
            x0: (B, *shape), any floating dtype and device.
            radius: L2: one number, one per row (K,), one per image and row (B, K), or None for the set's own radii.
            shrink: (B,) what is subtracted from the squared radii of each image (posterior radius); a radius that it
                brings to 0 finds nothing.
            nearest: only so many hits of each image, the nearest ones; None: all.

        Returns:
            The hits, on the device of `x0`.

        Raises:
            ValueError: if the shape of `x0` is wrong, a value is not finite, a radius or `shrink` is missing or
                negative, or `nearest` is below 1.
        """
        if nearest is not None and nearest < 1:
            raise ValueError(f"nearest must be at least 1, not {nearest}; None means all references within the radius.")
        x = self._checked_queries(x0)
        radii = self._checked_radius(radius, len(x))
        query, row, distance = self._search.within(x, radii, _checked_shrink(shrink, len(x)), nearest)
        return Hits(*(_like(part, x0) for part in (query, row, distance)))

    def nearest(self, x0: Tensor, k: int = 1) -> tuple[Tensor, list[list[str | int]]]:
        """Finds the k nearest references, nearest first; of equal distances the earlier row comes first.

        Args:
            x0: (B, *shape), any floating dtype and device.
            k: how many, at most the number of rows.

        Returns:
            Distances (B, k), float64 on the device of `x0`, and for each image the k ids.

        Raises:
            ValueError: if the set has fewer than k rows, the shape of `x0` is wrong, or a value is not finite.
        """
        distances, rows = self.nearest_rows(x0, k)
        return distances, [[self.ids[row] for row in image] for image in rows.tolist()]

    def nearest_rows(self, x0: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Like `nearest`, with row numbers (B, k) instead of ids."""
        x = self._checked_queries(x0)
        if not len(self):
            raise ValueError(f"The protected set at {self.path} is empty, so nothing is nearest; add references first.")
        if not 1 <= k <= len(self):
            raise ValueError(f"k must be between 1 and the {len(self)} rows of the set; got {k}.")
        distances, rows = self._search.nearest(x, k)
        return _like(distances, x0), _like(rows, x0)

    # ---- what is on disk ----

    def _load(self, manifest: store.Manifest, version: int | None = None) -> None:
        """Maps the files of a manifest; those that are mapped already stay."""
        dtype, dim = manifest["dtype"], self.space.dim
        self._files = {
            entry["file"]: self._files.get(entry["file"]) or store.read_shard(self.path, entry, dim, dtype)
            for entry in manifest["shards"]
        }
        self._removed = store.read_removed(self.path, manifest["removed"])
        self._manifest, self._dtype = manifest, _DTYPES[dtype]
        self.version = manifest["version"] if version is None else version
        self._shards = shards = list(self._files.values())
        paths = [self.path / name for name in self._files]
        removed, versions = self._removed
        alive = np.ones(sum(map(len, shards)), bool)
        if version is not None:
            alive[self._rows_at(version) :] = False
            removed = removed[versions <= version]
        alive[removed] = False
        if alive.all():
            alive = None
        self._live = None if alive is None else np.flatnonzero(alive)
        self._vectors = Vectors(paths, [rows.latents for rows in shards], dim, alive)
        self._search = Search(self._vectors, [index_path(path) for path in paths], self.space.shape, self._memory)
        self.ids = Ids(shards, self._live, alive)
        self.sources = Column([rows.sources for rows in shards], self._live)
        self.sha256 = Column([rows.sha256 for rows in shards], self._live)
        self.__dict__.pop("radii", None)

    def _rows_at(self, version: int) -> int:
        """How many rows were stored in a version, those removed by then included."""
        newest, oldest = self._manifest["version"], self._manifest["oldest"]
        history = store.read_history(self.path, self._manifest)
        if not 1 <= version <= newest:
            raise ValueError(f"The protected set at {self.path} has no version {version}; the newest is {newest}.")
        if version < oldest:
            event = history[oldest - 1]
            raise ValueError(
                f"Version {version} of the protected set at {self.path} no longer exists: version {oldest} "
                f"({event['action']}, {event['time']}) replaced it; {oldest} to {newest} can be opened."
            )
        start = history[oldest - 1]["count"]
        return start + sum(event["count"] for event in history[oldest:version] if event["action"] == "add")

    def _live_values(self, parts: list[np.ndarray]) -> np.ndarray:
        values = np.concatenate([np.empty(0), *parts])
        return values if self._live is None else values[self._live]

    def _norms(self) -> np.ndarray:
        """(K,) ‖z‖² of the rows."""
        return self._live_values([rows.norms for rows in self._shards])

    def _refresh(self) -> None:
        """Takes over what others have written since this set was read."""
        manifest = store.read_manifest(self.path)
        if manifest["version"] != self.version:
            self.space.require_same(LatentSpace.from_json(manifest["space"]))
            if _DTYPES[manifest["dtype"]] != self._dtype:
                raise ValueError(f"{self.path} has been replaced by a set of {manifest['dtype']}; open it again.")
            self._load(manifest)

    def _commit(self, action: str, count: int, shards: list[dict[str, Any]], ids: Any = None, **changes: Any) -> None:
        self._load(_commit(self.path, {**self._manifest, "shards": shards, **changes}, action, count, ids))

    def _untouched(self, new: int) -> int:
        """How many of the shards stay as they are when rows are added; smaller ones at the end are merged with them.

        A shard is merged with at least as many rows, so a row is written anew at most log2(rows per shard) times, and
        a million single adds leave a dozen small files.
        """
        shards = self._manifest["shards"]
        kept = len(shards)
        while kept and shards[kept - 1]["rows"] <= new and new + shards[kept - 1]["rows"] <= self._rows_per_shard:
            kept -= 1
            new += shards[kept]["rows"]
        return kept

    @property
    def _rows_per_shard(self) -> int:
        return max(1, _SHARD_BYTES // (self.space.dim * self._dtype.itemsize))

    def _write(self, rows: Rows, number: int) -> list[dict[str, Any]]:
        """Writes rows as new shards, numbered from `number`, and returns their entries."""
        size = self._rows_per_shard
        parts = (
            [rows]
            if len(rows) <= size
            else [rows.take(np.arange(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
        )
        return [store.write_shard(self.path, number + i, part, self.space.shape) for i, part in enumerate(parts)]

    def _compacted(self) -> list[dict[str, Any]]:
        """The shards without what has been removed, neighbours joined where they fit into one; writes the new ones."""
        alive = self._vectors.alive
        groups: list[list[tuple[dict[str, Any], Rows, np.ndarray]]] = [[]]
        size = 0
        for entry, rows, (first, _) in zip(self._manifest["shards"], self._shards, self._vectors.parts(), strict=True):
            live = np.arange(len(rows)) if alive is None else np.flatnonzero(alive[first : first + len(rows)])
            if size + len(live) > self._rows_per_shard:
                groups.append([])
                size = 0
            size += len(live)
            groups[-1].append((entry, rows, live))
        entries: list[dict[str, Any]] = []
        number = self._manifest["next_file"]
        for group in groups:
            if len(group) == 1 and len(group[0][2]) == len(group[0][1]):
                entries.append(group[0][0])
            elif any(len(live) for _, _, live in group):
                for entry, _, _ in group:
                    store.check_file(self.path, entry)
                merged = Rows.concatenate([rows.take(live) for _, rows, live in group if len(live)])
                entries += self._write(merged, number)
                number += 1
        return entries

    # ---- checks of what comes in ----

    def _checked_rows(self, latents: Tensor, ids: Any, radius: Any, sources: Any, sha256: Any) -> Rows:
        if not isinstance(latents, Tensor) or not latents.is_floating_point():
            raise TypeError(f"latents must be a float tensor; got {getattr(latents, 'dtype', type(latents).__name__)}.")
        self._check_shape(latents, "latents")
        ids = _id_list(ids)
        if len(ids) != len(latents):
            raise ValueError(f"{len(latents)} latents need as many ids; got {len(ids)}.")
        if len(set(ids)) < len(ids):
            raise ValueError(f"The ids must differ; repeated: {_few(i for i, n in Counter(ids).items() if n > 1)}.")
        latents = latents.detach().to("cpu", self._dtype, copy=True)
        flat = latents.flatten(1).numpy()
        norms = _norms(flat)
        if not np.isfinite(norms).all():
            bad = [name for name, norm in zip(ids, norms, strict=True) if not np.isfinite(norm)]
            raise ValueError(f"These latents are not finite in {self._dtype}: {_few(bad)}.")
        names = []
        for name, values in (("sources", sources), ("sha256", sha256)):
            values = [None] * len(ids) if values is None else list(values)
            if len(values) != len(ids):
                raise ValueError(f"{len(ids)} latents need as many {name}; got {len(values)}.")
            names.append(values)
        try:
            digests = Digests.of(names[1])
        except (TypeError, ValueError):
            raise ValueError("sha256 must be digests of 64 hexadecimal digits, or None.") from None
        texts = Texts.of(ids)
        return Rows(flat, norms, _row_radii(radius, len(ids)), keys(texts), texts, Texts.of(names[0]), digests)

    def _check_shape(self, latents: Tensor, name: str) -> None:
        if latents.ndim < 1 or tuple(latents.shape[1:]) != self.space.shape:
            raise ValueError(
                f"{name} must have the shape (B, {', '.join(map(str, self.space.shape))}) of the protected set; got "
                f"{tuple(latents.shape)}."
            )

    def _checked_queries(self, x0: Tensor) -> Tensor:
        self._check_shape(x0, "x0")
        x = x0.detach().flatten(1)
        if not x.isfinite().all():
            raise ValueError("x0 has NaN or infinite values, so its distances are not defined.")
        return x

    def _checked_radius(self, radius: float | Tensor | None, batch: int) -> np.ndarray:
        if radius is None:
            missing = int(self.radii.isnan().sum())
            if missing:
                raise ValueError(
                    f"{missing} of {len(self)} references have no radius of their own; pass radius=, or add them "
                    "with one."
                )
            radius = self.radii
        radius = torch.as_tensor(radius, dtype=torch.float64).detach().cpu()
        if radius.ndim and radius.shape not in ((len(self),), (batch, len(self))):
            raise ValueError(
                f"radius must be one number, {(len(self),)} or {(batch, len(self))}; got {tuple(radius.shape)}."
            )
        if not (radius >= 0).all():
            raise ValueError("A radius is negative or NaN; it is an L2 distance in the latent space.")
        return radius.expand(batch, len(self)).numpy()


def _id_list(ids: Any) -> list[str | int]:
    ids = None if isinstance(ids, str) else list(ids)
    if ids is None or not all(isinstance(name, str | int) for name in ids):
        raise TypeError("ids must be a list of strings (or plain integers).")
    return ids


def _commit(path: Path, manifest: store.Manifest, action: str, count: int, ids: Any = None) -> store.Manifest:
    """Makes what a manifest names the next version, and returns it as written."""
    version = manifest["version"] + 1
    event = {"version": version, "time": datetime.now(UTC).isoformat(timespec="seconds"), "action": action}
    event |= {"count": count} if ids is None else {"count": count, "ids": ids}
    files = [entry["file"] for entry in [*manifest["shards"], manifest["removed"]] if entry is not None]
    manifest = {
        **manifest,
        "version": version,
        "next_file": max([manifest["next_file"], *(int(name.partition(".")[0]) + 1 for name in files)]),
        "history": store.append_history(path, manifest["history"], event),
    }
    store.write_manifest(path, manifest)
    return manifest


def _norms(latents: np.ndarray) -> np.ndarray:
    """‖z‖² of each row of (n, dim), in float64."""
    step = max(1, _CHUNK // latents.shape[1])
    parts = [latents[i : i + step].astype(np.float64) for i in range(0, len(latents), step)]
    return np.concatenate([np.empty(0), *(np.square(part, out=part).sum(1) for part in parts)])


def _row_radii(radius: Any, n: int) -> np.ndarray:
    """A given radius as (n,) float64, NaN for None."""
    if radius is None:
        return np.full(n, np.nan)
    radii = torch.as_tensor(radius, dtype=torch.float64).detach().cpu()
    if radii.ndim and radii.shape != (n,):
        raise ValueError(f"radius must be one number or ({n},); got {tuple(radii.shape)}.")
    if not (radii.isfinite() & (radii > 0)).all():
        raise ValueError("A radius must be positive and finite; None leaves it open.")
    return radii.expand(n).clone().numpy()


def _checked_shrink(shrink: Tensor | None, batch: int) -> np.ndarray | None:
    if shrink is None:
        return None
    shrink = torch.as_tensor(shrink).detach().cpu().double()
    if shrink.shape != (batch,) or not (shrink >= 0).all():
        raise ValueError(f"shrink must be {(batch,)} numbers, none of them negative; got {tuple(shrink.shape)}.")
    return shrink.numpy()


def _like(array: np.ndarray, x0: Tensor) -> Tensor:
    tensor = torch.from_numpy(array)
    if x0.device.type == "mps" and tensor.is_floating_point():  # Metal has no float64
        tensor = tensor.float()
    return tensor.to(x0.device)


def _few(names: Any) -> str:
    """Up to three names, for a message."""
    names = sorted(names, key=str)
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
