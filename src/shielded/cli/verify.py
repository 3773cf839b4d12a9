"""shielded verify"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shielded.cli.options import AsJson, Debug, Device, Model, errors, positive, show


def verify(
    paths: Annotated[list[str], typer.Argument(help="Image files, folders or globs.")],
    protect: Annotated[Path, typer.Option(help="The protected set to measure against.")],
    model: Model = "emoji",
    radius: Annotated[float | None, typer.Option(help="Of every shield; default: the set's own radii.")] = None,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure images against a protected set; exit code 1 if one lies inside a shield.

    Example: shielded verify images/ --protect my-set
    """
    with errors(debug):
        if radius is not None:
            positive(radius, "--radius")
        from shielded.certificate import certify, leaks
        from shielded.latent_space import LatentSpace
        from shielded.models import load
        from shielded.protected import ProtectedSet, load_images

        loaded, skipped = load_images(paths, strict=False)
        for path, reason in skipped:
            typer.echo(f"skipped {path}: {reason}", err=True)
        if not loaded:
            raise ValueError("none of the images could be read.")
        protected = ProtectedSet.open(protect)
        space = LatentSpace.of(load(model, device))
        protected.require_space(space)
        latents = space.encode([image for _, image, _, _ in loaded])
        certificates = certify(latents, [Path(source) for _, _, source, _ in loaded], protected, radius)
        lines = [
            f"{c.image}: {'inside' if c.inside else 'outside'}, {c.nearest_distance:.2f} from {c.nearest_id} "
            f"(radius {c.radius:g})"
            for c in certificates
        ]
        result = {
            "n": len(certificates),
            "leaks": leaks(certificates),
            "skipped": [path for path, _ in skipped],
            "certificates": [vars(c) for c in certificates],
        }
        show(result, as_json, "\n".join(lines))
        if result["leaks"] or skipped:
            raise typer.Exit(1)
