"""shielded protect"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shielded.cli.options import (
    AsJson,
    Debug,
    Device,
    Model,
    Overwrite,
    UsageError,
    errors,
    positive,
    show,
    unless_completing,
    why,
)
from shielded.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from shielded.protected import ProtectResult

_MAX_SKIPPED_SHOWN = 20


def _known(name: str | None) -> str | None:
    """Refuse a descriptor that does not come with this package."""
    if name not in (None, "shielded"):
        raise typer.BadParameter(f"there is no descriptor {name!r} here; shielded comes along.")
    return name


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
        typer.Option(metavar="R", callback=positive, help="Shield radius (latent L2); default with --add: the set's."),
    ] = None,
    mirror: Annotated[
        bool, typer.Option("--mirror", metavar="", help="Protect each image mirrored left to right too.")
    ] = False,
    add: Annotated[bool, typer.Option("--add", metavar="", help="Add to a set that exists; its images stay.")] = False,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Remove this image and its mirror image; may be repeated.")
    ] = None,
    compact: Annotated[bool, typer.Option("--compact", metavar="", help="Delete removed images from disk.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", metavar="", help="Stop at what cannot be read or recognised.")
    ] = False,
    column: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Column of images in tables; may be repeated.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Ray cluster whose workers read and encode.")
    ] = None,
    descriptor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            callback=unless_completing(_known),
            help="Find changed copies too, by this network: shielded.",
        ),
    ] = None,
    copy_threshold: Annotated[
        float | None,
        typer.Option(metavar="S", help="Similarity from which on a picture is a copy; default: what the set has."),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Encode images into a protected set; remove images from one.

    A run that was interrupted goes on where it stopped when the command is repeated.

    Example: shielded protect photos/ --out my-set --radius 18
    """
    with errors(debug):
        if not (paths or remove or compact or copy_threshold is not None):
            raise UsageError("nothing to do; give images to protect, --remove ID, --copy-threshold S or --compact.")
        from shielded.protected.ingest import job

        try:
            result = job.protect(
                paths or [],
                out,
                model=model,
                radius=radius,
                mirror=mirror,
                add=add,
                remove=remove or (),
                compact=compact,
                overwrite=overwrite,
                strict=strict,
                ray=ray,
                device=device,
                descriptor=descriptor,
                copy_threshold=copy_threshold,
                progress=not as_json,
                columns=column or (),
            )
        except FileExistsError as error:
            raise UsageError(str(error)) from None
        except KeyError as error:
            raise UsageError(f"{error.args[0]} Ids are file names without suffix, as verify shows them.") from None
        except job.EmptySetError as error:
            _print(error.result, as_json)
            raise
        _print(result, as_json, radius is None)


def _print(result: ProtectResult, as_json: bool, taken: bool = False) -> None:
    """Print the outcome.

    Args:
        result: what was done.
        as_json: print JSON.
        taken: whether no radius was given, so that new images have that of the others.
    """
    from shielded.runs.report.summary import counted

    _print_skipped(result.skipped)
    if result.present and result.other_radii:
        typer.echo(
            f"{result.present} were in the set already and keep the radius that they have there; to change it, "
            "--remove them first, or give --radius to generate.",
            err=True,
        )
    if taken and result.new and result.radius is not None:
        typer.echo(f"New images get the radius {result.radius:g}, as the others have; see --radius.", err=True)
    mirrored = f" (with mirror images {result.added})" if result.added != result.new else ""
    counts = (
        f"{result.new} added{mirrored}, {result.present} already present, {len(result.skipped)} skipped, "
        f"{result.removed} removed"
    )
    found = f"{result.found} found: " if result.found else ""
    summary = f"{result.set}: {found}{counts}; {result.size} in all."
    if result.deleted is not None:
        freed = f"{max(result.freed, 0) / 1000:,.0f} kB freed, earlier versions are gone" if result.deleted else ""
        summary += f" Deleted from disk: {counted(result.deleted, 'removed image')}{f' ({freed})' if freed else ''}."
    if result.not_looked_at:
        kinds = ", ".join(f"{number} {reason}" for reason, number in sorted(result.not_looked_at.items()))
        summary += f" Not looked at: {kinds}."
    if result.copy_threshold is not None:
        summary += f" Pictures are copies from a similarity of {result.copy_threshold:g} on"
        summary += "; `shielded calibrate` suggests a threshold for these." if result.new else "."
    left_out = {"other_radii", *(("deleted", "freed") if result.deleted is None else ())}
    left_out |= {"copy_threshold"} if result.copy_threshold is None else set()
    printed = {name: value for name, value in vars(result).items() if name not in left_out}
    show(printed, as_json, summary)


def _print_skipped(skipped: list[tuple[str, str]]) -> None:
    """Print the images that could not be read, as a table."""
    if not skipped:
        return
    shown = skipped[:_MAX_SKIPPED_SHOWN]
    width = max(len(path) for path, _ in shown)
    typer.echo(f"{len(skipped)} could not be read:", err=True)
    for path, reason in shown:
        typer.echo(f"  {path:<{width}}  {why(reason)}", err=True)
    if len(skipped) > len(shown):
        typer.echo(f"  ... {len(skipped) - len(shown)} more; --json names all of them", err=True)
