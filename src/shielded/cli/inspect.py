"""shielded inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shielded.cli.options import AsJson, Debug, errors, show


def inspect(
    protected: Annotated[Path, typer.Argument(metavar="SET", help="The protected set.")],
    listed: Annotated[bool, typer.Option("--list", metavar="", help="List the ids, radii and sources.")] = False,
    search: Annotated[
        str | None, typer.Option(metavar="NAME", help="List the ids and sources that contain this text.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a protected set holds: model, images, radii, versions, descriptor.

    Example: shielded inspect my-set --search owl
    """
    with errors(debug):
        from shielded.protected import ProtectedSet

        found = ProtectedSet.open(protected)
        space, radii = found.space, found.radii
        known = radii[~radii.isnan()]
        result = {
            "set": str(protected),
            "images": len(found),
            "version": found.version,
            "autoencoder": space.vae_class,
            "image_size": space.image_size,
            "shape": space.shape,
            "fingerprint": space.fingerprint,
            "without_radius": len(radii) - len(known),
            "least_radius": known.min().item() if len(known) else None,
            "largest_radius": known.max().item() if len(known) else None,
            "descriptor": None if found.descriptor is None else found.descriptor["name"],
            "history": found.history,
        }
        lines = _summary(result)
        if listed or search is not None:
            rows = [
                (str(name), radius, source)
                for name, radius, source in zip(found.ids, radii.tolist(), found.sources, strict=True)
                if search is None or search.lower() in f"{name}\n{source or ''}".lower()
            ]
            result["listed"] = [
                {"id": name, "radius": None if radius != radius else radius, "source": source}
                for name, radius, source in rows
            ]
            width = max((len(name) for name, *_ in rows), default=0)
            lines += [f"  {name:<{width}}  {radius:8.3f}  {source or ''}" for name, radius, source in rows]
            lines += [f"{len(rows)} listed."]
        show(result, as_json, "\n".join(lines))


def _summary(result: dict) -> list[str]:
    size = "x".join(map(str, reversed(result["image_size"]))) if result["image_size"] else "of any size"
    least, largest = result["least_radius"], result["largest_radius"]
    radii = "none" if least is None else f"{least:g}" if least == largest else f"{least:g} to {largest:g}"
    without = f", {result['without_radius']} without one" if result["without_radius"] else ""
    lines = [
        f"{result['set']}: {result['images']} images, version {result['version']}",
        f"  latents     {'x'.join(map(str, result['shape']))}, pictures {size}, "
        f"autoencoder {result['autoencoder'] or 'unknown'}, fingerprint {result['fingerprint']}",
        f"  radii       {radii}{without}",
        f"  descriptor  {result['descriptor'] or 'none'}",
    ]
    shown = result["history"][-5:]
    lines += [f"  version {e['version']:<4}{e['time']}  {e['action']} {e['count']}" for e in shown]
    return lines
