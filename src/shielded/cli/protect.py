"""shielded protect"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shielded.cli.options import AsJson, Debug, Device, Model, Overwrite, check_out, errors, positive, show


def protect(
    paths: Annotated[list[str], typer.Argument(help="Image files, folders or globs.")],
    out: Annotated[Path, typer.Option("--out", help="The protected set.")],
    model: Model = "emoji",
    radius: Annotated[
        float | None, typer.Option(help="Of the shields of these images, L2 in the latent space.")
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Add to a set that exists; images in it are not encoded again.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at an image that cannot be read.")] = False,
    device: Device = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Encode images into a protected set.

    Example: shielded protect photos/ --out my-set --radius 18
    """
    with errors(debug):
        if radius is not None:
            positive(radius, "--radius")
        if not add:
            check_out(out, overwrite)
        from shielded.latent_space import LatentSpace
        from shielded.models import load
        from shielded.protected import ProtectedSet, add_images, find_images

        find_images(paths)  # a path that does not exist ends it before the model is loaded
        space = LatentSpace.of(load(model, device))
        exists = add and out.exists()
        protected = ProtectedSet.open(out) if exists else ProtectedSet.create(out, space, overwrite=overwrite)
        done = add_images(protected, paths, radius, strict, space=space)
        for path, reason in done.skipped:
            typer.echo(f"skipped {path}: {reason}", err=True)
        result = {"set": str(out), "size": len(protected), "version": protected.version, **vars(done)}
        counts = f"{done.added} added, {done.present} already present, {len(done.skipped)} skipped"
        show(result, as_json, f"{out}: {counts}; {len(protected)} in all.")
        if not len(protected):
            raise ValueError("none of the images could be read; the set is empty.")
