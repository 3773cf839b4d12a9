"""One visitor's protected images, memory and runs, without the page around them."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, ImageOps
from torch import Tensor

from shielded.copies import Descriptor
from shielded.files import file_sha256, replacing, sha256
from shielded.latent_space import LatentSpace, to_rgb
from shielded.latent_space.pixels import clip_to_pixels
from shielded.protected import ProtectedSet, open_sets
from shielded.protected.ingest.pictures import open_image
from shielded.runs.folder import RunFolder
from shielded.runs.paired import calibration_of, make_pair, spell_arguments
from shielded.runs.results import PairReport
from shielded.spell import History, Spell
from shielded.studio.limits import Server, folder_bytes
from shielded.studio.request import Settings, job_of
from shielded.studio.shown import Result, result_of

MOST_UPLOADS = 64
MOST_PIXELS = 50_000_000
MOST_RUNS_KEPT = 4  # on disk; older ones are deleted
MOST_MADE = 128  # reduced pictures of the session that the page shows
PREVIEW = 256  # pixels on the longer side of reduced pictures
REMEMBERED = 256
ATTEMPTS = 2

Progress = Callable[[int, int, str], Any]  # steps done, steps in all, what is being done


@dataclass
class Desk:
    """What a visitor has of one model.

    Args:
        pipe: the model.
        model: its name, for certificates.
        options: passed on to the pipeline, for example guidance_scale.
        space: of its latents.
        protected: the visitor's protected images.
        pictures: reduced protected pictures with their names.
        history: finished images of earlier runs.
        last: the last run.
    """

    pipe: Any
    model: str
    options: dict[str, Any]
    space: LatentSpace
    protected: ProtectedSet
    pictures: list[tuple[Image.Image, str]] = field(default_factory=list)
    history: History = field(default_factory=lambda: History(REMEMBERED))
    last: PairReport | None = None


class Session:
    """One visitor's protected images, memory and last result, in a folder that is deleted with the session.

    Args:
        pipe: the model to begin with.
        model: its name, for certificates.
        options: passed on to the pipeline, for example guidance_scale.
        server: counts what all sessions hold; None: this is the only one.

    Raises:
        ValueError: the server has too many sessions.
    """

    def __init__(self, pipe: Any, model: str, options: dict[str, Any], server: Server | None = None) -> None:
        self.usage = (server or Server()).open()
        self._folder = tempfile.TemporaryDirectory(prefix="shielded-")
        self._desks: dict[str, Desk] = {}
        self._runs = 0
        self.made: list[tuple[Image.Image, str]] = []  # reduced pictures of all runs, the newest first
        self.use(pipe, model, options)

    def use(self, pipe: Any, model: str, options: dict[str, Any]) -> None:
        """Go on with a model. Protected images and memory belong to its latent space, and are kept for each model."""
        if model not in self._desks:
            folder = Path(self._folder.name) / f"protected-{len(self._desks)}"
            space = LatentSpace.of(pipe)
            self._desks[model] = Desk(pipe, model, options, space, _empty_set(folder, space))
        self.desk = self._desks[model]

    @property
    def space(self) -> LatentSpace:
        """Latent space of the model in use."""
        return self.desk.space

    @property
    def protected(self) -> ProtectedSet:
        """The visitor's protected images for the model in use."""
        return self.desk.protected

    @property
    def pictures(self) -> list[tuple[Image.Image, str]]:
        """Reduced protected pictures with their names."""
        return self.desk.pictures

    @property
    def history(self) -> History:
        """Finished images of earlier runs of the model in use."""
        return self.desk.history

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
            stacked = torch.stack(pixels)
            self._protect(lambda: (self.space.encode(stacked), self._describe(stacked)), images, names, digests)
        parts = [f"{len(new)} added"]
        parts += [f"{present} already there"] if present else []
        return ", ".join(parts) + "." + "".join(f" {reason}" for reason in broken)

    def protect_result(self) -> str:
        """Protect the exact latents of the images that the last run made without SPELL."""
        last = self.desk.last
        if last is None:
            raise ValueError("generate something first; then its images can be protected.")
        rows, latents = last.rows, last.plain.latents
        digests = [sha256(row.numpy().tobytes()) for row in latents]
        known = set(self.protected.sha256)
        new = [i for i, digest in enumerate(digests) if digest not in known]
        if new:
            names = [f"{rows[i].prompt}, seed {rows[i].seed}" for i in new]
            images = [cast(Image.Image, rows[i].without) for i in new]
            previews = [_reduced(image) for image in images]
            self._protect(lambda: (latents[new], self._describe(images)), previews, names, [digests[i] for i in new])
        return f"{len(new)} added." if new else "they are protected already."

    def clear(self) -> None:
        """Stop protecting any images."""
        desk = self.desk
        desk.protected = _empty_set(desk.protected.path, desk.space)
        desk.pictures = []
        self._count_pictures()
        self._count_disk()

    def find_copies_from(self, similarity: float | None) -> None:
        """Set the similarity from which on a picture counts as a copy of a protected one; None: copies do not count."""
        if len(self.protected) and self.protected.copy_threshold != similarity:
            self.protected.set_copy_threshold(similarity)

    def forget(self) -> None:
        """Forget the images of earlier runs."""
        self.history.forget()

    def close(self) -> None:
        """Delete the session's files."""
        self._folder.cleanup()
        self.usage.close()

    # Generating ---------------------------------------------------------------------------------------------------

    def generate(self, settings: Settings, report: Progress, sets: Sequence[Path] = ()) -> Result:
        """Generate without and with SPELL at the same seeds.

        Args:
            settings: input of the page.
            report: called with (steps done, steps in all, what is being done).
            sets: folders of protected sets that count beside the visitor's own.

        Raises:
            ValueError: no prompt, nothing to keep away from, or a set of another latent space.
        """
        prompts, desk = settings.prompts, self.desk
        own = len(self.protected) > 0
        protect = own or bool(sets)
        apart = settings.apart and settings.n > 1
        if not (protect or apart or settings.remember):
            raise ValueError(
                "there is nothing to keep away from: protect images, or let several images of a prompt keep apart from "
                "each other or from earlier runs."
            )
        protected = None
        if protect:
            protected = open_sets([*([self.protected.path] if own else []), *sets])
            protected.require_space(self.space)
        push = job_of(protect)
        asked = {name: getattr(settings, name) for name in ("radius", "overcompensation", "release")}
        push |= {name: value for name, value in asked.items() if value is not None}
        spell = Spell(
            protected,
            self.l2(push.pop("radius")),
            batch=apart,
            history=self.history if settings.remember else False,
            window=(1.0, settings.window_end),
            calibration=calibration_of(desk.model) if protect else None,
            **push,
        )
        # A window that closes early is for variety; images that re-enter a shield then are shown, not repaired.
        on_leak = "restart" if protect and settings.window_end == 0 else "report"
        self._count_disk()
        self._runs += 1
        self._delete_run(self._runs - MOST_RUNS_KEPT)
        folder = RunFolder(Path(self._folder.name) / f"run-{self._runs}")
        done, steps = 0, 2 * len(prompts) * settings.steps

        def step(label: str, pipe: Any, index: int) -> None:
            nonlocal done
            if pipe is desk.pipe:
                done = min(done + 1, steps)
                report(done, steps, label)
            else:  # a restart, with the image-to-image relative of the pipeline
                report(done, steps, f"{label}, images inside a shield once more")

        seeds = range(settings.seed, settings.seed + settings.n)
        pair = make_pair(
            desk.pipe,
            [prompt for prompt in prompts for _ in seeds],
            [seed for _ in prompts for seed in seeds],
            spell,
            model=desk.model,
            options={"steps": settings.steps, **desk.options},
            on_leak=on_leak,
            attempts=ATTEMPTS,
            folder=folder,
            batch_size=settings.n,  # images keep apart within a batch
            one_prompt=len(prompts) > 1,
            on_step=step,
            show_protected=protect and not sets,  # the pictures of other sets are not the visitor's
        )
        pair = desk.last = cast(PairReport, pair)  # one process
        folder.finish(pair, spell_arguments(spell))
        self._keep(pair)
        return result_of(pair, _archive(folder.path, folder.path.with_suffix(".zip")))

    # Parts --------------------------------------------------------------------------------------------------------

    def _protect(
        self,
        latents: Callable[[], tuple[Tensor, Tensor]],
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
        self.pictures.extend(zip(images, ids, strict=True))

    def _describe(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        return self.protected.describe(images)

    def _keep(self, pair: PairReport) -> None:
        """Put reduced pictures of a run in front of those of earlier ones."""
        new = []
        for row in pair.rows:
            for label, image in (("without SPELL", row.without), ("with SPELL", row.with_)):
                if image is not None:
                    new.append((_reduced(image), f"{row.prompt}, seed {row.seed}, {label}"))
        self.made = [*new, *self.made][:MOST_MADE]

    def _count_pictures(self) -> None:
        self.usage.set("pictures", sum(len(desk.pictures) for desk in self._desks.values()))

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


def open_picture(path: Path, count: Callable[[int], None] = lambda pixels: None) -> Image.Image:
    """Read an uploaded picture, upright and in RGB.

    Args:
        path: of the picture.
        count: called with the number of its pixels before they are decoded; may refuse them with a ValueError.

    Raises:
        ValueError: it cannot be read, or is larger than the studio takes.
    """
    try:
        with open_image(path.read_bytes()) as image:
            pixels = image.width * image.height
    except Exception as error:  # decoders raise all kinds of errors on broken files
        reason = f": {error}" if isinstance(error, ValueError) else " is not a picture that can be read"
        raise ValueError(f"{path.name}{reason}.") from None
    if pixels > MOST_PIXELS:
        raise ValueError(f"{path.name} has more than {MOST_PIXELS // 1_000_000} million pixels; make it smaller.")
    count(pixels)
    try:
        with open_image(path.read_bytes()) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception:
        raise ValueError(f"{path.name} is not a picture that can be read.") from None


@cache
def copy_descriptor() -> Descriptor:
    """Load the descriptor that comes along; the sets of all sessions share it."""
    return Descriptor.load()


def _empty_set(folder: Path, space: LatentSpace) -> ProtectedSet:
    return ProtectedSet.create(folder, space, torch.float32, overwrite=True, descriptor=copy_descriptor())


def _reduced(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((PREVIEW, PREVIEW))
    return small


def _archive(folder: Path, path: Path) -> Path:
    with replacing(path) as draft, zipfile.ZipFile(draft, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path
