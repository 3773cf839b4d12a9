"""Read and write the files of a protected set.

    set.json                    the manifest: which shards make up the current version
    000002.safetensors          a shard: some thousand rows; never changed once it is written
    000003.removed.safetensors  the rows that have been removed, and in which version
    history.jsonl               one line per version; the manifest says how much of it counts
    000002.index.safetensors    what the search derived from a shard; may be missing
    unfinished.json             the job of `shielded protect`, until it is finished
    finished.json               the job that made the set, and the version that it left
    lock                        held by the one process that is writing

A shard holds `latents` (n, *shape), `norms` and `radii` (n,) float64 (NaN for none), `sha256` (n, 32) bytes of the
digests of the image files (zeros for none), in a set with a descriptor `descriptors` (n, d) with their `_codes` and
`_scales` for the search, and `ids` and `sources` as JSON values in one array of bytes, value i
from `ids_offsets[i]` to `ids_offsets[i + 1]`; `keys` are hashes of the ids. The manifest has two digests of it: of the
whole file, which is compared before latents or descriptors are first used, and of everything but these, compared when
the set is opened.

A new version exists once its manifest has replaced the old one, so a process that is killed leaves at worst files
that no manifest names and a tail of the history that does not count. The numbers in file names only grow: no file
name is ever used again for other content.
"""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from shielded.copies.bank import Descriptors
from shielded.files import chained, file_sha256, replacing, sha256
from shielded.protected import checksums
from shielded.protected.columns import Digests, Rows, Texts
from shielded.protected.manifest import problem
from shielded.protected.ownership import is_own

MANIFEST = "set.json"
HISTORY = "history.jsonl"
LOCK = "lock"
UNFINISHED = "unfinished.json"
FINISHED = "finished.json"
FORMAT = 2
_MAX_MANIFEST_BYTES = 1 << 30
_MAX_CHECKED_NUMBERS = 1 << 22

Manifest = dict[str, Any]


@contextmanager
def writing(folder: Path, wait_seconds: float = 0.0) -> Iterator[None]:
    """Make this process the only writer. The system releases the lock when the process ends, however it ends.

    Args:
        folder: the set's folder.
        wait_seconds: how long to wait for another writer to finish.

    Raises:
        RuntimeError: another process is writing.
        OSError: in one sentence: the folder cannot be written to, or the disk is full.
    """
    with explained(folder):
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=wait_seconds, poll_interval=0.02)
        except Timeout:
            raise RuntimeError(f"Another process is writing to {folder}; try again when it has finished.") from None
        try:
            yield
        finally:
            lock.release()


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn errors of the system while writing into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by this package, with a sentence
            raise
        hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder's permissions"
        kept = " The set stays at its last version." if (folder / MANIFEST).exists() else ""
        raise type(error)(f"{folder} cannot be written to: {os.strerror(error.errno)}; {hint}.{kept}") from error


