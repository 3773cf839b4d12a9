"""Options, checks and one-sentence errors that the commands share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from shielded._extras import RequestError as UsageError  # exit code 2
from shielded.cli import settings
from shielded.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from shielded.protected import ProtectedSet


def unless_completing(accept: Callable[[Any], Any]) -> Callable[..., Any]:
    """Make a callback of an option from a function that returns a value or refuses it; completion skips it.

    Checks may load torch, and a shell that completes a line waits for that at every press of the key.
    """

    def callback(context: typer.Context, value: Any) -> Any:
        return value if context.resilient_parsing else accept(value)

    return callback


def _known(model: str) -> str:
    """Refuse a model that cannot be loaded, before anything else is done."""
    if model != DEFAULT_MODEL:  # it is there, and looking needs torch
        from shielded.models import locate

        try:
            locate(model)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return model


def _seed(value: int) -> int:
    if not 0 <= value < 2**32:  # elsewhere -1 stands for a random one
        raise typer.BadParameter(f"must be from 0 to {2**32 - 1}, not {value}.")
    return value


def _device(name: str | None) -> str | None:
    if name is not None:
        import torch

        try:
            kind = torch.device(name).type
        except RuntimeError:
            raise typer.BadParameter(f"{name!r} is not known; use cpu, cuda, cuda:1, mps or leave it out.") from None
        if kind == "cuda" and not torch.cuda.is_available():
            raise typer.BadParameter("torch finds no CUDA device here; leave it out, or use cpu.")
    return name


def _positive(value: float | None) -> float | None:
    """Refuse a length or factor that is not positive."""
    if value is not None and not 0 < value < float("inf"):
        raise typer.BadParameter(f"must be positive and finite, such as 10, not {value:g}.")
    return value


positive = unless_completing(_positive)

Model = Annotated[
    str,
    typer.Option(
        metavar="MODEL", help="Preset name, pipeline folder, or owner/name.", callback=unless_completing(_known)
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="As for generate; may be repeated, and the page offers a choice.",
        callback=unless_completing(lambda names: names and [_known(name) for name in names]),
    ),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Offset added to all seeds.", callback=unless_completing(_seed))]
Steps = Annotated[int, typer.Option(metavar="N", min=1, help="Number of sampling steps.")]
PresetSteps = Annotated[
    int | None, typer.Option("--steps", metavar="N", min=1, help="Sampling steps; default: the model's, else 25.")
]
PresetOvercompensation = Annotated[
    float | None,
    typer.Option(
        "--overcompensation", metavar="X", help="Factor λ of the correction; default: the job's.", callback=positive
    ),
]
OnLeak = Annotated[
    Literal["restart", "push", "refuse", "report"],
    typer.Option(
        metavar="HOW",
        help="For leaks: restart, push, refuse or report.",
    ),
]
Attempts = Annotated[int, typer.Option(metavar="N", min=1, help="Maximum number of samplings per image.")]
RUNNING = "Running"  # panel of options that say nothing about what is made
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="cpu, cuda, ...; default: CUDA if available.",
        callback=unless_completing(_device),
        rich_help_panel=RUNNING,
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", metavar="", help="Print errors and warnings alone.", rich_help_panel=RUNNING)
]
Features = Annotated[
    Literal["emoji", "clip", "dinov2", "inception"],
    typer.Option(metavar="NAME", help="emoji (the embedded encoder), clip, dinov2 or inception (then Fréchet is FID)."),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", metavar="", help="Print JSON instead of a summary and progress.", rich_help_panel=RUNNING),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace the results of an earlier run.")]
Debug = Annotated[bool, typer.Option("--debug", metavar="", help="Show tracebacks.", rich_help_panel=RUNNING)]


class errors:
    """Turn exceptions into one sentence and an exit code: 2 for bad usage, 1 for a failed run.

    A missing file, folder or protected set was named by the user, so it counts as bad usage.
    """

    def __init__(self, debug: bool) -> None:
        self.debug = debug

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, KeyboardInterrupt) and not self.debug:
            _stop(" ".join(["stopped.", *_notes(error)]), 1)
        if self.debug or not isinstance(error, Exception) or isinstance(error, typer.Exit):
            return
        if isinstance(error, FileNotFoundError) and error.filename is not None:  # Python's own: a number and a name
            _stop(f"{error.filename} does not exist.", 2)
        _stop(
            " ".join([_sentence(error), *_notes(error)]), 2 if isinstance(error, UsageError | FileNotFoundError) else 1
        )


_EXPECTED = ValueError, TypeError, RuntimeError, OSError, KeyError, ImportError


def _notes(error: BaseException) -> list[str]:
    """Return the notes of an error, which say what was kept of the unfinished work."""
    return getattr(error, "__notes__", [])


def _sentence(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if isinstance(error, OSError) and error.filename is not None:  # without the number in front
        text = f"{error.filename}: {error.strerror}."
    first, *more = text.strip().splitlines() or [""]
    if not isinstance(error, _EXPECTED) or not first:
        return f"{type(error).__name__}: {first}".rstrip(": ") + "; --debug shows where."
    return f"{first} (--debug shows the rest)" if more else first


def _stop(message: str, code: int) -> NoReturn:
    file = settings.used if code == 2 else None
    note = "" if file is None else f" (Options that were not given come from {file}.)"
    typer.echo(f"Error: {message}{note}", err=True)
    raise typer.Exit(code)


def check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder with --out.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UsageError(f"{out} exists and is not empty; it is kept. Use --overwrite, or another --out.")


def why(reason: str) -> str:
    """Say why a picture could not be read; Pillow's own message names a memory address."""
    return "not a picture that can be read" if "cannot identify" in reason else reason


