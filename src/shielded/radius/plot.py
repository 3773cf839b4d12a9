"""Draw the measured distances."""

from __future__ import annotations

import os

import numpy as np

from shielded.files import replacing
from shielded.radius.choose import share_within
from shielded.radius.evidence import Evidence


def plot_evidence(evidence: Evidence, path: str | os.PathLike[str], radius: float) -> None:
    """Draw the range of each kind of distance: line 5-95 %, bar 25-75 %, dot median; needs matplotlib.

    Args:
        evidence: the measured distances.
        path: of the PNG.
        radius: drawn as a line, with the share of each row that lies within it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = evidence.by_name()
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
