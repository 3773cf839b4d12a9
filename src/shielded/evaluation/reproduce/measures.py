"""Reduce cells to metrics: per prompt and averaged, over all images, and as changes from the plain sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shielded.evaluation.metrics import (
    bootstrap_interval,
    frechet_distance,
    jackknife_interval,
    manifold_rows,
    mean_pairwise_similarity,
    vendi,
)
from shielded.evaluation.reproduce.study import Cell

NEIGHBOURS = 3  # k of the manifold metrics: a prompt of the embedded model has four real images

# name: (heading, decimals, whether higher is better)
HEADINGS = {
    "recall": ("recall", 3, True),
    "precision": ("precision", 3, True),
    "density": ("density", 3, True),
    "coverage": ("coverage", 3, True),
    "vendi": ("Vendi", 3, True),
    "similarity": ("mean pair similarity", 3, False),
    "caption": ("caption score", 3, True),
    "nearest": ("nearest reference", 3, True),
    "pair": ("closest pair (latents)", 1, True),
    "frechet": ("Fréchet", 4, False),
    "recall_all": ("recall, all images", 3, True),
    "precision_all": ("precision, all images", 3, True),
    "density_all": ("density, all images", 3, True),
    "coverage_all": ("coverage, all images", 3, True),
    "seconds": ("s per image", 3, False),
}

Estimate = dict[str, float]  # value, low, high


class SettingMetrics:
    """Metrics of one setting.

    Args:
        cells: ordered by seed, then by prompt.
        reference: (m, d) features for each prompt, in the same order.
    """

    def __init__(self, cells: Sequence[Cell], reference: Sequence[Tensor]) -> None:
        self.reference = list(reference)
        count = len(self.reference)
        self.seeds = [cells[i : i + count] for i in range(0, len(cells), count)]
        self.per_prompt = self._per_prompt()
        self.overall = self._overall()

    def _per_prompt(self) -> dict[str, Tensor]:
        """Compute each metric (prompts,), averaged over the seeds."""
        rows: dict[str, list[list[float]]] = {}
        for cells in self.seeds:
            for prompt, (cell, reference) in enumerate(zip(cells, self.reference, strict=True)):
                found = cell["features"]
                values = {
                    **{k: v.mean().item() for k, v in manifold_rows(found, reference, NEIGHBOURS).items()},
                    "vendi": vendi(found),
                    "similarity": mean_pairwise_similarity(found),
                    "nearest": torch.cdist(found.double(), reference.double()).amin(dim=1).mean().item(),
                    "pair": cell["pair"].min().item(),
                    "seconds": cell["seconds"].item() / len(found),
                }
                if "caption" in cell:
                    values["caption"] = cell["caption"].mean().item()
                for name, value in values.items():
                    rows.setdefault(name, [[] for _ in self.reference])[prompt].append(value)
        return {name: torch.tensor(values, dtype=torch.float64).mean(dim=1) for name, values in rows.items()}

    def _overall(self) -> dict[str, float]:
        """Compute the manifold metrics over all images of a seed, averaged over the seeds."""
        reference = torch.cat(self.reference)
        rows = [manifold_rows(torch.cat([c["features"] for c in cells]), reference, NEIGHBOURS) for cells in self.seeds]
        return {f"{k}_all": sum(row[k].mean().item() for row in rows) / len(rows) for k in rows[0]}

    def frechet(self, prompts: Tensor) -> float:
        """Compute the Fréchet distance between all images of these prompts, indices (n, 1), and their reference."""
        chosen = prompts.flatten().tolist()
        generated = torch.cat([cells[i]["features"] for cells in self.seeds for i in chosen])
        return frechet_distance(generated, torch.cat([self.reference[i] for i in chosen]))

    def estimates(self) -> dict[str, Estimate]:
        """Return every metric with its 95 % interval over the prompts; metrics over all images have no interval."""
        found = {name: mean_estimate(values) for name, values in self.per_prompt.items()}
        found["frechet"] = _estimate_over_prompts(self.frechet, len(self.reference))
        found |= {name: {"value": value} for name, value in self.overall.items()}
        return {name: found[name] for name in HEADINGS if name in found}

    def changes(self, plain: SettingMetrics) -> dict[str, Estimate]:
        """Return the changes from the plain sampler, paired by prompt; those of vendi and frechet are relative."""
        found = {}
        for name, values in self.per_prompt.items():
            difference = mean_estimate(values - plain.per_prompt[name])
            if name == "vendi":
                difference = {k: v / plain.per_prompt[name].mean().item() for k, v in difference.items()}
            found[name] = difference
        found["frechet"] = _estimate_over_prompts(
            lambda rows: self.frechet(rows) / plain.frechet(rows) - 1, len(self.reference)
        )
        return {name: found[name] for name in HEADINGS if name in found}


def mean_estimate(values: Tensor) -> Estimate:
    """Return the mean of values (n,) with its 95 % bootstrap interval."""
    estimate = {"value": values.mean().item()}
    if len(values) > 1:
        estimate["low"], estimate["high"] = bootstrap_interval(values)
    return estimate


def _estimate_over_prompts(statistic: Callable[[Tensor], float], count: int) -> Estimate:
    prompts = torch.arange(count)[:, None]
    estimate = {"value": statistic(prompts)}
    if count > 3:
        estimate["low"], estimate["high"] = jackknife_interval(statistic, prompts)
    return estimate


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one beats in both coordinates (higher is better), from left to right."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points), key=lambda p: (-p[0], -p[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def hypervolume(points: Sequence[tuple[float, float]], origin: tuple[float, float]) -> float:
    """Compute the area that the points dominate above `origin`, the worst point.

    Zitzler and Thiele 1998, "Multiobjective Optimization Using Evolutionary Algorithms".
    """
    area, left = 0.0, origin[0]
    for x, y in front([(x, y) for x, y in points if x > origin[0] and y > origin[1]]):
        area += (x - left) * (y - origin[1])
        left = x
    return area


def flatten_row(row: dict[str, Any]) -> dict[str, Any]:
    """Turn the estimates of a result row into columns of a table."""
    columns: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            for inner, item in flatten_row(value).items():
                columns[name if inner == "value" else f"{name}_{inner}"] = item
        else:
            columns[name] = value
    return columns
