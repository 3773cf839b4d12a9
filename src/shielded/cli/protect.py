"""shielded protect"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shielded.cli.options import AsJson, Debug, Device, Model, Overwrite, UsageError, errors, positive, show, why
from shielded.files import write_json
from shielded.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from shielded.protected import AddedImages, ProtectedSet

_SHOWN = 20  # images that could not be read


def protect(
    out: Annotated[Path, typer.Option("--out", metavar="SET", help="The protected set.")],
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Images, folders, globs, tar archives (webdataset), parquet or Arrow files, @FILE of paths",
            show_default=False,
        ),
    ] = None,
    model: Model = DEFAULT_MODEL,
    radius: Annotated[
        float | None,
        typer.Option(metavar="R", callback=positive, help="Of the shields of these images, L2 in the latent space."),
    ] = None,
    mirror: Annotated[
        bool, typer.Option("--mirror", metavar="", help="Protect each image mirrored left to right too.")
    ] = False,
    add: Annotated[
        bool, typer.Option("--add", metavar="", help="Add to a set that exists; what is in it stays.")
    ] = False,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Remove this image and its mirror image; may be repeated.")
    ] = None,
    compact: Annotated[bool, typer.Option("--compact", metavar="", help="Delete removed images from disk.")] = False,
    strict: Annotated[bool, typer.Option("--strict", metavar="", help="Stop at an image that cannot be read.")] = False,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Ray cluster whose workers read and encode.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Encode images into a protected set; remove images from one.

    A run that was stopped goes on where it was when it is started again.

    Example: shielded protect photos/ --out my-set --radius 18
    """
    with errors(debug):
        if not (paths or remove or compact):
            raise UsageError("nothing to do; give images to protect, --remove ID or --compact.")
        from shielded.protected import AddedImages, ProtectedSet

        done, removed, other_radii = AddedImages(), 0, False
        if remove:
            removed = _remove(ProtectedSet.open(out), remove)
        if paths:
            job = {"paths": paths, "model": model, "radius": radius, "mirror": mirror}
            other_radii = radius is not None and add and bool((ProtectedSet.open(out).radii != radius).any())
            done = _add(out, job, add or bool(remove), overwrite, strict, device, not as_json, ray)
        protected = ProtectedSet.open(out)
        if compact:
            protected.compact()
        _show_skipped(done)
        if done.present and other_radii:
            typer.echo(
                f"{done.present} were in the set already and keep the radius that they have there; to change it, "
                "--remove them first, or give --radius to generate.",
                err=True,
            )
        result = {"set": str(out), "size": len(protected), "version": protected.version, "removed": removed}
        counts = f"{done.added} added, {done.present} already present, {len(done.skipped)} skipped, {removed} removed"
        show({**result, **vars(done)}, as_json, f"{out}: {counts}; {len(protected)} in all.")
        if paths and not len(protected):
            _delete(out)  # so that the next try finds no set there
            raise ValueError("none of the images could be read; the set is empty.")


def _delete(out: Path) -> None:
    from shielded.protected import store

    for file in filter(store.is_own, list(out.iterdir())):
        file.unlink()
    if not any(out.iterdir()):
        out.rmdir()


def _remove(protected: ProtectedSet, ids: list[str]) -> int:
    from shielded.protected.ingest.images import MIRRORED

    mirrored = [MIRRORED + name for name in ids]
    try:
        protected.remove([*ids, *(name for name in mirrored if name in protected.ids and name not in ids)])
    except KeyError as error:
        raise UsageError(f"{error.args[0]} Ids are file names without suffix, as verify shows them.") from None
    return len(ids)


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
    """Encodes the images of a job into the set; goes on with the same job if that was stopped."""
    from shielded.protected import ProtectedSet, add_images, store
    from shielded.protected.ingest.sources import require_images

    if out.is_file() or (out.is_dir() and not all(map(store.is_own, out.iterdir()))):
        raise UsageError(f"{out} holds something else; give a protected set a folder of its own.")
    note = out / store.UNFINISHED
    goes_on = add or not overwrite
    protected = ProtectedSet.open(out) if goes_on and (out / store.MANIFEST).exists() else None
    if protected and not add and not (note.exists() and json.loads(note.read_text()) == job):
        raise UsageError(f"{out} is a protected set already; use --add to add to it, or --overwrite to replace it.")
    require_images(job["paths"])  # a path that does not exist ends it before the model is loaded
    if ray is not None:
        from shielded.protected.ray import cluster

        cluster.connect(ray)

    import torch

    from shielded.latent_space import LatentSpace
    from shielded.models import load

    space = LatentSpace.of(load(job["model"], device))
    if protected is None:
        protected = ProtectedSet.create(out, space, torch.float16, overwrite)
        write_json(note, job)
    options = {"radius": job["radius"], "strict": strict, "mirror": job["mirror"], "progress": progress}
    if ray is None:
        done = add_images(protected, job["paths"], space=space, **options)
    else:
        done = cluster.add_images(protected, job["paths"], ray, job["model"], **options)
    note.unlink(missing_ok=True)
    return done


def _show_skipped(done: AddedImages) -> None:
    """The images that could not be read, as a table."""
    if not done.skipped:
        return
    shown = done.skipped[:_SHOWN]
    width = max(len(path) for path, _ in shown)
    typer.echo(f"{len(done.skipped)} could not be read:", err=True)
    for path, reason in shown:
        typer.echo(f"  {path:<{width}}  {why(reason)}", err=True)
    if len(done.skipped) > len(shown):
        typer.echo(f"  ... {len(done.skipped) - len(shown)} more; --json names all of them", err=True)
