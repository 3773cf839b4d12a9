"""What one visitor of the studio protects, remembers and generates, without the page around it."""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from shielded.files import replacing, write_json
from shielded.generation import Generated, generate
from shielded.latent_space import LatentSpace, to_rgb
from shielded.protected import ProtectedSet
from shielded.runs.paired import closest_pair, compare, open_log, settings_of, write_images
from shielded.runs.report import Row, write_report
from shielded.spell import History, Spell

MOST_UPLOADS = 64
MOST_PIXELS = 50_000_000
REMEMBERED = 256
ATTEMPTS = 2

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """What the page asks for. `radius` is in units of √dim, so that it means the same for all models."""

    prompt: str
    n: int = 4
    seed: int = 0
    steps: int = 25
    radius: float = 0.5
    overcompensation: float = 1.6
    window_end: float = 0.0
    apart: bool = True  # the images of a run keep the radius from each other
    remember: bool = True  # and from those of earlier runs


@dataclass
class Result:
    """With and without SPELL at the same seeds.

    Args:
        plain: images without.
        shielded: images with; None where one is refused because it lies inside a shield.
        rows: of the table on the page, one per image.
        summary: what happened, in a few sentences.
        trace: of the Spell.
        archive: zip file with the images and their certificates.
    """

    plain: list[Image.Image]
    shielded: list[Image.Image | None]
    rows: list[list[Any]]
    summary: str
    trace: list[dict[str, Any]]
    archive: Path


COLUMNS = ["seed", "nearest protected image", "distance without", "distance with", "decoded", "radius", "result"]


