"""The audit log of a run: what was sampled, repaired, certified and refused, one JSON object per line.

Each line holds the SHA-256 of the line before it, so a line that was changed, removed or put in between shows. The last
line says that the run ended. Whoever can write the file can also write a new one from the start: keep the digest of the
last line, which the report holds, where it cannot be changed.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shielded.files import chained

LOG = "audit.jsonl"  # beside the images of a run


class AuditLog:
    """A log that is being written; a line is in the file when `append` returns.

    Args:
        path: a new file.

    Raises:
        FileExistsError: there is a log already; logs are not overwritten.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.sha256 = ""  # of the last line
        self._lines = 0
        self.path.open("x").close()

    def append(self, event: str, **content: Any) -> None:
        """Add a line.

        Args:
            event: what happened.
            **content: JSON types.
        """
        record = {"line": self._lines, "time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event}
        line = json.dumps({**record, **content, "previous": self.sha256}).encode()
        with self.path.open("ab") as file:
            file.write(line + b"\n")
        self.sha256 = chained(line)
        self._lines += 1

    def close(self) -> None:
        """Add the line that marks a complete log."""
        self.append("end", lines=self._lines)


def read_log(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Read and check a log.

    Returns:
        its lines, as far as they are JSON objects, and what is wrong with it, a sentence each.
    """
    records: list[dict[str, Any]] = []
    problems = []
    previous = ""
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError:
            problems.append(f"line {number} is not a JSON object")
            record = None
        else:
            records.append(record)
            if record.get("previous") != previous:
                problems.append(f"the line before line {number} was changed or removed")
        previous = chained(line)
    if not records or records[-1].get("event") != "end":
        problems.append("its end is missing: the run was stopped, or lines were removed")
    return records, problems
