"""One visitor's protected images, memory and runs, without the page around them."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, ImageOps
from torch import Tensor

from shielded.files import file_sha256, replacing, sha256
from shielded.latent_space import LatentSpace, to_rgb
from shielded.latent_space.pixels import clip_to_pixels
from shielded.models import PROTECTION, VARIETY
from shielded.protected import ProtectedSet
from shielded.runs.folder import RunFolder
from shielded.runs.paired import calibration_of, make_pair, spell_arguments
from shielded.runs.report import Row
from shielded.runs.results import PairReport
from shielded.spell import History, Spell
from shielded.studio.limits import Server, folder_bytes

MOST_UPLOADS = 64
MOST_PIXELS = 50_000_000
MOST_RUNS_KEPT = 4  # on disk; older ones are deleted
PREVIEW = 256  # pixels on the longer side of the protected pictures that the page shows
REMEMBERED = 256
ATTEMPTS = 2

Progress = Callable[[int, int, str], Any]  # steps done, steps in all, what is being done


@dataclass(frozen=True)
class Settings:
    """Input of the page. `radius` is in units of √dim, so that it means the same for all models."""

    prompt: str
    n: int = 4
    seed: int = 0
    steps: int = 25
    radius: float = 0.25
    overcompensation: float = 1.6
    window_end: float = 0.0
    apart: bool = True  # whether the images of a run keep the radius from each other
    remember: bool = True  # and from those of earlier runs


@dataclass
class Result:
    """With and without SPELL at the same seeds.

    Args:
        plain: images without.
        shielded: images with; None where one is refused because it lies inside a shield.
        rows: of the table on the page, one per image.
        summary: what happened, in a few sentences.
        trace: trace of the Spell.
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
    """One visitor's protected images, memory and last result, in a folder that is deleted with the session.

    Args:
        pipe: the model.
        model: its name, for certificates.
        options: passed on to the pipeline, for example guidance_scale.
        server: counts what all sessions hold; None: this is the only one.

    Raises:
        ValueError: the server has too many sessions.
    """

    def __init__(self, pipe: Any, model: str, options: dict[str, Any], server: Server | None = None) -> None:
        self.usage = (server or Server()).open()
        self._folder = tempfile.TemporaryDirectory(prefix="shielded-")
        self.pipe = pipe
        self.model = model
        self.options = options
        self.space = LatentSpace.of(pipe)
        self.history = History(REMEMBERED)
        self.last: PairReport | None = None
        self.protected = self._empty_set()
        self.pictures: list[tuple[Image.Image, str]] = []  # protected pictures with their names
        self._runs = 0

    def l2(self, radius: float) -> float:
        """Convert a radius from units of √dim to the L2 distance of this model's latent space."""
        return radius * self.space.dim**0.5

    # Protected images --------------------------------------------------------------------------------------------

    def protect_files(self, paths: Sequence[str]) -> str:
        """Protect uploaded pictures; return a sentence on what became of them.

        Raises:
            ValueError: too many at once, or none of them is a picture.
        """
        if len(paths) > MOST_UPLOADS:
            raise ValueError(f"{len(paths)} files at once; {MOST_UPLOADS} are the most.")
        new, present, broken = [], 0, []
        known = set(self.protected.sha256)
        self.usage.take("files", len(paths))
        for path in map(Path, paths):
            digest = file_sha256(path)
            if digest in known:
                present += 1
                continue
            try:
                with self.usage.server.decoding:  # and only its reduced form is kept
                    picture = open_picture(path, lambda pixels: self.usage.take("pixels", pixels))
                    pixels = clip_to_pixels(picture, self._image_size, None)
                    picture.thumbnail((PREVIEW, PREVIEW))
                new.append((pixels, picture, path.stem, digest))
                known.add(digest)
            except ValueError as error:
                broken.append(str(error))
        if broken and not new and not present:
            raise ValueError(" ".join(broken))
        if new:
            pixels, images, names, digests = zip(*new, strict=True)
            self._protect(lambda: self.space.encode(torch.stack(pixels)), images, names, digests)
        parts = [f"{len(new)} added"]
        parts += [f"{present} already there"] if present else []
        return ", ".join(parts) + "." + "".join(f" {reason}" for reason in broken)

    def protect_result(self) -> str:
        """Protect the exact latents of the images that the last run made without SPELL."""
        if self.last is None:
            raise ValueError("generate something first; then its images can be protected.")
        rows, latents = self.last.rows, self.last.plain.latents
        digests = [sha256(row.numpy().tobytes()) for row in latents]
        known = set(self.protected.sha256)
        new = [i for i, digest in enumerate(digests) if digest not in known]
        if new:
            names = [f"{rows[i].prompt}, seed {rows[i].seed}" for i in new]
            previews = [cast(Image.Image, rows[i].without).copy() for i in new]
            for preview in previews:
                preview.thumbnail((PREVIEW, PREVIEW))
            self._protect(lambda: latents[new], previews, names, [digests[i] for i in new])
        return f"{len(new)} added." if new else "they are protected already."

    def clear(self) -> None:
        """Stop protecting any images."""
        self.protected = self._empty_set()
        self.pictures = []
        self.usage.set("pictures", 0)
        self._count_disk()

    def forget(self) -> None:
        """Forget the images of earlier runs."""
        self.history.forget()

    def close(self) -> None:
        """Delete the session's files."""
        self._folder.cleanup()
        self.usage.close()

    # Generating ---------------------------------------------------------------------------------------------------

    def generate(self, settings: Settings, report: Progress) -> Result:
        """Generate without and with SPELL at the same seeds.

        Args:
            settings: input of the page.
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
            batch=settings.apart and settings.n > 1,
            history=self.history if settings.remember else False,
            window=(1.0, settings.window_end),
            calibration=calibration_of(self.model) if protect else None,
            **{**(PROTECTION if protect else VARIETY), "overcompensation": settings.overcompensation},
        )
        # A window that closes early is for variety; images that re-enter a shield then are shown, not repaired.
        on_leak = "restart" if protect and settings.window_end == 0 else "report"
        self._count_disk()
        self._runs += 1
        self._delete_run(self._runs - MOST_RUNS_KEPT)
        folder = RunFolder(Path(self._folder.name) / f"run-{self._runs}")

        def step(label: str, pipe: Any, index: int) -> None:
            if pipe is self.pipe:
                report(index + 1, settings.steps, label)
            else:  # a restart, with the image-to-image relative of the pipeline
                report(index + 1, pipe.num_timesteps, f"{label}, images inside a shield once more")

        pair = make_pair(
            self.pipe,
            [settings.prompt] * settings.n,
            list(range(settings.seed, settings.seed + settings.n)),
            spell,
            model=self.model,
            options={"steps": settings.steps, **self.options},
            on_leak=on_leak,
            attempts=ATTEMPTS,
            folder=folder,
            batch_size=settings.n,  # images keep apart within a batch
            on_step=step,
        )
        pair = self.last = cast(PairReport, pair)  # one process
        folder.finish(pair, spell_arguments(spell))
        return Result(
            [row.without for row in pair.rows if row.without is not None],
            [row.with_ for row in pair.rows],
            [_table_row(row) for row in pair.rows],
            _summary(pair),
            spell.trace,
            _archive(folder.path, folder.path.with_suffix(".zip")),
        )

    # Parts --------------------------------------------------------------------------------------------------------

    def _protect(
        self,
        latents: Callable[[], Tensor],
        images: Sequence[Image.Image],
        names: Sequence[str],
        digests: Sequence[str],
    ) -> None:
        self.usage.take("pictures", len(images))
        self._count_disk(len(images) * self.space.dim * 4)
        taken, ids = set(self.protected.ids), []
        for name in names:
            unique = name if name not in taken else f"{name} ({len(taken)})"
            taken.add(unique)
            ids.append(unique)
        self.protected.add(latents(), ids, sha256=digests)
        self.pictures += zip(images, ids, strict=True)

    @property
    def _image_size(self) -> tuple[int, int]:
        return cast(tuple[int, int], self.space.image_size)  # of a pipeline

    def _count_disk(self, more: int = 0) -> None:
        """Count the session's files, and what is about to be written; refuse what does not fit."""
        self.usage.set("disk", folder_bytes(Path(self._folder.name)) + more)

    def _delete_run(self, number: int) -> None:
        folder = Path(self._folder.name) / f"run-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".zip").unlink(missing_ok=True)

    def _empty_set(self) -> ProtectedSet:
        return ProtectedSet.create(Path(self._folder.name) / "protected", self.space, torch.float32, overwrite=True)


