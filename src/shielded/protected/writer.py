"""Create a protected set and change it: add, remove, compact. Only the process that holds the lock does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shielded.copies import Descriptors
from shielded.latent_space import LatentSpace
from shielded.protected import store
from shielded.protected.columns import Digests, Id, Rows, Texts, is_mirrored, keys
from shielded.protected.snapshot import DTYPES, Snapshot

_MAX_SHARD_BYTES = 1 << 26  # of latents in one file, unless a single row is larger
_MAX_FLOAT64_NUMBERS = 1 << 24  # converted to float64 at once


def create(
    path: Path, space: LatentSpace, dtype: torch.dtype, overwrite: bool, descriptor: dict[str, Any] | None
) -> Snapshot:
    """Make an empty set, as described at `ProtectedSet.create`."""
    name = str(dtype).removeprefix("torch.")
    if DTYPES.get(name) != dtype:
        raise ValueError(f"A protected set stores torch.float32 or torch.float16; got {dtype}.")
    with store.explained(path):
        path.mkdir(parents=True, exist_ok=True)
    foreign = sorted(file.name for file in path.iterdir() if not store.is_own(file))
    if foreign:
        raise FileExistsError(
            f"{path} holds other files, such as {foreign[0]}; give a protected set a folder of its own."
        )
    with store.writing(path):
        manifest: store.Manifest = {"version": 0, "next_file": 1, "history": {"bytes": 0, "sha256": ""}}
        if (path / store.MANIFEST).exists():
            if not overwrite:
                raise FileExistsError(f"{path} is a protected set already; open it, or pass overwrite=True.")
            # Numbers go on, so that no reader of the old set takes a new file for one of its own.
            manifest = store.read_manifest(path)
        else:
            store.require_no_remains(path)
        manifest |= {
            "format": store.FORMAT,
            "space": space.to_json(),
            "fingerprint": space.fingerprint,
            "dtype": name,
            "descriptor": descriptor,
            "shards": [],
            "removed": None,
            "oldest": manifest["version"] + 1,
        }
        manifest = _commit(path, manifest, "create", 0)
        store.delete_unused(path, manifest)
    return Snapshot.read(path, manifest, space)


class Writer:
    """Change a set from its newest version on. The caller holds the lock, `store.writing`.

    Attributes:
        snapshot: the newest version.

    Args:
        snapshot: some version of the set.

    Raises:
        ValueError: the set has been replaced by one of another latent space or dtype.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        manifest = store.read_manifest(snapshot.path)
        if manifest["version"] != snapshot.version:
            snapshot.space.require_same(LatentSpace.from_json(manifest["space"]))
            if DTYPES[manifest["dtype"]] != snapshot.dtype:
                raise ValueError(f"{snapshot.path} has been replaced by a set of {manifest['dtype']}; open it again.")
            if manifest.get("descriptor") != snapshot.manifest.get("descriptor"):
                raise ValueError(f"{snapshot.path} has been replaced by a set with another descriptor; open it again.")
            snapshot = snapshot.at(manifest)
        self.snapshot = snapshot

    def add(self, rows: Rows) -> None:
        """Add rows, which `checked_rows` made.

        Raises:
            ValueError: the set has one of the ids, or a shard to be merged is damaged.
        """
        known = self.snapshot.ids.find(list(rows.ids))
        if known:
            raise ValueError(f"{len(known)} of the ids are in the set already: {_first_names(known)}.")
        shards = self._manifest["shards"]
        kept = self._unchanged_shards(len(rows))
        for entry in shards[kept:]:
            store.check_file(self.snapshot.path, entry)  # a damaged shard must not get a new checksum
        merged = Rows.concatenate([*self.snapshot.shards[kept:], rows])
        entries = self._write(merged, self._manifest["next_file"])
        self._commit("add", len(rows), [*shards[:kept], *entries])
        if kept < len(shards):
            store.delete_unused(self.snapshot.path, self._manifest)

    def missing(self, rows: Rows) -> tuple[Rows, list[int]]:
        """Leave out images that the set has, by digest, and number ids that it has.

        Args:
            rows: made by `checked_rows`.

        Returns:
            The other rows, and the positions of those that were left out.
        """
        wanted = rows.sha256.data.view(np.int64)[:, 0]
        known: set[tuple[str | None, bool]] = set()
        alive = self.snapshot.vectors.alive
        for shard, (first, _) in zip(self.snapshot.shards, self.snapshot.vectors.extents(), strict=True):
            for row in np.flatnonzero(np.isin(shard.sha256.data.view(np.int64)[:, 0], wanted)).tolist():
                if alive is None or alive[first + row]:
                    known.add((shard.sha256[row], is_mirrored(shard.ids[row])))
        known = {(digest, mirrored) for digest, mirrored in known if digest is not None}
        present = [row for row in range(len(rows)) if (rows.sha256[row], is_mirrored(rows.ids[row])) in known]
        rows = rows.take(np.delete(np.arange(len(rows)), present))
        names = list(rows.ids)
        taken = self.snapshot.ids.find(names) if names else {}
        if not taken:
            return rows, present
        for row in [row for row, name in enumerate(names) if name in taken]:
            numbered = (f"{names[row]}-{number}" for number in count(2))
            names[row] = next(name for name in numbered if name not in names and name not in self.snapshot.ids)
        texts = Texts.of(names)
        return replace(rows, ids=texts, keys=keys(texts)), present

    def remove(self, ids: Sequence[Id]) -> None:
        """Mark rows as removed.

        Raises:
            KeyError: naming the ids that the set does not have.
        """
        path, snapshot = self.snapshot.path, self.snapshot
        found = snapshot.ids.find(ids)
        unknown = set(ids).difference(found)
        if unknown:
            raise KeyError(f"The protected set has no {_first_names(unknown)}.")
        rows, versions = store.read_removed(path, self._manifest["removed"])
        rows = np.append(rows, list(found.values()))
        versions = np.append(versions, np.full(len(found), snapshot.version + 1))
        order = np.argsort(rows)
        entry = store.write_removed(path, self._manifest["next_file"], rows[order], versions[order])
        self._commit("remove", len(ids), self._manifest["shards"], removed=entry, ids=list(ids))
        store.delete_unused(path, self._manifest)

    def set_copy_threshold(self, threshold: float | None) -> None:
        """Change the threshold of the set's descriptor, which keeps those of earlier versions."""
        record = self._manifest["descriptor"]
        earlier = record.get("thresholds", [[0, record["threshold"]]])
        changes = [*earlier, [self.snapshot.version + 1, threshold]]
        descriptor = {**record, "threshold": threshold, "thresholds": changes}
        self._commit("threshold", len(self.snapshot), self._manifest["shards"], descriptor=descriptor)

    def compact(self) -> None:
        """Rewrite shards without their removed rows, join small ones, and delete what is no longer used."""
        shards = self._compacted_shards()
        if shards != self._manifest["shards"]:
            self._commit("compact", len(self.snapshot), shards, removed=None, oldest=self.snapshot.version + 1)
        store.delete_unused(self.snapshot.path, self._manifest)

    @property
    def _manifest(self) -> store.Manifest:
        return self.snapshot.manifest

    def _commit(
        self, action: str, count: int, shards: list[dict[str, Any]], ids: list[Id] | None = None, **changes: Any
    ) -> None:
        manifest = {**self._manifest, "shards": shards, **changes}
        self.snapshot = self.snapshot.at(_commit(self.snapshot.path, manifest, action, count, ids))

    @property
    def _rows_per_shard(self) -> int:
        return max(1, _MAX_SHARD_BYTES // (self.snapshot.space.dim * self.snapshot.dtype.itemsize))

    def _unchanged_shards(self, new: int) -> int:
        """Count the shards that stay unchanged when `new` rows are added; smaller ones at the end are merged with them.

        A shard is merged with at least as many rows, so a row is rewritten at most log2(rows per shard) times, and
        a million single adds leave a dozen small files.
        """
        shards = self._manifest["shards"]
        kept = len(shards)
        while kept and shards[kept - 1]["rows"] <= new and new + shards[kept - 1]["rows"] <= self._rows_per_shard:
            kept -= 1
            new += shards[kept]["rows"]
        return kept

    def _write(self, rows: Rows, number: int) -> list[dict[str, Any]]:
        """Write rows as new shards, numbered from `number`; return their entries."""
        size, path = self._rows_per_shard, self.snapshot.path
        parts = (
            [rows]
            if len(rows) <= size
            else [rows.take(np.arange(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
        )
        return [store.write_shard(path, number + i, part, self.snapshot.space.shape) for i, part in enumerate(parts)]

    def _compacted_shards(self) -> list[dict[str, Any]]:
        """Join neighbouring shards without their removed rows where they fit into one; write the new shards."""
        vectors = self.snapshot.vectors
        groups: list[list[tuple[dict[str, Any], Rows, np.ndarray]]] = [[]]
        size = 0
        parts = zip(self._manifest["shards"], self.snapshot.shards, vectors.parts(), strict=True)
        for entry, rows, (first, _) in parts:
            live = (
                np.arange(len(rows))
                if vectors.alive is None
                else np.flatnonzero(vectors.alive[first : first + len(rows)])
            )
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
                    store.check_file(self.snapshot.path, entry)
                merged = Rows.concatenate([rows.take(live) for _, rows, live in group if len(live)])
                entries += self._write(merged, number)
                number += 1
        return entries


def _commit(
    path: Path, manifest: store.Manifest, action: str, count: int, ids: list[Id] | None = None
) -> store.Manifest:
    """Make a manifest the next version; return it as written."""
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


# Checks of arguments --------------------------------------------------------------------------------------------------


def checked_rows(
    latents: Tensor,
    ids: Iterable[Id],
    radius: float | Tensor | Sequence[float] | None,
    sources: Sequence[str | None] | None,
    sha256: Sequence[str | None] | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    descriptors: Tensor | None = None,
    descriptor: dict[str, Any] | None = None,
) -> Rows:
    """Convert the arguments of `ProtectedSet.add` to rows of a set of latents (*shape) in `dtype`.

    Raises:
        TypeError: latents or ids have the wrong type.
        ValueError: shapes or values are not those described there.
    """
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise TypeError(f"latents must be a float tensor; got {getattr(latents, 'dtype', type(latents).__name__)}.")
    check_shape(latents, shape, "latents")
    ids = checked_ids(ids)
    if len(ids) != len(latents):
        raise ValueError(f"{len(latents)} latents need as many ids; got {len(ids)}.")
    if len(set(ids)) < len(ids):
        raise ValueError(f"The ids must differ; repeated: {_first_names(i for i, n in Counter(ids).items() if n > 1)}.")
    latents = latents.detach().to("cpu", dtype, copy=True)
    flat = latents.flatten(1).numpy()
    norms = _squared_norms(flat)
    if not np.isfinite(norms).all():
        bad = [name for name, norm in zip(ids, norms, strict=True) if not np.isfinite(norm)]
        raise ValueError(f"These latents are not finite in {dtype}: {_first_names(bad)}.")
    columns: list[list[str | None]] = []
    for name, values in (("sources", sources), ("sha256", sha256)):
        column: list[str | None] = [None] * len(ids) if values is None else list(values)
        if len(column) != len(ids):
            raise ValueError(f"{len(ids)} latents need as many {name}; got {len(column)}.")
        columns.append(column)
    try:
        digests = Digests.of(columns[1])
    except (TypeError, ValueError):
        raise ValueError("sha256 must be digests of 64 hexadecimal digits, or None.") from None
    texts = Texts.of(ids)
    radii, described = _row_radii(radius, len(ids)), _checked_descriptors(descriptors, descriptor, len(ids))
    return Rows(flat, norms, radii, keys(texts), texts, Texts.of(columns[0]), digests, described)


def _checked_descriptors(vectors: Tensor | None, descriptor: dict[str, Any] | None, n: int) -> Descriptors | None:
    if descriptor is None:
        if vectors is not None:
            raise ValueError("This set has no descriptor, so it takes latents alone; create it with descriptor=.")
        return None
    if vectors is None:
        raise ValueError(
            f"This set finds copies by the descriptor {descriptor['name']!r}: add images, or (latents, descriptors)."
        )
    shape = (n, descriptor["dim"])
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point() or tuple(vectors.shape) != shape:
        got = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise ValueError(f"descriptors must be a float tensor {shape}; got {got}.")
    vectors = vectors.detach().cpu().float()
    if not ((vectors.double().norm(dim=1) - 1).abs() < 1e-3).all():  # NaN fails too
        raise ValueError("descriptors must be unit vectors, as Descriptor.of makes them.")
    return Descriptors.of(vectors.numpy())


def check_shape(latents: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Refuse latents that are not (B, *shape).

    Raises:
        ValueError: naming the argument.
    """
    if latents.ndim < 1 or tuple(latents.shape[1:]) != shape:
        raise ValueError(
            f"{name} must have the shape (B, {', '.join(map(str, shape))}) of the protected set; got "
            f"{tuple(latents.shape)}."
        )


def checked_ids(ids: Iterable[Id]) -> list[Id]:
    """List ids.

    Raises:
        TypeError: they are not strings or integers.
    """
    given = ids.tolist() if isinstance(ids, np.ndarray | Tensor) else ids
    single = isinstance(given, str) or not isinstance(given, Iterable)
    names = [int(name) if isinstance(name, np.integer) else name for name in (() if single else given)]
    if single or not all(isinstance(name, str | int) and not isinstance(name, bool) for name in names):
        raise TypeError("ids must be a list of strings or whole numbers.")
    return names


def _squared_norms(latents: np.ndarray) -> np.ndarray:
    """Compute ‖z‖² of each row of (n, dim), in float64."""
    step = max(1, _MAX_FLOAT64_NUMBERS // latents.shape[1])
    parts = [latents[i : i + step].astype(np.float64) for i in range(0, len(latents), step)]
    return np.concatenate([np.empty(0), *(np.square(part, out=part).sum(1) for part in parts)])


def _row_radii(radius: float | Tensor | Sequence[float] | None, n: int) -> np.ndarray:
    """Convert radii to (n,) float64, NaN for None."""
    if radius is None:
        return np.full(n, np.nan)
    radii = torch.as_tensor(radius, dtype=torch.float64).detach().cpu()
    if radii.ndim and radii.shape != (n,):
        raise ValueError(f"radius must be one number or ({n},); got {tuple(radii.shape)}.")
    if not (radii.isfinite() & (radii > 0)).all():
        raise ValueError("A radius must be positive and finite; None leaves it open.")
    return radii.expand(n).clone().numpy()


def _first_names(names: Iterable[Id]) -> str:
    """List up to three names, for a message."""
    ordered = sorted(names, key=str)
    return ", ".join(map(repr, ordered[:3])) + (", ..." if len(ordered) > 3 else "")
