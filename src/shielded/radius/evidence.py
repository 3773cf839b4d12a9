"""Measure distances in a model's latent space: between protected images, to altered copies, between plain images."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from shielded._extras import show_progress
from shielded.files import file_sha256
from shielded.latent_space import LatentSpace, to_rgb
from shielded.protected import ProtectedSet, add_images, find_images, load_images
from shielded.protected.columns import MIRRORED, Ids
from shielded.radius.alterations import CHANGES, Change

QUERIES = 2000  # protected images whose neighbours are searched; more would not change a quantile much
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def _empty() -> np.ndarray:
    return np.empty(0)


@dataclass
class Evidence:
    """Measured L2 distances in the latent space; the array of a distance that was not measured is empty.

    Args:
        dim: number of components of a latent.
        rows: (n,) protected images whose neighbours were searched.
        nearest: (n,) the nearest different protected image of each, -1 where there is none.
        different: (n,) the distance to it, infinity where there is none.
        copied: (m,) rows of the images that were altered.
        copies: kind of change -> (m,) distances from an image to its altered copy.
        generations: (g,) distances from a plain image of the model to the nearest protected image.
        same_prompt: distances between plain images of one prompt, each pair once.
        other_prompt: distances between plain images of different prompts, each pair once.
    """

    dim: int
    rows: np.ndarray = field(default_factory=_empty)
    nearest: np.ndarray = field(default_factory=_empty)
    different: np.ndarray = field(default_factory=_empty)
    copied: np.ndarray = field(default_factory=_empty)
    copies: dict[str, np.ndarray] = field(default_factory=dict)
    generations: np.ndarray = field(default_factory=_empty)
    same_prompt: np.ndarray = field(default_factory=_empty)
    other_prompt: np.ndarray = field(default_factory=_empty)

    def by_name(self) -> dict[str, np.ndarray]:
        """Return the measured finite distances, named by what they lie between."""
        named = {f"copy: {kind}": distances for kind, distances in self.copies.items()}
        named["different protected pictures"] = self.different[np.isfinite(self.different)]
        named["plain image to the set"] = self.generations
        named["plain images of one prompt"] = self.same_prompt
        named["plain images of different prompts"] = self.other_prompt
        return {name: distances for name, distances in named.items() if len(distances)}

    def quantiles(self) -> dict[str, dict[str, float]]:
        """Return the number and the quantiles of all measured distances."""
        return {
            name: {"n": len(distances)} | {f"{q:.0%}": float(np.quantile(distances, q)) for q in QUANTILES}
            for name, distances in self.by_name().items()
        }


def measure_evidence(
    space: LatentSpace,
    pictures: ProtectedPictures | None,
    plain: Tensor,
    texts: Sequence[str],
    queries: int = QUERIES,
    most: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> Evidence:
    """Measure all distances that the given images allow.

    Args:
        space: with its autoencoder.
        pictures: the protected set; None: only distances among plain images.
        plain: (G, *S) final latents of plain images; G may be 0.
        texts: G prompts.
        queries: protected images whose neighbours are searched, at most.
        most: images that are altered, at most.
        seed: seed of all random draws.
        progress: whether progress bars are shown.
    """
    evidence = Evidence(space.dim)
    if len(plain):
        evidence.same_prompt, evidence.other_prompt = prompt_distances(plain, texts)
    if pictures is None:
        return evidence
    protected = pictures.protected
    evidence.rows = draw_indices(len(protected), queries, seed)
    evidence.different, evidence.nearest = different_distances(protected, evidence.rows, pictures.motif)
    opened = pictures.open(most, seed)
    if opened:
        evidence.copied = np.array(list(opened))
        references = pictures.variants(list(opened))
        evidence.copies = copy_distances(space, list(opened.values()), references, seed=seed, progress=progress)
    if len(plain):
        evidence.generations = protected.nearest_rows(plain, 1)[0][:, 0].double().numpy()
    return evidence


def copy_distances(
    space: LatentSpace,
    images: Sequence[Image.Image],
    references: Tensor | None = None,
    changes: dict[str, Change] = CHANGES,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Measure the distances from images to altered copies of themselves.

    Images are resized to the model's size first, so that a change is as strong as its name says.

    Args:
        space: with its autoencoder, `LatentSpace.of(pipe)`.
        images: M images.
        references: (M, R, *S) protected latents of each; the nearest of them counts. None: the images' own latents.
        changes: what to do with them.
        seed: seed of the changes that draw random numbers.
        progress: whether a progress bar is shown.

    Returns:
        Kind of change -> (M,) float64.

    Raises:
        ValueError: a space without an autoencoder.
    """
    if space.image_size is None:
        raise ValueError("the latent space has no autoencoder to encode copies with; use LatentSpace.of(pipe).")
    height, width = space.image_size
    fitted = [ImageOps.fit(to_rgb(image), (width, height), Image.Resampling.LANCZOS) for image in images]
    references = space.encode(fitted)[:, None] if references is None else references
    rng = np.random.default_rng(seed)
    distances = {}
    for kind, change in show_progress(changes.items(), desc="changed copies", unit="kind", shown=progress):
        copies = space.encode([change(image, rng) for image in fitted])
        distances[kind] = (copies[:, None] - references).double().flatten(2).norm(dim=2).amin(dim=1).numpy()
    return distances


