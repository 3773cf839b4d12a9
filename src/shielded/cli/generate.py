"""shielded generate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

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
    PresetOvercompensation,
    PresetSteps,
    Seed,
    UsageError,
    check_out,
    errors,
    positive,
    repairs,
    say_tiers,
    show,
    smallest_distances,
)
from shielded.models import DEFAULT_MODEL


def generate(
    prompt: Annotated[str, typer.Argument(help="Prompt of the images.")],
    out: Out = Path("images"),
    model: Model = DEFAULT_MODEL,
    protect: Annotated[Path | None, typer.Option(metavar="SET", help="Protected set to keep away from.")] = None,
    n: Annotated[int, typer.Option("-n", metavar="N", min=1, help="Number of images.")] = 4,
    radius: Annotated[
        float | None,
        typer.Option(metavar="R", callback=positive, help="Radius (latent L2); default: the set's or model's."),
    ] = None,
    seed: Seed = 0,
    steps: PresetSteps = None,
    guidance: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="Guidance scale; default: the model's.")
    ] = None,
    overcompensation: PresetOvercompensation = None,
    window_end: Annotated[
        float,
        typer.Option(metavar="T", min=0, max=0.99, help="Push above noise level T alone; 0: to the end."),
    ] = 0.0,
    radius_schedule: Annotated[
        Literal["constant", "posterior"] | None,
        typer.Option(metavar="HOW", help="constant, or posterior: smaller while x0 is blurred.", hidden=True),
    ] = None,
    release: Annotated[
        float | None,
        typer.Option(metavar="T", min=0, max=1, help="In a shield, drop guidance above noise level T; 1: never."),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, help="Share of the radius that shields are wider."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Denoising error for posterior, from calibrate.", hidden=True)
    ] = None,
    on_leak: OnLeak = "restart",
    attempts: Attempts = 3,
    show_protected: Annotated[
        bool, typer.Option("--show-protected", metavar="", help="Show the nearest protected pictures in the report.")
    ] = False,
    device: Device = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Generate images that keep away from a protected set, or, without one, from each other.

    Example: shielded generate "a red apple" -n 8 --out apples
    """
    with errors(debug):
        if calibration is not None and radius_schedule != "posterior" and (radius_schedule or protect is None):
            raise UsageError("--calibration needs the posterior radius; add --radius-schedule posterior.")
        if margin and protect is None:
            raise UsageError("--margin is about protected images; give a set with --protect.")
        if show_protected and protect is None:
            raise UsageError("--show-protected shows what is in a protected set; give one with --protect.")
        check_out(out, overwrite)
        if protect is not None:
            from shielded.protected import ProtectedSet

            protected = ProtectedSet.open(protect)
            say_tiers(protected)
            if radius is None and protected.radii.isnan().any():
                raise UsageError(f"{protect} has images without a radius; give one with --radius (see calibrate).")
        from shielded.runs.paired import run

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
            guidance=guidance,
            radius_schedule=radius_schedule,
            calibration=calibration,
            show_protected=show_protected,
            window_end=window_end,
            release=release,
            margin=margin,
        )
        if report is None:  # one of several processes, but not the one that writes
            return
        show(report, as_json, _summary(report, out))
        if len(report["refused"]) == n:
            raise ValueError("all images were refused; another prompt may help or, in a shield, a smaller radius.")


def _summary(report: dict[str, Any], out: Path) -> str:
    from shielded.runs.report.rows import number

    made = report["n"] - len(report["refused"])
    lines = [f"{made} image{'' if made == 1 else 's'} in {out / 'with'}; the same seeds without SPELL beside it."]
    found = {k: [report.get(f"{k}_{w}") for w in ("without", "with")] for k in ("leaks", "min_distance", "vendi")}
    if protect := found["leaks"][0] is not None:
        lines.append(f"Inside a shield: {found['leaks'][0]} of {report['n']} without SPELL, {found['leaks'][1]} with.")
    what, key = ("Nearest protected image", "min_distance") if protect else ("Closest two images", "min_pair_distance")
    distances = smallest_distances(report) if protect else [report.get(f"{key}_{w}") for w in ("without", "with")]
    if distances != [None, None]:
        radius = "" if report["radius"] is None else f"; the radius is {number(report['radius'])}"
        lines.append(f"{what}: {number(distances[0])} without, {number(distances[1])} with{radius}.")
    if not protect and report["window"][1] > 0:
        lines.append(
            f"Pushed at noise levels above {report['window'][1]:g} alone, so images may come closer than the radius "
            "later."
        )
    if not report["corrected"]:
        lines.append("No image came closer than that to anything, so SPELL changed nothing; a larger --radius acts.")
    if report["n"] > 1 and None not in found["vendi"]:
        lines.append(
            "Vendi score, the effective number of images: {:.2f} without, {:.2f} with.".format(*found["vendi"])
        )
    return "\n".join([*lines, *repairs(report), f"Open {out / 'report.html'}"])
