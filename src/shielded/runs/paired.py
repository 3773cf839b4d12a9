"""Generate with and without SPELL at the same seeds, measure both, and write what was found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from shielded.certificates.audit import LOG, AuditLog, read_log
from shielded.certificates.certificate import (
    Certificate,
    attach_certificate,
    beside,
    certificate_sha256,
    certify,
    leaks,
)
from shielded.evaluation.encoder import Encoder, encoder_of
from shielded.evaluation.metrics import vendi
from shielded.files import replacing, write_json
from shielded.generation import Generated, distributed, generate
from shielded.generation.repair import OnLeak, check_on_leak
from shielded.latent_space import LatentSpace
from shielded.models import DEFAULT_MODEL, VARIETY, VARIETY_RADIUS, call_options, load, preset_of
from shielded.protected import ProtectedSet
from shielded.runs.report import Row, write_report
from shielded.runs.report.grid import protection_grid
from shielded.spell import Calibration, Spell


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
    radius_schedule: Literal["constant", "posterior"] = "constant",
    calibration: Path | None = None,
    show_protected: bool = False,
    window_end: float | None = None,
) -> dict[str, Any] | None:
    """n images of one prompt, kept away from a protected set or, without one, from each other.

    Without a set and a `window_end`, what costs least in quality for its variety (`shielded.models.VARIETY`).

    Writes the images with their certificates and an audit log, `grid.png`, `trace.csv`, `report.html` and `report.json`
    to the folder `out` and returns the report. Arguments as on the command line (`shielded generate --help`). The
    processes of `accelerate launch` share the work; the main one writes, the others return None.

    Images are written when their batch is finished. If the run is stopped or fails after that, the rest is written for
    the images that are there both without and with SPELL, and the exception goes on with a note that says so.
    """
    here = distributed.join(device)
    pipe = load(model, device if here is None else str(here))
    space = LatentSpace.of(pipe)
    protected = None if protect is None else ProtectedSet.open(protect)
    early = protected is None and window_end is None
    push = dict(VARIETY) if early else {"window": (1.0, window_end or 0.0)}
    if overcompensation is not None:
        push["overcompensation"] = overcompensation
    if protected is not None:
        protected.require_space(space)  # before anything is sampled or written
    else:
        per_root_dim = VARIETY_RADIUS if early else preset_of(model).radius
        radius, on_leak = radius or per_root_dim * space.dim**0.5, "report"
    if radius_schedule == "posterior" and calibration is None:
        calibration = preset_of(model).calibration
    spell = Spell(
        protected,
        radius,
        batch=protected is None,
        **push,
        radius_schedule=radius_schedule,
        calibration=None if calibration is None else Calibration.load(calibration),
    )
    check_on_leak(on_leak, attempts, spell)
    prompts, seeds = [prompt] * n, list(range(seed, seed + n))
    main = distributed.is_main()
    options = {**call_options(model, steps, guidance), "progress": progress and main}
    settings = settings_of(spell, pipe, model, on_leak, attempts, options)
    options["processes"] = here is not None
    plain, shielded = (_Finished(out / name, prompts, seeds, main) for name in ("without", "with"))
    trace: list[dict[str, Any]] = []

    def finished(batch: Generated) -> None:
        trace.extend({**row, "image": row["image"] + len(shielded)} for row in spell.trace)
        shielded.add(batch)

    stopped: BaseException | None = None
    try:
        generate(pipe, prompts, seeds, label="without SPELL", finished=plain.add, **options)
        log = open_log(out / "with", settings, protected) if main else None
        repairs = {"on_leak": on_leak, "attempts": attempts, "log": log.append if main else None}
        generate(pipe, prompts, seeds, spell, label="with SPELL", finished=finished, **repairs, **options)
        distributed.leave()
    except (Exception, KeyboardInterrupt) as error:
        if not main or not len(shielded):
            error.add_note(f"{len(plain)} of {n} images without SPELL are in {plain.folder}.") if len(plain) else None
            raise
        stopped = error
        log.append("stopped", images=len(shielded))
    if not main:
        return None
    made, count = Generated.joined(shielded.parts), len(shielded)
    before, prompts, seeds = Generated.joined(plain.parts).first(count), prompts[:count], seeds[:count]
    report, rows = compare(out, prompts, seeds, before, made, space, protected, radius, settings, log)
    if protected is not None and radius is None and len(protected.radii.unique()) == 1:
        report["radius"] = protected.radii[0].item()  # what all shields have
    encoder = encoder_of(model)
    if encoder is not None:
        report["vendi_without"] = vendi(encoder.image_features(before.images))
        report["vendi_with"] = _vendi_of_kept(encoder, made)
    report["window"] = list(spell.window)
    report["corrected"] = len({row["image"] for row in trace if row["push"] > 0})
    if protected is None and count > 1:
        report["min_pair_distance_without"], report["min_pair_distance_with"] = map(closest_pair, (before, made))
    if show_protected and protected is not None:
        _, nearest = protected.nearest_rows(made.latents)
        pictures = space.decode(protected.vectors(nearest[:, 0]))
        rows = [replace(row, protected=picture) for row, picture in zip(rows, pictures, strict=True)]
    call: dict[str, Any] = {} if protect is None else {"protected": str(protect)}
    call |= {"radius": radius, "overcompensation": spell.overcompensation, "batch": spell.batch}
    call |= {"window": spell.window} if spell.window != (1.0, 0.0) else {}
    call |= {"radius_schedule": radius_schedule} if radius_schedule != "constant" else {}
    call |= {"calibration": str(calibration)} if calibration is not None else {}
    spell.trace = trace
    spell.write_trace(out / "trace.csv")
    save_image(protection_grid(rows, report["radius"] if protected is not None else None), out / "grid.png")
    write_report(out / "report.html", report, rows, None, trace, call, settings)
    write_json(out / "report.json", report)
    if stopped is not None:
        stopped.add_note(f"{count} of {n} images are finished: {out / 'report.html'}")
        raise stopped
    return report


@dataclass
class _Finished:
    """The batches of a run that are finished. Their images are written at once."""

    folder: Path
    prompts: list[str]
    seeds: list[int]
    write: bool
    parts: list[Generated] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(part.images) for part in self.parts)

    def add(self, batch: Generated) -> None:
        if self.write:
            write_images(self.folder, batch, self.prompts[len(self) :], self.seeds[len(self) :])
        self.parts.append(batch)


def settings_of(
    spell: Spell, pipe: Any, model: str, on_leak: OnLeak, attempts: int, options: dict[str, Any]
) -> dict[str, Any]:
    """What a certificate says about how an image was made, in JSON types."""
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
        "on_leak": on_leak,
        "attempts": attempts,
        **{name: value for name, value in options.items() if name != "progress"},
    }


def open_log(folder: Path, settings: dict[str, Any], protected: ProtectedSet | None) -> AuditLog:
    """The audit log of a run, beside its images. The log of an earlier run goes, with the images that it lists."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / LOG).is_file():
        for record in read_log(folder / LOG)[0]:
            if record.get("event") == "certified":
                image = folder / Path(str(record.get("image"))).name
                image.unlink(missing_ok=True)
                beside(image).unlink(missing_ok=True)
        (folder / LOG).unlink()
    log = AuditLog(folder / LOG)
    known = {} if protected is None else {"set": str(protected.path), "version": protected.version}
    log.append("start", **known, settings=settings)
    return log