def show_skipped(skipped: Sequence[tuple[str, str]], not_looked_at: Mapping[str, int]) -> None:
    """Print which pictures could not be read, and how many files hold none that is recognised."""
    for path, reason in skipped:
        typer.echo(f"skipped {path}: {why(reason)}", err=True)
    unknown = {kind: number for kind, number in not_looked_at.items() if kind not in ("text", "empty")}
    if unknown:
        typer.echo(f"not looked at: {', '.join(f'{number} {kind}' for kind, number in unknown.items())}", err=True)


def show(result: dict[str, Any], as_json: bool, summary: str, quiet: bool = False) -> None:
    """Print the result of a command; with `quiet` only where JSON was asked for."""
    if as_json or not quiet:
        typer.echo(json.dumps(result, indent=2) if as_json else summary)


def read_prompts(path: Path) -> list[str]:
    """Read a text file with one prompt a line; empty lines are left out, and repetitions, which it says.

    Raises:
        FileNotFoundError: there is no such file.
        UsageError: it is no text, or has no prompts.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (UnicodeDecodeError, IsADirectoryError):
        raise UsageError(f"{path} is no text file with one prompt a line.") from None
    prompts = distinct([line for line in lines if line])
    if not prompts:
        raise UsageError(f"{path} has no prompts; write one a line.")
    return prompts


def distinct(prompts: Sequence[str]) -> list[str]:
    """Leave out repeated prompts, and say on stderr which."""
    repeated = [prompt for prompt, times in Counter(prompts).items() if times > 1]
    if repeated:
        more = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
        typer.echo(f"Given more than once, and made once with every seed: {repeated[0]!r}{more}.", err=True)
    return list(dict.fromkeys(prompts))


def say_tiers(sets: Sequence[ProtectedSet]) -> None:
    """Say on stderr that copies are not looked for in sets without a descriptor."""
    bare = [str(protected.path) for protected in sets if protected.descriptor is None]
    if bare:
        verb, whose = ("has", "its") if len(bare) == 1 else ("have", "their")
        typer.echo(
            f"{' and '.join(bare)} {verb} no descriptor: {whose} images are kept apart by distance alone, and changed "
            "copies are not looked for (protect --descriptor shielded makes a set that finds them).",
            err=True,
        )


def repairs(report: dict[str, Any]) -> list[str]:
    """List repaired and refused images for the summary of a run."""
    lines = []
    if report["restarted"] or report["pushed"]:
        lines.append(
            f"Repaired: {report['restarted']} by sampling again, {report['pushed']} by a push; "
            f"{report['samplings']} samplings for {report['n']} images."
        )
    for image in report.get("unresolved", ()):
        lines.append(
            f"Not resolved: {image['prompt']}, seed {image['seed']}: still inside a shield, or closer than the "
            "radius to another image."
        )
    for refused in report["refused"]:
        lines.append(f"Refused: {refused['prompt']}, seed {refused['seed']}: {refused['reason']}.")
    return lines
