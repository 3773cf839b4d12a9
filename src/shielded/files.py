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
