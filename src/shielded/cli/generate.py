"""shielded generate"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from shielded.cli.options import (
    RUNNING,
    AsJson,
    Debug,
    Device,
    Model,
    Out,
    Overwrite,
    PresetSteps,
    Quiet,
    UsageError,
    check_out,
    distinct,
    errors,
    positive,
    read_prompts,
    repairs,
    say_tiers,
    show,
)
from shielded.models import DEFAULT_MODEL

_SAMPLING, _SHIELDS = "Images", "Shields"  # short: the list of the second fits one line
_IMAGES = 4  # of each prompt, unless -n or --seeds says otherwise
_MAX_SEED = 2**32 - 1
_MAX_SEEDS = 1_000_000  # of one run


def generate(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="One or several, each in quotation marks.", show_default=False),
    ] = None,
    out: Out = Path("images"),
    model: Model = DEFAULT_MODEL,
    protect: Annotated[
        list[Path] | None, typer.Option(metavar="SET", help="Protected set to keep away from; may be repeated.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Text file with a prompt on each line.")] = None,
    n: Annotated[
        int | None, typer.Option("-n", metavar="N", min=1, help=f"Images of each prompt; default: {_IMAGES}.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="A,B", help="Seeds of each prompt, such as 1,5,9 or 0-7, in place of -n.")
    ] = None,
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="What the images should not show.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels; default: the model's.")] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start from this picture instead of noise.")
    ] = None,
    radius: Annotated[
        float | None,
        typer.Option(metavar="R", callback=positive, help="Radius (latent L2); default: the set's or model's."),
    ] = None,
    steps: PresetSteps = None,
    compare: Annotated[
        bool, typer.Option("--no-compare", metavar="", help="Leave out the run without SPELL.", show_default=False)
    ] = False,
    history: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep away from images of earlier runs too, remembered here."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", metavar="", help="Go on with a run that was stopped.", rich_help_panel=RUNNING),
    ] = False,
    overwrite: Overwrite = False,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, max=_MAX_SEED, help="First seed; default: 0.", rich_help_panel=_SAMPLING),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, help="Guidance scale; default: the model's.", rich_help_panel=_SAMPLING),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Scheduler of diffusers, such as ddim or euler:trailing; default: the model's.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:X]", help="Add this LoRA, scaled by X (1); may be repeated.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            metavar="X", min=0.01, max=1, help="Share of the steps taken from --image.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Images sampled at once; without a set, these keep apart.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 16,
    overcompensation: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Factor λ of the correction; default: the job's.",
            callback=positive,
            rich_help_panel=_SHIELDS,
        ),
    ] = None,
    window_end: Annotated[
        float,
        typer.Option(
            metavar="T",
            min=0,
            max=0.99,
            help="Push above noise level T alone; 0: to the end.",
            rich_help_panel=_SHIELDS,
        ),
    ] = 0.0,
    radius_schedule: Annotated[
        Literal["constant", "posterior"] | None,
        typer.Option(
            metavar="HOW", help="constant, or posterior: smaller while x0 is blurred.", rich_help_panel=_SHIELDS
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Denoising error for posterior, from calibrate.", rich_help_panel=_SHIELDS),
    ] = None,
    release: Annotated[
        float | None,
        typer.Option(
            metavar="T",
            min=0,
            max=1,
            help="In a shield, drop guidance above noise level T; 1: never.",
            rich_help_panel=_SHIELDS,
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, help="Share of the radius that shields are wider.", rich_help_panel=_SHIELDS),
    ] = None,
    on_leak: Annotated[
        Literal["restart", "push", "refuse", "report"],
        typer.Option(metavar="HOW", help="For leaks: restart, push, refuse or report.", rich_help_panel=_SAMPLING),
    ] = "restart",
    attempts: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Maximum number of samplings per image.", rich_help_panel=_SAMPLING),
    ] = 3,
    name: Annotated[
        str,
        typer.Option(metavar="PATTERN", help="File names, of {prompt}, {seed} and {number}.", rich_help_panel=RUNNING),
    ] = "{prompt}-{seed}",
    show_protected: Annotated[
        bool,
        typer.Option(
            "--show-protected",
            metavar="",
            help="Show the nearest protected pictures in the report.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Generate images that keep away from a protected set, or, without one, from each other.

    Example: shielded generate "a red apple" -n 8 --out apples
    """
    with errors(debug):
        texts = _prompts(prompt or [], prompts, model)
        numbers = _seeds(seeds, seed, n)
        if calibration is not None and radius_schedule != "posterior" and (radius_schedule or not protect):
            raise UsageError("--calibration needs the posterior radius; add --radius-schedule posterior.")
        if margin and not protect:
            raise UsageError("--margin is about protected images; give a set with --protect.")
        if show_protected and not protect:
            raise UsageError("--show-protected shows what is in a protected set; give one with --protect.")
        if strength is not None and image is None:
            raise UsageError("--strength is about a picture to start from; give one with --image.")
        if resume and overwrite:
            raise UsageError("--resume keeps what is there and --overwrite deletes it; give one of them.")
        dimensions, loras = _size(size), tuple(_lora(given) for given in lora or ())
        finished = resume and _finished(out, texts, numbers, name)
        if not resume:
            if not overwrite and _stopped(out):
                raise UsageError(f"{out} holds a stopped run; --resume goes on with it, --overwrite deletes it.")
            check_out(out, overwrite)
        if protect:
            from shielded.protected import ProtectedSet

            sets = [ProtectedSet.open(path) for path in protect]
            if not quiet:
                say_tiers(sets)
        from shielded.runs.job import run
        from shielded.runs.model_call import ModelCall

        call = ModelCall(model, steps, guidance, negative, dimensions, scheduler, loras, image, strength)
        if finished:
            report = json.loads((out / "report.json").read_bytes())
            typer.echo(f"{out} holds a finished run, so nothing is left to do.", err=True)
        else:
            report = run(
                out,
                texts,
                numbers,
                call,
                protect=protect or (),
                radius=radius,
                overcompensation=overcompensation,
                device=device,
                progress=not (as_json or quiet),
                on_leak=on_leak,
                attempts=attempts,
                radius_schedule=radius_schedule,
                calibration=calibration,
                show_protected=show_protected,
                window_end=window_end,
                release=release,
                margin=margin,
                batch_size=batch,
                compare=not compare,
                history=history,
                resume=resume and _stopped(out),
                names=name,
                warn=lambda message: typer.echo(message, err=True),
            )
        if report is None:  # one of several processes, but not the one that writes
            return
        show(report, as_json, _summary(report, out), quiet)
        if len(report["refused"]) == report["n"]:
            raise ValueError("all images were refused; another prompt may help or, in a shield, a smaller radius.")


