"""Run the paper's experiments. Each returns its result as plain data: the settings and rows of metrics.

Kirchhof et al., "Shielded Diffusion: Generating Novel and Diverse Images using Sparse Repellency", ICML 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shielded.evaluation.reproduce.measures import SettingMetrics, front, hypervolume, mean_estimate
from shielded.evaluation.reproduce.reference import ReferenceImages
from shielded.evaluation.reproduce.study import Cell, Setting, Study
from shielded.latent_space import LatentSpace
from shielded.models import PROTECTION, VARIETY, VARIETY_RADIUS, preset_of

PLAIN = Setting("plain")
LEVELS = tuple((round(1 - i / 10, 1), round(0.9 - i / 10, 1)) for i in range(10))
PAIRS = {"recall": "precision", "coverage": "density", "vendi": "caption"}  # x axis: y axis of the trade-off plots
INTERVAL = 0.6  # strength of Interval Guidance that other methods are combined with
WORST_CAPTION = 0.9  # share of the plain caption score; points below it add no area, however diverse they are


_PAPER = {"overlap": "sum", "overcompensation": 1.6, "radius_schedule": "constant", "release": None}


def spell_setting(label: str, radius: float, **options: Any) -> Setting:
    """Return a setting of `Spell` with this radius and these options."""
    return Setting(label, "spell", radius, options)


def paper_setting(radius: float) -> Setting:
    """Return the formula as published: the sum, λ = 1.6, the full radius at all noise levels, guidance kept."""
    return spell_setting("SPELL, the paper's sum", radius, **_PAPER)


def variety_setting(radius: float) -> Setting:
    """Return the default of `shielded generate`, the least costly for its diversity on the embedded model."""
    return spell_setting("SPELL, our setting", radius, **VARIETY)


def radii(study: Study, radius: float | None = None) -> tuple[float, float]:
    """Return the radius of the paper's formula and that of `variety_setting`.

    Both are `radius` where it is given; else the preset's, and `VARIETY_RADIUS`, times √dim.
    """
    if radius is not None:
        return radius, radius
    preset, root = preset_of(study.model), LatentSpace.of(study.pipe).dim ** 0.5
    return (preset.formula_radius or preset.radius) * root, VARIETY_RADIUS * root


# Settings swept by `tradeoff`, by method; radii are multiples of those that `radii` returns.
SWEEPS: dict[str, Callable[[float, float], list[Setting]]] = {
    "spell": lambda _, r: [variety_setting(round(f * r, 3)) for f in (0.5, 0.75, 1, 1.25, 1.5, 2)],
    "spell-paper": lambda r, _: [paper_setting(round(f * r, 3)) for f in (0.2, 0.3, 0.4, 0.6, 1)],
    "particle": lambda *_: [Setting("Particle Guidance", "particle", s) for s in (5.0, 10.0, 20.0, 40.0, 80.0)],
    "cads": lambda *_: [Setting("CADS", "cads", s) for s in (0.5, 1.0, 2.0, 4.0, 8.0)],
    "interval": lambda *_: [Setting("Interval Guidance", "interval", s) for s in (0.2, 0.4, 0.6, 0.8, 1.0)],
    "sgf": lambda *_: [Setting("SGF kernel, early", "sgf", s) for s in (4.0, 8.0, 16.0, 32.0, 64.0)],
    "noise": lambda *_: [Setting("farthest initial noise", "noise", s) for s in (1.0, 3.0, 15.0)],
}


def _with_interval(sweep: Callable[[float, float], list[Setting]]) -> Callable[[float, float], list[Setting]]:
    def limited(formula: float, ours: float) -> list[Setting]:
        return [
            replace(s, label=f"{s.label}, with Interval Guidance", options={**s.options, "interval": INTERVAL})
            for s in sweep(formula, ours)
        ]

    return limited


# Every method may limit the guidance as well, so that none wins by that alone. Ours then limits it for all images
# instead of releasing it for those that collide.
SWEEPS |= {f"{name}-interval": _with_interval(sweep) for name, sweep in list(SWEEPS.items()) if name != "interval"}
SWEEPS["spell-interval"] = lambda _, r: [
    spell_setting("SPELL, with Interval Guidance", round(f * r, 3), release=None, interval=INTERVAL)
    for f in (0.5, 0.75, 1, 1.25, 1.5, 2)
]


def diversity(study: Study, reference: ReferenceImages, radius: float | None = None) -> dict[str, Any]:
    """Reproduce the paper's table of recall, Vendi and FID with and without SPELL."""
    formula, ours = radii(study, radius)
    settings = [PLAIN, paper_setting(formula), spell_setting("SPELL, defaults", formula), variety_setting(ours)]
    base, rows = None, []
    for setting, measured in _metrics_of(study, reference, settings):
        base = base or measured
        row = {**_named(setting), **measured.estimates()}
        if measured is not base:
            row["change"] = measured.changes(base)
        rows.append(row)
    return {"rows": rows}