class Session:
    """One visitor's protected images, memory and last result, in a folder that goes with the session.

    Args:
        pipe: the model.
        model: its name, for certificates.
        options: passed on to the pipeline, for example guidance_scale.
    """

    def __init__(self, pipe: Any, model: str, options: dict[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="shielded-")
        self.pipe = pipe
        self.model = model
        self.options = options
        self.space = LatentSpace.of(pipe)
        self.history = History(REMEMBERED)
        self.last: Generated | None = None
        self.last_settings: Settings | None = None
        self.protected = self._empty_set()
        self.pictures: list[tuple[Image.Image, str]] = []  # of what is protected, with names
        self._runs = 0

    def l2(self, radius: float) -> float:
        """A radius in units of √dim as the L2 distance of this model's latent space."""
        return radius * self.space.dim**0.5

    # What to keep away from ---------------------------------------------------------------------------------------

    def protect_files(self, paths: Sequence[str]) -> str:
        """Protect uploaded pictures; says in a sentence what became of them.

        Raises:
            ValueError: too many at once, or none of them is a picture.
        """
        if len(paths) > MOST_UPLOADS:
            raise ValueError(f"{len(paths)} files at once; {MOST_UPLOADS} are the most.")
        new, present, broken = [], 0, []
        known = set(self.protected.sha256)
        for path in map(Path, paths):
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if digest in known:
                present += 1
                continue
            try:
                new.append((open_picture(path), path.stem, digest))
                known.add(digest)
            except ValueError as error:
                broken.append(str(error))
        if broken and not new and not present:
            raise ValueError(" ".join(broken))
        if new:
            images, names, digests = zip(*new, strict=True)
            self._protect(self.space.encode(images), images, names, digests)
        parts = [f"{len(new)} added"]
        parts += [f"{present} already there"] if present else []
        return ", ".join(parts) + "." + "".join(f" {reason}" for reason in broken)

    def protect_result(self) -> str:
        """Protect the images that the last run made without SPELL: their exact latents."""
        if self.last is None:
            raise ValueError("generate something first; then its images can be protected.")
        made, settings = self.last, self.last_settings
        digests = [hashlib.sha256(latents.numpy().tobytes()).hexdigest() for latents in made.latents]
        known = set(self.protected.sha256)
        new = [i for i, digest in enumerate(digests) if digest not in known]
        if new:
            names = [f"{settings.prompt}, seed {settings.seed + i}" for i in new]
            self._protect(made.latents[new], [made.images[i] for i in new], names, [digests[i] for i in new])
        return f"{len(new)} added." if new else "they are protected already."

    def clear(self) -> None:
        """Nothing is protected any more."""
        self.protected = self._empty_set()
        self.pictures = []

    def forget(self) -> None:
        """Earlier runs are not remembered any more."""
        self.history.forget()

    def close(self) -> None:
        """Delete what the session has on disk."""
        self._folder.cleanup()

    # Generating ---------------------------------------------------------------------------------------------------

    def generate(self, settings: Settings, report: Progress) -> Result:
        """Without and with SPELL at the same seeds.

        Args:
            settings: as the page has them.
            report: called with (steps done, steps in all, what is being done).

        Raises:
            ValueError: no prompt, or nothing to keep away from.
        """
        if not settings.prompt.strip():
            raise ValueError("there is no prompt; write what the images shall show.")
        protect = len(self.protected) > 0
        if not (protect or settings.apart or settings.remember):
            raise ValueError(
                "there is nothing to keep away from: protect images, or let images keep apart from each other or from "
                "earlier runs."
            )
        radius = self.l2(settings.radius)
        spell = Spell(
            self.protected if protect else None,
            radius,
            settings.overcompensation,
            batch=settings.apart and settings.n > 1,
            history=self.history if settings.remember else False,
            window=(1.0, settings.window_end),
        )
        # A window that closes early is for variety; what comes back into a shield then is shown, not repaired.
        on_leak = "restart" if protect and settings.window_end == 0 else "report"
        self._runs += 1
        folder = Path(self._folder.name) / f"run-{self._runs}"
        called = {"steps": settings.steps, "progress": False, **self.options}
        facts = settings_of(spell, self.pipe, self.model, on_leak, ATTEMPTS, called)
        log = open_log(folder / "with", facts, self.protected if protect else None)
        plain = self._sample(settings, None, "without SPELL", report)
        repairs = {"on_leak": on_leak, "attempts": ATTEMPTS, "log": log.append}
        shielded = self._sample(settings, spell, "with SPELL", report, **repairs)
        self.last, self.last_settings = plain, settings
        prompts, seeds = _prompts_and_seeds(settings)
        protected = self.protected if protect else None
        write_images(folder / "without", plain, prompts, seeds)
        write_images(folder / "with", shielded, prompts, seeds)
        content, rows = compare(folder, prompts, seeds, plain, shielded, self.space, protected, radius, facts, log)
        call = {"radius": radius, "overcompensation": settings.overcompensation, "batch": spell.batch}
        write_report(folder / "report.html", content, rows, None, spell.trace, call, facts)
        write_json(folder / "report.json", content)
        return Result(
            [row.without for row in rows],
            [row.with_ for row in rows],
            _table(rows, content),
            _summary(content, plain, shielded, spell),
            spell.trace,
            _archive(folder, folder.with_suffix(".zip")),
        )

    # Parts --------------------------------------------------------------------------------------------------------

    def _sample(
        self,
        settings: Settings,
        spell: Spell | None,
        what: str,
        report: Callable[[int, int, str], None],
        **repairs: Any,
    ) -> Generated:
        def step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if pipe is self.pipe:
                report(index + 1, settings.steps, what)
            else:  # a restart, with the relative of the pipeline that begins from pictures
                report(index + 1, pipe.num_timesteps, f"{what}, what came out inside a shield once more")
            return {}

        return generate(
            self.pipe,
            *_prompts_and_seeds(settings),
            spell,
            steps=settings.steps,
            batch_size=settings.n,  # images keep apart within a batch
            progress=False,
            callback_on_step_end=step,
            **repairs,
            **self.options,
        )

    def _protect(
        self, latents: Tensor, images: Sequence[Image.Image], names: Sequence[str], digests: Sequence[str]
    ) -> None:
        taken, ids = set(self.protected.ids), []
        for name in names:
            own = name if name not in taken else f"{name} ({len(taken)})"
            taken.add(own)
            ids.append(own)
        self.protected.add(latents, ids, sha256=digests)
        self.pictures += zip(images, ids, strict=True)

    def _empty_set(self) -> ProtectedSet:
        return ProtectedSet.create(Path(self._folder.name) / "protected", self.space, torch.float32, overwrite=True)


def open_picture(path: Path) -> Image.Image:
    """An uploaded picture, upright and in RGB.

    Raises:
        ValueError: it cannot be read, or is larger than the studio takes.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height <= MOST_PIXELS:
                return to_rgb(ImageOps.exif_transpose(image))
    except Exception:  # decoders raise all kinds of errors on broken files
        raise ValueError(f"{path.name} is not a picture that can be read.") from None
    raise ValueError(f"{path.name} has more than {MOST_PIXELS // 1_000_000} million pixels; make it smaller.")


def _prompts_and_seeds(settings: Settings) -> tuple[list[str], list[int]]:
    return [settings.prompt] * settings.n, list(range(settings.seed, settings.seed + settings.n))


def _table(rows: Sequence[Row], content: dict[str, Any]) -> list[list[Any]]:
    before = content["certificates_without"]
    after = {c["seed"]: c for c in content["certificates"]}
    refused = {entry["seed"] for entry in content["refused"]}
    table = []
    for i, row in enumerate(rows):
        certificate = after.get(row.seed)
        if row.seed in refused:
            result = "refused"
        elif certificate is None:
            result = ""
        else:
            result = "inside" if certificate["inside"] else "outside"
        found = certificate or (before[i] if before else {})
        table.append(
            [
                row.seed,
                found.get("nearest_id", ""),
                _rounded(before[i]["nearest_distance"] if before else None),
                _rounded(certificate["nearest_distance"] if certificate else None),
                _rounded(certificate["decoded_distance"] if certificate else None),
                _rounded(found.get("radius")),
                result,
            ]
        )
    return table


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _summary(content: dict[str, Any], plain: Generated, shielded: Generated, spell: Spell) -> str:
    lines = []
    if content["leaks_without"] is not None:
        lines.append(
            f"Closer than the radius to a protected image: **{content['leaks_without']} of {content['n']} without "
            f"SPELL, {content['leaks_with']} with**."
        )
    if content["refused"]:
        lines.append(f"{len(content['refused'])} could not be brought outside and are refused: they are not shown.")
    if content["n"] > 1:
        pairs = [closest_pair(made) for made in (plain, shielded)]
        lines.append(f"The two images that are most alike: {pairs[0]:.1f} apart without, {pairs[1]:.1f} with.")
    pushed = {(row["run"], row["image"]) for row in spell.trace if row["push"] > 0}
    if pushed:
        steps = len({(row["run"], row["step"]) for row in spell.trace if row["push"] > 0})
        lines.append(f"{len(pushed)} images were pushed, in {steps} of {spell.trace[-1]['step'] + 1} steps.")
    else:
        lines.append("No image came closer than the radius to anything, so nothing was changed; a larger radius acts.")
    return "\n\n".join(lines)


def _archive(folder: Path, path: Path) -> Path:
    with replacing(path) as draft, zipfile.ZipFile(draft, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path
