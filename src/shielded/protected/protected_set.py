"""ProtectedSet: references on disk with ids and radii, and exact search among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..latent_space import LatentSpace
from . import search, store
from .search import Hits
from .store import Rows

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class ProtectedSet:
    """The images that samples must stay away from, as latents in a folder.

    `ProtectedSet.create(path, space)` and `ProtectedSet.open(path)` make one. An open set is a snapshot: it holds all
    rows in memory and keeps working while another process writes; its own changes build on whatever is on disk by then.
    Row numbers are positions in `ids` and change when rows are removed.

    Attributes:
        path: the folder.
        space: the `LatentSpace` of the references. It has no autoencoder if the set was opened.
        version: grows by one with every change.
        ids: name of each row.
        radii: (K,) float64 CPU tensor, radius of each row's shield, NaN where none was given.
        sources: where each row's image came from, or None.
        sha256: digest of each row's image file, or None.
    """

    path: Path
    space: LatentSpace
    version: int
    ids: list[str | int]
    radii: Tensor
    sources: list[str | None]
    sha256: list[str | None]

    def __init__(self, path: Path, manifest: dict[str, Any], space: LatentSpace) -> None:
        """For `create` and `open`."""
        self.path = path
        self.space = space
        self._load(manifest)

    @classmethod
    def create(
        cls, path: str | Path, space: LatentSpace, dtype: torch.dtype = torch.float32, overwrite: bool = False
    ) -> ProtectedSet:
        """Makes an empty set.

        Args:
            path: a folder that is empty or does not exist yet.
            space: the space that the references live in.
            dtype: torch.float32, or torch.float16 for half the size. Distances are those to the stored vectors.
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
        path.mkdir(parents=True, exist_ok=True)
        if not all(store.is_own(file) for file in path.iterdir()):
            raise FileExistsError(f"{path} holds other files; give a protected set a folder of its own.")
        with store.writing(path):
            version = 1
            if (path / store.MANIFEST).exists():
                if not overwrite:
                    raise FileExistsError(f"{path} is a protected set already; open it, or pass overwrite=True.")
                # Numbers go on, so that no reader of the old set takes a new file for one of its own.
                version = store.read_manifest(path)["version"] + 1
            manifest = {
                "format": store.FORMAT,
                "version": version,
                "space": space.to_json(),
                "fingerprint": space.fingerprint,
                "dtype": name,
                "shards": [],
                "history": [_event(version, "create", 0)],
            }
            store.write_manifest(path, manifest)
            store.delete_unused(path, manifest)
        return cls(path, manifest, space)

    @classmethod
    def open(cls, path: str | Path) -> ProtectedSet:
        """Reads a set into memory.

        Args:
            path: the folder of the set.

        Returns:
            The set as it is now.

        Raises:
            FileNotFoundError: if there is no set, or one of its files is missing.
            ValueError: if one of its files is damaged.
        """
        path = Path(path)
        manifest = store.read_manifest(path)
        while True:
            try:
                return cls(path, manifest, LatentSpace.from_json(manifest["space"]))
            except FileNotFoundError:
                # A writer may have compacted the set between the two reads; then there is a newer manifest.
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
        """
        rows = self._checked_rows(latents, ids, radius, sources, sha256)
        if not rows.ids:
            return
        with store.writing(self.path):
            self._refresh()
            known = set(self.ids).intersection(rows.ids)
            if known:
                raise ValueError(f"{len(known)} of the ids are in the set already: {_few(known)}.")
            entry = store.write_shard(self.path, self.version + 1, rows)
            self._commit("add", len(rows.ids), [*self._manifest["shards"], entry])
        self._append(rows)

    def remove(self, ids: Sequence[str | int]) -> None:
        """Removes references. Their vectors stay on disk until `compact`.

        Args:
            ids: names of rows; all of them are removed or, on any error, none.

        Raises:
            KeyError: naming the ids that the set does not have.
            RuntimeError: if another process is writing.
        """
        gone = set(_id_list(ids))
        if not gone:
            return
        with store.writing(self.path):
            self._refresh()
            unknown = gone.difference(self.ids)
            if unknown:
                raise KeyError(f"The protected set has no {_few(unknown)}.")
            shards, start = [], 0
            for entry in self._manifest["shards"]:
                live = self.ids[start : start + entry["rows"] - len(entry["removed"])]
                start += len(live)
                shards.append({**entry, "removed": [*entry["removed"], *(name for name in live if name in gone)]})
            self._commit("remove", len(gone), shards)
        self._keep(self._rows().without(list(gone)))

    def compact(self) -> None:
        """Rewrites the set as one shard and deletes what was removed from disk.

        Raises:
            RuntimeError: if another process is writing.
        """
        with store.writing(self.path):
            self._refresh()
            shards = [store.write_shard(self.path, self.version + 1, self._rows())] if self.ids else []
            self._commit("compact", len(self), shards)
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
        rows = 0
        for entry in manifest["shards"]:
            store.check_shard(self.path, entry)
            rows += entry["rows"] - len(entry["removed"])
        if LatentSpace.from_json(manifest["space"]).fingerprint != manifest["fingerprint"]:
            raise ValueError(f"{self.path / store.MANIFEST} is damaged: its fingerprint is not that of its space.")
        return {
            "version": manifest["version"],
            "rows": rows,
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

    @property
    def energy(self) -> float:
        """Mean of ‖z‖² over the references, 0 if there are none."""
        return float(self._squared_norms().mean()) if self.ids else 0.0

    def vectors(self, rows: Tensor | Sequence[int]) -> Tensor:
        """The references of the given rows.

        Args:
            rows: (P,) row numbers.

        Returns:
            (P, *shape) float32, on the device of `rows`.
        """
        rows = torch.as_tensor(rows, dtype=torch.int64)
        return self._matrix()[rows.cpu()].float().to(rows.device).unflatten(1, self.space.shape)

    def within(self, x0: Tensor, radius: float | Tensor | None = None) -> Hits:
        """Finds every reference that is nearer than its radius, strictly: d < r. None is missed.

        Args:
            x0: (B, *shape), any floating dtype and device.
            radius: L2: one number, one per row (K,), one per image and row (B, K), or None for the set's own radii.

        Returns:
            The hits, on the device of `x0`.

        Raises:
            ValueError: if the shape of `x0` is wrong, a value is not finite, or a radius is missing or negative.
        """
        x = self._checked_queries(x0)
        radii = self._checked_radius(radius, len(x))
        query, row, distance = search.within(x, self._matrix(), self._squared_norms(), radii)
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
        if not self.ids:
            raise ValueError(f"The protected set at {self.path} is empty, so nothing is nearest; add references first.")
        if not 1 <= k <= len(self):
            raise ValueError(f"k must be between 1 and the {len(self)} rows of the set; got {k}.")
        distances, rows = search.nearest(x, self._matrix(), self._squared_norms(), k)
        return _like(distances, x0), _like(rows, x0)

    # ---- the rows in memory ----

    def _load(self, manifest: dict[str, Any]) -> None:
        dtype = _DTYPES[manifest["dtype"]]
        parts = [store.read_shard(self.path, entry) for entry in manifest["shards"]]
        empty = Rows(torch.empty(0, *self.space.shape, dtype=dtype), torch.empty(0, dtype=torch.float64), [], [], [])
        parts = [empty, *parts]
        # Copies: the tensors of a shard are views of its file.
        rows = Rows(
            torch.cat([part.latents for part in parts]),
            torch.cat([part.radii for part in parts]),
            *([name for part in parts for name in getattr(part, kind)] for kind in ("ids", "sources", "sha256")),
        )
        self._manifest, self.version, self._dtype = manifest, manifest["version"], dtype
        self._keep(rows)

    def _keep(self, rows: Rows) -> None:
        self._blocks = [rows.latents.flatten(1)]
        self.radii, self.ids, self.sources, self.sha256 = rows.radii, rows.ids, rows.sources, rows.sha256
        self._norms: np.ndarray | None = None

    def _append(self, rows: Rows) -> None:
        self._blocks.append(rows.latents.flatten(1))
        self.radii = torch.cat([self.radii, rows.radii])
        self.ids, self.sources = self.ids + rows.ids, self.sources + rows.sources
        self.sha256 = self.sha256 + rows.sha256
        self._norms = None

    def _rows(self) -> Rows:
        latents = self._matrix().unflatten(1, self.space.shape)
        return Rows(latents, self.radii, self.ids, self.sources, self.sha256)

    def _matrix(self) -> Tensor:
        """All references (K, dim). They are joined here and not in `add`, so that many small adds stay cheap."""
        if len(self._blocks) > 1:
            self._blocks = [torch.cat(self._blocks)]
        return self._blocks[0]

    def _squared_norms(self) -> np.ndarray:
        if self._norms is None:
            self._norms = search.squared_norms(self._matrix())
        return self._norms

    def _refresh(self) -> None:
        """Takes over what others have written since this set was read."""
        manifest = store.read_manifest(self.path)
        if manifest["version"] != self.version:
            self.space.require_same(LatentSpace.from_json(manifest["space"]))
            if _DTYPES[manifest["dtype"]] != self._dtype:
                raise ValueError(f"{self.path} has been replaced by a set of {manifest['dtype']}; open it again.")
            self._load(manifest)

    def _commit(self, action: str, count: int, shards: list[dict[str, Any]]) -> None:
        version = self.version + 1
        history = [*self._manifest["history"], _event(version, action, count)]
        manifest = {**self._manifest, "version": version, "shards": shards, "history": history}
        store.write_manifest(self.path, manifest)
        self._manifest, self.version = manifest, version

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
        finite = latents.flatten(1).isfinite().all(1)
        if not finite.all():
            bad = [name for name, good in zip(ids, finite.tolist(), strict=True) if not good]
            raise ValueError(f"These latents are not finite in {self._dtype}: {_few(bad)}.")
        names = []
        for name, values in (("sources", sources), ("sha256", sha256)):
            values = [None] * len(ids) if values is None else list(values)
            if len(values) != len(ids):
                raise ValueError(f"{len(ids)} latents need as many {name}; got {len(values)}.")
            names.append(values)
        return Rows(latents, _row_radii(radius, len(ids)), ids, *names)

    def _check_shape(self, latents: Tensor, name: str) -> None:
        if latents.ndim < 1 or tuple(latents.shape[1:]) != self.space.shape:
            raise ValueError(
                f"{name} must have the shape (B, {', '.join(map(str, self.space.shape))}) of the protected set; got "
                f"{tuple(latents.shape)}."
            )

    def _checked_queries(self, x0: Tensor) -> np.ndarray:
        self._check_shape(x0, "x0")
        x = x0.detach().cpu().double().flatten(1)
        if not x.isfinite().all():
            raise ValueError("x0 has NaN or infinite values, so its distances are not defined.")
        return x.numpy()

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


def _event(version: int, action: str, count: int) -> dict[str, Any]:
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return {"version": version, "time": time, "action": action, "count": count}


def _id_list(ids: Any) -> list[str | int]:
    ids = None if isinstance(ids, str) else list(ids)
    if ids is None or not all(isinstance(name, str | int) for name in ids):
        raise TypeError("ids must be a list of strings (or plain integers).")
    return ids


def _row_radii(radius: Any, n: int) -> Tensor:
    """A given radius as (n,) float64, NaN for None."""
    if radius is None:
        return torch.full((n,), float("nan"), dtype=torch.float64)
    radii = torch.as_tensor(radius, dtype=torch.float64).detach().cpu()
    if radii.ndim and radii.shape != (n,):
        raise ValueError(f"radius must be one number or ({n},); got {tuple(radii.shape)}.")
    if not (radii.isfinite() & (radii > 0)).all():
        raise ValueError("A radius must be positive and finite; None leaves it open.")
    return radii.expand(n).clone()


def _like(array: np.ndarray, x0: Tensor) -> Tensor:
    tensor = torch.from_numpy(array)
    if x0.device.type == "mps" and tensor.is_floating_point():  # Metal has no float64
        tensor = tensor.float()
    return tensor.to(x0.device)


def _few(names: Any) -> str:
    """Up to three names, for a message."""
    names = sorted(names, key=str)
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
