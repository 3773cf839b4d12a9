"""Write results as JSON, CSV, plots and a page, and as a section of the documentation."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from shielded.evaluation.reproduce.experiments import EXPERIMENTS
from shielded.evaluation.reproduce.measures import HEADINGS, flatten_row
from shielded.evaluation.reproduce.pictures import picture_table
from shielded.evaluation.reproduce.plots import plot_result
from shielded.evaluation.reproduce.reference import ReferenceImages
from shielded.evaluation.reproduce.study import Study
from shielded.files import replace_section, replacing, write_json

_COLUMNS = {
    "diversity": ["recall", "precision", "density", "coverage", "vendi", "similarity", "frechet", "caption"],
    "tradeoff": ["recall", "precision", "density", "coverage", "vendi", "frechet", "caption"],
    "shielding": ["precision", "recall", "vendi", "frechet", "caption"],
}


def reproduce(
    experiment: str, study: Study, reference_path: Path | None = None, plots: bool = True, **options: Any
) -> dict[str, Any]:
    """Run an experiment and write its results to `study.out`; cells of an earlier run are reused.

    Args:
        experiment: a key of `EXPERIMENTS`.
        study: prompts, images, seeds, model.
        reference_path: real images, see `shielded.evaluation.reproduce.reference.real_images`.
        plots: whether plots are drawn, which needs matplotlib.
        **options: options of the experiment, `methods` and `radius`; None: its default.

    Returns:
        The content of `<experiment>.json`.

    Raises:
        ValueError: options out of range, or too few reference images.
    """
    study.out.mkdir(parents=True, exist_ok=True)
    reference = ReferenceImages(study, reference_path)
    given = {name: value for name, value in options.items() if value is not None}
    result = {
        "experiment": experiment,
        "study": {**study.describe(), "prompts": len(study.prompts), "seeds": study.seeds},
        "reference": reference.describe(),
        **EXPERIMENTS[experiment](study, reference, **given),
    }
    write_json(study.out / f"{experiment}.json", result)
    _write_csv(study.out / f"{experiment}.csv", result["rows"])
    drawn = plot_result(result, study.out) if plots else []
    with replacing(study.out / f"{experiment}.html") as draft:
        protected = reference.latents() if experiment == "shielding" else None
        draft.write_text(html_page(result, drawn, picture_table(study, result["rows"], protected)), encoding="utf-8")
    return result


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    columns = [
        {**flatten_row({k: v for k, v in row.items() if k != "options"}), "options": row["options"]} for row in rows
    ]
    names = list(dict.fromkeys(name for row in columns for name in row))
    with replacing(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(columns)


# Tables ----------------------------------------------------------------------------------------------------------


def result_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Format a result as a head and rows of text: values with their 95 % intervals."""
    if result["experiment"] == "sparsity":
        head = ["setting", "noise level t", "images touched", "push/score, median", "most"]
        return head, [
            [
                _name(row),
                f"{row['from']:g}–{row['to']:g}",
                _text(row["touched"], 3),
                f"{row['ratio_median']:.3f}" if "ratio_median" in row else "–",
                f"{row['ratio_max']:.3f}" if "ratio_max" in row else "–",
            ]
            for row in result["rows"]
        ]
    names = [name for name in _COLUMNS[result["experiment"]] if name in result["rows"][0]]
    extra = ["inside"] if result["experiment"] == "shielding" else []
    changed = result["experiment"] == "diversity"
    head = ["setting", *("share inside" for _ in extra), *(HEADINGS[name][0] for name in names)]
    head += ["Vendi, change", "Fréchet, change"] if changed else []
    rows = []
    for row in result["rows"]:
        cells = [_name(row), *(_text(row[name], 4) for name in extra)]
        cells += [_text(row[name], HEADINGS[name][1]) for name in names]
        if changed:
            cells += [_percent(row["change"][name]) if "change" in row else "" for name in ("vendi", "frechet")]
        rows.append(cells)
    return head, rows


def _name(row: dict[str, Any]) -> str:
    options = ", ".join(f"{name} {value}" for name, value in row["options"].items())
    strength = f" ({row['strength']:g}{', ' + options if options else ''})" if row["strength"] else ""
    return f"{row['label']}{strength}"


def _text(value: dict[str, float], decimals: int) -> str:
    text = f"{value['value']:.{decimals}f}"
    if "low" in value:
        text += f" [{value['low']:.{decimals}f}, {value['high']:.{decimals}f}]"
    return text


def _percent(value: dict[str, float]) -> str:
    text = f"{100 * value['value']:+.1f} %"
    if "low" in value:
        text += f" [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"
    return text


def setup(result: dict[str, Any]) -> str:
    """Describe the setup of a result in one paragraph."""
    study = result["study"]
    sampler = f", {study['sampler']}" if study["sampler"] else ""
    shields = (
        f" Radius {result['radius']:.2f}, {result['protected']} protected images." if "protected" in result else ""
    )
    return (
        f"Model {study['model']}, {study['prompts']} prompts × {study['images']} images × {study['seeds']} seeds, "
        f"{study['steps']} steps{sampler}; features: {study['encoder']}; reference: {result['reference']}. Metrics are "
        "taken per prompt and averaged, the Fréchet distance is over all images; brackets are 95 % intervals over the "
        f"prompts.{shields}"
    )


def markdown(result: dict[str, Any]) -> str:
    """Format a result as Markdown: setup, table and verdict."""
    head, rows = result_table(result)
    lines = [setup(result), "", f"| {' | '.join(head)} |", "|---|" + "---|" * (len(head) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    if result.get("verdict"):
        lines += ["", *(f"- {line}" for line in result["verdict"])]
    return "\n".join(lines)


def write_section(document: Path, result: dict[str, Any]) -> None:
    """Replace the text between `<!-- <experiment>:begin -->` and `:end` in a Markdown document.

    Raises:
        ValueError: the document has no such section.
    """
    replace_section(document, result["experiment"], markdown(result))


def html_page(result: dict[str, Any], plots: Sequence[Path], pictures: str = "") -> str:
    """Format a result as a self-contained HTML page with its plots and, as HTML, pictures."""
    head, rows = result_table(result)
    title = f"shielded reproduce {result['experiment']}"
    figures = "".join(f"<figure>{_inline(path)}</figure>" for path in plots)
    listed = "".join(f"<li>{escape(line)}</li>" for line in result.get("verdict", []))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;font-size:.85rem}th,td{padding:.3rem .6rem;border-bottom:1px solid #ccc;"
        "text-align:left}"
        ".pictures td{white-space:nowrap}.pictures img{margin:2px}div{overflow-x:auto}"
        "figure{margin:1rem 0}svg{max-width:100%;height:auto}</style>"
        f"<h1>{title}</h1><p>{escape(setup(result))}</p>{f'<ul>{listed}</ul>' if listed else ''}"
        f"<div><table><thead><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr></thead><tbody>"
        + "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        + f"</tbody></table></div>{pictures}{figures}"
        f"<p>All figures: {result['experiment']}.json, {result['experiment']}.csv.</p></html>\n"
    )


def _inline(path: Path) -> str:
    svg = path.read_text(encoding="utf-8")
    return svg[svg.index("<svg") :]
