"""Tell the files that a protected set made from those of somebody else, by their content and not by name alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HEAD_BYTES = 1 << 16
_DRAFT = r"(\.\d+)?\.tmp"


def is_own(path: Path) -> bool:
    """Tell whether a protected set made this file, or began to write it. An empty file of such a name counts as one.

    Raises:
        OSError: the file cannot be read.
    """
    if path.is_symlink() or not path.is_file():
        return False
    name = re.sub(_DRAFT + "$", "", path.name)
    for pattern, belongs in _CONTENTS:
        if re.fullmatch(pattern, name):
            with open(path, "rb") as file:
                head = file.read(_HEAD_BYTES)
            return not head or belongs(head)
    return False


def _is_lock(head: bytes) -> bool:
    return not head


def _is_manifest(head: bytes) -> bool:
    return re.match(rb'\{"version": \d+, "next_file": \d+, "history": \{', head) is not None


def _is_history(head: bytes) -> bool:
    first, whole, _ = head.partition(b"\n")
    event = _json(first)
    if event is None:
        return not whole and b'{"version": 1, "time": "'.startswith(first[:24])  # cut off while it was written
    return event.get("version") == 1 and event.get("action") == "create"


def _is_job(head: bytes) -> bool:
    job = _json(head)
    job = job.get("job", job) if job is not None else None
    return isinstance(job, dict) and {"paths", "model", "radius", "mirror"} <= set(job)


def _holds(*tensors: str) -> Callable[[bytes], bool]:
    """Make a test for safetensors files with these tensors, of which only the header has to be there."""

    def belongs(head: bytes) -> bool:
        size = int.from_bytes(head[:8], "little")
        header = _json(head[8 : 8 + size]) if 0 < size <= len(head) - 8 else None
        return header is not None and set(tensors) <= set(header)

    return belongs


def _json(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


_CONTENTS: list[tuple[str, Callable[[bytes], bool]]] = [
    (r"set\.json", _is_manifest),
    (r"history\.jsonl", _is_history),
    (r"lock", _is_lock),
    (r"(unfinished|finished)\.json", _is_job),
    (r"\d{6,}\.index\.safetensors", _holds("head", "codes", "squared", "rho")),
    (r"\d{6,}\.removed\.safetensors", _holds("rows", "versions")),
    (r"\d{6,}\.safetensors", _holds("latents", "norms", "keys", "ids", "ids_offsets", "sources_offsets")),
]