def different_distances(
    protected: ProtectedSet, rows: Sequence[int] | np.ndarray, motifs: Callable[[int], Hashable] = lambda row: row
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest different protected image of each row.

    Args:
        protected: the set.
        rows: (n,) row numbers.
        motifs: row number -> key of what it shows. Rows with one key, and images at distance 0, are not different.

    Returns:
        Distances (n,) float64, infinity where there is no different image, and rows (n,), -1 there.
    """
    rows = np.asarray(rows, dtype=np.int64)

    def nearest(queries: list[int], k: int) -> tuple[Tensor, Tensor]:
        return protected.nearest_rows(protected.vectors(queries), k)

    return first_different(rows, len(protected), motifs, nearest, np.inf, lambda distance: distance > 0)


def first_different(
    rows: np.ndarray,
    count: int,
    motifs: Callable[[int], Hashable],
    nearest: Callable[[list[int], int], tuple[Tensor, Tensor]],
    missing: float,
    counts: Callable[[float], bool] = lambda _: True,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest image of another motif, among more and more neighbours until there is one.

    Args:
        rows: (n,) int64 row numbers.
        count: of all rows.
        motifs: row number -> key of what it shows; rows with one key are not different.
        nearest: (row numbers, k) -> distances or similarities (n, k) to their k nearest, and the rows of these (n, k).
        missing: what stands where there is no different image.
        counts: whether an image at this distance or similarity may be different.

    Returns:
        Distances or similarities (n,) float64, and rows (n,), -1 where there is none.
    """
    values, others = np.full(len(rows), missing), np.full(len(rows), -1, dtype=np.int64)
    open_queries, k = np.arange(len(rows)), 2
    while len(open_queries):
        k = min(k, count)
        found, found_rows = (part.numpy() for part in nearest(rows[open_queries].tolist(), k))
        for i, query in enumerate(open_queries):
            for value, row in zip(found[i].tolist(), found_rows[i].tolist(), strict=True):
                if counts(value) and row != rows[query] and motifs(row) != motifs(int(rows[query])):
                    values[query], others[query] = value, row
                    break
        if k == count:
            break
        open_queries, k = open_queries[others[open_queries] < 0], 4 * k
    return values, others


def prompt_distances(latents: Tensor, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Measure the distances between images of one prompt and between images of different prompts, each pair once.

    Args:
        latents: (N, *S).
        prompts: N.

    Returns:
        Distances of pairs of one prompt, and of pairs of different prompts, float64.
    """
    flat = latents.double().flatten(1)
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    first, second = np.triu_indices(len(flat), 1)
    pairs = zip(first.tolist(), second.tolist(), strict=True)
    same = np.array([prompts[i] == prompts[j] for i, j in pairs], dtype=bool)
    return distances[first, second][same], distances[first, second][~same]


def draw_indices(count: int, most: int, seed: int) -> np.ndarray:
    """Draw up to `most` of `count` indices without repetition, in ascending order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


# Image files and their captions -----------------------------------------------------------------------------------


@dataclass
class ProtectedPictures:
    """A protected set and, as far as they are known, the image files behind its rows.

    Args:
        protected: the set.
        files: row -> path. The file may be gone by now, or hold another image.
    """

    protected: ProtectedSet
    files: dict[int, Path]

    def __post_init__(self) -> None:
        self._captions: dict[int, str | None] = {}

    def caption(self, row: int) -> str | None:
        """Return the caption beside the image file; None if there is none."""
        if row not in self._captions:
            self._captions[row] = caption_of(self.files[row]) if row in self.files else None
        return self._captions[row]

    def motif(self, row: int) -> Hashable:
        """Return a key of what a row shows: images with one caption or of one file are variants of one motif."""
        return self.caption(row) or self.protected.sha256[row] or row

    def variants(self, rows: Sequence[int]) -> Tensor:
        """Return (M, 2, *S) latents of rows and of their mirrored images; the row twice where those are unprotected."""
        return torch.stack([self.protected.vectors(each) for each in self.variant_rows(rows)], dim=1)

    def variant_rows(self, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return rows and those of their mirrored images; the row again where that is unprotected."""
        mirrored = [f"{MIRRORED}{self.protected.ids[row]}" for row in rows]
        found = cast(Ids, self.protected.ids).find(mirrored)  # calibration reads sets of this machine
        return list(rows), [found.get(name, row) for name, row in zip(mirrored, rows, strict=True)]

    def open(self, most: int, seed: int) -> dict[int, Image.Image]:
        """Open up to `most` images by row, drawn at random among those whose file still holds what was protected."""
        found: dict[int, Image.Image] = {}
        upright = [row for row in self.files if not str(self.protected.ids[row]).startswith(MIRRORED)]
        for row in np.random.default_rng(seed).permutation(upright).tolist():
            if len(found) == most:
                break
            if self.files[row].is_file() and file_sha256(self.files[row]) == self.protected.sha256[row]:
                loaded, _ = load_images(self.files[row])
                found.update((row, image) for _, image, _, _ in loaded)
        return found

    def latents(self, most: int, seed: int) -> tuple[Tensor, list[str]]:
        """Draw up to `most` rows (n, *S) and return them with their captions; "" where none is known."""
        rows = draw_indices(len(self.protected), most, seed).tolist()
        return self.protected.vectors(rows), [self.caption(row) or "" for row in rows]


@contextmanager
def open_pictures(
    space: LatentSpace, protect: Path | None, images: Sequence[str], progress: bool = False
) -> Iterator[ProtectedPictures | None]:
    """Open a protected set with its image files.

    Without a set, the images are encoded into a temporary one; without images either, yield None.

    Args:
        space: of the model, with its autoencoder.
        protect: a protected set.
        images: files, folders or globs; with a protected set, where its image files are now.
        progress: whether a progress bar is shown.

    Raises:
        ValueError: the set is empty, or was made for another latent space.
    """
    if protect is None and not images:
        yield None
        return
    with TemporaryDirectory() as scratch:
        if protect is None:
            protected = ProtectedSet.create(Path(scratch) / "set", space)
            add_images(protected, images, space=space, progress=progress)
        else:
            protected = ProtectedSet.open(protect)
            protected.require_space(space)
        if not len(protected):
            raise ValueError("there are no protected pictures to measure; add some first.")
        if protect is None or not images:
            files = {row: Path(source) for row, source in enumerate(protected.sources) if source}
        else:
            found = {file_sha256(path): path for _, path in find_images(images)}
            files = {row: found[digest] for row, digest in enumerate(protected.sha256) if digest in found}
        yield ProtectedPictures(protected, files)


def caption_of(path: str | os.PathLike[str]) -> str | None:
    """Read the caption beside an image file: the text of its .txt, or "caption" in its .json; None if neither."""
    path = Path(path)
    text, label = path.with_suffix(".txt"), path.with_suffix(".json")
    if text.is_file():
        return text.read_text().strip() or None
    if not label.is_file():
        return None
    try:
        caption = json.loads(label.read_text())["caption"]
    except (ValueError, KeyError, TypeError):
        return None
    return caption if isinstance(caption, str) and caption else None
