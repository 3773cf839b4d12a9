"""Radii that people can choose: what a radius catches and what it touches, measured on pictures and a model.

The rule behind every suggestion: the largest radius at which at most 1 % (or another rate) of what has nothing to do
with each other lies closer than that. For a protected set these are different protected pictures, for diversity plain
images of different prompts. Distances are L2 in the model's latent space, and a picture that is far in it can still
resemble another one.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from shielded.files import replacing, write_json
from shielded.generation import generate
from shielded.latent_space import LatentSpace, to_rgb
from shielded.models import DEFAULT_MODEL, GUIDANCE, load, preset_of
from shielded.protected import ProtectedSet, add_images, find_images, load_images
from shielded.protected.ingest.images import MIRRORED
from shielded.radius.alterations import CHANGES, Change
from shielded.spell.posterior import measure_calibration

QUERIES = 2000  # protected pictures whose neighbours are searched; more would not change a quantile much
PROMPTS = 16  # captions of the embedded model that plain images are made of
RATES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # rows of the table
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

# Evidence ---------------------------------------------------------------------------------------------------------


def _nothing() -> np.ndarray:
    return np.empty(0)


@dataclass
class Evidence:
    """Distances, L2 in the latent space. What was not measured is empty.

    Args:
        dim: number of components of a latent.
        rows: (n,) protected pictures whose neighbours were searched.
        nearest: (n,) the nearest different protected picture of each, -1 where there is none.
        different: (n,) the distance to it, infinity where there is none.
        copied: (m,) rows of the pictures that were changed.
        copies: kind of change -> (m,) from a picture to its changed copy.
        generations: (g,) from a plain image of the model to the nearest protected picture.
        same_prompt: between plain images of one prompt, per pair.
        other_prompt: between plain images of different prompts, per pair.
    """

    dim: int
    rows: np.ndarray = field(default_factory=_nothing)
    nearest: np.ndarray = field(default_factory=_nothing)
    different: np.ndarray = field(default_factory=_nothing)
    copied: np.ndarray = field(default_factory=_nothing)
    copies: dict[str, np.ndarray] = field(default_factory=dict)
    generations: np.ndarray = field(default_factory=_nothing)
    same_prompt: np.ndarray = field(default_factory=_nothing)
    other_prompt: np.ndarray = field(default_factory=_nothing)


def measure(
    space: LatentSpace,
    pictures: Pictures | None,
    plain: Tensor,
    texts: Sequence[str],
    queries: int = QUERIES,
    most: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> Evidence:
    """All distances that can be measured.

    Args:
        space: with its autoencoder.
        pictures: the protected set; None: distances among plain images alone.
        plain: (G, *S) final latents of plain images; G may be 0.
        texts: G prompts.
        queries: protected pictures whose neighbours are searched, at most.
        most: pictures that are changed, at most.
        seed: of what is drawn.
        progress: whether progress bars are shown.
    """
    evidence = Evidence(space.dim)
    if len(plain):
        evidence.same_prompt, evidence.other_prompt = prompt_distances(plain, texts)
    if pictures is None:
        return evidence
    protected = pictures.protected
    evidence.rows = _drawn(len(protected), queries, seed)
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
    """Distances from pictures to changed copies of themselves.

    Pictures are brought to the size of the model first, so that a change is as strong as its name says there.

    Args:
        space: with its autoencoder, `LatentSpace.of(pipe)`.
        images: M pictures.
        references: (M, R, *S) protected latents of each; the nearest of them counts. None: of the pictures themselves.
        changes: what to do with them.
        seed: of the changes that draw random numbers.
        progress: whether a progress bar is shown.

    Returns:
        Kind of change -> (M,) float64.
    """
    height, width = space.image_size
    fitted = [ImageOps.fit(to_rgb(image), (width, height), Image.Resampling.LANCZOS) for image in images]
    references = space.encode(fitted)[:, None] if references is None else references
    rng = np.random.default_rng(seed)
    distances = {}
    for kind, change in tqdm(changes.items(), desc="changed copies", unit="kind", disable=not progress):
        copies = space.encode([change(image, rng) for image in fitted])
        distances[kind] = (copies[:, None] - references).double().flatten(2).norm(dim=2).amin(dim=1).numpy()
    return distances


def different_distances(
    protected: ProtectedSet, rows: Sequence[int], motifs: Callable[[int], Any] = lambda row: row
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest different protected picture of each row.

    Args:
        protected: the set.
        rows: (n,) row numbers.
        motifs: row number -> what it shows. Rows of one motif, and pictures at distance 0, do not count as different.

    Returns:
        Distances (n,) float64, infinity where there is no different picture, and rows (n,), -1 there.
    """
    rows = np.asarray(rows, dtype=np.int64)
    distances, nearest = np.full(len(rows), np.inf), np.full(len(rows), -1, dtype=np.int64)
    left, k = np.arange(len(rows)), 2
    while len(left):
        k = min(k, len(protected))
        found, found_rows = (part.numpy() for part in protected.nearest_rows(protected.vectors(rows[left].tolist()), k))
        for i, query in enumerate(left):
            for distance, row in zip(found[i].tolist(), found_rows[i].tolist(), strict=True):
                if distance > 0 and row != rows[query] and motifs(row) != motifs(int(rows[query])):
                    distances[query], nearest[query] = distance, row
                    break
        if k == len(protected):
            break
        left, k = left[np.isinf(distances[left])], 4 * k
    return distances, nearest


