"""What the commands share: options, checks of what was asked for, and errors as one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

Model = Annotated[str, typer.Option(metavar="MODEL", help="emoji, pipeline folder, or owner/name.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Added to all seeds.")]
Steps = Annotated[int, typer.Option(metavar="N", min=1, help="Steps of the sampler.")]
Strength = Annotated[float, typer.Option("--overcompensation", metavar="X", help="λ, multiplies the correction.")]
OnLeak = Annotated[
    Literal["restart", "push", "refuse", "report"],
    typer.Option(
        metavar="HOW",
        help="With an image inside a shield all the same: restart (sample it again), push (move it out), both refuse "
        "what stays inside; refuse; or report.",
    ),
]
Attempts = Annotated[int, typer.Option(metavar="N", min=1, help="How often an image is sampled at most.")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, ...; default: CUDA if there is one.")]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="JSON instead of a summary and progress.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace the results of an earlier run.")]
Debug = Annotated[bool, typer.Option("--debug", metavar="", help="Show tracebacks.")]


class UsageError(ValueError):
    """What was asked for does not make sense; exit code 2."""


class errors:
    """Turn exceptions into one sentence and an exit code: 2 for bad usage, 1 for a failed run."""

    def __init__(self, debug: bool) -> None:
        self.debug = debug

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or isinstance(error, typer.Exit) or self.debug:
            return
        if isinstance(error, KeyboardInterrupt):
            _stop("stopped; what was finished is kept.", 1)
        if isinstance(error, UsageError):
            _stop(str(error), 2)
        if isinstance(error, (ValueError, TypeError, RuntimeError, OSError, KeyError)):
            _stop(str(error), 1)


def _stop(message: str, code: int) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(code)


def check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder with --out.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UsageError(f"{out} exists and is not empty; it is kept. Use --overwrite, or another --out.")


def positive(value: float, name: str) -> float:
    if not 0 < value < float("inf"):
        raise UsageError(f"{name} must be positive and finite, not {value}.")
    return value


def show(result: dict[str, Any], as_json: bool, summary: str) -> None:
    typer.echo(json.dumps(result, indent=2) if as_json else summary)


def repairs(report: dict[str, Any]) -> list[str]:
    """What had to be repaired or refused, for the summary of a run."""
    lines = []
    if report["restarted"] or report["pushed"]:
        lines.append(
            f"Repaired: {report['restarted']} by sampling again, {report['pushed']} by a push; "
            f"{report['samplings']} samplings for {report['n']} images."
        )
    for refused in report["refused"]:
        lines.append(f"Refused: {refused['prompt']}, seed {refused['seed']}: {refused['reason']}.")
    return lines
