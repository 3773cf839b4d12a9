"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name to write to, which takes the place of `path` when the block ends without an error."""
    target = Path(path)
    draft = target.with_name(target.name + ".tmp")
    yield draft
    draft.replace(target)


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n")


def replace_section(document: Path, name: str, text: str) -> None:
    """Replace what is between `<!-- <name>:begin -->` and `:end` in a Markdown file.

    Raises:
        ValueError: the file has no such section.
    """
    begin, end = (f"<!-- {name}:{mark} -->" for mark in ("begin", "end"))
    whole = document.read_text(encoding="utf-8")
    before, found, rest = whole.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"{document} has no section between {begin} and {end}.")
    with replacing(document) as draft:
        draft.write_text(f"{before}{begin}\n{text}\n{rest[rest.index(end) :]}", encoding="utf-8")
