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

from shielded.certificates.reading import COUNT, DIGEST, FILE_NAME, OBJECT, TEXT, Check, check_fields, strict_json
from shielded.files import chained, naming

LOG = "audit.jsonl"  # beside the images of a run
_CHECKS: dict[str, Check] = {
    "line": COUNT,
    "event": TEXT,
    "image": FILE_NAME,
    "sha256": DIGEST,
    "certificate_sha256": DIGEST,
    "settings": OBJECT,
}


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
        with naming(self.path), self.path.open("ab") as file:
            file.write(line + b"\n")
        self.sha256 = chained(line)
        self._lines += 1

    def close(self) -> None:
        """Add the line that marks a complete log."""
        self.append("end", lines=self._lines)


def read_log(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Read and check a log.

    Returns:
        its lines, as far as they are JSON objects, and what is wrong with it, a sentence each: also that it cannot be
        read.
    """
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    previous = ""
    try:
        if not Path(path).is_file():  # a pipe would wait for its writer
            raise OSError("it is no file")
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        return [], [f"it cannot be read: {error.strerror or error}"]
    if lines.pop():  # what follows the last line's end
        problems.append("its last line is cut")
    for number, line in enumerate(lines, 1):
        try:
            record = strict_json(line)
            check_fields(record, _CHECKS)
        except ValueError as error:
            problems.append(f"line {number} is no record: {error}")
            previous = chained(line)
            continue
        if record.get("previous") != previous:
            problems.append(f"the line before line {number} was changed or removed")
        if record.get("line") != number - 1:
            problems.append(f"line {number} has another number: lines were removed or put in")
        if records and records[-1].get("event") == "end":
            problems.append(f"line {number} follows the end")
        records.append(record)
        previous = chained(line)
    if not records or records[-1].get("event") != "end":
        problems.append("its end is missing: the run was stopped, or lines were removed")
    return records, problems


def log_sha256(path: str | os.PathLike[str]) -> str:
    """Compute the digest of a log's last line, which `report.json` of the run holds."""
    lines = Path(path).read_bytes().splitlines()
    return chained(lines[-1]) if lines else ""


def reported_logs(folder: Path) -> dict[str, list[str]]:
    """Compare the log beside the images of a folder with what the run's `report.json` says of it.

    Args:
        folder: of the images.

    Returns:
        Path of the log -> what is wrong with it; empty if there is no report that names a log of this folder.
    """
    report, log = folder.parent / "report.json", folder / LOG
    try:
        entry = json.loads(report.read_bytes())["audit_log"]
        named, expected = folder.parent / entry["file"], entry["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    if named.resolve() != log.resolve():
        return {}
    if not log.is_file():
        return {str(log): [f"it is missing, and {report} names it"]}
    try:
        found = log_sha256(log)
    except OSError:
        return {}  # `read_log` says so
    return {str(log): [] if found == expected else [f"it is not the log that {report} names: its end differs"]}
