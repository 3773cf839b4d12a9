"""Draw the experiments as PNG and SVG; needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shielded._extras import missing
from shielded.evaluation.reproduce.experiments import PAIRS
from shielded.evaluation.reproduce.measures import HEADINGS
from shielded.files import replacing


def plot_result(result: dict[str, Any], out: Path) -> list[Path]:
    """Draw a result into the folder `out`, and return the SVG files.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ModuleNotFoundError(missing("plots", "plot")) from error
    matplotlib.use("Agg")
    # Equal results give equal files.
    matplotlib.rcParams["svg.hashsalt"] = "shielded"
    draw = {"tradeoff": _tradeoff, "sparsity": _sparsity}.get(result["experiment"], _bars)
    return [_save(figure, out / f"{result['experiment']}-{name}") for name, figure in draw(result)]


def _save(figure: Any, path: Path) -> Path:
    for suffix in (".png", ".svg"):
        with replacing(path.with_suffix(suffix)) as draft:
            metadata = {"Date": None} if suffix == ".svg" else None
            figure.savefig(draft, format=suffix[1:], dpi=150, metadata=metadata)
    figure.clear()
    return path.with_suffix(".svg")


def _axes(width: float = 6.4, height: float = 4.4) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _tradeoff(result: dict[str, Any]) -> list[tuple[str, Any]]:
    """Draw one plot per pair of metrics: all points of a method with their strengths, its front as a line."""
    found = []
    for across, up in PAIRS.items():
        fronts = [f for f in result["fronts"] if f["across"] == across]
        if not fronts:
            continue
        figure, axes = _axes()
        for f, marker in zip(fronts, "oso^vDPX*", strict=False):
            points = [r for r in result["rows"] if r["label"] == f["label"]]
            xs, ys = ([r[name]["value"] for r in points] for name in (across, up))
            artist = axes.scatter(xs, ys, marker=marker, s=30, label=f["label"])
            for x, y, r in zip(xs, ys, points, strict=True):
                axes.annotate(f"{r['strength']:g}", (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
            axes.plot(*zip(*f["front"], strict=True), color=artist.get_facecolor()[0], alpha=0.5)
        plain = next(r for r in result["rows"] if r["label"] == "plain")
        axes.scatter([plain[across]["value"]], [plain[up]["value"]], color="black", marker="X", s=60, label="plain")
        axes.set_xlabel(HEADINGS[across][0])
        axes.set_ylabel(HEADINGS[up][0])
        axes.legend(fontsize=8)
        found.append((f"{across}-{up}", figure))
    return found


def _sparsity(result: dict[str, Any]) -> list[tuple[str, Any]]:
    found = []
    for name, heading in (("touched", "share of images touched"), ("ratio_median", "push / score, median")):
        figure, axes = _axes()
        for label in dict.fromkeys(r["label"] for r in result["rows"]):
            rows = [r for r in result["rows"] if r["label"] == label and name in r]
            values = [r[name]["value"] if isinstance(r[name], dict) else r[name] for r in rows]
            axes.plot([(r["from"] + r["to"]) / 2 for r in rows], values, marker="o", label=label)
        axes.set_xlabel("noise level t = σ/(α + σ)")
        axes.set_ylabel(heading)
        axes.set_xlim(1, 0)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
        found.append((name.replace("_", "-"), figure))
    return found


def _bars(result: dict[str, Any]) -> list[tuple[str, Any]]:
    names: Sequence[str] = [n for n in ("inside", "recall", "precision", "vendi", "frechet") if n in result["rows"][0]]
    figure, _ = _axes(3 * len(names), 3.4)
    figure.clear()
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        for y, row in enumerate(result["rows"]):
            value = row[name]
            low, high = value.get("low", value["value"]), value.get("high", value["value"])
            axes.plot([low, high], [y, y], color="grey")
            axes.plot(value["value"], y, "o")
        axes.set_title(HEADINGS[name][0] if name in HEADINGS else "share inside shields", fontsize=9)
        first = name == names[0]
        axes.set_yticks(range(len(result["rows"])), [r["label"] for r in result["rows"]] if first else [], fontsize=8)
        axes.invert_yaxis()
    return [("metrics", figure)]