# The manifest and the history ----------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """Read the current manifest.

    Raises:
        FileNotFoundError: no protected set in `folder`.
        ValueError: the manifest is damaged, of another format, or missing beside the files of a set.
    """
    path = folder / MANIFEST
    try:
        text = _read_text(path)
    except (FileNotFoundError, NotADirectoryError):
        require_no_remains(folder)
        raise FileNotFoundError(
            f"There is no protected set at {folder}: {MANIFEST} is missing. Make one: shielded protect IMAGES --out SET"
        ) from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise ValueError(f"{path} is damaged.") from None
    try:
        manifest = json.loads(text)
        number = manifest["format"]
        del manifest["sha256"]
        if number != 1 and _manifest_text(manifest) != text:  # format 1 was laid out in another way
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged: its checksum does not hold.") from None
    if number != FORMAT:
        raise ValueError(
            f"{path} has format {str(number)[:20]}; this version of shielded reads format {FORMAT}. "
            "Protect the images again, or use the version that wrote it."
        )
    wrong = problem(manifest)
    if wrong is not None:
        raise ValueError(f"{path} is damaged: {wrong}.")
    return manifest


def require_no_remains(folder: Path) -> None:
    """Refuse a folder with files of a protected set that has lost its manifest.

    Raises:
        ValueError: naming what is there.
    """
    remains = [path.name for path in folder.glob("*.safetensors") if is_own(path)] if folder.is_dir() else []
    history = folder / HISTORY
    if is_own(history) and history.read_bytes().count(b"\n") > 1:
        remains.append(HISTORY)
    if remains:
        raise ValueError(
            f"The protected set at {folder} is damaged: {MANIFEST} is missing, but {sorted(remains)[0]} is there. "
            "Nothing of it is changed; restore the folder from a copy, or use another one."
        )


def _read_text(path: Path) -> str:
    if os.path.lexists(path) and _regular(path).stat().st_size > _MAX_MANIFEST_BYTES:
        raise ValueError(f"{path} is damaged: it is too large.")
    return path.read_text("utf-8")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make `manifest` the current one, atomically."""
    with replacing(folder / MANIFEST) as draft:
        draft.write_text(_manifest_text(manifest), "utf-8")


def append_history(folder: Path, history: dict[str, Any], event: dict[str, Any]) -> dict[str, Any]:
    """Write the line of a version that is about to be committed.

    Args:
        folder: the set's folder.
        history: the part of the file that counts so far: its `bytes`, and `sha256`, the last link of its hash chain.
        event: what happened.

    Returns:
        The part that counts from the next manifest on.
    """
    path = folder / HISTORY
    if history["bytes"] and (not path.exists() or path.stat().st_size < history["bytes"]):
        raise ValueError(f"{path} is damaged: it is shorter than the versions of the set.")
    line = json.dumps(event).encode() + b"\n"
    with open(path, "r+b" if path.exists() else "w+b") as file:
        file.truncate(history["bytes"])  # a line whose version was never committed
        file.seek(history["bytes"])
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": history["bytes"] + len(line), "sha256": chained(line, history["sha256"])}


