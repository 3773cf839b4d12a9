"""shielded calibrate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shielded._extras import missing
from shielded.cli.options import (
    AsJson,
    Debug,
    Device,
    Model,
    Out,
    Overwrite,
    Seed,
    Steps,
    UsageError,
    check_out,
    errors,
    positive,
    read_prompts,
    show,
)
from shielded.models import DEFAULT_MODEL

_LITTLE = 0.5  # share of copies below which the summary says that the radius catches little


def calibrate(
    out: Out = Path("calibration"),
    model: Model = DEFAULT_MODEL,
    protect: Annotated[Path | None, typer.Option(metavar="SET", help="Protected set to choose radii for.")] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Where the set's image files are now or, without a set, images to measure; may be repeated.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts for plain images, one per line; default: captions of emoji."),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", min=0, help="Plain images per prompt; 0 for none.")] = 4,
    false_alarms: Annotated[
        float, typer.Option(metavar="X", help="Tolerated share of unrelated images within the radius.")
    ] = 0.01,
    radius: Annotated[
        float | None,
        typer.Option(metavar="R", callback=positive, help="Report on this radius instead of suggesting one."),
    ] = None,
    per_image: Annotated[
        bool, typer.Option("--per-image", metavar="", help="Also write a radius for each protected image (radii.csv).")
    ] = False,
    sample: Annotated[int, typer.Option(metavar="N", min=1, help="Most images to alter and encode again.")] = 100,
    seed: Seed = 0,
    steps: Steps = 25,
    device: Device = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Suggest a radius, with what it catches and touches, and measure the model's denoising error.

    Example: shielded calibrate --protect my-set --out my-radius
    """
    with errors(debug):
        if not 0 <= false_alarms < 1:
            raise UsageError(f"--false-alarms must be from 0 to below 1, such as 0.01; got {false_alarms}.")
        check_out(out, overwrite)
        texts = None if prompts is None else read_prompts(prompts)
        if per_image and protect is None:
            raise UsageError("--per-image writes radii for a protected set; give one with --protect.")
        from shielded.models import preset_of

        if protect is None and not images and (not seeds or (texts is None and preset_of(model).captions is None)):
            raise UsageError("nothing to measure; give --protect, --images or --prompts.")
        from shielded.protected import ProtectedSet
        from shielded.protected.ingest.sources import require_images
        from shielded.radius import calibrate as job

        require_images(images or ())  # before anything is written
        if protect is not None:
            ProtectedSet.open(protect)
        out.mkdir(parents=True, exist_ok=True)
        result = job.calibrate(
            out,
            model,
            protect,
            images or (),
            texts or (),
            seeds,
            false_alarms,
            radius,
            per_image,
            sample,
            seed,
            steps,
            device,
            progress=not as_json,
        )
        show(result, as_json, _summary(result, out))


def _summary(result: dict[str, Any], out: Path) -> str:
    plot = f"Plot: {out / 'radius.png'}" if result["plot"] else f"No plot: {missing('plots', 'plot')}"
    lines = [*_overview(result), plot, ""]
    lines += [*_protection(result), *_copy_tier(result), *_diversity(result), *_error(result), ""]
    lines.append(f"Distances are L2 in the latent space of the model. All figures: {out / 'radius.json'}")
    return "\n".join(lines)


def _overview(result: dict[str, Any]) -> list[str]:
    """Format what was found as a small table; empty if nothing was."""
    rows = []
    protection, copies, variety = (result.get(name) for name in ("protection", "copies", "diversity"))
    if protection is not None:
        caught = _share(list(protection["copies"].values()))
        per_dim, alarms = f"{protection['radius_per_sqrt_dim']:.3f}", f"{protection['false_alarms']:.1%}"
        rows.append(("radius, protected set", f"{protection['radius']:.4g}", per_dim, alarms, caught))
    if copies is not None:
        caught = _share(list(copies["copies"].values()))
        rows.append(("similarity, copies", f"{copies['threshold']:.4f}", "", f"{copies['false_alarms']:.1%}", caught))
    if variety is not None:
        per_dim, alarms = f"{variety['radius_per_sqrt_dim']:.3f}", f"{variety['other_prompt']:.1%}"
        rows.append(("radius, variety", f"{variety['radius']:.4g}", per_dim, alarms, ""))
    if not rows:
        return []
    rows.insert(0, ("", "value", "per √dim", "false alarms", "copies caught"))
    return ["".join(f"{cell:<24}" if i == 0 else f"{cell:>15}" for i, cell in enumerate(row)).rstrip() for row in rows]


def _share(caught: list[float]) -> str:
    return f"{sum(caught) / len(caught):.0%}" if caught else ""


