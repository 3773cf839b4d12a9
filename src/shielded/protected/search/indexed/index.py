"""Index of a shard: small codes that bound distances without a miss.

For each row z of a shard an index holds

- a prefix p: the lowest frequencies Pz of z under a discrete cosine transform, where latents of images have most of
  their energy, as int8;
- codes of the rest t = z − Pᵀp, as int8;
- ‖z‖² and ρ ≥ ‖t − PᵀPt‖, the energy of the other frequencies.

The rows are sorted by ‖z‖² and divided into cells of equal size, so that the rows of a cell are about equally far from
any query and can be ruled out at once. The error of all codes is measured in float64 when the index is built, so bounds
assume nothing about the data.

An index is not part of the set: the first search builds it, it never changes, and it is deleted with its shard. It
carries the digest of its shard and one of itself; one that does not fit or is damaged is built again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shielded.files import replacing
from shielded.protected.search.interface import require_finite

FORMAT = "shielded-index-3"
MAX_CELL_ROWS = 2048
LINE_BYTES = 64  # rows of codes are padded to whole cache lines
_PREFIX_NUMBERS = 128  # at most, in the prefix of a row, if there are no more channels than that
_PAGE_BYTES = 4096
_MAX_ARRAY_NUMBERS = 1 << 22  # numbers in the float64 arrays of `build`
_FILE_NAMES = {  # tensors that have another name in the file than in `Index`
    "prefix": "head",
    "prefix_scale": "head_scale",
    "prefix_norm": "head_norm",
    "prefix_error": "head_error",
    "low_norm": "low",
    "high_norm": "high",
}


def padded(count: int) -> int:
    """Round up to a multiple of LINE_BYTES."""
    return -(-count // LINE_BYTES) * LINE_BYTES


class Projection:
    """Project to the lowest frequencies of each channel: P. Its rows are orthonormal up to rounding in float64.

    Args:
        shape: shape of one latent; the first axis is the channels unless it is the only one.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._first = min(1, len(shape) - 1)
        axes = shape[self._first :]
        channels = int(np.prod(shape[: self._first]))
        frequency = sum(np.ix_(*(np.arange(n) / n for n in axes)))
        lowest = np.argsort(frequency, axis=None, kind="stable")[: max(1, _PREFIX_NUMBERS // channels)]
        positions = np.unravel_index(lowest, axes)
        used = [1 + int(position.max()) for position in positions]
        self._waves = [_cosines(n, count) for n, count in zip(axes, used, strict=True)]
        self._lowest = np.ravel_multi_index(positions, used)
        self.dim = int(np.prod(shape))
        self.size = channels * len(lowest)

    def down(self, x: np.ndarray) -> np.ndarray:
        """Compute Px, (B, dim) to (B, size), in float64."""
        x = x.reshape(len(x), *self._shape)
        for axis, wave in enumerate(self._waves, 1 + self._first):
            x = np.moveaxis(np.tensordot(x, wave, (axis, 1)), -1, axis)
        return x.reshape(*x.shape[: 1 + self._first], -1)[..., self._lowest].reshape(len(x), self.size)

    def up(self, u: np.ndarray) -> np.ndarray:
        """Compute Pᵀu, (B, size) to (B, dim), in float64."""
        used = [len(wave) for wave in self._waves]
        x = np.zeros((len(u), *self._shape[: self._first], int(np.prod(used))))
        x[..., self._lowest] = u.reshape(*x.shape[:-1], -1)
        x = x.reshape(*x.shape[:-1], *used)
        for axis, wave in enumerate(self._waves, 1 + self._first):
            x = np.moveaxis(np.tensordot(x, wave, (axis, 0)), -1, axis)
        return x.reshape(len(u), self.dim)


def _cosines(n: int, count: int) -> np.ndarray:
    """Compute the first rows of the orthonormal discrete cosine transform (DCT-II) of n numbers."""
    waves = np.cos(np.pi / n * np.arange(count)[:, None] * (np.arange(n) + 0.5)) * np.sqrt(2 / n)
    waves[0] = np.sqrt(1 / n)
    return waves


@dataclass
class Index:
    """Index of a shard: n rows in c cells, n / c in each. The last rows may be blank, with ‖z‖² = inf.

    Args:
        order: (n,) int32, row of the shard that each row of the index stands for.
        prefix: (n, size) int8; p = `prefix * prefix_scale`. Padded with 0 to whole cache lines, as the codes are.
        codes: (n, dim) int8; `codes * scale` is about t.
        scale: (n,) float32.
        squared: (n,) float32, ‖z‖² rounded.
        rho: (n,) float32, at least ‖t − PᵀPt‖ = ‖z − PᵀPz‖.
        code_error: (n,) float32, at least ‖t − codes · scale‖.
        prefix_scale: (size,) float64.
        prefix_norm: (c,) float64, at least ‖prefix‖ of each row of the cell.
        prefix_error: (c,) float64, at least ‖Pt‖.
        low_norm: (c,) float64, at least ‖Pz‖.
        high_norm: (c,) float64, at least ‖z − PᵀPz‖.
    """

    order: Tensor
    prefix: Tensor
    codes: Tensor
    scale: Tensor
    squared: Tensor
    rho: Tensor
    code_error: Tensor
    prefix_scale: Tensor
    prefix_norm: Tensor
    prefix_error: Tensor
    low_norm: Tensor
    high_norm: Tensor

    @property
    def cell_rows(self) -> int:
        """Rows in a cell."""
        return len(self.order) // len(self.low_norm)


def build_index(rows: np.ndarray, projection: Projection) -> Index:
    """Build the index of a shard.

    Args:
        rows: (n, dim) float32 or float16.
        projection: P.

    Raises:
        ValueError: a row is not finite.
    """
    n, dim = rows.shape
    cells = -(-n // MAX_CELL_ROWS)
    size = -(-n // cells)
    step = max(1, _MAX_ARRAY_NUMBERS // dim)
    squared = np.concatenate([np.square(rows[a : a + step], dtype=np.float64).sum(1) for a in range(0, n, step)])
    order = np.argsort(require_finite(squared), kind="stable")
    squared = squared[order]
    usual = order[squared <= 16 * squared[n // 2]]  # so that outliers do not make it coarse for all
    prefix_scale = _prefix_scale(rows, usual, step, projection)
    prefix, codes = (np.zeros((cells * size, padded(numbers)), np.int8) for numbers in (projection.size, dim))
    scale = np.ones(n, np.float32)
    prefix_norm, prefix_error, code_error, low, high = np.zeros((5, n))
    for start in range(0, n, step):
        piece = slice(start, min(start + step, n))
        z = rows[order[piece]].astype(np.float64)
        u = projection.down(z)
        low[piece] = np.square(u).sum(1)
        high[piece] = np.maximum(squared[piece] - low[piece], 0)
        prefix[piece, : projection.size] = np.clip(np.rint(u / prefix_scale), -127, 127)
        p = prefix[piece, : projection.size] * prefix_scale
        prefix_norm[piece] = np.linalg.norm(prefix[piece].astype(np.float64), axis=1)
        prefix_error[piece] = np.linalg.norm(u - p, axis=1)
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
    prefix_error, code_error = prefix_error + 1e-12 * np.sqrt(squared), code_error + 1e-12 * np.sqrt(squared)
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
                prefix,
                codes,
                filled(scale, 1),
                filled(squared, np.inf),
                filled(rho, 0),
                filled(code_error, 0),
                prefix_scale,
                *(filled(v, 0).reshape(cells, size).max(1) for v in (prefix_norm, prefix_error, low, high)),
            ),
        )
    )


def _prefix_scale(rows: np.ndarray, usual: np.ndarray, step: int, projection: Projection) -> np.ndarray:
    """Choose a step (size,) for each number of the prefix, so that 127 steps reach every usual row."""
    largest = np.zeros(projection.size)
    for start in range(0, len(usual), step):
        z = rows[usual[start : start + step]].astype(np.float64)
        largest = np.maximum(largest, np.abs(projection.down(z)).max(0))
    return np.where(largest > 0, largest, largest.max() or 1.0) / 127


def index_path(shard: Path) -> Path:
    """Name the index file of a shard."""
    return shard.with_suffix(".index.safetensors")


def write_index(path: Path, index: Index, shard: str) -> None:
    """Write an index, with a digest of its content. Several processes may write the same one; the last one remains.

    Args:
        path: the index file.
        index: the index.
        shard: SHA-256 of the shard that it was built from.
    """
    with replacing(path, concurrent=True) as draft:
        draft.write_bytes(_packed(_tensors(index), shard))


def _tensors(index: Index) -> dict[str, Tensor]:
    """List the tensors of an index by their names in the file."""
    return {_file_name(field.name): getattr(index, field.name).contiguous() for field in fields(index)}


def _file_name(field: str) -> str:
    return _FILE_NAMES.get(field, field)


def _packed(tensors: dict[str, Tensor], shard: str) -> bytes:
    """Serialise as safetensors, padded so that the codes start at a page: rows then cover as few pages as possible."""
    metadata = {"format": FORMAT, "shard": shard, "sha256": _digest(tensors, shard), "filling": ""}
    content = save(tensors, metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    at_codes = start + json.loads(content[8:start])["codes"]["data_offsets"][0]
    return save(tensors, {**metadata, "filling": " " * (-at_codes % _PAGE_BYTES)})


def read_index(path: Path, rows: int, projection: Projection, shard: str) -> Index | None:
    """Map an index and compare it with its digest; None if the file is missing, damaged or not of this shard.

    Args:
        path: the index file.
        rows: rows of the shard.
        projection: P.
        shard: SHA-256 of the shard.
    """
    try:
        tensors = _intact(path, shard)
    except (OSError, ValueError):
        return None
    names = {_file_name(field.name): field.name for field in fields(Index)}
    if set(tensors) != set(names):
        return None
    index = Index(**{names[name]: tensor for name, tensor in tensors.items()})
    blank = len(index.order) - rows
    fits = 0 <= blank < len(index.low_norm) and (index.codes.shape[1], index.prefix.shape[1]) == (
        padded(projection.dim),
        padded(projection.size),
    )
    return index if fits else None


def check_index(path: Path, shard: str) -> None:
    """Compare an index with its digest and its shard.

    Args:
        path: the index file.
        shard: SHA-256 of the shard.

    Raises:
        ValueError: a byte of the file has changed, or it is of another shard or of an earlier version.
    """
    try:
        _intact(path, shard)
    except ValueError:
        raise ValueError(f"{path} is damaged; delete it, and the next search builds it again.") from None


def _intact(path: Path, shard: str) -> dict[str, Tensor]:
    """Map the tensors of an index file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not what `write` wrote for this shard.
    """
    if not path.is_file():  # a pipe would wait for a writer
        raise FileNotFoundError(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is no index ({error}).") from None
    stated = (metadata.get("format"), metadata.get("shard"), metadata.get("sha256"))
    if stated != (FORMAT, shard, _digest(tensors, shard)):
        raise ValueError(f"{path} is not the index of its shard.")
    return tensors


def _digest(tensors: dict[str, Tensor], shard: str) -> str:
    """Compute the SHA-256 of names, types, shapes and contents, and of the digest of the shard."""
    digest = hashlib.sha256(shard.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.numpy().reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
