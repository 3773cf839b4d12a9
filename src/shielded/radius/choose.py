"""Choose radii by measured distances.

One rule is behind every suggestion: the largest radius at which at most 1 % (or another rate) of unrelated images lie
closer than that. For a protected set these are different protected images, for diversity plain images of different
prompts.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shielded.files import replacing
from shielded.models import PROTECTION_RADIUS
from shielded.protected import ProtectedSet
from shielded.radius.evidence import Evidence, different_distances, draw_indices

_SAMPLE = 500  # images that `suggested_radius` looks at
RATES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # rates of false alarms in the table of `protection_radius`


def largest_radius(distances: np.ndarray, rate: float) -> float:
    """Return the largest radius with at most a share `rate` of the distances below it.

    Args:
        distances: (n,), at least one of them finite.
        rate: from 0 to below 1.

    Raises:
        ValueError: another rate, or no finite distance.

    Example:
        >>> largest_radius(np.array([1.0, 2.0, 3.0, 4.0]), rate=0.25)
        2.0
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the tolerated rate of false alarms must be from 0 to below 1, not {rate}.")
    finite = np.sort(distances[np.isfinite(distances)])
    if not len(finite):
        raise ValueError("there are no distances to choose a radius by.")
    # Of n values, floor(rate·n) may lie strictly below the radius, so it may reach the next one.
    return float(finite[min(int(rate * len(distances) + 1e-9), len(finite) - 1)])


def share_within(distances: np.ndarray, radius: float | np.ndarray) -> float | None:
    """Return the share of the distances below the radius; None if there are none."""
    return float((distances < radius).mean()) if len(distances) else None


def protection_radius(evidence: Evidence, rate: float = 0.01, radius: float | None = None) -> dict[str, Any]:
    """Choose a radius for the protected set, and report what it catches and touches.

    Different pictures as close to each other as half of the least altered copies are to their originals nearly equal
    each other: they are counted apart, to be joined or removed, and do not rule the radius.

    Args:
        evidence: with `different` or, for a set without two different images, `generations`.
        rate: tolerated share of false alarms.
        radius: chosen by the user; None: the largest with at most that rate.

    Returns:
        JSON types. `table` holds the same figures at the radii for other rates.

    Raises:
        ValueError: a rate out of range, or nothing to choose a radius by.
    """
    among = bool(np.isfinite(evidence.different).any())
    basis, limit = evidence.different if among else evidence.generations, nearly_equal_below(evidence)
    if among and np.isfinite(basis[basis >= limit]).any():
        basis = basis[basis >= limit]
    return {
        "suggested": radius is None,
        "tolerated": rate,
        "basis": "different protected pictures" if among else "plain images",
        "n": len(basis),
        "nearly_equal_below": limit,
        "nearly_equal": int((evidence.different < limit).sum()),
        **_figures(evidence, largest_radius(basis, rate) if radius is None else radius, basis),
        "table": [_figures(evidence, largest_radius(basis, other), basis) for other in RATES],
    }


def nearly_equal_below(evidence: Evidence) -> float:
    """Return the distance below which different pictures nearly equal each other; 0 without altered copies."""
    return min((float(np.median(distances)) for distances in evidence.copies.values() if len(distances)), default=0.0)


def suggested_radius(protected: ProtectedSet, rate: float = 0.01) -> float:
    """Suggest a radius for a set without one, without pictures or prompts: see `shielded calibrate` for a better one.

    Args:
        protected: the set.
        rate: tolerated share of protected images that lie within the radius of a different one.

    Returns:
        L2: `PROTECTION_RADIUS` √dim, or less where that rate asks for it. Up to 500 images decide.
    """
    most = PROTECTION_RADIUS * protected.space.dim**0.5
    different, _ = different_distances(protected, draw_indices(len(protected), _SAMPLE, 0))
    return min(most, largest_radius(different, rate)) if np.isfinite(different).any() else most


def _figures(evidence: Evidence, radius: float, basis: np.ndarray) -> dict[str, Any]:
    return {
        "radius": radius,
        "radius_per_sqrt_dim": radius / evidence.dim**0.5,
        "false_alarms": share_within(basis, radius),
        "generations": share_within(evidence.generations, radius),
        "copies": {kind: share_within(distances, radius) for kind, distances in evidence.copies.items()},
    }


def diversity_radius(evidence: Evidence, rate: float = 0.01) -> dict[str, Any]:
    """Choose a radius for the images of one batch: at most a share `rate` of pairs of different prompts lie closer.

    Returns:
        JSON types.

    Raises:
        ValueError: a rate out of range, or no pair of different prompts.
    """
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


# A radius per protected image ---------------------------------------------------------------------------------------


def radii_per_image(nearest: np.ndarray, radius: float, share: float = 0.5) -> np.ndarray:
    """Return a radius for each protected image, smaller where the set is dense.

    Args:
        nearest: (K,) distance to the nearest different protected image.
        radius: upper limit of all radii.
        share: of that distance. At one half no two shields of different images overlap; at 1 no protected image lies
            inside the shield of a different one.

    Returns:
        (K,) float64.
    """
    return np.minimum(radius, share * nearest)


def summarise_radii(evidence: Evidence, radii: np.ndarray) -> dict[str, Any]:
    """Report what one radius per protected image comes to.

    Args:
        evidence: of all rows of the set.
        radii: (K,) for each row of the set.

    Returns:
        JSON types.
    """
    of_copied = radii[evidence.copied.astype(int)]
    return {
        "smallest": float(radii.min()),
        "median": float(np.median(radii)),
        "largest": float(radii.max()),
        "reduced": float((radii < radii.max()).mean()),
        "copies": {kind: share_within(distances, of_copied) for kind, distances in evidence.copies.items()},
    }


def write_radii(path: str | os.PathLike[str], protected: ProtectedSet, radii: np.ndarray, nearest: np.ndarray) -> None:
    """Write radii as a CSV table (id, radius), with the distance to the nearest different image for information."""
    with replacing(path) as draft, draft.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "radius", "nearest_different"])
        writer.writerows(zip(protected.ids, radii.tolist(), nearest.tolist(), strict=True))


def read_radii(path: str | os.PathLike[str], protected: ProtectedSet) -> Tensor:
    """Read the radii of a protected set, row by row, from the table that `shielded calibrate --per-image` wrote.

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
