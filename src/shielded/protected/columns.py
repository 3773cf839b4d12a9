"""What is known of the rows of a set, as arrays that stay on disk until something is asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

Id = str | int


class Texts:
    """Strings, numbers and None one after the other, as JSON in a single array of bytes.

    Args:
        data: uint8, all entries without anything in between.
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

    def text(self, row: int) -> bytes:
        """The JSON of an entry."""
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
        """Raises ValueError where a value is not 64 hexadecimal digits."""
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
        keys: (n,) int64, hashes of the ids, by which they are found.
        ids: n names.
        sources: n paths or addresses, or None.
        sha256: digests of the image files.
    """

    latents: np.ndarray
    norms: np.ndarray
    radii: np.ndarray
    keys: np.ndarray
    ids: Texts
    sources: Texts
    sha256: Digests

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, rows: np.ndarray) -> Rows:
        return Rows(*(part.take(rows) if isinstance(part, Texts | Digests) else part[rows] for part in self._parts()))

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(rows._parts() for rows in parts), strict=True)
        return Rows(
            *(type(c[0]).concatenate(c) if isinstance(c[0], Texts | Digests) else np.concatenate(c) for c in columns)
        )

    def _parts(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]


def keys(ids: Texts) -> np.ndarray:
    """Hashes (n,) int64 of ids. Different ids may share one, so a match is compared in full."""
    hashes = [hashlib.blake2b(ids.text(row), digest_size=8).digest() for row in range(len(ids))]
    return np.frombuffer(b"".join(hashes), "<i8")


class Column(Sequence):
    """One property of every row of a set: like a list, but read from disk when an entry is asked for.

    Args:
        parts: the property of the rows of each shard.
        live: (K,) the stored rows that have not been removed, ascending; None: all of them.
    """

    __hash__ = None

    def __init__(self, parts: Sequence[Texts | Digests], live: np.ndarray | None) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self._live = live

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._live is None else len(self._live)

    def __getitem__(self, index: Any) -> Any:
        rows = range(len(self))[index]
        return [self._read(row) for row in rows] if isinstance(rows, range) else self._read(rows)

    def _read(self, row: int) -> Any:
        stored = row if self._live is None else self._live[row]
        part = np.searchsorted(self._starts, stored, side="right") - 1
        return self._parts[part][stored - self._starts[part]]

    def __iter__(self) -> Iterator[Any]:
        for start, part in zip(self._starts, self._parts, strict=False):
            rows: Iterable[int] = range(len(part))
            if self._live is not None:
                first, last = np.searchsorted(self._live, (start, start + len(part)))
                rows = (self._live[first:last] - start).tolist()
            yield from map(part.__getitem__, rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"[{shown}, ... {len(self)} in all]" if len(self) > 3 else f"[{shown}]"


class Ids(Column):
    """The ids of a set, found by their hashes."""

    def __init__(self, shards: Sequence[Rows], live: np.ndarray | None, alive: np.ndarray | None) -> None:
        super().__init__([rows.ids for rows in shards], live)
        self._keys = [rows.keys for rows in shards]
        self._alive = alive

    def __contains__(self, name: object) -> bool:
        return isinstance(name, Id) and bool(self.find([name]))

    def find(self, names: Sequence[Id]) -> dict[Id, int]:
        """The stored row of each of these names (one at least) that the set has."""
        texts = Texts.of(names)
        by_text = {texts.text(row): name for row, name in enumerate(names)}
        wanted = np.sort(keys(texts))
        found = {}
        for start, part, hashes in zip(self._starts.tolist(), self._parts, self._keys, strict=False):
            nearest = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
            for row in np.flatnonzero(wanted[nearest] == hashes).tolist():
                name = by_text.get(part.text(row))
                if name is not None and (self._alive is None or self._alive[start + row]):
                    found[name] = start + row
        return found
