"""Compare every file of a protected set with its checksum, and go on after a damaged one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shielded.latent_space import LatentSpace
from shielded.protected import store
from shielded.protected.search.indexed import index


@dataclass
class CheckedSet:
    """Outcome of `check_set`.

    Args:
        version: version of the set; 0 if its manifest cannot be read.
        rows: rows of that version.
        shards: its shards.
        fingerprint: of its latent space.
        files: name of each file that was compared with a checksum.
        problems: what is wrong, by the name of the file.
        unknown: names of the files that are no part of the set, such as the rest of an interrupted write.
    """

    version: int = 0
    rows: int = 0
    shards: int = 0
    fingerprint: str = ""
    files: list[str] = field(default_factory=list)
    problems: dict[str, Exception] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def check_set(path: Path) -> CheckedSet:
    """Compare the manifest, the history, the shards and their indexes with their checksums, read from disk again.

    Args:
        path: the set's folder.

    Returns:
        What was compared and what is wrong with it.

    Raises:
        FileNotFoundError: there is no protected set.
    """
    checked = CheckedSet(files=[store.MANIFEST])
    try:
        manifest = store.read_manifest(path)
    except ValueError as error:
        checked.problems[store.MANIFEST] = error
        return checked
    removed = [] if manifest["removed"] is None else [manifest["removed"]]
    checked.version, checked.shards = manifest["version"], len(manifest["shards"])
    checked.fingerprint = manifest["fingerprint"]
    checked.rows = sum(entry["rows"] for entry in manifest["shards"]) - sum(entry["rows"] for entry in removed)
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(_problem, *zip(*_checks(path, manifest), strict=True))
        for name, problem in results:
            checked.files.append(name)
            if problem is not None:
                checked.problems[name] = problem
    known = {*checked.files, store.LOCK, store.UNFINISHED, store.FINISHED}
    checked.unknown = sorted(file.name for file in path.iterdir() if file.name not in known)
    return checked


def _checks(path: Path, manifest: store.Manifest) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name of each file with a function that raises what is wrong with it."""
    removed, dim = manifest["removed"], LatentSpace.from_json(manifest["space"]).dim
    yield store.HISTORY, lambda: store.read_history(path, manifest)
    if removed is not None:
        yield removed["file"], lambda: store.read_removed(path, removed)
    for entry in manifest["shards"]:
        yield entry["file"], lambda entry=entry: store.check_shard(path, entry, dim, manifest["dtype"])
        file = index.index_path(path / entry["file"])
        if file.exists():
            yield file.name, lambda file=file, entry=entry: index.check_index(file, entry["sha256"])


def _problem(name: str, check: Callable[[], Any]) -> tuple[str, Exception | None]:
    try:
        check()
    except (OSError, ValueError) as error:
        return name, error
    return name, None