def tradeoff(
    study: Study, reference: ReferenceImages, methods: Sequence[str] | None = None, radius: float | None = None
) -> dict[str, Any]:
    """Sweep each method's strength: all points, Pareto fronts and the area they dominate.

    Raises:
        ValueError: an unknown method.
    """
    names = list(methods or SWEEPS)
    unknown = [name for name in names if name not in SWEEPS]
    if unknown:
        raise ValueError(f"the method {unknown[0]!r} is not known; use some of {', '.join(SWEEPS)}.")
    formula, ours = radii(study, radius)
    sweeps = {name: SWEEPS[name](formula, ours) for name in names}
    rows, base = [], None
    for setting, measured in _metrics_of(study, reference, [PLAIN, *(s for sweep in sweeps.values() for s in sweep)]):
        base = base or measured
        change = {} if measured is base else {"change": measured.changes(base)}
        rows.append({**_named(setting), **measured.estimates(), **change})
    fronts = []
    for across, up in PAIRS.items():
        if any(up not in row for row in rows):
            continue  # features without text have no caption score
        for sweep in sweeps.values():
            label = sweep[0].label
            points = [(r[across]["value"], r[up]["value"]) for r in rows if r["label"] in ("plain", label)]
            area = hypervolume(points, origin(across, rows[0]))
            fronts.append({"across": across, "up": up, "label": label, "hypervolume": area, "front": front(points)})
    return {"rows": rows, "fronts": fronts, "verdict": verdict(fronts)}


def origin(across: str, plain: dict[str, Any]) -> tuple[float, float]:
    """Return the worst point, from which the area under a front is measured."""
    return (1.0, WORST_CAPTION * plain["caption"]["value"]) if across == "vendi" else (0.0, 0.0)


def verdict(fronts: Sequence[dict[str, Any]]) -> list[str]:
    """Say which method dominates the largest area for each pair of metrics, and where our setting loses."""
    lines = []
    for across, up in PAIRS.items():
        ranked = sorted((f for f in fronts if f["across"] == across), key=lambda f: -f["hypervolume"])
        if not ranked:
            continue
        order = ", ".join(f"{f['label']} {f['hypervolume']:.3f}" for f in ranked)
        labels = [f["label"] for f in ranked]
        ours = variety_setting(1.0).label
        if ours not in labels:
            end = ""
        elif labels[0] == ours:
            end = f" {ours} dominates the largest area."
        else:
            end = f" {ours} loses to {', '.join(labels[: labels.index(ours)])}."
        lines.append(f"{up} over {across}, area: {order}.{end}")
    return lines


def sparsity(study: Study, reference: ReferenceImages, radius: float | None = None) -> dict[str, Any]:
    """Measure the share of touched trajectories, and the push as a share of the score, by noise level."""
    formula, ours = radii(study, radius)
    rows = []
    for setting, cells in study.cells(
        [paper_setting(formula), spell_setting("SPELL, defaults", formula), variety_setting(ours)]
    ):
        rows += [{**_named(setting), **row} for row in levels(cells)]
    return {"rows": rows}


def levels(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return a row per noise level t = σ/(α + σ): the share of images with an active shield, and their push/score."""
    level, active, ratio = (torch.cat([c[k].flatten() for c in cells]) for k in ("level", "active", "ratio"))
    rows = []
    for high, low in LEVELS:
        inside = (level > low) & (level <= high)
        if not inside.any():
            continue
        touched = torch.cat([_touched(cell, low, high) for cell in cells])
        push = ratio[inside & (active > 0)].double()
        row: dict[str, Any] = {"from": high, "to": low, "touched": mean_estimate(touched)}
        if len(push):
            row |= {"ratio_median": push.median().item(), "ratio_max": push.max().item()}
        rows.append(row)
    return rows


def _touched(cell: Cell, low: float, high: float) -> Tensor:
    """Return (images,) 1 where a shield was active at a step between the levels."""
    inside = (cell["level"] > low) & (cell["level"] <= high)
    return ((cell["active"] > 0) & inside).any(dim=0).double()[inside.any(dim=0)]


def shielding(study: Study, reference: ReferenceImages, radius: float | None = None) -> dict[str, Any]:
    """Reproduce the paper's table of protected training images: share inside shields, precision and time, by method.

    The protected set is the reference: real images, or plain ones of other seeds. By default a tenth of the plain
    images lie within the radius, near the share that the paper starts from.
    """
    protected = reference.latents()
    (_, plain), *_ = study.cells([PLAIN], protected)
    found = torch.cat([cell["protected"] for cell in plain])
    radius = found.quantile(0.1).item() if radius is None else radius
    settings = [
        PLAIN,
        spell_setting("SPELL-1, the paper's sum", radius, **_PAPER, nearest=1),
        spell_setting("SPELL-10, the paper's sum", radius, **_PAPER, nearest=10),
        spell_setting("SPELL, guidance kept", radius, radius_schedule="constant", release=None),
        spell_setting("SPELL, protecting (default of generate)", radius, **PROTECTION),
    ]
    features, rows = reference.features(), []
    for setting, cells in study.cells(settings, protected):
        distance = torch.cat([cell["protected"] for cell in cells])
        inside = (distance < radius).double()
        rows.append(
            {
                **_named(setting),
                "inside": mean_estimate(inside),
                "nearest_protected": distance.min().item(),
                **SettingMetrics(cells, [features[prompt] for prompt in study.prompts]).estimates(),
            }
        )
    return {"rows": rows, "radius": radius, "protected": len(protected)}


def _metrics_of(
    study: Study, reference: ReferenceImages, settings: Sequence[Setting]
) -> Iterator[tuple[Setting, SettingMetrics]]:
    found = reference.features()
    for setting, cells in study.cells(settings):
        yield setting, SettingMetrics(cells, [found[prompt] for prompt in study.prompts])


def _named(setting: Setting) -> dict[str, Any]:
    return {"label": setting.label, "method": setting.method, "strength": setting.strength, "options": setting.options}


EXPERIMENTS = {"diversity": diversity, "tradeoff": tradeoff, "sparsity": sparsity, "shielding": shielding}
