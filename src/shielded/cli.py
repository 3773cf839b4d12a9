"""The command line. Commands import what they need when they run, so that help is immediate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    help="Keep diffusion models away from protected images, and make their outputs differ.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Option(help="'emoji' (embedded), a saved diffusers pipeline, or owner/name.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]
Seed = Annotated[int, typer.Option(help="Added to all seeds.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the sampler.")]
Strength = Annotated[float, typer.Option("--overcompensation", help="Multiplies the correction (paper: 1.6).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: CUDA if there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON and no progress.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the results of an earlier run.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


class UsageError(ValueError):
    """What was asked for does not make sense; exit code 2."""


@app.callback()
def _commands() -> None:
    """Keeps `demo` a command of its own."""


@app.command()
def demo(
    out: Out = Path("demo"),
    radius: Annotated[float | None, typer.Option(help="Of the shields, L2 in the latent space.")] = None,
    seed: Seed = 0,
    steps: Steps = 25,
    overcompensation: Strength = 1.6,
    device: Device = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Protect what the embedded model makes, then generate with the same seeds again.

    Example: shielded demo --out demo
    """
    with _errors(debug):
        _check_out(out, overwrite)
        from shielded import demo as job

        report = job.demo(
            out,
            seed=seed,
            steps=steps,
            radius=job.RADIUS if radius is None else _positive(radius, "--radius"),
            overcompensation=_positive(overcompensation, "--overcompensation"),
            device=device,
            progress=not as_json,
        )
        _print(report, as_json, _demo_summary(report, out))


def _demo_summary(report: dict[str, Any], out: Path) -> str:
    without, with_ = ({k: report[f"{k}_{w}"] for k in ("leaks", "min_distance", "vendi")} for w in ("without", "with"))
    return (
        f"Inside a shield: {without['leaks']} of {report['n']} images without SPELL, {with_['leaks']} with.\n"
        f"Nearest protected image: {without['min_distance']:.2f} without, {with_['min_distance']:.2f} with; "
        f"the radius is {report['radius']:g}.\n"
        f"Vendi score of one prompt: {without['vendi']:.2f} without, {with_['vendi']:.2f} with.\n"
        f"Open {out / 'report.html'}"
    )


class _errors:
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


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder with --out.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UsageError(f"{out} exists and is not empty; it is kept. Use --overwrite, or another --out.")


def _positive(value: float, name: str) -> float:
    if not 0 < value < float("inf"):
        raise UsageError(f"{name} must be positive and finite, not {value}.")
    return value


def _print(result: dict[str, Any], as_json: bool, summary: str) -> None:
    typer.echo(json.dumps(result, indent=2) if as_json else summary)


def main() -> None:
    app(prog_name="shielded")


if __name__ == "__main__":
    sys.exit(main())
