"""The job behind `shielded generate`: prompts and seeds to images, certificates and a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shielded import __version__
from shielded._extras import RequestError
from shielded.certificates.certificate import history_sha256
from shielded.evaluation.metrics import nearest_distance
from shielded.generation import distributed
from shielded.generation.repair import OnLeak, check_on_leak
from shielded.models import PROTECTION, PROTECTION_RADIUS, VARIETY, VARIETY_RADIUS, preset_of
from shielded.models.prompts import cut_prompts, without_length_warnings
from shielded.protected import ProtectedSet, open_sets, parts_of
from shielded.radius.choose import suggested_radius
from shielded.runs.folder import RunFolder
from shielded.runs.model_call import ModelCall
from shielded.runs.names import PATTERN, image_names
from shielded.runs.paired import make_pair, settings_of, spell_arguments
from shielded.runs.results import Side
from shielded.spell import Calibration, History, Spell

BATCH = 16  # images that are sampled at once
_SHOWN_LETTERS = 40  # of a prompt in a message


def run(
    out: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: ModelCall | None = None,
    *,
    protect: Sequence[Path] = (),
    radius: float | None = None,
    overcompensation: float | None = None,
    device: str | None = None,
    progress: bool = True,
    on_leak: OnLeak = "restart",
    attempts: int = 3,
    radius_schedule: Literal["constant", "posterior"] | None = None,
    calibration: Path | None = None,
    show_protected: bool = False,
    window_end: float = 0.0,
    release: float | None = None,
    margin: float | None = None,
    batch_size: int = BATCH,
    compare: bool = True,
    history: Path | None = None,
    resume: bool = False,
    names: str = PATTERN,
    warn: Callable[[str], None] | None = None,
) -> dict[str, Any] | None:
    """Generate an image of each prompt and seed that keeps away from a protected set or, without one, from the others.

    With a set, take the settings of `shielded.models.PROTECTION`; without one those of `VARIETY`, among the images of
    each prompt. Options that are given replace theirs.

    Writes the images with their certificates and an audit log, `grid.png`, `trace.csv`, `report.html` and `report.json`
    to the folder `out`. Arguments are those of the command line (`shielded generate --help-all`). The processes of
    `accelerate launch` share the work.

    A finished batch is written at once. If the run is stopped or fails later, the report covers the images that are
    finished both without and with SPELL, and the exception goes on with a note that says so. With `resume` a later
    call goes on there, and makes the images that one call would have made.

    Args:
        out: folder of the results; files of an earlier run are replaced.
        prompts: different texts.
        seeds: different numbers; an image is made of each prompt with each of them.
        call: the model and how it is called; None: the embedded one.
        protect: folders of protected sets, which all count.
        radius: of the shields, L2 in the latent space; None: the set's own, that of `suggested_radius` where it has
            none, or without a set that of `VARIETY`.
        overcompensation: λ; None: that of the job.
        device: None: CUDA if there is one.
        progress: whether progress is shown.
        on_leak: what to do with images inside a shield; see `generate`. Without a set there is nothing to do.
        attempts: limit on how often an image is sampled.
        radius_schedule: see `Spell`.
        calibration: file of a `Calibration`; None: that of the model, if it has one.
        show_protected: whether the report shows protected pictures.
        window_end: noise level down to which it pushes.
        release: see `Spell`; None: that of the job.
        margin: see `Spell`; None: that of the job.
        batch_size: images that are sampled at once, and without a set keep apart.
        compare: whether the same images are generated without SPELL as well.
        history: folder of the finished images of earlier runs (`History.open`), which count like images of the batch;
            those of this run are added. None: earlier runs do not count.
        resume: go on with the stopped run in `out`.
        names: pattern of the image files; see `shielded.runs.names`.
        warn: called with each sentence that the user should read before the images are made.

    Returns:
        the content of `report.json`; None in a process other than the main one.

    Raises:
        RequestError: what is asked for makes no sense, or is not what the stopped run was asked for.
    """
    call = call or ModelCall()
    joined = distributed.join(device)
    if resume and joined is not None:
        raise RequestError("a run goes on in one process alone; leave out accelerate launch, or --resume.")
    every_prompt = [prompt for prompt in prompts for _ in seeds]
    every_seed = [seed for _ in prompts for seed in seeds]
    files = image_names(every_prompt, every_seed, names)
    protected = open_sets(protect) if protect else None
    if history is not None and joined is not None:
        raise RequestError("a history is written by one process; leave out accelerate launch, or --history.")
    if protected is not None and radius is None:
        radius = _radius_of(protected, warn)
        if history is not None and radius is None:
            raise RequestError("with a history all images need one radius; give it with --radius.")
    opened = call.open(device if joined is None else str(joined), progress)
    push: dict[str, Any] = dict(VARIETY if protected is None else PROTECTION)
    given = {"overcompensation": overcompensation, "release": release, "margin": margin}
    push["window"] = (1.0, window_end)
    push |= {name: value for name, value in given.items() if value is not None}
    if protected is not None:
        protected.require_space(opened.space)  # before anything is sampled or written
    else:
        radius, on_leak = radius or VARIETY_RADIUS * opened.space.dim**0.5, "report"
    if calibration is None and (radius_schedule == "posterior" or (radius_schedule is None and protected is not None)):
        calibration = preset_of(call.model).calibration
    error = None if calibration is None else Calibration.load(calibration)
    push["batch"] = protected is None or history is not None
    remembered = None if history is None else History.open(history, opened.space)
    push |= {} if remembered is None else {"history": remembered}
    spell = Spell(protected, radius, **push, radius_schedule=radius_schedule, calibration=error)
    check_on_leak(on_leak, attempts, spell)
    earlier = torch.empty(0) if remembered is None else remembered.latents
    folder = RunFolder(out, write=distributed.is_main(), resume=resume)
    folder.start(
        {
            "prompts": list(prompts),
            "seeds": list(seeds),
            "settings": settings_of(
                spell, opened.pipe, call.model, on_leak, attempts, {**opened.options, **opened.files}
            ),
            "calibration": None if error is None else asdict(error),
            "protect": [] if protected is None else [history_sha256(part) for part in parts_of(protected)],
            "batch": batch_size,
            "no-compare": not compare,
            "history": None if history is None else str(history),
            "name": names,
            "version of shielded": __version__,
        }
    )
    if warn is not None and distributed.is_main():
        for prompt, tokens, read in cut_prompts(opened.pipe, [*prompts, *([call.negative] if call.negative else [])]):
            short = prompt if len(prompt) <= _SHOWN_LETTERS else f"{prompt[:_SHOWN_LETTERS]}…"
            warn(f"The prompt {short!r} has {tokens} tokens, of which the model reads {read} and ignores the rest.")
    with without_length_warnings():
        report = make_pair(
            opened.pipe,
            every_prompt,
            every_seed,
            spell,
            model=call.model,
            options=opened.options,
            inputs=opened.inputs,
            files=opened.files,
            space=opened.space,
            on_leak=on_leak,
            attempts=attempts,
            folder=folder,
            names=files,
            progress=progress,
            processes=joined is not None,
            batch_size=batch_size,
            one_prompt=protected is None and len(prompts) > 1,
            compare=compare,
            score=True,
            show_protected=show_protected,
        )
    if report is None:
        return None
    extra: dict[str, Any] = {"window": list(spell.window), "corrected": report.corrected}
    if protected is None and report.with_.min_pair_distance is not None:
        extra["min_pair_distance_without"] = None if report.without is None else report.without.min_pair_distance
        extra["min_pair_distance_with"] = report.with_.min_pair_distance
    if remembered is not None:
        sides = {"min_distance_without": report.without, "min_distance_with": report.with_}
        extra["history"] = {"folder": str(history), "before": len(earlier), "after": len(remembered)}
        extra["history"] |= {name: _nearest(side, earlier) for name, side in sides.items()}
    paths = [str(path) for path in protect]
    named = paths[0] if len(paths) == 1 else paths or None
    return folder.finish(report, spell_arguments(spell, named, calibration), extra=extra)


def _nearest(side: Side | None, earlier: Tensor) -> float | None:
    """Return the smallest distance of a side's latents from earlier images; None if there are none of either."""
    if side is None or not len(earlier) or not len(side.latents):
        return None
    return nearest_distance(side.latents.flatten(1), earlier.flatten(1)).min().item()


def _radius_of(protected: ProtectedSet, warn: Callable[[str], None] | None) -> float | None:
    """Suggest a radius for a set without any; None where each image has its own.

    Raises:
        RequestError: some images have one and others not.
    """
    missing = protected.radii.isnan()
    if not missing.any():
        return None
    if not missing.all():
        raise RequestError(
            f"{int(missing.sum())} of {len(protected)} protected images have no radius; give one with --radius."
        )
    radius = suggested_radius(protected)
    if warn is not None and distributed.is_main():
        warn(
            f"The set has no radius; {radius:.4g} is taken: at most 1 % of its different images are that close, and it "
            f"is at most {PROTECTION_RADIUS:g} √dim. `shielded calibrate` finds a better one; --radius overrides."
        )
    return radius