def prompt_distances(latents: Tensor, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Distances between images of one prompt and between images of different prompts, each pair once.

    Args:
        latents: (N, *S).
        prompts: N.
    """
    flat = latents.double().flatten(1)
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    first, second = np.triu_indices(len(flat), 1)
    same = np.array([prompts[i] == prompts[j] for i, j in zip(first, second, strict=True)], dtype=bool)
    return distances[first, second][same], distances[first, second][~same]


# Radii ------------------------------------------------------------------------------------------------------------


def largest_radius(distances: np.ndarray, rate: float) -> float:
    """The largest radius with at most a share `rate` of the distances below it.

    Args:
        distances: (n,), at least one of them finite.
        rate: from 0 to below 1.

    Raises:
        ValueError: another rate, or no distance to go by.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the tolerated rate of false alarms must be from 0 to below 1, not {rate}.")
    finite = np.sort(distances[np.isfinite(distances)])
    if not len(finite):
        raise ValueError("there are no distances to choose a radius by.")
    # Of n values, floor(rate·n) may lie strictly below the radius, so it may reach the next one.
    return float(finite[min(int(rate * len(distances) + 1e-9), len(finite) - 1)])


def share_within(distances: np.ndarray, radius: float | np.ndarray) -> float | None:
    """Share of the distances below the radius; None if there are none."""
    return float((distances < radius).mean()) if len(distances) else None


def radii_per_image(nearest: np.ndarray, radius: float, share: float = 0.5) -> np.ndarray:
    """A radius for each protected picture: smaller where the set is dense.

    Args:
        nearest: (K,) distance to the nearest different protected picture.
        radius: the largest radius that any of them gets.
        share: of that distance. At one half no two shields of different pictures overlap; at 1 no protected picture
            lies inside the shield of a different one.

    Returns:
        (K,) float64.
    """
    return np.minimum(radius, share * nearest)


def write_radii(path: str | os.PathLike[str], protected: ProtectedSet, radii: np.ndarray, nearest: np.ndarray) -> None:
    """Write radii as a CSV table (id, radius), with the distance to the nearest different picture for information."""
    with replacing(path) as draft, draft.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "radius", "nearest_different"])
        writer.writerows(zip(protected.ids, radii.tolist(), nearest.tolist(), strict=True))


def read_radii(path: str | os.PathLike[str], protected: ProtectedSet) -> Tensor:
    """Radii of a protected set, row by row, from the table that `shielded calibrate --per-image` wrote.

    Use them as `Spell(protected, radius=read_radii("radii.csv", protected), batch=False)`.

    Returns:
        (K,) float64.

    Raises:
        ValueError: the table has no radius for one of the set's ids, or is no such table.
    """
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and not {"id", "radius"} <= rows[0].keys():
        raise ValueError(f"{path} has no columns id and radius; `shielded calibrate --per-image` writes such a table.")
    known = {row["id"]: float(row["radius"]) for row in rows}
    missing = [str(name) for name in protected.ids if str(name) not in known]
    if missing:
        raise ValueError(
            f"{path} has no radius for {len(missing)} of {len(protected)} protected images, such as {missing[0]!r}; "
            "run `shielded calibrate --per-image` again."
        )
    return torch.tensor([known[str(name)] for name in protected.ids], dtype=torch.float64)


# The result -------------------------------------------------------------------------------------------------------


