"""Check the fields of a set's manifest, so that what follows may rely on their types and ranges."""

from __future__ import annotations

import math
import re
from typing import Any

from shielded.latent_space import LatentSpace

DTYPES = ("float16", "float32")
_SHARD = re.compile(r"(\d{6,18})\.safetensors")
_REMOVED = re.compile(r"(\d{6,18})\.removed\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_NUMBER = 2**62


def problem(manifest: dict[str, Any]) -> str | None:
    """Say what is wrong with a manifest of the present format; None if nothing is."""
    try:
        _check(manifest)
    except _Wrong as error:
        return str(error)
    return None


class _Wrong(Exception):
    pass


def _check(manifest: dict[str, Any]) -> None:
    version = _number(manifest, "version", 1)
    next_file = _number(manifest, "next_file", 1)
    _number(manifest, "oldest", 1, version)
    history = _value(manifest, "history", dict)
    _number(history, "bytes", 1)
    _digest(history, "sha256")
    if manifest.get("dtype") not in DTYPES:
        raise _Wrong(f"`dtype` is not one of {', '.join(DTYPES)}")
    _space(_value(manifest, "space", dict), manifest.get("fingerprint"))
    if manifest.get("descriptor") is not None:
        _descriptor(_value(manifest, "descriptor", dict))
    stored = sum(_entry(entry, _SHARD, next_file) for entry in _value(manifest, "shards", list))
    names = [entry["file"] for entry in manifest["shards"]]
    if len(set(names)) < len(names):
        raise _Wrong("`shards` names a file twice")
    if "removed" not in manifest:
        raise _Wrong("it has no `removed`")
    if manifest["removed"] is not None and _entry(manifest["removed"], _REMOVED, next_file) > stored:
        raise _Wrong("more rows are removed than there are")


def _space(data: dict[str, Any], fingerprint: Any) -> None:
    numbers: list[Any] = [data.get(name) for name in ("scaling", "shift")]
    for name in ("mean", "std", "pixel_range"):
        numbers += data[name] if isinstance(data.get(name), list) else [data.get(name) or 1.0]
    sizes = [data.get(name) or 1 for name in ("num_frames", "patch")]
    sizes += data["image_size"] if isinstance(data.get("image_size"), list) else [data.get("image_size") or 1]
    shape = data.get("shape")
    sizes += shape if isinstance(shape, list) else [0]
    texts = [data.get(name) or "" for name in ("vae_class", "vae_sha256")]
    if (
        not all(_is_number(number, float | int) and math.isfinite(number) for number in numbers)
        or not all(_is_number(size, int) and size >= 1 for size in sizes)
        or math.prod(sizes) > _MAX_NUMBER
        or not all(isinstance(text, str) for text in texts)
    ):
        raise _Wrong("`space` describes no latent space")
    try:
        found = LatentSpace.from_json(data).fingerprint
    except (TypeError, ValueError):
        raise _Wrong("`space` describes no latent space") from None
    if found != fingerprint:
        raise _Wrong("its fingerprint is not that of its space")


def _descriptor(record: dict[str, Any]) -> None:
    _value(record, "name", str)
    _digest(record, "sha256")
    _number(record, "dim", 1, 2**20)
    threshold = record.get("threshold")
    changes = record.get("thresholds", [])
    if not isinstance(changes, list) or not all(isinstance(change, list) and len(change) == 2 for change in changes):
        raise _Wrong("`thresholds` are no pairs")
    for version, value in [*changes, [0, threshold]]:
        if not _is_number(version, int):
            raise _Wrong("`thresholds` name no versions")
        if value is not None and not (_is_number(value, float | int) and -1 <= value <= 1):
            raise _Wrong("`threshold` is no similarity")


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _entry(entry: Any, name: re.Pattern[str], next_file: int) -> int:
    """Check the entry of a file; return its number of rows."""
    if not isinstance(entry, dict):
        raise _Wrong("the entry of a file is no object")
    file = entry.get("file")
    match = name.fullmatch(file) if isinstance(file, str) else None
    if match is None:
        raise _Wrong(f"{str(file)[:80]!r} is no name of a file of a set")
    if not 1 <= int(match[1]) < next_file:
        raise _Wrong(f"`next_file` is {next_file}, but there is {file}")
    _digest(entry, "sha256")
    if "columns" in entry:
        _digest(entry, "columns")
    return _number(entry, "rows", 1)


def _value(container: dict[str, Any], name: str, kind: type) -> Any:
    value = container.get(name)
    if not isinstance(value, kind):
        raise _Wrong(f"`{name}` is missing or of another type")
    return value


def _number(container: dict[str, Any], name: str, least: int, most: int = _MAX_NUMBER) -> int:
    value: Any = container.get(name)
    if not _is_number(value, int) or not least <= value <= most:
        raise _Wrong(f"`{name}` is no number from {least} to {most}")
    return value


def _digest(container: dict[str, Any], name: str) -> None:
    if not isinstance(container.get(name), str) or not _DIGEST.fullmatch(container[name]):
        raise _Wrong(f"`{name}` is no SHA-256")
