"""Generate with and without SPELL at the same seeds, certify both, and report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from shielded.evaluation.encoder import encoder_of
from shielded.generation import Generated, distributed, generate
from shielded.generation.repair import OnLeak, check_on_leak
from shielded.latent_space import LatentSpace
from shielded.models import DEFAULT_MODEL, PROTECTION, VARIETY, VARIETY_RADIUS, call_options, load, preset_of
from shielded.protected import ProtectedSet
from shielded.runs.certified import certified_rows, scored_sides
from shielded.runs.folder import RunFolder
from shielded.runs.results import PairReport
from shielded.spell import Calibration, Spell

Shield = Spell | Callable[[Generated], Spell]


def run(
    out: Path,
    prompt: str,
    model: str = DEFAULT_MODEL,
    protect: Path | None = None,
    n: int = 4,
    radius: float | None = None,
    seed: int = 0,
    steps: int | None = None,
    overcompensation: float | None = None,
    device: str | None = None,
    progress: bool = True,
    on_leak: OnLeak = "restart",
    attempts: int = 3,
    guidance: float | None = None,
    radius_schedule: Literal["constant", "posterior"] | None = None,
    calibration: Path | None = None,
    show_protected: bool = False,
    window_end: float = 0.0,
    release: float | None = None,
    margin: float | None = None,
) -> dict[str, Any] | None:
    """Generate n images of one prompt that keep away from a protected set or, without one, from each other.

    With a set, take the settings of `shielded.models.PROTECTION`; without one those of `VARIETY`. Options that are
    given replace theirs.

    Writes the images with their certificates and an audit log, `grid.png`, `trace.csv`, `report.html` and `report.json`
    to the folder `out`. Arguments are those of the command line (`shielded generate --help`). The processes of
    `accelerate launch` share the work.

    A finished batch is written at once. If the run is stopped or fails later, the report covers the images that are
    finished both without and with SPELL, and the exception goes on with a note that says so.

    Returns:
        the content of `report.json`; None in a process other than the main one.
    """
    joined = distributed.join(device)
    pipe = load(model, device if joined is None else str(joined))
    space = LatentSpace.of(pipe)
    protected = None if protect is None else ProtectedSet.open(protect)
    push: dict[str, Any] = dict(VARIETY if protected is None else PROTECTION)
    given = {"overcompensation": overcompensation, "release": release, "margin": margin}
    push["window"] = (1.0, window_end)
    push |= {name: value for name, value in given.items() if value is not None}
    if protected is not None:
        protected.require_space(space)  # before anything is sampled or written
    else:
        radius, on_leak = radius or VARIETY_RADIUS * space.dim**0.5, "report"
    if calibration is None and (radius_schedule == "posterior" or (radius_schedule is None and protected is not None)):
        calibration = preset_of(model).calibration
    error = None if calibration is None else Calibration.load(calibration)
    spell = Spell(
        protected, radius, batch=protected is None, **push, radius_schedule=radius_schedule, calibration=error
    )
    options = call_options(pipe, model, steps, guidance)
    folder = RunFolder(out, write=distributed.is_main())
    report = make_pair(
        pipe,
        [prompt] * n,
        list(range(seed, seed + n)),
        spell,
        model=model,
        options=options,
        on_leak=on_leak,
        attempts=attempts,
        folder=folder,
        progress=progress,
        processes=joined is not None,
        score=True,
        show_protected=show_protected,
    )
    if report is None:
        return None
    extra: dict[str, Any] = {"window": list(spell.window), "corrected": report.corrected}
    if protected is None and len(report.rows) > 1:
        extra["min_pair_distance_without"] = report.without.min_pair_distance
        extra["min_pair_distance_with"] = report.with_.min_pair_distance
    return folder.finish(report, spell_arguments(spell, protect, calibration), extra=extra)


def make_pair(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    spell: Shield,
    *,
    model: str,
    options: dict[str, Any],
    on_leak: OnLeak = "report",
    attempts: int = 3,
    folder: RunFolder | None = None,
    labels: tuple[str, str] = ("without SPELL", "with SPELL"),
    progress: bool = False,
    processes: bool = False,
    batch_size: int = 16,
    on_step: Callable[[str, Any, int], None] | None = None,
    score: bool = False,
    show_protected: bool = False,
) -> PairReport | None:
    """Generate one image per prompt and seed without and with SPELL, and certify both.

    Each image is encoded and measured once: where `on_leak` has measured it, its certificate holds that measurement.

    Args:
        pipe: a diffusers pipeline with a supported scheduler.
        prompts: one per image.
        seeds: one per image.
        spell: the correction, or a function that makes it from the images without SPELL.
        model: name of the model, for certificates and for its encoder.
        options: steps and what the pipeline takes besides, in JSON types; certificates hold them.
        on_leak: what to do with images inside a shield; see `generate`.
        attempts: limit on how often an image is sampled.
        folder: writes finished batches and the audit log at once; None: nothing is written.
        labels: text in front of the two progress bars.
        progress: whether progress bars are shown.
        processes: share the work among the processes that `distributed.join` has joined. They are left after sampling.
        batch_size: images per batch.
        on_step: called with the label, the pipeline and the index of each finished step.
        score: whether to compute Vendi scores, if the model comes with an encoder.
        show_protected: whether rows hold the protected pictures that the certificates name.

    Returns:
        the report; None in a process other than the main one. If an exception, `KeyboardInterrupt` included, ended the
        run with SPELL after its first batch, the report covers the finished images and holds the exception.

    Raises:
        ValueError: settings that `generate` refuses.
    """
    main = distributed.is_main()
    if isinstance(spell, Spell):
        check_on_leak(on_leak, attempts, spell)
    call: dict[str, Any] = {**options, "batch_size": batch_size, "progress": progress and main, "processes": processes}
    plain, shielded = [], []  # finished batches
    trace: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}

    def add_plain(batch: Generated) -> None:
        if folder is not None:
            folder.add(folder.without, batch, *_following(plain, prompts, seeds))
        plain.append(batch)

    def add_shielded(batch: Generated) -> None:
        trace.extend({**row, "image": row["image"] + _size(shielded)} for row in correction.trace)
        if folder is not None:
            folder.add(folder.with_, batch, *_following(shielded, prompts, seeds))
        shielded.append(batch)

    stopped: BaseException | None = None
    try:
        whole = generate(
            pipe, prompts, seeds, label=labels[0], finished=add_plain, **call, **_steps(on_step, labels[0])
        )
        correction = spell if isinstance(spell, Spell) else spell(whole)
        settings = settings_of(correction, pipe, model, on_leak, attempts, options)
        protected = correction.protected if isinstance(correction.protected, ProtectedSet) else None
        if folder is not None:
            folder.start_log(settings, protected)
        call |= {"on_leak": on_leak, "attempts": attempts, "log": folder.log if folder is not None and main else None}
        generate(
            pipe,
            prompts,
            seeds,
            correction,
            label=labels[1],
            finished=add_shielded,
            **call,
            **_steps(on_step, labels[1]),
        )
        if processes:
            distributed.leave()
    except (Exception, KeyboardInterrupt) as error:
        if not main or not shielded:
            if plain and folder is not None:
                error.add_note(f"{_size(plain)} of {len(prompts)} images without SPELL are in {folder.without}.")
            raise
        stopped = error
        if folder is not None:
            folder.log("stopped", images=_size(shielded))
    if not main:
        return None
    correction.trace = trace
    after = Generated.joined(shielded)
    before = whole.first(len(after.images))
    rows = certified_rows(LatentSpace.of(pipe), before, after, correction, prompts, seeds, settings, show_protected)
    return PairReport(
        rows,
        *scored_sides(before, after, encoder_of(model) if score else None),
        correction,
        settings,
        len(prompts),
        stopped,
    )


def settings_of(
    spell: Spell, pipe: Any, model: str, on_leak: OnLeak, attempts: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Describe how images are made, in JSON types, for their certificates."""
    return {
        "model": model,
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "radius": spell.radius,
        "overcompensation": spell.overcompensation,
        "overlap": spell.overlap,
        "nearest": spell.nearest,
        "batch": spell.batch,
        "window": list(spell.window),
        "radius_schedule": spell.radius_schedule,
        "release": spell.release,
        "release_scale": spell.release_scale,
        "margin": spell.margin,
        "on_leak": on_leak,
        "attempts": attempts,
        **options,
    }