def protection(evidence: Evidence, rate: float = 0.01, radius: float | None = None) -> dict[str, Any]:
    """A radius for the protected set, and what it catches and touches.

    Args:
        evidence: with `different` or, for a set without two different pictures, `generations`.
        rate: the share of false alarms that is tolerated.
        radius: given by the user; None: the largest with at most that rate.

    Returns:
        JSON types. `table` holds the same figures at the radii for other rates.

    Raises:
        ValueError: a rate out of range, or nothing to choose a radius by.
    """
    among = bool(np.isfinite(evidence.different).any())
    basis = evidence.different if among else evidence.generations
    return {
        "suggested": radius is None,
        "tolerated": rate,
        "basis": "different protected pictures" if among else "plain images",
        "n": len(basis),
        **_measured(evidence, largest_radius(basis, rate) if radius is None else radius, basis),
        "table": [_measured(evidence, largest_radius(basis, other), basis) for other in RATES],
    }


def _measured(evidence: Evidence, radius: float, basis: np.ndarray) -> dict[str, Any]:
    return {
        "radius": radius,
        "radius_per_sqrt_dim": radius / evidence.dim**0.5,
        "false_alarms": share_within(basis, radius),
        "generations": share_within(evidence.generations, radius),
        "copies": {kind: share_within(distances, radius) for kind, distances in evidence.copies.items()},
    }


def diversity(evidence: Evidence, rate: float = 0.01) -> dict[str, Any]:
    """A radius for images of one batch: at most a share `rate` of pairs of different prompts are closer anyway."""
    radius = largest_radius(evidence.other_prompt, rate)
    return {
        "radius": radius,
        "radius_per_sqrt_dim": radius / evidence.dim**0.5,
        "tolerated": rate,
        "other_prompt": share_within(evidence.other_prompt, radius),
        "same_prompt": share_within(evidence.same_prompt, radius),
        "pairs_other_prompt": len(evidence.other_prompt),
        "pairs_same_prompt": len(evidence.same_prompt),
    }


def _per_image(evidence: Evidence, radii: np.ndarray) -> dict[str, Any]:
    """What radii (K,) of all protected pictures come to; `evidence` must hold all rows of the set."""
    own = radii[evidence.copied.astype(int)]
    return {
        "smallest": float(radii.min()),
        "median": float(np.median(radii)),
        "largest": float(radii.max()),
        "reduced": float((radii < radii.max()).mean()),
        "copies": {kind: share_within(distances, own) for kind, distances in evidence.copies.items()},
    }


def rows_of(evidence: Evidence) -> dict[str, np.ndarray]:
    """All measured distances by what they are between."""
    rows = {f"copy: {kind}": distances for kind, distances in evidence.copies.items()}
    rows["different protected pictures"] = evidence.different[np.isfinite(evidence.different)]
    rows["plain image to the set"] = evidence.generations
    rows["plain images of one prompt"] = evidence.same_prompt
    rows["plain images of different prompts"] = evidence.other_prompt
    return {name: distances for name, distances in rows.items() if len(distances)}


def quantiles(evidence: Evidence) -> dict[str, dict[str, float]]:
    """Number and quantiles of all measured distances."""
    return {
        name: {"n": len(distances)} | {f"{q:.0%}": float(np.quantile(distances, q)) for q in QUANTILES}
        for name, distances in rows_of(evidence).items()
    }


