"""The trace of a Spell: one row per step and image, with what was active there and how far it was pushed."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shielded.core.references import Hits, closest
from shielded.files import replacing


@dataclass
class Push:
    """What a step with active shields did.

    Args:
        delta: (B, D) the correction λΔ.
        noise: (B, D) the direction that it is compared with.
        hits: active shields of protected references and history; None: there were none to search.
        close: (B, B) bool, active pairs of the batch; None: the batch does not repel.
        unresolved: (B,) bool, rows that are still inside a shield; None: not known, as with the paper's sum.
        ratio: α/σ, which makes the push a share of the score, (α/σ²)λΔ against −ε/σ; None: noise level not known.
    """

    delta: Tensor
    noise: Tensor
    hits: Hits | None
    close: Tensor | None
    unresolved: Tensor | None
    ratio: float | None


def rows_of_step(
    run: int,
    step: int,
    level: float | None,
    count: int,
    push: Push | None,
    released: Tensor | None,
    name: Callable[[int], str],
) -> list[dict[str, Any]]:
    """Make the trace's rows of one step. Nothing is read back from the device unless a shield was active.

    Args:
        run: number of the trajectory.
        step: number of the evaluation in it.
        level: noise level t = σ/(α + σ).
        count: B.
        push: what the step did; None: no shield was active.
        released: (B,) bool, images whose guidance was let go; None: none.
        name: gives the id of a static reference's row.
    """
    active, length, share, failed = [0] * count, [0.0] * count, [0.0] * count, [False] * count
    nearest: dict[int, tuple[float, str, float]] = {}
    if push is not None:
        device = push.delta.device
        number = torch.zeros(count, device=device) if push.close is None else push.close.sum(dim=1).float()
        if push.hits is not None:
            number = number + torch.bincount(push.hits.query, minlength=count)
            first = closest(push.hits, 1)
            columns = (column.tolist() for column in (first.query, first.row, first.distance, first.radius))
            for query, row, distance, radius in zip(*columns, strict=True):
                nearest[query] = distance, name(row), radius
        norm = push.delta.norm(dim=1)
        active, length = number.int().tolist(), norm.tolist()
        if push.ratio is not None:
            share = (push.ratio * norm / push.noise.norm(dim=1).clamp(min=1e-12)).tolist()
        if push.unresolved is not None:
            failed = push.unresolved.tolist()
    without_guidance = [False] * count if released is None else released.tolist()
    rows = []
    for image in range(count):
        distance, reference, radius = nearest.get(image, (None, None, None))
        rows.append(
            {
                "run": run,
                "step": step,
                "image": image,
                "noise_level": level,
                "active": active[image],
                "push": length[image],
                "score_ratio": share[image],
                "nearest_id": reference,
                "nearest_distance": distance,
                "radius": radius,
                "unresolved": failed[image],
                "released": without_guidance[image],
            }
        )
    return rows


def write_csv(trace: list[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write a trace as a CSV table, one row per step and image."""
    with replacing(path) as draft, draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(trace[0]) if trace else ["step"])
        writer.writeheader()
        writer.writerows(trace)