def compare(
    out: Path,
    prompts: list[str],
    seeds: list[int],
    plain: Generated,
    shielded: Generated,
    space: LatentSpace,
    protected: ProtectedSet | None,
    radius: float | None,
    settings: dict[str, Any],
    log: AuditLog,
) -> tuple[dict[str, Any], list[Row]]:
    """Certify both sets of images, which `write_images` has written, and put the report together.

    A refused image is listed.
    """
    kept = [i for i, reason in enumerate(shielded.refused) if reason is None]
    files_without = [_file(out / "without", prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    files_with = [_file(out / "with", prompts[i], seeds[i]) for i in kept]
    before: list[Certificate] = []
    after: dict[int, Certificate] = {}
    if protected is not None:
        before = certify(plain.latents, files_without, protected, radius, decoded=space.encode(plain.images))
        certificates = certify(
            shielded.latents[kept],
            files_with,
            protected,
            radius,
            decoded=space.encode([shielded.images[i] for i in kept]),
            details=[
                {
                    "attempts": shielded.attempts[i],
                    "repair": shielded.repair[i],
                    "prompt": prompts[i],
                    "seed": seeds[i],
                    "model": settings["model"],
                    "settings": settings,
                }
                for i in kept
            ],
        )
        for i, file, certificate in zip(kept, files_with, certificates, strict=True):
            after[i] = attach_certificate(file, certificate)
            log.append(
                "certified",
                image=file.name,
                sha256=after[i].sha256,
                certificate_sha256=certificate_sha256(certificate),
                inside=certificate.inside,
            )
    refused = [
        {"prompt": prompts[i], "seed": seeds[i], "attempts": shielded.attempts[i], "reason": reason}
        for i, reason in enumerate(shielded.refused)
        if reason is not None
    ]
    for entry in refused:
        log.append("refused", **entry)
    log.close()
    rows = [
        Row(
            prompt,
            seed,
            plain.images[i],
            None if shielded.refused[i] else shielded.images[i],
            before[i] if before else None,
            after.get(i),
        )
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    report = {
        "prompt": ", ".join(dict.fromkeys(prompts)),
        "n": len(rows),
        "radius": radius,
        "leaks_without": leaks(before) if before else None,
        "leaks_with": leaks(list(after.values())) if before else None,
        "min_distance_without": _least(c.nearest_distance for c in before),
        "min_distance_with": _least(c.nearest_distance for c in after.values()),
        "min_decoded_distance_without": _least(c.decoded_distance for c in before),
        "min_decoded_distance_with": _least(c.decoded_distance for c in after.values()),
        "vendi_without": None,
        "vendi_with": None,
        "seconds_without": plain.seconds,
        "seconds_with": shielded.seconds,
        "samplings": sum(shielded.attempts),
        "restarted": shielded.repair.count("restart"),
        "pushed": shielded.repair.count("push"),
        "refused": refused,
        "certificates": [asdict(c) for c in after.values()],
        "certificates_without": [asdict(c) for c in before],
        "audit_log": {"file": f"with/{LOG}", "sha256": log.sha256},
    }
    return report, rows


def _least(distances: Iterable[float]) -> float | None:
    return min(distances, default=None)


def _vendi_of_kept(encoder: Encoder, made: Generated) -> float | None:
    kept = [image for image, reason in zip(made.images, made.refused, strict=True) if reason is None]
    return vendi(encoder.image_features(kept)) if kept else None


def closest_pair(made: Generated) -> float:
    """The smallest distance between the latents of two of these images."""
    return torch.pdist(made.latents.double().flatten(1)).min().item()


def write_images(folder: Path, made: Generated, prompts: list[str], seeds: list[int]) -> None:
    """Write images, but for refused ones, which are not to be handed out."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, reason, prompt, seed in zip(made.images, made.refused, prompts, seeds, strict=False):
        if reason is None:
            save_image(image, _file(folder, prompt, seed))


def _file(folder: Path, prompt: str, seed: int) -> Path:
    words = "".join(c if c.isalnum() else " " for c in prompt).split()
    return folder / f"{'-'.join(words)[:60] or 'image'}-{seed}.png"


def save_image(image: Image.Image, path: Path) -> None:
    with replacing(path) as draft:
        image.save(draft, format="PNG")