# Options ------------------------------------------------------------------------------------------------------------


def _prompts(given: list[str], file: Path | None, model: str) -> list[str]:
    """List the prompts of the command line and of a file, each once; one that is empty if the model takes none."""
    if not all(prompt.strip() for prompt in given):
        raise UsageError("a prompt is empty; say what the images shall show, or leave it out.")
    found = distinct(given + (read_prompts(file) if file is not None else []))
    if not found and model != DEFAULT_MODEL:
        from shielded.models import needs_prompt

        found = [] if needs_prompt(model) else [""]
    if not found:
        raise UsageError('there is no prompt; give one, such as shielded generate "a red apple", or --prompts FILE.')
    return found


def _seeds(given: str | None, first: int | None, n: int | None) -> list[int]:
    if given is None:
        first = first or 0
        return list(range(first, first + (n or _IMAGES)))
    if n is not None or first is not None:
        raise UsageError(f"--seeds names every seed; leave out {'-n' if n is not None else '--seed'}.")
    found: list[int] = []
    for part in given.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        start, end = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not start <= end <= _MAX_SEED:
            raise UsageError(f"--seeds takes whole numbers such as 1,5,9 or 0-7, not {given!r}.")
        if len(found) + end - start >= _MAX_SEEDS:
            raise UsageError(f"--seeds names more than {_MAX_SEEDS:,} seeds; make several runs.")
        found += range(start, end + 1)
    if len(set(found)) < len(found):
        twice = Counter(found).most_common(1)[0][0]
        raise UsageError(f"--seeds names {twice} twice, which would be the same image.")
    return found


def _size(given: str | None) -> tuple[int, int] | None:
    if given is None:
        return None
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", given.strip().lower())
    if not match or not int(match[1]) * int(match[2]):
        raise UsageError(f"--size takes width and height in pixels, such as 768x512, not {given!r}.")
    return int(match[1]), int(match[2])


def _lora(given: str) -> tuple[Path, float]:
    """Split FILE[:SCALE]."""
    path, colon, scale = given.rpartition(":")
    if not colon or Path(given).is_file():
        return Path(given), 1.0
    try:
        value = float(scale)
    except ValueError:
        return Path(given), 1.0  # a colon of the path
    if not abs(value) < float("inf"):
        raise UsageError(f"--lora: the scale must be a finite number, such as 0.8, not {scale}.")
    return Path(path), value


def _stopped(out: Path) -> bool:
    """Tell whether a folder holds a run that can go on."""
    if not out.is_dir():
        return False
    from shielded.runs.unfinished import Unfinished

    return Unfinished(out).exists


