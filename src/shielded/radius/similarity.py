"""Choose the similarity from which on a protected set calls a picture a copy, by what the set's descriptor measures."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from shielded.latent_space import to_rgb
from shielded.protected import ProtectedSet
from shielded.radius.alterations import CHANGES, Change
from shielded.radius.choose import RATES
from shielded.radius.evidence import Evidence, ProtectedPictures, first_different

_MAX_PAIRS = 20  # in the report
_DECIDING = 5  # pairs on either side of the threshold that are named


@dataclass
class Similarities:
    """Measured similarities by a set's descriptor.

    Args:
        rows: (n,) protected images whose neighbours were searched.
        other: (n,) the most similar different protected image of each, -1 where there is none.
        different: (n,) the similarity to it, -1 where there is none.
        copies: kind of change -> (m,) similarities of an altered copy to its protected image.
    """

    rows: np.ndarray
    other: np.ndarray
    different: np.ndarray
    copies: dict[str, np.ndarray] = field(default_factory=dict)


def measure_similarities(pictures: ProtectedPictures, evidence: Evidence, most: int, seed: int = 0) -> Similarities:
    """Measure the similarities that belong to the distances of `evidence`: the same rows, images and changes."""
    protected = pictures.protected
    different, other = different_similarities(protected, evidence.rows, pictures.motif)
    opened = pictures.open(most, seed)
    copies = copy_similarities(protected, pictures, opened, seed=seed) if opened else {}
    return Similarities(evidence.rows, other, different, copies)


def different_similarities(
    protected: ProtectedSet, rows: Sequence[int] | np.ndarray, motifs: Callable[[int], Hashable] = lambda row: row
) -> tuple[np.ndarray, np.ndarray]:
    """Find the most similar different protected image of each row.

    Args:
        protected: a set with a descriptor.
        rows: (n,) row numbers.
        motifs: row number -> key of what it shows; rows with one key are not different.

    Returns:
        Similarities (n,) float64, -1 where there is no different image, and rows (n,), -1 there.
    """
    rows = np.asarray(rows, dtype=np.int64)

    def nearest(queries: list[int], k: int) -> tuple[Tensor, Tensor]:
        return protected.copy_rows(protected.descriptors(queries), k)

    return first_different(rows, len(protected), motifs, nearest, -1.0)


def copy_similarities(
    protected: ProtectedSet,
    pictures: ProtectedPictures,
    opened: dict[int, Image.Image],
    changes: dict[str, Change] = CHANGES,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Measure the similarities of altered copies to the images of the rows that they are of, or their mirror images.

    Args:
        protected: a set with a descriptor.
        pictures: of that set.
        opened: row -> image.
        changes: what to do with the images, at the size of the model, as `copy_distances` does.
        seed: seed of the changes that draw random numbers.

    Returns:
        Kind of change -> (m,) float64.
    """
    size = protected.space.image_size
    fitted = [
        to_rgb(image) if size is None else ImageOps.fit(to_rgb(image), (size[1], size[0]), Image.Resampling.LANCZOS)
        for image in opened.values()
    ]
    references = torch.stack([protected.descriptors(rows) for rows in pictures.variant_rows(list(opened))], dim=1)
    rng = np.random.default_rng(seed)
    similarities = {}
    for kind, change in changes.items():
        vectors = protected.describe([change(image, rng) for image in fitted])
        similarities[kind] = (vectors[:, None] * references).double().sum(dim=2).amax(dim=1).numpy()
    return similarities


def copy_threshold(
    similarities: Similarities, evidence: Evidence, rate: float, radius: float | None, ids: Sequence[Any]
) -> dict[str, Any] | None:
    """Choose a threshold, and report what it catches, alone and together with a radius.

    Different pictures that are as similar as half of all altered copies are to their originals nearly equal each other:
    they are listed for the user, to be joined or removed, and do not rule the threshold.

    Args:
        similarities: of the set.
        evidence: distances of the same images.
        rate: tolerated share of false alarms, different pictures at or above the threshold.
        radius: that the distances are compared with; None: none.
        ids: of the set's rows.

    Returns:
        JSON types; None without two different pictures.
    """
    found = similarities.other >= 0
    if not found.any():
        return None
    copies = np.concatenate([*similarities.copies.values(), np.empty(0)])
    limit = float(np.median(copies)) if len(copies) else 1.0
    nearly = found & (similarities.different >= limit)
    basis = similarities.different[~nearly]
    threshold = smallest_threshold(basis if len(basis) else similarities.different, rate)

    def figures(value: float) -> dict[str, Any]:
        return {
            "threshold": value,
            "false_alarms": float((basis >= value).mean()) if len(basis) else 0.0,
            "copies": {kind: float((values >= value).mean()) for kind, values in similarities.copies.items()},
        }

    both = {}
    if radius is not None:
        for kind, values in similarities.copies.items():
            both[kind] = float(((values >= threshold) | (evidence.copies[kind] < radius)).mean())
    order = np.argsort(-similarities.different)
    kept = [i for i in order.tolist() if found[i] and not nearly[i]]
    place = sum(similarities.different[i] >= threshold for i in kept)
    return {
        "tolerated": rate,
        "n": len(basis),
        **figures(threshold),
        "both": both,
        "table": [figures(smallest_threshold(basis, other)) for other in RATES] if len(basis) else [],
        "deciding": _pairs(similarities, kept[max(0, place - _DECIDING) : place + _DECIDING], ids),
        "nearly_equal": _pairs(similarities, [i for i in order.tolist() if nearly[i]], ids)[:_MAX_PAIRS],
        "nearly_equal_above": limit,
    }


def smallest_threshold(different: np.ndarray, rate: float) -> float:
    """Return the smallest threshold that at most a share `rate` of the similarities reach, to four decimals above it.

    Example:
        >>> smallest_threshold(np.array([0.2, 0.4, 0.6, 0.8]), rate=0.25)
        0.6001
    """
    ordered = np.sort(different)[::-1]
    allowed = int(rate * len(ordered) + 1e-9)
    if allowed >= len(ordered):
        return -1.0
    # The next one, which must not reach it any more.
    return min(1.0, float(np.floor(ordered[allowed] * 1e4 + 1e-6) + 1) / 1e4)


def _pairs(similarities: Similarities, places: Sequence[int], ids: Sequence[Any]) -> list[list[Any]]:
    """List pairs [id, id, similarity], each once."""
    pairs = {}
    for i in places:
        row, other = int(similarities.rows[i]), int(similarities.other[i])
        pairs[min(row, other), max(row, other)] = float(similarities.different[i])
    return [[ids[a], ids[b], value] for (a, b), value in pairs.items()]