def open_picture(path: Path, count: Callable[[int], None] = lambda pixels: None) -> Image.Image:
    """Read an uploaded picture, upright and in RGB.

    Args:
        path: of the picture.
        count: called with the number of its pixels before they are decoded; may refuse them with a ValueError.

    Raises:
        ValueError: it cannot be read, or is larger than the studio takes.
    """
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
    except Exception:  # decoders raise all kinds of errors on broken files
        raise ValueError(f"{path.name} is not a picture that can be read.") from None
    if pixels > MOST_PIXELS:
        raise ValueError(f"{path.name} has more than {MOST_PIXELS // 1_000_000} million pixels; make it smaller.")
    count(pixels)
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception:
        raise ValueError(f"{path.name} is not a picture that can be read.") from None


def _table_row(row: Row) -> list[Any]:
    """List what `COLUMNS` names, read from the certificates of a row."""
    before, after = row.certificate_without, row.certificate_with
    shown = after or before
    verdict = "" if after is None else "inside" if after.inside else "outside"
    return [
        row.seed,
        "" if shown is None else shown.nearest_id,
        _rounded(row.distance_without),
        _rounded(row.distance_with),
        _rounded(None if after is None else after.decoded_distance),
        _rounded(None if shown is None else shown.radius),
        "refused" if row.refused else verdict,
    ]


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _summary(pair: PairReport) -> str:
    lines = []
    if pair.leaks_without is not None:
        lines.append(
            f"Closer than the radius to a protected image: **{pair.leaks_without} of {len(pair.rows)} without SPELL, "
            f"{pair.leaks_with} with**."
        )
    if pair.unresolved:
        lines.append(f"{len(pair.unresolved)} are still inside a shield or closer than the radius to another image.")
    if pair.refused:
        lines.append(f"{len(pair.refused)} could not be brought outside and are refused: they are not shown.")
    before, after = pair.plain.min_pair_distance, pair.with_.min_pair_distance
    if before is not None and after is not None:
        lines.append(f"The two images that are most alike: {before:.1f} apart without, {after:.1f} with.")
    trace = pair.spell.trace
    if pair.corrected:
        steps = len({(row["run"], row["step"]) for row in trace if row["push"] > 0})
        lines.append(
            f"{pair.corrected} images were pushed, in {steps} of {max(row['step'] for row in trace) + 1} steps."
        )
    else:
        lines.append("No image came closer than the radius to anything, so nothing was changed; a larger radius acts.")
    return "\n\n".join(lines)


def _archive(folder: Path, path: Path) -> Path:
    with replacing(path) as draft, zipfile.ZipFile(draft, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path