def plot(evidence: Evidence, path: str | os.PathLike[str], radius: float) -> None:
    """Draw where the measured distances lie: line 5-95 %, bar 25-75 %, dot median; needs matplotlib.

    Args:
        evidence: what was measured.
        path: of the PNG.
        radius: drawn as a line, with the share of each row that lies within it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = rows_of(evidence)
    copies = {f"copy: {kind}" for kind in evidence.copies}
    names = sorted(rows, key=lambda name: (name not in copies, np.median(rows[name]) if name in copies else 0))
    figure = Figure(figsize=(8, 1.3 + 0.27 * len(names)), layout="constrained")
    axes = figure.subplots()
    for y, name in enumerate(names):
        low, left, middle, right, high = np.quantile(rows[name], (0.05, 0.25, 0.5, 0.75, 0.95))
        color = "#2c6fbb" if name in copies else "#a8430f"
        axes.plot([low, high], [y, y], color=color, linewidth=1)
        axes.plot([left, right], [y, y], color=color, linewidth=5, solid_capstyle="butt", alpha=0.6)
        axes.plot(middle, y, "o", color=color, markersize=4)
        share = share_within(rows[name], radius)
        axes.annotate(f"{share:.0%}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("L2 distance in the latent space")
    axes.axvline(radius, color="#1d2126", linewidth=1, linestyle="--")
    axes.set_title(f"radius {radius:.3g}; on the right: share within it", fontsize=9, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=130)


# Where pictures and their captions come from ----------------------------------------------------------------------


@dataclass
class Pictures:
    """A protected set and, as far as they are known, the picture files behind its rows.

    Args:
        protected: the set.
        files: row -> path. A path may be gone by now, or lead to another picture.
    """

    protected: ProtectedSet
    files: dict[int, Path]

    def __post_init__(self) -> None:
        self._captions: dict[int, str | None] = {}

    def caption(self, row: int) -> str | None:
        """The caption beside the picture file; None if there is none."""
        if row not in self._captions:
            self._captions[row] = caption_of(self.files[row]) if row in self.files else None
        return self._captions[row]

    def motif(self, row: int) -> Any:
        """What a row shows, as far as is known: pictures of one caption or of one file are variants of one motif."""
        return self.caption(row) or self.protected.sha256[row] or row

    def variants(self, rows: Sequence[int]) -> Tensor:
        """(M, 2, *S) latents of rows and of their mirrored images; where these are not protected, twice the row."""
        mirrored = [f"{MIRRORED}{self.protected.ids[row]}" for row in rows]
        found = self.protected.ids.find(mirrored)
        others = [found.get(name, row) for name, row in zip(mirrored, rows, strict=True)]
        return torch.stack([self.protected.vectors(list(rows)), self.protected.vectors(others)], dim=1)

    def open(self, most: int, seed: int) -> dict[int, Image.Image]:
        """Up to `most` pictures by row, drawn at random among those whose file still holds what was protected."""
        found: dict[int, Image.Image] = {}
        upright = [row for row in self.files if not str(self.protected.ids[row]).startswith(MIRRORED)]
        for row in np.random.default_rng(seed).permutation(upright).tolist():
            if len(found) == most:
                break
            if self.files[row].is_file() and _sha256(self.files[row]) == self.protected.sha256[row]:
                loaded, _ = load_images(self.files[row])
                found.update((row, image) for _, image, _, _ in loaded)
        return found

    def latents(self, most: int, seed: int) -> tuple[Tensor, list[str]]:
        """Up to `most` rows (n, *S) drawn at random, and their captions; an empty one where none is known."""
        rows = _drawn(len(self.protected), most, seed).tolist()
        return self.protected.vectors(rows), [self.caption(row) or "" for row in rows]


@contextmanager
def open_pictures(
    space: LatentSpace, protect: Path | None, images: Sequence[str], progress: bool = False
) -> Iterator[Pictures | None]:
    """The protected set with its pictures; without one, a set of the images that is gone afterwards; or None.

    Args:
        space: of the model, with its autoencoder.
        protect: a protected set.
        images: files, folders or globs; with a protected set, where its pictures are now.
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
            found = {_sha256(path): path for _, path in find_images(images)}
            files = {row: found[digest] for row, digest in enumerate(protected.sha256) if digest in found}
        yield Pictures(protected, files)


