"""Hold ids, sources, digests and radii of the rows of a set as arrays that stay on disk until they are read."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shielded.copies.bank import Descriptors

Id = str | int
MIRRORED = "mirrored:"
"""Prefix of the ids of mirrored images."""


def is_mirrored(name: Id) -> bool:
    """Tell whether an id is that of a mirrored image."""
    return str(name).startswith(MIRRORED)


class Texts:
    """Strings, numbers and None, as JSON values in a single array of bytes.

    Args:
        data: uint8, all entries without a separator.
        offsets: (n + 1,) int64; entry i is `data[offsets[i]:offsets[i + 1]]`.
    """

    def __init__(self, data: np.ndarray, offsets: np.ndarray) -> None:
        self.data, self.offsets = data, offsets

    @classmethod
    def of(cls, values: Iterable[Id | None]) -> Texts:
        return cls._join([json.dumps(value).encode() for value in values])

    @classmethod
    def _join(cls, texts: list[bytes]) -> Texts:
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(texts), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Any:
        return json.loads(self.text(row))

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))

    def text(self, row: int) -> bytes:
        """Return the JSON of an entry."""
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes()

    def take(self, rows: np.ndarray) -> Texts:
        return self._join([self.text(row) for row in rows])

    @classmethod
    def concatenate(cls, parts: Sequence[Texts]) -> Texts:
        starts = np.cumsum([0, *(part.offsets[-1] for part in parts)])
        ends = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
        return cls(np.concatenate([part.data for part in parts]), np.concatenate([[0], *ends]).astype(np.int64))


class Digests:
    """SHA-256 digests as (n, 32) bytes, read in hexadecimal; zeros stand for None."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    @classmethod
    def of(cls, values: Sequence[str | None]) -> Digests:
        """Convert hexadecimal digests; raise ValueError if a value is not 64 hexadecimal digits."""
        data = b"".join(_digest(value) for value in values)
        return cls(np.frombuffer(data, np.uint8).reshape(len(values), 32))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> str | None:
        digest = self.data[row]
        return digest.tobytes().hex() if digest.any() else None

    def take(self, rows: np.ndarray) -> Digests:
        return Digests(self.data[rows])

    @classmethod
    def concatenate(cls, parts: Sequence[Digests]) -> Digests:
        return cls(np.concatenate([part.data for part in parts]))


def _digest(value: str | None) -> bytes:
    if value is None:
        return bytes(32)
    digest = bytes.fromhex(value)
    if len(digest) != 32:
        raise ValueError(value)
    return digest


@dataclass
class Rows:
    """References in order, in memory or on disk.

    Args:
        latents: (n, dim) float16 or float32.
        norms: (n,) float64, ‖z‖² of each.
        radii: (n,) float64, NaN for none.
        keys: (n,) int64, hashes of the ids, for the search by id.
        ids: n names.
        sources: n paths or addresses, or None.
        sha256: digests of the image files.
        descriptors: unit vectors of the images, for the search for copies; None: the set has no descriptor.
    """

    latents: np.ndarray
    norms: np.ndarray
    radii: np.ndarray
    keys: np.ndarray
    ids: Texts
    sources: Texts
    sha256: Digests
    descriptors: Descriptors | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, rows: np.ndarray) -> Rows:
        return Rows(
            self.latents[rows],
            self.norms[rows],
            self.radii[rows],
            self.keys[rows],
            self.ids.take(rows),
            self.sources.take(rows),
            self.sha256.take(rows),
            None if self.descriptors is None else self.descriptors.take(rows),
        )

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        if len(parts) == 1:
            return parts[0]
        described = [rows.descriptors for rows in parts if rows.descriptors is not None]
        return Rows(
            np.concatenate([rows.latents for rows in parts]),
            np.concatenate([rows.norms for rows in parts]),
            np.concatenate([rows.radii for rows in parts]),
            np.concatenate([rows.keys for rows in parts]),
            Texts.concatenate([rows.ids for rows in parts]),
            Texts.concatenate([rows.sources for rows in parts]),
            Digests.concatenate([rows.sha256 for rows in parts]),
            Descriptors.concatenate(described) if described else None,
        )


def keys(ids: Texts) -> np.ndarray:
    """Hash ids to (n,) int64. Different ids may share a hash, so the ids of a match must be compared."""
    hashes = [hashlib.blake2b(ids.text(row), digest_size=8).digest() for row in range(len(ids))]
    return np.frombuffer(b"".join(hashes), "<i8")


class Column(Sequence[Any], ABC):
    """One property of every row of a set: like a list, but an entry is read when it is asked for."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # compared like a list, so not hashable

    @abstractmethod
    def take(self, rows: np.ndarray) -> list[Any]:
        """Read the entries of the rows (n,)."""

    def __getitem__(self, index: Any) -> Any:
        rows = range(len(self))[index]
        return self.take(np.array(rows, np.int64)) if isinstance(rows, range) else self.take(np.array([rows]))[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"[{shown}, ... {len(self)} in all]" if len(self) > 3 else f"[{shown}]"


class StoredColumn(Column):
    """A column that is mapped from the shards of a set.

    Args:
        parts: the entries of each shard.
        live: (K,) the stored rows that have not been removed, ascending; None: all of them.
    """

    def __init__(self, parts: Sequence[Texts | Digests], live: np.ndarray | None) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self._live = live

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._live is None else len(self._live)

    def take(self, rows: np.ndarray) -> list[Any]:
        """Read the entries of the rows (n,)."""
        stored = rows if self._live is None else self._live[rows]
        parts = np.searchsorted(self._starts, stored, side="right") - 1
        return [self._parts[part][row - self._starts[part]] for part, row in zip(parts, stored, strict=True)]

    def __iter__(self) -> Iterator[Any]:
        for start, part in zip(self._starts, self._parts, strict=False):
            rows: Iterable[int] = range(len(part))
            if self._live is not None:
                first, last = np.searchsorted(self._live, (start, start + len(part)))
                rows = (self._live[first:last] - start).tolist()
            yield from map(part.__getitem__, rows)


class Ids(StoredColumn):
    """The ids of a set, found by their hashes."""

    def __init__(self, shards: Sequence[Rows], live: np.ndarray | None, alive: np.ndarray | None) -> None:
        self._texts = [rows.ids for rows in shards]
        super().__init__(self._texts, live)
        self._keys = [rows.keys for rows in shards]
        self._alive = alive

    def __contains__(self, name: object) -> bool:
        return isinstance(name, Id) and bool(self.find([name]))

    def rows(self, names: Sequence[Id]) -> dict[Id, int]:
        """Find those of these names (at least one) that the set has; return the row of each, as in `vectors`."""
        found = self.find(names)
        return found if self._live is None else {n: int(np.searchsorted(self._live, row)) for n, row in found.items()}

    def find(self, names: Sequence[Id]) -> dict[Id, int]:
        """Find those of these names (at least one) that the set has; return the stored row of each."""
        texts = Texts.of(names)
        by_text = {texts.text(row): name for row, name in enumerate(names)}
        wanted = np.sort(keys(texts))
        found = {}
        for start, part, hashes in zip(self._starts.tolist(), self._texts, self._keys, strict=False):
            nearest = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
            for row in np.flatnonzero(wanted[nearest] == hashes).tolist():
                name = by_text.get(part.text(row))
                if name is not None and (self._alive is None or self._alive[start + row]):
                    found[name] = start + row
        return found
