"""shielded demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shielded.cli.options import (
    AsJson,
    Attempts,
    Debug,
    Device,
    OnLeak,
    Out,
    Overwrite,
    PresetOvercompensation,
    Seed,
    Steps,
    check_out,
    errors,
    positive,
    repairs,
    show,
)


def demo(
    out: Out = Path("demo"),
    radius: Annotated[
        float | None, typer.Option(metavar="R", callback=positive, help="Shield radius (latent L2).")
    ] = None,
    seed: Seed = 0,
    steps: Steps = 25,
    overcompensation: PresetOvercompensation = None,
    on_leak: OnLeak = "restart",
    attempts: Attempts = 3,
    device: Device = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Protect images of the embedded model, then generate with the same seeds again.

    Example: shielded demo --out demo
    """
    with errors(debug):
        check_out(out, overwrite)
        from shielded.runs import demo as job

        report = job.demo(
            out,
            seed=seed,
            steps=steps,
            radius=radius,
            overcompensation=overcompensation,
            device=device,
            progress=not as_json,
            on_leak=on_leak,
            attempts=attempts,
        )
        show(report, as_json, _demo_summary(report, out))


def _demo_summary(report: dict[str, Any], out: Path) -> str:
    from shielded.runs.report.rows import number
    from shielded.runs.report.summary import smallest_distances

    without, with_ = ({k: report[f"{k}_{w}"] for k in ("leaks", "vendi")} for w in ("without", "with"))
    before, after = smallest_distances(report)
    again = "\n".join(["", *repairs(report)])
    return (
        f"Inside a shield: {without['leaks']} of {report['n']} images without SPELL, {with_['leaks']} with.\n"
        f"Nearest protected image: {number(before)} without, {number(after)} with; "
        f"the radius is {report['radius']:g}.{again}\n"
        f"Vendi score of one prompt: {without['vendi']:.2f} without, {with_['vendi']:.2f} with.\n"
        f"Open {out / 'report.html'}"
    )
