"""One self-contained HTML file that reports a run; it needs neither the network nor JavaScript.

Where the pictures inside it are reduced, the viewer shows the image files beside the page, if they are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from shielded.files import replacing
from shielded.runs.report.content import sections_of
from shielded.runs.report.rows import Diversity, Row
from shielded.runs.report.summary import facts, lead, warning


def write_report(
    path: str | Path,
    report: Mapping,
    rows: Sequence[Row],
    diversity: Diversity | None,
    trace: Sequence[Mapping],
    settings: Mapping[str, object],
    made_with: Mapping[str, object] | None = None,
    title: str = "Images with and without SPELL",
) -> None:
    """Write the page as one file; an existing file is kept until the new one is complete.

    Args:
        path: file to write.
        report: content of `report.json`; missing and None values are shown as not measured or left out.
        rows: images with and without SPELL; may be empty.
        diversity: one batch without and with SPELL, or None.
        trace: `Spell.trace`; may be empty.
        settings: keyword arguments of `Spell`; `protected` and `calibration` are paths.
        made_with: model, steps and guidance, named as in certificates; None: not known.
        title: heading of the page.

    Raises:
        TypeError: a setting is not plain data.
    """
    sections = sections_of(report, rows, diversity, trace, settings, made_with or {})
    html = (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            lead=lead(report),
            warning=warning(report),
            facts=facts(report),
            guaranteed=any(section.name == "guarantee" for section in sections),
            sections=sections,
        )
    )
    with replacing(path) as draft:
        draft.write_text(html, encoding="utf-8")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("shielded.runs.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
