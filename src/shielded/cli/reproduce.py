"""shielded reproduce"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from shielded.cli.options import AsJson, Debug, Device, Model, UsageError, errors, positive, read_prompts, show
from shielded.models import DEFAULT_MODEL


class Experiment(StrEnum):
    diversity = "diversity"
    tradeoff = "tradeoff"
    sparsity = "sparsity"
    shielding = "shielding"


def reproduce(
    experiment: Annotated[Experiment, typer.Argument(metavar="EXPERIMENT", help="Experiment of the paper.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Results; a stopped run continues.")] = Path("study"),
    model: Model = DEFAULT_MODEL,
    prompts: Annotated[str, typer.Option(metavar="N|FILE", help="Number of emoji's captions, or a text file.")] = "100",
    images: Annotated[int, typer.Option(metavar="N", min=4, help="Images per prompt and seed.")] = 16,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Number of seeds.")] = 3,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sampler steps; default: enough for the model.")
    ] = None,
    methods: Annotated[str | None, typer.Option(metavar="A,B", help="Methods of tradeoff; default: all.")] = None,
    radius: Annotated[
        float | None,
        typer.Option(metavar="R", callback=positive, help="Shield radius; default: measured, or the preset's."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Real images: a tar, or a folder per prompt."),
    ] = None,
    features: Annotated[
        Literal["emoji", "clip", "dinov2", "inception"] | None,
        typer.Option(metavar="NAME", help="Features for metrics: emoji, clip, dinov2 or inception; default: by model."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Images sampled at once; default: all of a prompt.")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Markdown file with a section for the result.")
    ] = None,
    plots: Annotated[bool, typer.Option(metavar="", help="Draw plots; needs matplotlib.")] = True,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run an experiment of the SPELL paper at any size, with JSON, CSV, plots and a page as results.

    Example: shielded reproduce diversity --prompts 20 --images 8 --seeds 1 --out study
    """
    with errors(debug):
        if methods is not None and experiment is not Experiment.tradeoff:
            raise UsageError("--methods applies to tradeoff only.")
        from shielded.evaluation import reproduce as job
        from shielded.models import preset_of

        names = None if methods is None else [name.strip() for name in methods.split(",")]
        unknown = [name for name in names or [] if name not in job.SWEEPS]
        if unknown:
            raise UsageError(f"--methods: {unknown[0]!r} is not known; use some of {', '.join(job.SWEEPS)}.")
        study = job.Study(
            out=out,
            prompts=_prompts(prompts, model, reference),
            images=images,
            seeds=seeds,
            model=model,
            steps=steps,
            encoder=features or preset_of(model).features,
            batch_size=batch_size,
            device=device,
            progress=not as_json,
        )
        result = job.reproduce(experiment, study, reference, plots, methods=names, radius=radius)
        if docs is not None:
            job.write_section(docs, result)
        show(result, as_json, f"{job.markdown(result)}\n\nOpen {out / f'{experiment}.html'}")


def _prompts(given: str, model: str, reference: Path | None) -> list[str]:
    if given.isdigit():
        from shielded.evaluation.reproduce import prompts_of
        from shielded.models import preset_of

        if preset_of(model).captions is None:
            raise UsageError("--prompts: give a text file with one prompt a line; only the embedded model has its own.")
        if int(given) < 1:
            raise UsageError("--prompts must be at least 1.")
        return prompts_of(model, int(given), reference)
    path = Path(given)
    if not path.is_file():
        raise UsageError(f"--prompts: {given} is neither a number nor a text file.")
    return read_prompts(path)
