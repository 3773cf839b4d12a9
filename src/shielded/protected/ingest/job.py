"""Run the job behind `shielded protect`: resumable, from Python or the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shielded._extras import RequestError
from shielded.files import file_sha256, write_json
from shielded.latent_space import LatentSpace
from shielded.models import DEFAULT_MODEL
from shielded.protected import store
from shielded.protected.columns import MIRRORED, is_mirrored
from shielded.protected.described import require_copy_threshold
from shielded.protected.ingest.encoding import AddedImages, add_images
from shielded.protected.ingest.sources import Paths, require_images
from shielded.protected.protected_set import ProtectedSet


@dataclass
class ProtectResult:
    """Outcome of `protect`.

    Args:
        set: the set's folder.
        size: rows that it holds now.
        version: its version now.
        removed: how many images were removed.
        added: how many were encoded and added, each mirrored image counted too.
        present: how many were in the set already, or were given twice.
        skipped: path and reason of each image that could not be read.
        found: how many pictures were found, the sum of `new`, `present` and the number of `skipped`.
        new: of how many pictures something was added.
        not_looked_at: how many files hold no picture that is recognised, by what they are.
        other_radii: whether images that were in the set before have another radius than the given one.
        radius: shield radius of the images that were added; None: they have none.
        deleted: how many removed images `compact` deleted from disk; None: it was not asked to.
        freed: bytes that this freed.
        copy_threshold: similarity from which on the set calls a picture a copy; None: it has no descriptor, or no
            threshold.
    """

    set: str
    size: int
    version: int
    removed: int = 0
    added: int = 0
    present: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    found: int = 0
    new: int = 0
    not_looked_at: dict[str, int] = field(default_factory=dict)
    other_radii: bool = False
    radius: float | None = None
    deleted: int | None = None
    freed: int = 0
    copy_threshold: float | None = None


class EmptySetError(ValueError):
    """None of the images could be read; `result` says why."""

    def __init__(self, result: ProtectResult) -> None:
        super().__init__("none of the images could be read; the set is empty.")
        self.result = result


def protect(
    paths: Paths,
    out: str | os.PathLike[str],
    *,
    model: str = DEFAULT_MODEL,
    radius: float | None = None,
    mirror: bool = False,
    add: bool = False,
    remove: Sequence[str] = (),
    compact: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    ray: str | None = None,
    device: str | None = None,
    progress: bool = True,
    descriptor: str | None = None,
    columns: Sequence[str] = (),
    copy_threshold: float | None = None,
) -> ProtectResult:
    """Encode images into a protected set on disk; remove images from one.

    A call that was interrupted, at any moment and in any way, goes on where it stopped when it is repeated with the
    same paths, model, radius and mirror. A finished call may be repeated as well, as long as nothing else has changed
    the set: it adds what is missing.

    Args:
        paths: images to protect, as in `add_images`; an empty list: none.
        out: the set's folder.
        model: name or folder of the model whose autoencoder encodes; see `shielded.models.load`.
        radius: shield radius of these images, L2 in the latent space; None: that of the images that are in the set
            already, which leaves it open if they have none.
        mirror: also protect each image mirrored left to right, as `mirrored:ID`.
        add: add to a set that exists; its images stay.
        remove: ids to remove first, each with its mirror image; those that were removed before are passed over.
        compact: delete the vectors of removed images from disk at the end.
        overwrite: replace a set that exists.
        strict: raise if an image cannot be read, or a file may hold pictures that are not recognised, instead of
            skipping it.
        ray: address of a Ray cluster whose workers read and encode; see `shielded.protected.ray`.
        device: where to encode; None: CUDA if available.
        progress: show a progress bar.
        descriptor: "shielded", so that a new set also finds changed copies; None: it has shields alone. A set that
            exists keeps what it has.
        columns: names of the columns of tables that hold images; none: the only one.
        copy_threshold: similarity from which on the set calls a picture a copy, as `shielded calibrate` suggests one;
            None: what it has, at first the descriptor's own.

    Returns:
        Counts of what was done, and the images that were skipped.

    Raises:
        FileExistsError: the folder holds a set (without `add` or `overwrite`) or other files.
        FileNotFoundError: a path or the set does not exist.
        KeyError: the set has no image of an id in `remove`.
        EmptySetError: none of the images could be read. The set has been deleted if this call made it.
        RequestError: some images would have a radius and others not, or a threshold is no cosine, or for a set without
            a descriptor.
        ValueError: the set was made for another latent space, `strict` and an image cannot be read, or a descriptor
            together with `ray`.
        RuntimeError: another process is writing to the set, or no cluster answers.
        OSError: the disk is full or the folder read-only.
    """
    out = Path(out)
    given = [os.fspath(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    done, removed, other_radii = AddedImages(), 0, False
    if descriptor is not None and ray is not None:
        raise ValueError("A cluster does not describe images yet; leave out the descriptor, or ray.")
    existed = (out / store.MANIFEST).exists() and not overwrite
    if copy_threshold is not None:  # before anything is encoded
        chosen = ProtectedSet.open(out).descriptor if existed else descriptor
        require_copy_threshold(copy_threshold, chosen is not None)
    if remove:
        removed = _remove(ProtectedSet.open(out), remove)
    if given:
        radius = _radius(ProtectedSet.open(out), radius) if existed and (add or remove) else radius
        other_radii = radius is not None and add and bool((ProtectedSet.open(out).radii != radius).any())
        job = {"paths": given, "model": model, "radius": radius, "mirror": mirror}
        job |= {} if descriptor is None else {"descriptor": descriptor}
        job |= {"columns": list(columns)} if columns else {}
        done = _add(out, job, add or bool(remove), overwrite, strict, device, progress, ray)
    protected = ProtectedSet.open(out)
    if copy_threshold not in (None, protected.copy_threshold):
        protected.set_copy_threshold(copy_threshold)
    counts: dict[str, Any] = {"removed": removed, **vars(done), "other_radii": other_radii, "radius": radius}
    counts["copy_threshold"] = protected.copy_threshold
    if compact:
        before = _stored(out)
        protected.compact()
        after = _stored(out)
        counts |= {"deleted": before[0] - after[0], "freed": before[1] - after[1]}
    result = ProtectResult(str(out), len(protected), protected.version, **counts)
    if given and not len(protected):
        if not existed:
            _delete(out)  # so that the next try finds no set
        raise EmptySetError(result)
    return result


def _radius(protected: ProtectedSet, given: float | None) -> float | None:
    """Return the radius of images that are added to a set: the given one, or the one that all images in it have.

    Raises:
        RequestError: some images would have a radius and others not, which no run can use.
    """
    missing = protected.radii.isnan()
    known = protected.radii[~missing].unique().tolist()
    if given is not None and len(protected) and not known:
        raise RequestError(
            f"the images of {protected.path} have no radius, so that one is found for all when it is used; leave out "
            "--radius here, and give it to generate."
        )
    if given is not None or not known:
        return given
    if len(known) > 1 or missing.any():
        raise RequestError(f"the images of {protected.path} have different radii; give one for the new with --radius.")
    return known[0]


def _stored(out: Path) -> tuple[int, int]:
    """Count the rows that are stored in a set, removed ones included, and the bytes of its files."""
    rows = sum(entry["rows"] for entry in store.read_manifest(out)["shards"])
    return rows, sum(file.stat().st_size for file in out.iterdir() if file.is_file())


def _remove(protected: ProtectedSet, ids: Sequence[str]) -> int:
    """Remove ids with their mirror images; pass over those that are gone, as a call that is repeated has to.

    Raises:
        RequestError: an id is the name of a picture that the set holds under another one.
        KeyError: the set does not have an id.
    """
    gone = {str(name) for event in protected.history for name in event.get("ids", [])}
    ids = [name for name in dict.fromkeys(ids) if name in protected.ids or name not in gone]
    for name in ids:
        other = None if name in protected.ids else _stands_for(protected, name)
        if other is not None:
            raise RequestError(f"{name} has the same content as {other}, which stands for both; --remove {other}.")
    mirrored = [MIRRORED + name for name in ids]
    protected.remove([*ids, *(name for name in mirrored if name in protected.ids and name not in ids)])
    return len(ids)


def _stands_for(protected: ProtectedSet, name: str) -> str | None:
    """Find the id under which the set holds a picture of another name, by the files beside its sources."""
    stem = os.path.basename(name)
    found = [name] if os.path.isfile(name) else []
    for folder in dict.fromkeys(os.path.dirname(source) for source in protected.sources if source):
        if os.path.isdir(folder or "."):
            found += [entry.path for entry in os.scandir(folder or ".") if os.path.splitext(entry.name)[0] == stem]
    digests = {file_sha256(path) for path in found if os.path.isfile(path)}
    rows = (row for row, digest in enumerate(protected.sha256) if digest in digests)
    return next((str(protected.ids[row]) for row in rows if not is_mirrored(protected.ids[row])), None)


def _add(
    out: Path,
    job: dict[str, Any],
    add: bool,
    overwrite: bool,
    strict: bool,
    device: str | None,
    progress: bool,
    ray: str | None,
) -> AddedImages:
    """Encode the images of a job into the set; resume the same job if it was interrupted."""
    exists = (out / store.MANIFEST).exists()
    if out.is_file() or (out.is_dir() and not exists and not all(map(store.is_own, out.iterdir()))):
        raise FileExistsError(f"{out} holds something else; give a protected set a folder of its own.")
    resumed = exists and not add and _resumes(out, job, overwrite)
    protected = ProtectedSet.open(out) if exists and (add or resumed) else None
    if exists and protected is None and not overwrite:
        raise FileExistsError(
            f"{out} is a protected set already; use --add (add=True) to add to it, or --overwrite (overwrite=True) to "
            "replace it."
        )
    columns = job.get("columns", [])
    require_images(job["paths"], columns)  # a path that does not exist ends the job before the model is loaded
    if ray is not None:
        from shielded.protected.ray.connection import connect

        connect(ray)

    from shielded.models import load

    space = LatentSpace.of(load(job["model"], device))
    if protected is None:
        replaced = store.read_manifest(out)["version"] if exists else 0
        if not exists:
            store.require_no_remains(out)
            out.mkdir(parents=True, exist_ok=True)
        # Noted first, so that a set that is there without being finished always has its note.
        write_json(out / store.UNFINISHED, {**job, "replaces": replaced})
        protected = ProtectedSet.create(out, space, torch.float16, overwrite, job.get("descriptor"))
    before = len(protected)
    options = {"radius": job["radius"], "strict": strict, "mirror": job["mirror"], "progress": progress}
    options |= {"columns": columns} if columns else {}
    try:
        if ray is None:
            done = add_images(protected, job["paths"], space=space, **options)
        else:
            from shielded.protected.ray.ingest import add_images_on_cluster

            done = add_images_on_cluster(protected, job["paths"], ray, job["model"], **options)
    except KeyboardInterrupt as error:
        kept = len(ProtectedSet.open(out)) - before
        error.add_note(f"{kept or 'No'} new images are in {out}; the same command goes on with the rest.")
        raise
    if not add:
        write_json(out / store.FINISHED, {"job": job, "version": ProtectedSet.open(out).version})
    (out / store.UNFINISHED).unlink(missing_ok=True)
    return done


def _resumes(out: Path, job: dict[str, Any], overwrite: bool) -> bool:
    """Tell whether the set in a folder was made by the same job, finished or not, and by nothing else since."""
    manifest, note = store.read_manifest(out), out / store.UNFINISHED
    if note.exists():
        unfinished = _json(note)
        if unfinished is None:  # cut off by a power failure: whatever the job was, it was not finished
            return not overwrite
        replaced = unfinished.pop("replaces", 0)
        return unfinished == job and manifest["version"] > replaced
    finished = None if overwrite else _json(out / store.FINISHED)
    if finished is None or finished.get("job") != job:
        return False
    since = store.read_history(out, manifest)[finished.get("version") :]
    return all(event["action"] == "compact" for event in since)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _delete(out: Path) -> None:
    for file in filter(store.is_own, list(out.iterdir())):
        file.unlink()
    if not any(out.iterdir()):
        out.rmdir()