def _protection(result: dict[str, Any]) -> list[str]:
    found = result["protection"]
    if found is None:
        if "rows" not in result:
            return []
        return ["No radius for the set: it has no two different pictures; give --prompts to go by plain images."]
    lines = [
        f"{'Suggested radius' if found['suggested'] else 'Radius'} for the protected set: {found['radius']:.4g} "
        f"({found['radius_per_sqrt_dim']:.3f} per √dim).",
        f"{found['false_alarms']:.1%} of {found['n']} {found['basis']} lie closer than that to "
        f"{'another' if found['basis'].startswith('different') else 'a protected one'}.",
    ]
    if found["nearly_equal"]:
        lines.append(
            f"{found['nearly_equal']} more, closer than {found['nearly_equal_below']:.3g}, nearly equal another and "
            "are left out; join or remove them:"
        )
        pairs = [pair for pair in result["closest"] if pair[2] < found["nearly_equal_below"]]
        lines += [f"  {a} and {b} ({distance:.3g})" for a, b, distance in pairs[:5]]
    if found["n"] * found["tolerated"] < 1 and found["suggested"]:
        lines.append(f"With {found['n']} of them the radius is the smallest distance seen; more would say more.")
    if found["generations"] is not None:
        count = result["distances"]["plain image to the set"]["n"]
        lines.append(f"{found['generations']:.0%} of {count} plain images lie inside a shield and would be moved.")
    if not found["copies"]:
        return [*lines, "No file of the protected pictures was found: give --images for the rates of changed copies."]
    little = [kind for kind, share in found["copies"].items() if share < _LITTLE]
    if little:
        lines.append(f"The radius alone catches less than half of the copies changed by: {', '.join(little)}.")
    return [*lines, "", *_copies(result)]


def _copy_tier(result: dict[str, Any]) -> list[str]:
    """Format what the set's descriptor catches, alone and together with the radius."""
    found = result.get("copies")
    if found is None:
        return []
    lines = [
        "",
        f"Suggested copy threshold: {found['threshold']:.4f}. {found['false_alarms']:.1%} of {found['n']} different "
        "protected pictures are that similar to another. shielded protect --copy-threshold keeps it in the set.",
    ]
    lines += [f"  the pair that decides: {a} and {b} ({value:.3f})" for a, b, value in found["deciding"][:1]]
    lines += [f"  nearly equal, left out: {a} and {b} ({value:.3f})" for a, b, value in found["nearly_equal"][:5]]
    if found["copies"]:
        radius = (result["protection"] or {}).get("copies", {})
        width = max(map(len, found["copies"]))
        lines += ["", f"{'':{width}}{'radius':>12}{'descriptor':>12}{'both':>12}"]
        for kind, share in found["copies"].items():
            cells = (radius.get(kind), share, found["both"].get(kind))
            lines.append(f"{kind:{width}}" + "".join(f"{'' if cell is None else f'{cell:.0%}':>12}" for cell in cells))
    return lines


def _copies(result: dict[str, Any]) -> list[str]:
    """Format a row per kind of change, a column per radius."""
    found = result["protection"]
    columns = {}  # with few images, several rates share a radius
    for row in [found, *found["table"]]:
        columns.setdefault(round(row["radius"], 9), row)
    names = [f"r = {radius:.3g}" if row is found else f"{radius:.3g}" for radius, row in columns.items()]
    rows = {"": names}
    rows |= {kind: [f"{row['copies'][kind]:.0%}" for row in columns.values()] for kind in found["copies"]}
    if "per_image" in result:
        names.append("per image")
        for kind, share in result["per_image"]["copies"].items():
            rows[kind].append(f"{share:.0%}")
    rows["false alarms"] = [f"{row['false_alarms']:.1%}" for row in columns.values()]
    if found["generations"] is not None:
        rows["plain images"] = [f"{row['generations']:.0%}" for row in columns.values()]
    width = max(map(len, rows))
    return [
        f"Share within the radius, for each kind of change {result['changed_pictures']} changed copies:",
        *(f"{name:{width}}" + "".join(f"{cell:>10}" for cell in cells) for name, cells in rows.items()),
    ]


def _diversity(result: dict[str, Any]) -> list[str]:
    found = result["diversity"]
    if found is None:
        return []
    same_prompt = f", and {found['same_prompt'] or 0:.0%} of {found['pairs_same_prompt']} pairs of one prompt"
    return [
        "",
        f"Suggested radius for diversity: {found['radius']:.4g} ({found['radius_per_sqrt_dim']:.3f} per √dim). "
        f"{found['other_prompt']:.1%} of {found['pairs_other_prompt']} pairs of plain images of different prompts are "
        f"closer than that{same_prompt if found['pairs_same_prompt'] else ''}.",
    ]


def _error(result: dict[str, Any]) -> list[str]:
    found = result["denoising_error"]
    if "failed" in found:
        return ["", f"The denoising error could not be measured: {found['failed']}"]
    middle = min(range(len(found["levels"])), key=lambda i: abs(found["levels"][i] - 0.5))
    return [
        "",
        f"Denoising error of {found['pictures']} pictures ({found['with_caption']} with caption): at noise level "
        f"{found['levels'][middle]:.2f} {found['error'][middle]:.4g}, where {found['without_measurement'][middle]:.4g} "
        "is assumed without calibration.json.",
    ]
