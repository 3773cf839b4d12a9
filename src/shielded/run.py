"""Generate with and without SPELL at the same seeds, measure both, and write what was found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from shielded import distributed
from shielded.audit import LOG, AuditLog, read_log
from shielded.certificate import Certificate, attach_certificate, beside, certificate_sha256, certify, leaks
from shielded.evaluation.encoder import Encoder
from shielded.evaluation.metrics import vendi
from shielded.files import replacing, write_json
from shielded.generate import Generated, generate
from shielded.latent_space import LatentSpace
from shielded.models import EMOJI, GUIDANCE, load
from shielded.protected import ProtectedSet
from shielded.repair import OnLeak
from shielded.report import Row, write_report
from shielded.report.grid import protection_grid
from shielded.spell import Spell

UNIT_FREE_RADIUS = 0.8  # per √dim; the paper's 200 for Stable Diffusion 3 is 0.78


def run(
    out: Path,
    prompt: str,
    model: str = "emoji",
    protect: Path | None = None,
    n: int = 4,
    radius: float | None = None,
    seed: int = 0,
    steps: int = 25,
    overcompensation: float = 1.6,
    device: str | None = None,
    progress: bool = True,
    on_leak: OnLeak = "restart",
    attempts: int = 3,
) -> dict[str, Any] | None:
    """n images of one prompt, kept away from a protected set or, without one, from each other.

    Writes the images with their certificates and an audit log, `grid.png`, `trace.csv`, `report.html` and `report.json`
    to the folder `out` and returns the report. Arguments as on the command line (`shielded generate --help`). The
    processes of `accelerate launch` share the work; the main one writes, the others return None.
    """
    here = distributed.join(device)
    pipe = load(model, device if here is None else str(here))
    protected = None if protect is None else ProtectedSet.open(protect)
    if protected is not None:
        protected.require_space(LatentSpace.of(pipe))  # before anything is sampled or written
    else:
        radius, on_leak = radius or UNIT_FREE_RADIUS * LatentSpace.of(pipe).dim ** 0.5, "report"
    spell = Spell(protected, radius, overcompensation, batch=protected is None)
    prompts, seeds = [prompt] * n, list(range(seed, seed + n))
    main = distributed.is_main()
    options: dict[str, Any] = {"steps": steps, "progress": progress and main}
    if model in GUIDANCE:
        options["guidance_scale"] = GUIDANCE[model]
    settings = settings_of(spell, pipe, model, on_leak, attempts, options)
    log = open_log(out / "with", settings, protected) if main else None
    options["processes"] = here is not None
    repairs = {"on_leak": on_leak, "attempts": attempts, "log": log.append if main else None}
    plain = generate(pipe, prompts, seeds, label="without SPELL", **options)
    shielded = generate(pipe, prompts, seeds, spell, label="with SPELL", **repairs, **options)
    distributed.leave()
    if not main:
        return None
    report, rows = compare(out, prompts, seeds, plain, shielded, LatentSpace.of(pipe), protected, radius, settings, log)
    if model == "emoji":
        encoder = Encoder.from_pretrained(EMOJI / "encoder", EMOJI / "tokenizer")
        report["vendi_without"] = vendi(encoder.image_features(plain.images))
        report["vendi_with"] = _vendi_of_kept(encoder, shielded)
    call = {"radius": radius, "overcompensation": overcompensation, "batch": spell.batch}
    if protect is not None:
        call = {"protected": str(protect), **call}
    spell.write_trace(out / "trace.csv")
    save_image(protection_grid(rows, radius if protected is not None else None), out / "grid.png")
    write_report(out / "report.html", report, rows, None, spell.trace, call)
    write_json(out / "report.json", report)
    return report


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
    """Write both sets of images, certify them against the protected set, and put the report together.

    A refused image is listed and not written.
    """
    kept = [i for i, reason in enumerate(shielded.refused) if reason is None]
    files_without = _write_images(out / "without", plain, prompts, seeds, range(len(prompts)))
    files_with = _write_images(out / "with", shielded, prompts, seeds, kept)
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
            before[i].nearest_distance if before else None,
            after[i].nearest_distance if i in after else None,
            None,
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


def _write_images(
    folder: Path, made: Generated, prompts: list[str], seeds: list[int], rows: Iterable[int]
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i in rows:
        words = "".join(c if c.isalnum() else " " for c in prompts[i]).split()
        files.append(folder / f"{'-'.join(words)[:60] or 'image'}-{seeds[i]}.png")
        save_image(made.images[i], files[-1])
    return files


def save_image(image: Image.Image, path: Path) -> None:
    with replacing(path) as draft:
        image.save(draft, format="PNG")
