"""What the search derives from a shard of the set: small codes from which distances can be bounded without a miss.

For each row z of a shard an index holds

- a head p: the lowest frequencies Pz of z under a discrete cosine transform, where latents of images have most of
  their energy, as int8;
- codes of the rest t = z − Pᵀp, as int8;
- ‖z‖² and ρ ≥ ‖t − PᵀPt‖, the energy of the other frequencies.

The rows are in order of ‖z‖², and in cells of equal size, so that the rows of a cell are about equally far from
anything and can be ruled out together. How far codes are from what they stand for is measured in float64 when the index
is built, so no bound made of them has to assume anything about the data.

An index is not part of the set: it is made when it is missing, never changes, and goes with its shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = "shielded-index-2"
CELL = 2048  # rows that are ruled out together, at most
LINE = 64  # bytes; rows of codes are filled up to whole ones
_HEAD = 128  # numbers in the head of a row, at most, if there are no more channels than that
_PAGE = 4096  # bytes
_PIECE = 1 << 22  # numbers in the float64 arrays of `build`


def padded(count: int) -> int:
    """The next multiple of LINE."""
    return -(-count // LINE) * LINE


class Projection:
    """P: the lowest frequencies of each channel. Its rows are orthonormal up to rounding in float64.

    Args:
        shape: of one latent; the first axis is the channels unless it is the only one.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._first = min(1, len(shape) - 1)
        axes = shape[self._first :]
        channels = int(np.prod(shape[: self._first]))
        frequency = sum(np.ix_(*(np.arange(n) / n for n in axes)))
        lowest = np.argsort(frequency, axis=None, kind="stable")[: max(1, _HEAD // channels)]
        places = np.unravel_index(lowest, axes)
        used = [1 + int(place.max()) for place in places]
        self._waves = [_cosines(n, count) for n, count in zip(axes, used, strict=True)]
        self._lowest = np.ravel_multi_index(places, used)
        self.dim = int(np.prod(shape))
        self.size = channels * len(lowest)

    def down(self, x: np.ndarray) -> np.ndarray:
        """Px, (B, dim) to (B, size), in float64."""
        x = x.reshape(len(x), *self._shape)
        for axis, wave in enumerate(self._waves, 1 + self._first):
            x = np.moveaxis(np.tensordot(x, wave, (axis, 1)), -1, axis)
        return x.reshape(*x.shape[: 1 + self._first], -1)[..., self._lowest].reshape(len(x), self.size)

    def up(self, u: np.ndarray) -> np.ndarray:
        """Pᵀu, (B, size) to (B, dim), in float64."""
        used = [len(wave) for wave in self._waves]
        x = np.zeros((len(u), *self._shape[: self._first], int(np.prod(used))))
        x[..., self._lowest] = u.reshape(*x.shape[:-1], -1)
        x = x.reshape(*x.shape[:-1], *used)
        for axis, wave in enumerate(self._waves, 1 + self._first):
            x = np.moveaxis(np.tensordot(x, wave, (axis, 0)), -1, axis)
        return x.reshape(len(u), self.dim)


def _cosines(n: int, count: int) -> np.ndarray:
    """The first rows of the orthonormal discrete cosine transform (DCT-II) of n numbers."""
    waves = np.cos(np.pi / n * np.arange(count)[:, None] * (np.arange(n) + 0.5)) * np.sqrt(2 / n)
    waves[0] = np.sqrt(1 / n)
    return waves


@dataclass
class Index:
    """The index of a shard: n rows in c cells, n / c in each. The last ones may be blank, with ‖z‖² = inf.

    Args:
        order: (n,) int32, the row of the shard that each row of the index stands for.
        head: (n, size) int8; p = `head * head_scale`. Filled up with 0, as the codes are to whole `LINE`s.
        codes: (n, dim) int8; `codes * scale` is about t.
        scale: (n,) float32.
        squared: (n,) float32, ‖z‖² rounded.
        rho: (n,) float32, at least ‖t − PᵀPt‖ = ‖z − PᵀPz‖.
        code_error: (n,) float32, at least ‖t − codes · scale‖.
        head_scale: (size,) float64.
        head_norm: (c,) float64, at least ‖head‖ of each row of the cell.
        head_error: (c,) float64, at least ‖Pt‖.
        low: (c,) float64, at least ‖Pz‖.
        high: (c,) float64, at least ‖z − PᵀPz‖.
    """

    order: Tensor
    head: Tensor
    codes: Tensor
    scale: Tensor
    squared: Tensor
    rho: Tensor
    code_error: Tensor
    head_scale: Tensor
    head_norm: Tensor
    head_error: Tensor
    low: Tensor
    high: Tensor

    @property
    def size(self) -> int:
        """Rows in a cell."""
        return len(self.order) // len(self.low)


def build(rows: np.ndarray, projection: Projection) -> Index:
    """Makes the index of a shard.

    Args:
        rows: (n, dim) float32 or float16.
        projection: P.
    """
    n, dim = rows.shape
    cells = -(-n // CELL)
    size = -(-n // cells)
    step = max(1, _PIECE // dim)
    squared = np.concatenate([np.square(rows[a : a + step], dtype=np.float64).sum(1) for a in range(0, n, step)])
    order = np.argsort(squared, kind="stable")
    squared = squared[order]
    usual = order[squared <= 16 * squared[n // 2]]  # a few outliers shall not make it coarse for all
    head_scale = _head_scale(rows, usual, step, projection)
    head, codes = (np.zeros((cells * size, padded(numbers)), np.int8) for numbers in (projection.size, dim))
    scale = np.ones(n, np.float32)
    head_norm, head_error, code_error, low, high = np.zeros((5, n))
    for start in range(0, n, step):
        piece = slice(start, min(start + step, n))
        z = rows[order[piece]].astype(np.float64)
        u = projection.down(z)
        low[piece] = np.square(u).sum(1)
        high[piece] = np.maximum(squared[piece] - low[piece], 0)
        head[piece, : projection.size] = np.clip(np.rint(u / head_scale), -127, 127)
        p = head[piece, : projection.size] * head_scale
        head_norm[piece] = np.linalg.norm(head[piece].astype(np.float64), axis=1)
        head_error[piece] = np.linalg.norm(u - p, axis=1)
        z -= projection.up(p)
        with np.errstate(over="ignore", under="ignore"):
            fine = (np.abs(z).max(1) / 126).astype(np.float32)  # not 127, so that no rounding leads beyond it
        fine[~(np.isfinite(fine) & (fine > 0))] = 1
        codes[piece, :dim] = np.clip(np.rint(z / fine[:, None]), -127, 127)
        z -= codes[piece, :dim] * fine[:, None].astype(np.float64)
        code_error[piece] = np.linalg.norm(z, axis=1)
        scale[piece] = fine
    # Sums of rounding errors in float64 are far below 1e-12 of what is summed.
    low, high = np.sqrt(low + 1e-12 * squared), np.sqrt(high + 1e-12 * squared)
    head_error, code_error = head_error + 1e-12 * np.sqrt(squared), code_error + 1e-12 * np.sqrt(squared)
    with np.errstate(over="ignore"):
        rho, code_error = (np.nextafter(v.astype(np.float32), np.float32(np.inf)) for v in (high, code_error))
        squared = squared.astype(np.float32)

    def filled(values: np.ndarray, blank: float) -> np.ndarray:
        return np.append(values, np.full(cells * size - n, blank, values.dtype))

    return Index(
        *map(
            torch.from_numpy,
            (
                filled(order.astype(np.int32), 0),
                head,
                codes,
                filled(scale, 1),
                filled(squared, np.inf),
                filled(rho, 0),
                filled(code_error, 0),
                head_scale,
                *(filled(v, 0).reshape(cells, size).max(1) for v in (head_norm, head_error, low, high)),
            ),
        )
    )


def _head_scale(rows: np.ndarray, usual: np.ndarray, step: int, projection: Projection) -> np.ndarray:
    """A step for each number of the head, such that 127 of them are enough for the usual rows."""
    most = np.zeros(projection.size)
    for start in range(0, len(usual), step):
        z = rows[usual[start : start + step]].astype(np.float64)
        most = np.maximum(most, np.abs(projection.down(z)).max(0))
    return np.where(most > 0, most, most.max() or 1.0) / 127


def index_path(shard: Path) -> Path:
    """Where the index of a shard belongs."""
    return shard.with_suffix(".index.safetensors")


def write(path: Path, index: Index) -> None:
    """Writes an index, with a digest of its content. Several processes may do so at once; the last one stays."""
    tensors = {field.name: getattr(index, field.name).contiguous() for field in fields(index)}
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            file.write(_packed(tensors))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _packed(tensors: dict[str, Tensor]) -> bytes:
    """As safetensors, filled up so that the codes start with a page: a row then takes as few pages as it can."""
    metadata = {"format": FORMAT, "sha256": _digest(tensors), "filling": ""}
    content = save(tensors, metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    at_codes = start + json.loads(content[8:start])["codes"]["data_offsets"][0]
    return save(tensors, {**metadata, "filling": " " * (-at_codes % _PAGE)})


def read(path: Path, rows: int, projection: Projection) -> Index | None:
    """Maps an index without reading it; None if there is none that fits."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                return None
            index = Index(**{field.name: file.get_tensor(field.name) for field in fields(Index)})
    except (OSError, SafetensorError):
        return None
    blank = len(index.order) - rows
    fits = 0 <= blank < len(index.low) and (index.codes.shape[1], index.head.shape[1]) == (
        padded(projection.dim),
        padded(projection.size),
    )
    return index if fits else None


def check(path: Path) -> None:
    """Compares an index with its digest.

    Raises:
        ValueError: if a byte of the file has changed.
    """
    try:
        with safe_open(path, "pt") as file:
            digest = (file.metadata() or {}).get("sha256")
            intact = digest == _digest({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except SafetensorError:
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged; delete it, and the next search makes it anew.")


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy())
    return digest.hexdigest()
