"""Remember finished images of earlier calls as references for the next, in memory or in a folder."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shielded._extras import RequestError
from shielded.core.inputs import float_tensor
from shielded.files import replacing, sha256
from shielded.latent_space import LatentSpace
from shielded.protected import ProtectedSet, store

_PATIENCE_SECONDS = 60.0  # with another process that writes to the same folder
_T = TypeVar("_T")


class History:
    """The last `limit` finished latents, in main memory; the oldest are forgotten first.

    Args:
        limit: how many images are remembered at most.
    """

    def __init__(self, limit: int = 1024) -> None:
        if limit < 1:
            raise ValueError(f"a history needs room for at least one image, not {limit}.")
        self.limit = limit
        self.version = 0  # rises with each change, so that copies elsewhere can be renewed
        self._latents: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self._latents is None else len(self._latents)

    @property
    def latents(self) -> Tensor:
        """(M, *S) float32, oldest first."""
        return torch.zeros(0) if self._latents is None else self._latents

    def add(self, latents: Tensor) -> None:
        """Remember finished latents (B, *S).

        Raises:
            ValueError: another shape than what is remembered already, or NaN.
        """
        new = _checked(latents)
        if self._latents is not None and self._latents.shape[1:] != new.shape[1:]:
            raise ValueError(
                f"the history holds latents of shape {tuple(self._latents.shape[1:])}, these have "
                f"{tuple(new.shape[1:])}; use one history per image size, or forget() first."
            )
        old = new[:0] if self._latents is None else self._latents
        self._latents = torch.cat([old, new])[-self.limit :].contiguous()
        self.version += 1

    def amend(self, count: int, latents: Tensor) -> None:
        """Replace the `count` latents remembered last, which were repaired or refused, by latents (n, *S)."""
        if self._latents is not None:
            self._latents = self._latents[: max(0, len(self) - count)]
        self.add(latents)

    def refresh(self) -> None:
        """Read what others have remembered since; a history in memory has no others."""

    def forget(self) -> None:
        """Forget all images."""
        self._latents = None
        self.version += 1

    @classmethod
    def open(cls, path: str | os.PathLike[str], space: LatentSpace | None = None, limit: int = 1024) -> StoredHistory:
        """Open a history that lives in a folder, for runs one after another and processes side by side.

        Args:
            path: the folder, which is made with the first image.
            space: latent space of the images; None: one of their shape alone.
            limit: how many images are remembered at most.

        Raises:
            RequestError: the folder holds something else, or images of another latent space.
        """
        return StoredHistory(Path(path), space, limit)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, with a checksum."""
        metadata = {"limit": str(self.limit), "sha256": _digest(self.latents)}
        with replacing(path) as draft:
            save_file({"latents": self.latents}, draft, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], limit: int = 1024) -> History:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged.
        """
        history = cls(limit)
        try:
            with safe_open(path, "pt") as file:
                latents, metadata = file.get_tensor("latents"), file.metadata() or {}
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, TypeError, KeyError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged: it is no history of finished images ({error}).") from None
        if metadata.get("sha256", _digest(latents)) != _digest(latents):  # version 0.1 wrote none
            raise ValueError(f"{path} is damaged: its checksum does not hold.")
        if not latents.is_floating_point() or not latents.isfinite().all():
            raise ValueError(f"{path} is damaged: its latents are not finite numbers.")
        if len(latents):
            history.add(latents)
        return history


class StoredHistory(History):
    """A history in a folder, which is a protected set: each image is written when it is finished.

    Processes may share the folder. Each trajectory reads what the others have finished by the time that it begins;
    images that are under way at the same time do not see each other.

    Args:
        path: the folder.
        space: latent space of the images; None: one of their shape alone.
        limit: how many images are remembered at most; the oldest are deleted.
    """

    def __init__(self, path: Path, space: LatentSpace | None = None, limit: int = 1024) -> None:
        super().__init__(limit)
        self.path, self.space = path, space
        self._ids: list[str] = []  # of the latents in memory
        self._mine: list[str] = []  # of those that this object has added
        self._set: ProtectedSet | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have remembered since."""
        if self._set is None:
            self._set = self._opened()
            if self._set is None:
                return
        elif store.read_manifest(self.path)["version"] != self._set.version:
            self._set = ProtectedSet.open(self.path)
        ids = [str(name) for name in self._set.ids]
        first = max(0, len(ids) - self.limit)
        if ids[first:] == self._ids:
            return
        self._ids = ids[first:]
        self._latents = self._set.vectors(range(first, len(ids))) if self._ids else None
        self.version += 1

    def add(self, latents: Tensor) -> None:
        """Remember finished latents (B, *S), in the folder too.

        Raises:
            ValueError: another shape than what is remembered already, or NaN.
            RuntimeError: another process has been writing for a minute.
        """
        new = _checked(latents)
        if self._set is None:
            self._set = _patiently(lambda: self._opened() or self._created(new))
        if len(new):
            names = [uuid.uuid4().hex for _ in new]
            # `present` makes it wait for other processes; random names and no digests mean that none is present.
            self._set.add(new, names, present=[])
            self._mine = [*self._mine, *names][-self.limit :]
        if len(self._set) > 2 * self.limit:
            oldest = self._set.ids[: -self.limit]
            _patiently(lambda: self._removed(oldest))
        self.refresh()

    def amend(self, count: int, latents: Tensor) -> None:
        """Replace the `count` latents that this history remembered last by latents (n, *S)."""
        if count and self._set is not None:
            replaced, known = self._mine[-count:], self._set
            _patiently(lambda: known.remove([name for name in replaced if name in known.ids]))
            del self._mine[-count:]
        self.add(latents)

    def forget(self) -> None:
        """Forget all images, and delete them from the folder."""
        if self._set is not None and len(self._set):
            everything = self._set.ids[:]
            _patiently(lambda: self._removed(everything))
        self.refresh()

    def _removed(self, ids: list[str]) -> None:
        """Delete images from the folder; those that are gone already do not count."""
        assert self._set is not None
        self._set = ProtectedSet.open(self.path)
        self._set.remove([name for name in ids if name in self._set.ids])
        self._set.compact()

    def _opened(self) -> ProtectedSet | None:
        if not (self.path / store.MANIFEST).is_file():
            if self.path.exists() and not (self.path.is_dir() and all(map(store.is_own, self.path.iterdir()))):
                raise RequestError(f"{self.path} holds something else; give a history a folder of its own.")
            return None
        found = ProtectedSet.open(self.path)
        if not all(_ID.fullmatch(str(name)) for name in found.ids):
            raise RequestError(f"{self.path} is a protected set and no history; give a history a folder of its own.")
        if self.space is not None:
            try:
                found.space.require_same(self.space)
            except ValueError as error:
                raise RequestError(f"The history in {self.path} is of another latent space. {error}") from None
        return found

    def _created(self, latents: Tensor) -> ProtectedSet:
        space = self.space
        if space is None or space.pixel_range is not None:  # which finished latents may leave
            space = LatentSpace(tuple(latents.shape[1:]))
        try:
            return ProtectedSet.create(self.path, space)
        except FileExistsError:  # another process was first
            return ProtectedSet.open(self.path)


def _checked(latents: Tensor) -> Tensor:
    new = float_tensor(latents, "latents").detach().float().cpu()
    if not torch.isfinite(new).all():
        raise ValueError("latents with NaN or infinity are not remembered; the model's output is broken.")
    return new


_ID = re.compile("[0-9a-f]{32}")


def _patiently(change: Callable[[], _T]) -> _T:
    """Try again, for a minute, while another process is writing."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return change()
        except RuntimeError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _digest(latents: Tensor) -> str:
    """Compute the SHA-256 of latents with their shape and type."""
    return sha256(f"{latents.dtype} {tuple(latents.shape)} ".encode() + latents.contiguous().numpy().tobytes())
