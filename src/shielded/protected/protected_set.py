"""ProtectedSet: references on disk with ids and radii, and exact search among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shielded._extras import RequestError
from shielded.copies import Descriptor
from shielded.core.inputs import float_tensor
from shielded.core.references import Hits
from shielded.latent_space import LatentSpace
from shielded.protected import store, writer
from shielded.protected.check import check_set
from shielded.protected.columns import Column, Id
from shielded.protected.described import Described
from shielded.protected.search.interface import shrunk
from shielded.protected.snapshot import Reader, Snapshot

_MERGE_SECONDS = 60.0  # that `add` may wait for another process to finish writing


class ProtectedSet(Described):
    """Images that samples must stay away from, as latents in a folder.

    `ProtectedSet.create(path, space)` and `ProtectedSet.open(path)` make one. An open set is a snapshot: it keeps
    working while another process writes, and its own changes build on the newest version on disk. Latents, ids,
    sources and digests stay on disk and are mapped into memory, so a set may be far larger than memory. Row numbers
    are positions in `ids` and change when rows are removed. Several threads may read and search one open set.

    Each file is compared with its checksum where it is first used: ids, radii and digests when the set is opened, the
    latents of a shard, and its index, before they are first searched. A damaged file is an error that names it.
    """

    def __init__(self, reader: Reader, descriptor: Descriptor | None = None) -> None:
        """Wrap an open version; called by `create` and `open`."""
        super().__init__(reader, descriptor)

    @classmethod
    def create(
        cls,
        path: str | Path,
        space: LatentSpace,
        dtype: torch.dtype = torch.float32,
        overwrite: bool = False,
        descriptor: str | Descriptor | None = None,
    ) -> ProtectedSet:
        """Make an empty set.

        Args:
            path: a folder that is empty or does not exist yet.
            space: the latent space of the references.
            dtype: torch.float32, or torch.float16 for half the size. Distances are those to the stored vectors, which
                float16 moves by at most 2⁻¹¹ of their norm.
            overwrite: replace a set that exists.
            descriptor: what `copies` finds changed copies by: "shielded", or what `Descriptor.load` loaded. None: the
                set holds latents alone.

        Returns:
            The new set.

        Raises:
            FileExistsError: the folder holds a set or other files.
            ValueError: another dtype.
        """
        if isinstance(descriptor, str):
            descriptor = Descriptor.load(descriptor)
        record = None if descriptor is None else descriptor.record
        return cls(writer.create(Path(path), space, dtype, overwrite, record), descriptor)

    @classmethod
    def open(
        cls,
        path: str | Path,
        version: int | None = None,
        ray: str | None = None,
        memory: int | None = None,
        descriptor: Descriptor | None = None,
    ) -> ProtectedSet:
        """Open a set.

        Args:
            path: the set's folder.
            version: an earlier version, which can be opened until `compact` deletes what has been removed since; None:
                the newest.
            ray: address of a Ray cluster whose workers share the shards and search them, for a set that is too large
                for one machine; see `shielded.protected.ray`. Such a set can be read and searched, but not changed.
            memory: bytes that the search may hold besides queries and answers, in each worker with `ray`; None: 1 GiB.
                With less it takes fewer images at a time. Memory mapped from disk does not count.
            descriptor: the one that the set was made with; None: the one that comes with this package, if `copies`
                needs it.

        Returns:
            The set.

        Raises:
            FileNotFoundError: no set in the folder, or one of its files is missing.
            ValueError: one of its files is damaged, the version does not exist or no longer does, the memory is not
                positive, or the descriptor is not that of the set.
            RuntimeError: Ray is not installed, or no cluster answers at that address.
        """
        if memory is not None and not memory > 0:
            raise ValueError(f"memory must be a positive number of bytes, not {memory}; 1 << 30 is 1 GiB.")
        path = Path(path)
        manifest = store.read_manifest(path)
        read: Callable[..., Reader] = Snapshot.read
        if ray is not None:
            from shielded.protected.ray.search import ClusterSnapshot

            read = partial(ClusterSnapshot, address=ray)
        while True:
            try:
                space = LatentSpace.from_json(manifest["space"])
                return cls(read(path, manifest, space, version=version, memory=memory), descriptor)
            except FileNotFoundError:
                # A writer may have replaced files between the two reads; then there is a newer manifest.
                newer = store.read_manifest(path)
                if newer["version"] == manifest["version"]:
                    raise
                manifest = newer

    def at(self, version: int) -> ProtectedSet:
        """Open another version of this set; see `open`."""
        return ProtectedSet.open(self.path, version, descriptor=self._network)

    # Changes ----------------------------------------------------------------------------------------------------------

    def add(
        self,
        latents: Tensor | Sequence[Any] | tuple[Tensor, Tensor],
        ids: Sequence[str | int],
        radius: float | Tensor | Sequence[float] | None = None,
        sources: Sequence[str | None] | None = None,
        sha256: Sequence[str | None] | None = None,
        present: list[int] | None = None,
    ) -> None:
        """Add references: all of them or, on any error, none.

        Args:
            latents: (n, *shape), any floating dtype and device; rounded to the set's dtype. A set with a descriptor
                takes them with the images' descriptors, (latents, (n, d)). Or the images themselves, as
                `LatentSpace.encode` takes them, if the space has an autoencoder.
            ids: n names that the set does not have yet.
            radius: shield radius, L2 in the latent space: one for all, (n,), or None to leave it open.
            sources: n paths or addresses of the images.
            sha256: n digests of the image files.
            present: a list, if other processes add images at the same time: the call then waits up to a minute for
                them to finish writing, leaves out images whose digest the set has by now, appends their positions to
                the list, and numbers ids that the set has.

        Raises:
            TypeError: latents or ids have the wrong type.
            ValueError: shapes, values or ids are not as above.
            RuntimeError: another process is writing, or the set was opened with `ray`.
            OSError: the disk is full or the folder read-only.
        """
        current = self._writable()
        z, described = self._described(latents)
        rows = writer.checked_rows(
            z, ids, radius, sources, sha256, self.space.shape, current.dtype, described, self.descriptor
        )
        if len(rows):
            with self._writing(current, 0.0 if present is None else _MERGE_SECONDS) as changes:
                if present is not None:
                    rows, found = changes.missing(rows)
                    present += found
                if len(rows):
                    changes.add(rows)

    def remove(self, ids: Sequence[str | int]) -> None:
        """Remove references from now on. Their vectors stay on disk until `compact`, their ids in the history.

        Args:
            ids: names of rows; all of them are removed or, on any error, none.

        Raises:
            KeyError: naming the ids that the set does not have.
            RuntimeError: another process is writing, or the set was opened with `ray`.
            OSError: the disk is full or the folder read-only.
        """
        current = self._writable()
        names = list(dict.fromkeys(writer.checked_ids(ids)))
        if names:
            with self._writing(current) as changes:
                changes.remove(names)

    def compact(self) -> None:
        """Delete the vectors of removed references from disk and join small files; earlier versions are lost.

        Only files that change are rewritten. The version stays the same if there is nothing to do.

        Raises:
            RuntimeError: another process is writing, or the set was opened with `ray`.
            OSError: the disk is full or the folder read-only.
        """
        with self._writing(self._writable()) as changes:
            changes.compact()

    def _writable(self) -> Snapshot:
        if not isinstance(self._reader, Snapshot):
            raise RuntimeError("A set that was opened with ray= is only read; open it without, to change it.")
        return self._reader

    @contextmanager
    def _writing(self, current: Snapshot, wait_seconds: float = 0.0) -> Iterator[writer.Writer]:
        """Hold the lock, and read the newest version afterwards, also after an error."""
        with store.writing(self.path, wait_seconds):
            changes = writer.Writer(current)
            try:
                yield changes
            finally:
                self._reader = changes.snapshot

    # Contents ---------------------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The set's folder."""
        return self._reader.path

    @property
    def space(self) -> LatentSpace:
        """Latent space of the references, without an autoencoder if the set was opened."""
        return self._reader.space

    @property
    def version(self) -> int:
        """Version number, which grows by one with every change."""
        return self._reader.version

    @property
    def ids(self) -> Column:
        """Name of each row, like a list."""
        return self._reader.ids

    @property
    def sources(self) -> Column:
        """Path or address of each row's image, or None, like a list."""
        return self._reader.sources

    @property
    def sha256(self) -> Column:
        """Digest of each row's image file, or None, like a list."""
        return self._reader.sha256

    @property
    def radii(self) -> Tensor:
        """(K,) float64 on the CPU: radius of each row's shield, NaN where it has none."""
        return self._reader.radii

    @property
    def energy(self) -> float:
        """Mean of ‖z‖² over the references, 0 if there are none."""
        return self._reader.energy

    @property
    def history(self) -> list[dict[str, Any]]:
        """Changes up to this version, oldest first.

        Each entry has `version`, `time` (UTC), `action` (create, add, remove, threshold or compact) and `count`: how
        many rows were added or removed, or there are; entries of `remove` also have the `ids`.
        """
        events = store.read_history(self.path, self._reader.manifest)
        return [event for event in events if event["version"] <= self.version]

    def vectors(self, rows: Tensor | Sequence[int]) -> Tensor:
        """Read the references of the given rows.

        Args:
            rows: (P,) row numbers.

        Returns:
            (P, *shape) float32, on the device of `rows`.

        Raises:
            IndexError: there is no such row.
        """
        reader = self._reader
        rows = torch.as_tensor(rows, dtype=torch.int64)
        numbers = rows.cpu().numpy()
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(reader)):
            raise IndexError(f"The protected set has the rows 0 to {len(reader) - 1}; got {numbers.tolist()[:3]}.")
        return torch.from_numpy(reader.take(numbers)).to(rows.device).unflatten(1, self.space.shape)

    def verify(self) -> dict[str, Any]:
        """Check every file of the set on disk against its checksum, and the indexes that belong to it.

        Returns:
            `version`, `rows`, `shards` (numbers) and `fingerprint` of the set on disk.

        Raises:
            FileNotFoundError: naming a missing file.
            ValueError: naming a damaged file.
        """
        checked = check_set(self.path)
        for error in checked.problems.values():
            raise error
        return {name: getattr(checked, name) for name in ("version", "rows", "shards", "fingerprint")}

    def require_space(self, space: LatentSpace) -> None:
        """Refuse a latent space in which the references of this set mean nothing.

        Raises:
            ValueError: naming what differs.
        """
        try:
            self.space.require_same(space)
        except ValueError as error:
            raise RequestError(f"The protected set at {self.path} was made for another latent space. {error}") from None

    def __len__(self) -> int:
        return len(self._reader)

    def __repr__(self) -> str:
        return f"ProtectedSet({str(self.path)!r}, {len(self)} rows of shape {self.space.shape}, version {self.version})"

    # Search -----------------------------------------------------------------------------------------------------------

    def within(
        self,
        x0: Tensor,
        radius: float | Tensor | None = None,
        shrink: Tensor | None = None,
        nearest: int | None = None,
    ) -> Hits:
        """Find every reference that is nearer than its radius, strictly: d < r. None is missed.

        Args:
            x0: (B, *shape), any floating dtype and device.
            radius: L2: one number, one per row (K,), one per image and row (B, K), or None for the set's own radii.
            shrink: (B,) subtracted from the squared radii of each image (posterior radius); a radius of 0 or less then
                has no hits.
            nearest: keep only so many hits of each image, the nearest ones; None: all.

        Returns:
            The hits with the radius that applied to each, sorted by image, then by row, on the device of `x0`.

        Raises:
            ValueError: the shape of `x0` is wrong, a value is not finite, a radius or `shrink` is missing or negative,
                or `nearest` is below 1.
        """
        if nearest is not None and nearest < 1:
            raise ValueError(f"nearest must be at least 1, not {nearest}; None means all references within the radius.")
        reader = self._reader  # another thread may change the set meanwhile
        x = self._checked_queries(x0)
        radii = _checked_radius(radius, len(x), reader)
        reduction = _checked_shrink(shrink, len(x))
        query, row, distance = reader.within(x, radii, reduction, nearest)
        applied = hit_radii(reader.radii.numpy() if radii is None else radii, reduction, query, row)
        return Hits(*(_like(part, x) for part in (query, row, distance, applied)))

    def nearest(self, x0: Tensor, k: int = 1) -> tuple[Tensor, list[list[Id]]]:
        """Find the k nearest references, nearest first; of equal distances the earlier row comes first.

        Args:
            x0: (B, *shape), any floating dtype and device.
            k: how many, at most the number of rows.

        Returns:
            Distances (B, k), float64 on the device of `x0`, and for each image the k ids.

        Raises:
            ValueError: the set has fewer than k rows, the shape of `x0` is wrong, or a value is not finite.
        """
        reader = self._reader
        distances, rows = self._nearest_rows(reader, x0, k)
        names = reader.ids.take(rows.flatten().cpu().numpy())
        return distances, [names[i : i + k] for i in range(0, len(names), k)]

    def nearest_rows(self, x0: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Find the k nearest references like `nearest`, with row numbers (B, k) instead of ids."""
        return self._nearest_rows(self._reader, x0, k)

    def _nearest_rows(self, reader: Reader, x0: Tensor, k: int) -> tuple[Tensor, Tensor]:
        x = self._checked_queries(x0)
        if not len(reader):
            raise ValueError(f"The protected set at {self.path} is empty, so nothing is nearest; add references first.")
        if not 1 <= k <= len(reader):
            raise ValueError(f"k must be between 1 and the {len(reader)} rows of the set; got {k}.")
        distances, rows = reader.nearest(x, k)
        return _like(distances, x), _like(rows, x)

    def _checked_queries(self, x0: Tensor) -> Tensor:
        x0 = float_tensor(x0, "x0")
        writer.check_shape(x0, self.space.shape, "x0")
        x = x0.detach().flatten(1)
        if not x.isfinite().all():
            raise ValueError("x0 has NaN or infinite values, so its distances are not defined.")
        return x


def _checked_radius(radius: float | Tensor | None, batch: int, reader: Reader) -> np.ndarray | None:
    """Convert a radius to (), (K,) or (B, K) float64; None for the set's own radii."""
    if radius is None or (isinstance(radius, Tensor) and radius.ndim == 1 and radius is reader.radii):
        missing = int(reader.radii.isnan().sum())
        if missing:
            raise ValueError(
                f"{missing} of {len(reader)} references have no radius of their own; pass radius=, or add them "
                "with one."
            )
        return None
    radii = torch.as_tensor(radius, dtype=torch.float64).detach().cpu()
    if radii.ndim and radii.shape not in ((len(reader),), (batch, len(reader))):
        raise ValueError(
            f"radius must be one number, {(len(reader),)} or {(batch, len(reader))}; got {tuple(radii.shape)}."
        )
    if not (radii >= 0).all():
        raise ValueError("A radius is negative or NaN; it is an L2 distance in the latent space.")
    return radii.numpy()


def hit_radii(radii: np.ndarray, shrink: np.ndarray | None, query: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Compute the radius that applies to each pair of an image and a row.

    Args:
        radii: (), (K,) or (B, K).
        shrink: (B,) subtracted from the squared radii of each image; None: nothing.
        query: (P,) images.
        row: (P,) rows.

    Returns:
        (P,) float64, 0 where nothing of the radius is left.
    """
    applied = radii[query, row] if radii.ndim == 2 else radii[row] if radii.ndim else np.full(len(row), radii)
    return shrunk(applied, None if shrink is None else shrink[query])


def _checked_shrink(shrink: Tensor | None, batch: int) -> np.ndarray | None:
    if shrink is None:
        return None
    shrink = torch.as_tensor(shrink).detach().cpu().double()
    if shrink.shape != (batch,) or not (shrink >= 0).all():
        raise ValueError(f"shrink must be {(batch,)} numbers, none of them negative; got {tuple(shrink.shape)}.")
    return shrink.numpy()


def _like(array: np.ndarray, x0: Tensor) -> Tensor:
    """Move an array to the device of x0."""
    tensor = torch.from_numpy(array)
    if x0.device.type == "mps" and tensor.is_floating_point():  # Metal has no float64
        tensor = tensor.float()
    return tensor.to(x0.device)
