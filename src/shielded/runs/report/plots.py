"""Plots of distances and of the trace, as inline SVG.

Positions across are percentages and text has its natural size, so a plot fits a phone and a wide screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

from markupsafe import escape

from shielded.certificates.certificate import Certificate
from shielded.runs.report.rows import Row, by_prompt, number
from shielded.runs.report.summary import shorten

MAX_LINES = 64  # images that get a line each; more are counted
_BINS = 48


def distance_plot(rows: Sequence[Row], radius: float | None) -> str:
    """Draw one line per image: its distance to the nearest protected image, without (hollow) and with SPELL (filled).

    Of more than 64 images, bars show how many lie at which distance.

    Args:
        rows: rows without any distance are left out.
        radius: marked on every line, with the inside shaded; None: not shown.

    Returns:
        An inline SVG that takes the width of its container, styled by the page; "" if there is no distance to show.
    """
    rows = [row for row in rows if known(row.distance_without) or known(row.distance_with)]
    if not rows:
        return ""
    distances = [d for row in rows for d in (row.distance_without, row.distance_with, radius) if known(d)]
    top = _round_up(max(distances))
    if len(rows) > MAX_LINES:
        return _counts_plot(rows, radius, top)

    def x(distance: float) -> float:
        return 100 * distance / top

    marks, y = [], 26
    for prompt, group in by_prompt(rows).items():
        marks.append(f'<text class="strong" x="0" dx="8" y="{y + 20}">{escape(shorten(prompt, 38))}</text>')
        y += 32
        for row in group:
            if known(radius):  # a tick per image: a line all the way down would run through the numbers
                marks.append(_radius_tick(x(radius), y + 18))
            marks.append(_dumbbell(row, x, y))
            y += 42
    zone, axis = _zone(radius, x, y), _axis(x, y, top)
    label = f"Distance of {len(rows)} images to their nearest protected image, without and with SPELL"
    return f'<svg role="img" aria-label="{label}" height="{y + 26}">\n{zone}{axis}\n' + "\n".join(marks) + "\n</svg>"


def trace_plot(trace: Sequence[Mapping]) -> str:
    """Draw how many shields were active and how hard they pushed, over the noise schedule from 1 to 0.

    Args:
        trace: one row per step and image with the keys `noise_level` (1 at the start, 0 at the end), `active`,
            `push`, `score_ratio` and `released`. Lines are means over the images, bands go from the least to the most.

    Returns:
        An inline SVG that takes the width of its container, styled by the page; "" if there is nothing to show.
    """
    quantities = [
        ("active", "Active shields per image"),
        ("push", "Length of the push (latent L2)"),
        ("score_ratio", "Push as a share of the model's score"),
    ]
    if any(row.get("released") for row in trace):
        quantities.append(("released", "Share of the images whose guidance was let go"))
    panels = [(label, points) for key, label in quantities if (points := _aggregate(trace, key))]
    if not panels:
        return ""
    marks = [_panel(label, points, 166 * i) for i, (label, points) in enumerate(panels)]
    y = 166 * len(panels)
    for level, anchor, text in (1, "start", "1 (pure noise)"), (0.5, "middle", "0.5"), (0, "end", "0 (finished)"):
        marks.append(f'<text x="{100 * (1 - level):g}%" y="{y}" text-anchor="{anchor}">{text}</text>')
    label = "Over the noise schedule: " + ", ".join(label for label, _ in panels)
    return f'<svg role="img" aria-label="{label}" height="{y + 6}">\n' + "\n".join(marks) + "\n</svg>"


def known(value: float | None) -> TypeGuard[float]:
    """Tell whether a number was measured and is finite."""
    return value is not None and math.isfinite(value)


# ----------------------------------------------------------------------------------------------------------------
# Elements of the plots.


def _round_up(value: float) -> float:
    """Round up to the end of an axis: the next 1, 2, 2.5, 4, 5 or 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 8, 10) if step * power >= value)


def _counts_plot(rows: Sequence[Row], radius: float | None, top: float) -> str:
    """Draw two histograms on one axis, of the distances without and with SPELL."""

    def x(distance: float) -> float:
        return 100 * distance / top

    marks, y = [], 26
    for label, style, distances in (
        ("without SPELL", "bar-before", [row.distance_without for row in rows]),
        ("with SPELL", "bar-after", [row.distance_with for row in rows]),
    ):
        measured = [distance for distance in distances if known(distance)]
        if not measured:
            continue
        counts = [0] * _BINS
        for distance in measured:
            counts[min(_BINS - 1, int(_BINS * distance / top))] += 1
        marks.append(f'<text class="strong" x="100%" y="{y + 14}" text-anchor="end">{len(measured)} {label}</text>')
        for i, count in enumerate(counts):
            if count:
                height = 100 * count / max(counts)
                box = f'x="{100 * i / _BINS:.2f}%" y="{y + 124 - height:.1f}" width="{90 / _BINS:.2f}%"'
                marks.append(f'<rect class="{style}" {box} height="{height:.1f}"><title>{count}</title></rect>')
        y += 128
    zone, axis = _zone(radius, x, y), _axis(x, y, top)
    label = f"Number of images at each distance from their nearest protected image, of {len(rows)}"
    return f'<svg role="img" aria-label="{label}" height="{y + 26}">\n{zone}{axis}\n' + "\n".join(marks) + "\n</svg>"


