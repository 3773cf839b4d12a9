"""Generate with and without SPELL at the same seeds, certify both, and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shielded.evaluation.encoder import encoder_of
from shielded.generation import Generated, distributed, generate
from shielded.generation.repair import OnLeak, check_on_leak
from shielded.latent_space import LatentSpace
from shielded.models import preset_of
from shielded.protected import ProtectedSet
from shielded.runs.certified import certified_rows, scored_sides
from shielded.runs.folder import RunFolder
from shielded.runs.names import image_name
from shielded.runs.results import PairReport
from shielded.spell import Calibration, Spell

Shield = Spell | Callable[[Generated], Spell]


def make_pair(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    spell: Shield,
    *,
    model: str,
    options: dict[str, Any],
    inputs: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
    space: LatentSpace | None = None,
    on_leak: OnLeak = "report",
    attempts: int = 3,
    folder: RunFolder | None = None,
    names: list[str] | None = None,
    labels: tuple[str, str] = ("without SPELL", "with SPELL"),
    progress: bool = False,
    processes: bool = False,
    batch_size: int = 16,
    one_prompt: bool = False,
    compare: bool = True,
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
        inputs: what the pipeline takes besides and is not in JSON types.
        files: what certificates say of the files that went in.
        space: of the latents; None: that of the pipeline at the size of the options.
        on_leak: what to do with images inside a shield; see `generate`.
        attempts: limit on how often an image is sampled.
        folder: writes finished batches and the audit log at once; None: nothing is written. If it was started, what a
            stopped run has finished is not sampled again.
        names: of the image files, one per image; None: by prompt and seed.
        labels: text in front of the two progress bars.
        progress: whether progress is shown.
        processes: share the work among the processes that `distributed.join` has joined. They are left after sampling.
        batch_size: images per batch.
        one_prompt: end batches where the prompt changes; see `generate`.
        compare: False: only the run with SPELL; `spell` is no function then.
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
    space = space or LatentSpace.of(pipe, options.get("height"), options.get("width"))
    names = names or [image_name(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    call: dict[str, Any] = {**options, **(inputs or {}), "batch_size": batch_size, "one_prompt": one_prompt}
    call |= {"progress": progress and main, "processes": processes}
    kept = {stage: [] if folder is None else folder.kept(stage) for stage in ("without", "with")}
    plain, shielded = ([made for made, _ in kept[stage]] for stage in ("without", "with"))  # finished batches
    trace: list[dict[str, Any]] = [row for _, rows in kept["with"] for row in rows]
    settings: dict[str, Any] = {}

    def add_plain(batch: Generated) -> None:
        if folder is not None:
            folder.add("without", batch, names[_size(plain) :])
        plain.append(batch)

    def add_shielded(batch: Generated) -> None:
        rows = [{**row, "image": row["image"] + _size(shielded)} for row in correction.trace]
        trace.extend(rows)
        if folder is not None:
            folder.add("with", batch, names[_size(shielded) :], rows)
        shielded.append(batch)

    def rest(made: list[Generated]) -> dict[str, Any]:
        done = _size(made)
        return {"prompts": prompts[done:], "seeds": seeds[done:], "first": done}

    stopped: BaseException | None = None
    try:
        if compare and _size(plain) < len(prompts):
            generate(pipe, **rest(plain), label=labels[0], finished=add_plain, **call, **_steps(on_step, labels[0]))
        correction = spell if isinstance(spell, Spell) else spell(Generated.joined(plain))
        settings = settings_of(correction, pipe, model, on_leak, attempts, {**options, **(files or {})})
        protected = correction.protected if isinstance(correction.protected, ProtectedSet) else None
        if folder is not None:
            folder.start_log(settings, protected)
        call |= {"on_leak": on_leak, "attempts": attempts, "log": folder.log if folder is not None and main else None}
        if _size(shielded) < len(prompts):
            generate(
                pipe,
                spell=correction,
                **rest(shielded),
                label=labels[1],
                finished=add_shielded,
                space=space,
                **call,
                **_steps(on_step, labels[1]),
            )
        if processes:
            distributed.leave()
    except (Exception, KeyboardInterrupt) as error:
        if not main or not shielded:
            if plain and folder is not None:
                made = f"{_size(plain)} of {len(prompts)} images without SPELL are in {folder.without}."
                error.add_note(made + folder.how_to_go_on)
            elif folder is not None:
                folder.abandon()
                if isinstance(error, KeyboardInterrupt):
                    error.add_note("No batch was finished yet, so nothing is kept.")
            raise
        stopped = error
        if folder is not None:
            folder.log("stopped", images=_size(shielded))
    if not main:
        return None
    correction.trace = trace
    after = Generated.joined(shielded)
    before = Generated.joined(plain).first(len(after.images)) if compare else None
    rows = certified_rows(space, before, after, correction, prompts, seeds, names, settings, show_protected)
    return PairReport(
        rows,
        *scored_sides(before, after, encoder_of(model) if score else None, prompts),
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
        **({} if spell.history is None else {"history": len(spell.history)}),
        "window": list(spell.window),
        "radius_schedule": spell.radius_schedule,
        "release": spell.release,
        "release_scale": spell.release_scale,
        "margin": spell.margin,
        "on_leak": on_leak,
        "attempts": attempts,
        **options,
    }


def calibration_of(model: str) -> Calibration | None:
    """Load the denoising error that was measured for a model with a preset; None if it was not."""
    file = preset_of(model).calibration
    return None if file is None else Calibration.load(file)


def spell_arguments(
    spell: Spell, protected: Path | str | Sequence[str] | None = None, calibration: Path | None = None
) -> dict[str, Any]:
    """List the keyword arguments with which a reader of the page makes this Spell again.

    Args:
        spell: with one radius, or with those of its set.
        protected: path of its set, as the reader opens it; or those of several sets.
        calibration: file of its calibration.
    """
    paths = str(protected) if isinstance(protected, str | Path) else protected
    call: dict[str, Any] = {} if paths is None else {"protected": paths}
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


def _steps(on_step: Callable[[str, Any, int], None] | None, label: str) -> dict[str, Any]:
    """Pass `on_step` to a pipeline as its callback."""

    def step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(label, pipe, index)
        return {}

    return {} if on_step is None else {"callback_on_step_end": step}