def _finished(out: Path, prompts: list[str], seeds: list[int], pattern: str) -> bool:
    """Tell whether a folder holds this run, finished; refuse one that holds neither that nor a stopped one."""
    from shielded.runs.names import image_names

    if _stopped(out):
        return False
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        typer.echo(f"There is no run in {out} to go on with; a new one begins.", err=True)
        return False
    try:
        refused = len(json.loads((out / "report.json").read_bytes())["refused"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{out} holds no run that was stopped; leave out --resume, or give another --out.") from None
    expected = image_names([p for p in prompts for _ in seeds], [seed for _ in prompts for seed in seeds], pattern)
    made = {path.name for path in (out / "with").glob("*.png")}
    if not made <= set(expected) or len(made) + refused != len(expected):
        raise UsageError(f"{out} holds a finished run of other prompts or seeds; give another --out.")
    return True


# Summary ------------------------------------------------------------------------------------------------------------


def _summary(report: dict[str, Any], out: Path) -> str:
    from shielded.runs.report.rows import number
    from shielded.runs.report.summary import counted

    made = report["n"] - len(report["refused"])
    beside = f"; the same seeds without SPELL are in {out / 'without'}" if report["compared"] else ""
    lines = [f"{counted(made, 'image')} in {out / 'with'}{beside}."]
    lines += _distances(report) if report["leaks_with"] is not None else _variety(report)
    lines += _earlier(report)
    before, after = report["vendi_without"], report["vendi_with"]
    if after is not None and report.get("min_pair_distance_with") is not None:
        instead = "" if before is None else f", {number(before)} without SPELL"
        lines.append(f"Effective number of different images of a prompt (Vendi score): {number(after)}{instead}.")
    return "\n".join([*lines, *repairs(report), f"Open {out / 'report.html'}"])


def _distances(report: dict[str, Any]) -> list[str]:
    """Say how far images are from protected ones."""
    from shielded.runs.report.rows import number
    from shielded.runs.report.summary import smallest_distances

    inside, made = report["leaks_with"], report["n"] - len(report["refused"])
    before = "" if report["leaks_without"] is None else f"; without SPELL {report['leaks_without']} of {report['n']}"
    lines = [f"Inside a shield: {inside or 'none'} of {made}{before}."] if made else []
    nearest, distance = smallest_distances(report)
    if distance is not None:
        radius = "" if report["radius"] is None else f" (radius {number(report['radius'])})"
        instead = "" if nearest is None else f", {number(nearest)} without SPELL"
        lines.append(f"Nearest protected image: {number(distance)} away{radius}{instead}.")
    if not report["corrected"]:
        lines.append("No image came near a protected one, so SPELL changed nothing.")
    return lines


def _earlier(report: dict[str, Any]) -> list[str]:
    """Say how far images are from those of earlier runs."""
    from shielded.runs.report.rows import number
    from shielded.runs.report.summary import counted

    found = report.get("history")
    if found is None:
        return []
    earlier, after = counted(found["before"], "earlier image"), found["min_distance_with"]
    if after is None:
        return [f"{found['folder']} remembers {counted(found['after'], 'image')} now."]
    before = found["min_distance_without"]
    instead = "" if before is None else f" instead of {number(before)}"
    return [f"Nearest of {earlier} in {found['folder']}: {number(after)} away{instead}."]


def _variety(report: dict[str, Any]) -> list[str]:
    """Say how far images of a prompt are from each other."""
    from shielded.runs.report.rows import number

    before, after = (report.get(f"min_pair_distance_{side}") for side in ("without", "with"))
    radius = number(report["radius"])
    if after is None and "history" in report:
        return []
    if after is None:
        return ["One image has no other to keep apart from, so SPELL changed nothing; -n makes several."]
    if not report["corrected"] and after < report["radius"]:
        return [
            f"Within the batches all were further than {radius} apart, so SPELL changed nothing. Images of different "
            f"batches do not keep apart, and the two closest are at a distance of {number(after)}; see --batch."
        ]
    if not report["corrected"]:
        return [f"All were further than {radius} from each other anyway, so SPELL changed nothing; see --radius."]
    instead = "" if before is None else f" instead of {number(before)}"
    aim = f"; {radius} was the aim" if report["window"][1] == 0 else ""
    lines = [
        f"SPELL moved {report['corrected']} of {report['n']} apart: the two closest are now at a distance of "
        f"{number(after)}{instead}{aim}."
    ]
    if report["window"][1] > 0:
        lines.append(
            f"It pushed at noise levels above {report['window'][1]:g} alone, so images may come closer than the radius "
            "later."
        )
    return lines