def caption_of(path: str | os.PathLike[str]) -> str | None:
    """The caption of a picture file: the text of a .txt, or "caption" of a .json, of the same name; None if neither."""
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drawn(count: int, most: int, seed: int) -> np.ndarray:
    """Up to `most` of `count` indices, drawn without repetition, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


# The command ------------------------------------------------------------------------------------------------------


def calibrate(
    out: Path,
    model: str = DEFAULT_MODEL,
    protect: Path | None = None,
    images: Sequence[str] = (),
    prompts: Sequence[str] = (),
    seeds: int = 4,
    rate: float = 0.01,
    radius: float | None = None,
    per_image: bool = False,
    most: int = 100,
    seed: int = 0,
    steps: int = 25,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure distances and the denoising error, and suggest radii.

    Writes `radius.json`, `radius.png` (with matplotlib), `calibration.json` and perhaps `radii.csv`; returns what
    `radius.json` holds.

    Args:
        out: folder for the results.
        model: as for `shielded.models.load`.
        protect: a protected set.
        images: files, folders or globs: where the set's pictures are now or, without a set, pictures to measure among.
        prompts: texts for plain images; empty: captions of the embedded model, none for other models.
        seeds: plain images per prompt; 0: none.
        rate: share of false alarms that is tolerated.
        radius: to report on instead of the suggested one.
        per_image: write a radius for each protected picture too.
        most: pictures that are changed and denoised.
        seed: of everything random.
        steps: of the sampler.
        device: where the model runs.
        progress: whether progress bars are shown.

    Raises:
        ValueError: nothing to measure, or a set that is empty or of another latent space.
    """
    pipe = load(model, device)
    space = LatentSpace.of(pipe)
    texts = [text for text in prompts or _captions(model, seed) for _ in range(seeds)]
    with open_pictures(space, protect, images, progress) as pictures:
        plain = torch.empty(0, *space.shape)
        if texts:
            options = {"guidance_scale": GUIDANCE[model]} if model in GUIDANCE else {}
            # Seeds differ between prompts too, so that no two images start from the same noise.
            numbers = list(range(seed, seed + len(texts)))
            plain = generate(pipe, texts, numbers, None, steps, label="plain", progress=progress, **options).latents
        elif pictures is None:
            raise ValueError("nothing to measure: give a protected set, pictures, or texts for plain images.")
        every = len(pictures.protected) if per_image and pictures is not None else QUERIES
        evidence = measure(space, pictures, plain, texts, every, most, seed, progress)
        clean, captions = plain[:most], texts[:most]
        result: dict[str, Any] = {"model": model, "dim": space.dim, "space": space.fingerprint}
        if pictures is not None:
            clean, captions = pictures.latents(most, seed)
            result |= {"rows": len(pictures.protected), "version": pictures.protected.version}
            result["changed_pictures"] = len(evidence.copied)
            result["closest"] = _closest_pairs(pictures.protected, evidence)
        enough = np.isfinite(evidence.different).any() or len(evidence.generations)
        result["protection"] = protection(evidence, rate, radius) if enough else None
        result["diversity"] = diversity(evidence, rate) if len(evidence.other_prompt) else None
        if per_image and result["protection"]:
            radii = radii_per_image(evidence.different, result["protection"]["radius"])
            write_radii(out / "radii.csv", pictures.protected, radii, evidence.different)
            result["per_image"] = _per_image(evidence, radii)
    result["denoising_error"] = _denoising_error(
        out / "calibration.json",
        pipe,
        clean,
        captions,
        steps=steps,
        seed=seed,
        space=space.fingerprint,
        progress=progress,
    )
    result["distances"] = quantiles(evidence)
    drawn = result["protection"] or result["diversity"]
    result["plot"] = drawn is not None and _plotted(evidence, out / "radius.png", drawn["radius"])
    write_json(out / "radius.json", result)
    return result


def _denoising_error(path: Path, pipe: Any, clean: Tensor, captions: list[str], **options: Any) -> dict[str, Any]:
    """Write the calibration; where a pipeline cannot be measured, the reason instead: the radii are no worse for it."""
    try:
        measured = measure_calibration(pipe, clean, captions, **options)
    except (TypeError, ValueError) as error:
        return {"failed": str(error)}
    measured.save(path)
    return {
        "pictures": len(clean),
        "with_caption": sum(map(bool, captions)),
        "levels": measured.levels,
        "error": measured.error,
        "without_measurement": [measured.energy * level**2 for level in measured.levels],
    }


def _captions(model: str, seed: int) -> list[str]:
    """Draw captions that the model was trained on; none where they are not known."""
    captions = preset_of(model).read_captions()
    return [captions[i] for i in _drawn(len(captions), PROMPTS, seed)]


def _plotted(evidence: Evidence, path: Path, radius: float) -> bool:
    try:
        plot(evidence, path, radius)
    except ImportError:
        return False
    return True


def _closest_pairs(protected: ProtectedSet, evidence: Evidence) -> list[list[Any]]:
    """The closest different pictures [id, id, distance], at most 20: variants to look at, or duplicates to remove."""
    pairs = {
        (min(row, other), max(row, other)): distance
        for row, other, distance in zip(
            evidence.rows.tolist(), evidence.nearest.tolist(), evidence.different.tolist(), strict=True
        )
        if other >= 0
    }
    closest = sorted(pairs.items(), key=lambda pair: pair[1])[:20]
    return [[protected.ids[a], protected.ids[b], distance] for (a, b), distance in closest]
