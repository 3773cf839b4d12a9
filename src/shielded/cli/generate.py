"""shielded generate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shielded.cli.options import (
    AsJson,
    Attempts,
    Debug,
    Device,
    Model,
    OnLeak,
    Out,
    Overwrite,
    Seed,
    Steps,
    Strength,
    check_out,
    errors,
    positive,
    repairs,
    show,
)


def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    out: Out = Path("images"),
    model: Model = "emoji",
    protect: Annotated[Path | None, typer.Option(metavar="SET", help="A protected set to keep away from.")] = None,
    n: Annotated[int, typer.Option("-n", metavar="N", min=1, help="Number of images.")] = 4,
    radius: Annotated[
        float | None, typer.Option(metavar="R", help="L2 in the latent space; default: the set's, else 0.8 √dim.")
    ] = None,
    seed: Seed = 0,
    steps: Steps = 25,
    overcompensation: Strength = 1.6,
    on_leak: OnLeak = "restart",
    attempts: Attempts = 3,
    device: Device = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Generate images that keep away from a protected set, or, without one, from each other.

    Example: shielded generate "a red apple" -n 8 --out apples
    """
    with errors(debug):
        if radius is not None:
            positive(radius, "--radius")
        positive(overcompensation, "--overcompensation")
        check_out(out, overwrite)
        from shielded.run import run

        report = run(
            out,
            prompt,
            model,
            protect,
            n,
            radius,
            seed,
            steps,
            overcompensation,
            device,
            progress=not as_json,
            on_leak=on_leak,
            attempts=attempts,
        )
        if report is None:  # one of several processes, but not the one that writes
            return
        show(report, as_json, _summary(report, out))
        if len(report["refused"]) == n:
            raise ValueError("all images were refused; a smaller radius or another prompt may help.")


def _summary(report: dict[str, Any], out: Path) -> str:
    lines = [f"{report['n'] - len(report['refused'])} images in {out / 'with'}"]
    if report["leaks_with"] is not None:
        lines.append(
            f"Inside a shield: {report['leaks_without']} of {report['n']} without SPELL, {report['leaks_with']} with."
        )
    return "\n".join([*lines, *repairs(report), f"Open {out / 'report.html'}"])