def _zone(radius: float | None, x: Callable[[float], float], y: float) -> str:
    """Shade what is inside the radius, down to y, with the radius above it."""
    if not known(radius):
        return ""
    edge = x(radius)
    side = 'text-anchor="end" dx="-6"' if edge > 60 else 'dx="6"'
    return (
        f'<rect class="zone" x="0" y="20" width="{edge:.2f}%" height="{y - 20}"/>\n{_radius_tick(edge, 4)}\n'
        f'<text class="strong" x="{edge:.2f}%" y="14" {side}>radius {number(radius)}</text>\n'
    )


def _axis(x: Callable[[float], float], y: float, top: float) -> str:
    ticks = [(0, "start"), (top / 2, "middle"), (top, "end")]
    return f'<line class="rule" x1="0" x2="100%" y1="{y}" y2="{y}"/>\n' + "\n".join(
        f'<text x="{x(value):.2f}%" y="{y + 18}" text-anchor="{anchor}">{value:g}</text>' for value, anchor in ticks
    )


def _radius_tick(x: float, y: float) -> str:
    return f'<line class="radius" x1="{x:.2f}%" x2="{x:.2f}%" y1="{y}" y2="{y + 16}"/>'


def _dumbbell(row: Row, x: Callable[[float], float], y: float) -> str:
    before, after = row.distance_without, row.distance_with
    values = f"{number(before)} → {number(after)}"
    marks = [
        f'<text x="0" dx="8" y="{y + 13}">seed {row.seed}</text>',
        f'<text x="100%" y="{y + 13}" text-anchor="end">{values}</text>',
        f'<line class="rule" x1="0" x2="100%" y1="{y + 26}" y2="{y + 26}"/>',
    ]
    if known(before) and known(after):
        marks.append(f'<line class="link" x1="{x(before):.2f}%" x2="{x(after):.2f}%" y1="{y + 26}" y2="{y + 26}"/>')
    if known(before):
        inside = _inside_class(row.certificate_without)
        marks.append(f'<circle class="before{inside}" cx="{x(before):.2f}%" cy="{y + 26}" r="6"/>')
    if known(after):
        inside = _inside_class(row.certificate_with)
        marks.append(f'<circle class="after{inside}" cx="{x(after):.2f}%" cy="{y + 26}" r="4.5"/>')
    return "\n".join(marks)


def _inside_class(certificate: Certificate | None) -> str:
    """Mark an image as its certificate does: one that leaked only once decoded is drawn outside the shaded zone."""
    return " is-inside" if certificate is not None and certificate.inside else ""


def _aggregate(trace: Sequence[Mapping], key: str) -> list[tuple[float, float, float, float]]:
    """Return (level, mean, least, most) over the images for each noise level, from 1 to 0."""
    levels: dict[float, list[float]] = {}
    for row in trace:
        if known(row.get(key)):
            levels.setdefault(row["noise_level"], []).append(float(row[key]))
    return [(level, sum(v) / len(v), min(v), max(v)) for level, v in sorted(levels.items(), reverse=True)]


def _panel(label: str, points: Sequence[tuple[float, float, float, float]], y: float) -> str:
    top = _round_up(max(most for *_, most in points))

    def at(level: float, value: float) -> str:
        return f"{100 * (1 - level):.2f},{100 * (1 - value / top):.2f}"

    band = [at(level, most) for level, _, _, most in points] + [at(level, least) for level, _, least, _ in points[::-1]]
    mean = [at(level, mean) for level, mean, _, _ in points]
    marks = [f'<text class="strong" x="0" y="{y + 14}">{escape(label)}</text>']
    for share in (0, 0.5, 1):  # the numbers stand at the right, where the noise is gone and the lines run low
        height = y + 26 + 110 * (1 - share)
        marks.append(f'<line class="rule" x1="0" x2="100%" y1="{height:g}" y2="{height:g}"/>')
        if share:
            marks.append(f'<text x="100%" y="{height - 4:g}" text-anchor="end">{top * share:g}</text>')
    marks.append(
        f'<svg x="0" y="{y + 26}" width="100%" height="110" viewBox="0 0 100 100" preserveAspectRatio="none">'
        f'<polygon class="band" points="{" ".join(band)}"/>'
        f'<polyline class="mean" vector-effect="non-scaling-stroke" points="{" ".join(mean)}"/></svg>'
    )
    marks += [
        f'<circle class="after" cx="{100 * (1 - level):.2f}%" cy="{y + 26 + 110 * (1 - mean / top):.2f}" r="2.5"/>'
        for level, mean, _, _ in points
    ]
    return "\n".join(marks)