def read_history(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Read the events up to the version of this manifest.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged.
    """
    path = _existing(folder / HISTORY)
    with open(path, "rb") as file:
        lines = file.read(min(manifest["history"]["bytes"], path.stat().st_size)).splitlines(keepends=True)
    digest = ""
    for line in lines:
        digest = chained(line, digest)
    if digest != manifest["history"]["sha256"]:
        raise ValueError(f"{path} is damaged: its checksum does not hold.")
    try:
        events = [json.loads(line) for line in lines]
        kinds = [
            (event["version"], type(event["count"]), type(event["action"]), type(event["time"])) for event in events
        ]
    except (ValueError, TypeError, KeyError, RecursionError):
        kinds = []
    if kinds != [(version, int, str, str) for version in range(1, manifest["version"] + 1)]:
        raise ValueError(f"{path} is damaged: it does not tell the versions up to {manifest['version']}.")
    return events


def _manifest_text(manifest: Manifest) -> str:
    """Serialise a manifest, with a checksum of itself, in the one way that counts as intact."""
    digest = sha256(json.dumps(manifest, sort_keys=True).encode())
    shards = ",\n".join(map(json.dumps, manifest["shards"]))
    rest = json.dumps({**{k: v for k, v in manifest.items() if k != "shards"}, "sha256": digest})
    return f'{rest[:-1]}, "shards": [\n{shards}\n]}}\n'


# Shards -------------------------------------------------------------------------------------------------------------


def write_shard(folder: Path, number: int, rows: Rows, shape: tuple[int, ...]) -> dict[str, Any]:
    """Write a shard; return its entry in the manifest."""
    tensors = {
        "latents": rows.latents.reshape(-1, *shape),
        "norms": rows.norms,
        "radii": rows.radii,
        "keys": rows.keys,
        "sha256": rows.sha256.data,
        "ids": rows.ids.data,
        "ids_offsets": rows.ids.offsets,
        "sources": rows.sources.data,
        "sources_offsets": rows.sources.offsets,
    }
    if rows.descriptors is not None:
        tensors["descriptors"] = rows.descriptors.vectors
        tensors["descriptors_codes"] = rows.descriptors.codes
        tensors["descriptors_scales"] = rows.descriptors.scales
    return _write(folder, f"{number:06d}.safetensors", tensors, len(rows))


def read_shard(folder: Path, entry: dict[str, Any], dim: int, dtype: str) -> Rows:
    """Map the rows of a shard into memory, without reading them.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged.
    """
    path = _existing(folder / entry["file"])
    if "columns" not in entry:
        require_intact(folder, entry)  # of a version that had one digest alone
    elif _columns_digest(path) != entry["columns"]:
        raise ValueError(f"{path} is damaged: its checksum does not hold.")
    tensors = _read(folder, entry)
    n = entry["rows"]
    try:
        rows = Rows(
            tensors["latents"].reshape(n, dim),
            tensors["norms"],
            tensors["radii"],
            tensors["keys"],
            Texts(tensors["ids"], tensors["ids_offsets"]),
            Texts(tensors["sources"], tensors["sources_offsets"]),
            Digests(tensors["sha256"]),
            Descriptors(*(tensors[f"descriptors{part}"] for part in ("", "_codes", "_scales")))
            if "descriptors" in tensors
            else None,
        )
        lengths = {len(part) for part in vars(rows).values() if part is not None}
        if lengths != {n} or rows.latents.dtype != dtype or rows.sha256.data.shape != (n, 32):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: it does not hold {n} rows.") from None
    wrong = _wrong_column(rows)
    if wrong is not None:
        raise ValueError(f"{path} is damaged: {wrong}.")
    return rows


def check_shard(folder: Path, entry: dict[str, Any], dim: int, dtype: str) -> None:
    """Compare a shard with its checksums, and look at every number of it.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, or a row is not finite.
    """
    check_file(folder, entry)
    rows = read_shard(folder, entry, dim, dtype)
    step = max(1, _MAX_CHECKED_NUMBERS // dim)
    if not all(np.isfinite(rows.latents[start : start + step]).all() for start in range(0, len(rows), step)):
        raise ValueError(f"{folder / entry['file']} is damaged: a row is not finite.")


def _columns_digest(path: Path) -> str | None:
    try:
        return checksums.columns_digest(path)
    except ValueError:
        return None


def _wrong_column(rows: Rows) -> str | None:
    """Say which column cannot have been written by a set; None if none."""
    numbers = {"norms": rows.norms, "radii": rows.radii}
    wrong = [name for name, values in numbers.items() if values.shape != (len(rows),) or values.dtype != np.float64]
    wrong += [] if rows.keys.shape == (len(rows),) and rows.keys.dtype == np.int64 else ["keys"]
    wrong += [] if rows.sha256.data.dtype == np.uint8 else ["sha256"]
    for name, texts in (("ids", rows.ids), ("sources", rows.sources)):
        ends = texts.offsets
        kinds = texts.data.dtype == np.uint8 and ends.dtype == np.int64 and ends.ndim == texts.data.ndim == 1
        if not kinds or ends[0] != 0 or ends[-1] != len(texts.data) or (np.diff(ends) < 0).any():
            wrong.append(name)
    if wrong:
        return f"its {wrong[0]} are not those of {len(rows)} rows"
    if not (np.isfinite(rows.norms) & (rows.norms >= 0)).all():
        return "a row is not finite"
    if not (np.isnan(rows.radii) | (np.isfinite(rows.radii) & (rows.radii > 0))).all():
        return "a radius is not positive"
    return None


def write_removed(folder: Path, number: int, rows: np.ndarray, versions: np.ndarray) -> dict[str, Any]:
    """Write which stored rows have been removed, and in which version each; return the entry in the manifest."""
    return _write(folder, f"{number:06d}.removed.safetensors", {"rows": rows, "versions": versions}, len(rows))


def read_removed(folder: Path, entry: dict[str, Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """Read which stored rows have been removed, and in which version each."""
    if entry is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    check_file(folder, entry)
    tensors = _read(folder, entry)
    if {name: tensor.shape for name, tensor in tensors.items()} != dict.fromkeys(
        ("rows", "versions"), (entry["rows"],)
    ):
        raise ValueError(f"{folder / entry['file']} is damaged: it does not hold {entry['rows']} rows.")
    rows, versions = tensors["rows"], tensors["versions"]
    if rows.dtype != np.int64 or versions.dtype != np.int64 or (rows < 0).any() or (np.diff(rows) <= 0).any():
        raise ValueError(f"{folder / entry['file']} is damaged: its rows are not those of a set.")
    return rows, versions


def check_file(folder: Path, entry: dict[str, Any]) -> None:
    """Compare a file with its checksum.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a byte of the file has changed.
    """
    path = _existing(folder / entry["file"])
    if file_sha256(path) != entry["sha256"]:
        raise ValueError(f"{path} is damaged: its checksum does not hold.")


def require_intact(folder: Path, entry: dict[str, Any]) -> None:
    """Compare a file with its checksum, unless this process has done so and the file is as it was.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a byte of the file has changed.
    """
    path = _existing(folder / entry["file"])
    if checksums.file_digest(path) != entry["sha256"]:
        raise ValueError(f"{path} is damaged: its checksum does not hold.")


def delete_unused(folder: Path, manifest: Manifest) -> None:
    """Delete shards, indexes and temporary files that do not belong to the manifest."""
    shards = {Path(entry["file"]).stem for entry in manifest["shards"]}
    kept = {MANIFEST, HISTORY, LOCK, UNFINISHED, FINISHED, (manifest["removed"] or {}).get("file")}
    for path in folder.iterdir():
        # A reader may be writing the index of a shard, so its temporary file is left alone.
        stem, _, rest = path.name.partition(".")
        used = path.name in kept or (stem in shards and (rest == "safetensors" or rest.startswith("index.")))
        if not used and is_own(path):
            with suppress(PermissionError):  # Windows: still mapped by a reader
                path.unlink(missing_ok=True)


def _write(folder: Path, name: str, tensors: dict[str, np.ndarray], rows: int) -> dict[str, Any]:
    # Not save_file: that writes to a hidden file of its own, which a kill would leave behind.
    content = save({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()})
    with replacing(folder / name) as draft:
        draft.write_bytes(content)
    entry = {"file": name, "rows": rows, "sha256": sha256(content)}
    return entry | ({"columns": checksums.columns_sha256(io.BytesIO(content))} if "latents" in tensors else {})


def _read(folder: Path, entry: dict[str, Any]) -> dict[str, np.ndarray]:
    """Map the tensors of a file as read-only arrays, which hold no file open."""
    path = _existing(folder / entry["file"])
    try:
        with safe_open(path, "pt") as file:
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: it cannot be read as safetensors ({error}).") from None
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def _existing(path: Path) -> Path:
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path} is missing, a part of the protected set.")
    return _regular(path)


def _regular(path: Path) -> Path:
    """Refuse what is no file of the folder: a link that leads out of it, a pipe, a folder."""
    if path.is_symlink():
        try:
            inside = path.resolve(strict=True).parent == path.parent.resolve()
        except (OSError, RuntimeError):  # RuntimeError: a circle, before Python 3.13
            raise ValueError(f"{path} is damaged: it is a link to no file.") from None
        if not inside:
            raise ValueError(f"{path} is damaged: it is a link to a file outside the set.")
    if not path.is_file():
        raise ValueError(f"{path} is damaged: it is no file.")
    return path