def spell_arguments(
    spell: Spell, protected: Path | str | None = None, calibration: Path | None = None
) -> dict[str, Any]:
    """List the keyword arguments with which a reader of the page makes this Spell again.

    Args:
        spell: with one radius, or with those of its set.
        protected: path of its set, as the reader opens it.
        calibration: file of its calibration.
    """
    call: dict[str, Any] = {} if protected is None else {"protected": str(protected)}
    call |= {"radius": spell.radius, "overcompensation": spell.overcompensation, "batch": spell.batch}
    call |= {"window": spell.window} if spell.window != (1.0, 0.0) else {}
    call |= {"radius_schedule": spell.radius_schedule} if spell.radius_schedule is not None else {}
    call |= {"release": spell.release} if spell.release != 0.5 else {}
    call |= {"release_scale": spell.release_scale} if spell.release_scale != 1 else {}
    call |= {"margin": spell.margin} if spell.margin else {}
    call |= {"calibration": str(calibration)} if calibration is not None else {}
    return call


# ----------------------------------------------------------------------------------------------------------------
# Parts.


def _size(batches: Sequence[Generated]) -> int:
    return sum(len(batch.images) for batch in batches)


def _following(
    batches: Sequence[Generated], prompts: list[str], seeds: list[int]
) -> tuple[Sequence[str], Sequence[int]]:
    """Prompts and seeds of the batch after these."""
    return prompts[_size(batches) :], seeds[_size(batches) :]


def _steps(on_step: Callable[[str, Any, int], None] | None, label: str) -> dict[str, Any]:
    """Pass `on_step` to a pipeline as its callback."""

    def step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(label, pipe, index)
        return {}

    return {} if on_step is None else {"callback_on_step_end": step}
