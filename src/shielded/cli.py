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


@app.command()
def protect(
    paths: Annotated[list[str], typer.Argument(help="Image files, folders or globs.")],
    out: Annotated[Path, typer.Option("--out", help="The protected set.")],
    model: Model = "emoji",
    radius: Annotated[
        float | None, typer.Option(help="Of the shields of these images, L2 in the latent space.")
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Add to a set that exists; images in it are not encoded again.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at an image that cannot be read.")] = False,
    device: Device = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Encode images into a protected set.

    Example: shielded protect photos/ --out my-set --radius 18
    """
    with _errors(debug):
        if radius is not None:
            _positive(radius, "--radius")
        if not add:
            _check_out(out, overwrite)
        from shielded.latent_space import LatentSpace
        from shielded.models import load
        from shielded.protected import ProtectedSet, add_images, find_images

        find_images(paths)  # a path that does not exist ends it before the model is loaded
        space = LatentSpace.of(load(model, device))
        exists = add and out.exists()
        protected = ProtectedSet.open(out) if exists else ProtectedSet.create(out, space, overwrite=overwrite)
        done = add_images(protected, paths, radius, strict, space=space)
        for path, reason in done.skipped:
            typer.echo(f"skipped {path}: {reason}", err=True)
        result = {"set": str(out), "size": len(protected), "version": protected.version, **vars(done)}
        counts = f"{done.added} added, {done.present} already present, {len(done.skipped)} skipped"
        _print(result, as_json, f"{out}: {counts}; {len(protected)} in all.")
        if not len(protected):
            raise ValueError("none of the images could be read; the set is empty.")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    out: Out = Path("images"),
    model: Model = "emoji",
    protect: Annotated[Path | None, typer.Option(help="A protected set to keep away from.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Number of images.")] = 4,
    radius: Annotated[
        float | None, typer.Option(help="L2 in the latent space; default: the set's own, else 0.8 per √dim.")
    ] = None,
    seed: Seed = 0,
    steps: Steps = 25,
    overcompensation: Strength = 1.6,
    device: Device = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Generate images that keep away from a protected set, or, without one, from each other.

    Example: shielded generate "a red apple" -n 8 --out apples
    """
    with _errors(debug):
        if radius is not None:
            _positive(radius, "--radius")
        _positive(overcompensation, "--overcompensation")
        _check_out(out, overwrite)
        from shielded.run import run

        report = run(
            out, prompt, model, protect, n, radius, seed, steps, overcompensation, device, progress=not as_json
        )
        _print(report, as_json, _summary(report, out))


def _summary(report: dict[str, Any], out: Path) -> str:
    lines = [f"{report['n']} images in {out}"]
    if report["leaks_with"] is not None:
        lines.append(
            f"Inside a shield: {report['leaks_without']} of {report['n']} without SPELL, {report['leaks_with']} with."
        )
    return "\n".join([*lines, f"Open {out / 'report.html'}"])


@app.command()
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
    with _errors(debug):
        if radius is not None:
            _positive(radius, "--radius")
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
        _print(result, as_json, "\n".join(lines))
        if result["leaks"] or skipped:
            raise typer.Exit(1)


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
