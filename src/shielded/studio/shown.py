"""What the page shows of a run: a summary, a table without empty columns, and pairs of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from shielded.runs.report.reasons import badge, by_image, reasons
from shielded.runs.report.rows import Row, copied_view
from shielded.runs.report.summary import counted
from shielded.runs.results import PairReport

_COLUMNS = (
    "prompt",
    "seed",
    "nearest protected",
    "distance without",
    "with",
    "decoded",
    "radius",
    "similarity without",
    "similarity with",
    "result",
    "what happened",
)


@dataclass(frozen=True)
class Result:
    """With and without SPELL at the same seeds.

    Args:
        plain: images without.
        shielded: images with; None where one is refused because it lies inside a shield or is a copy.
        names: of the images: prompt and seed.
        columns: of the table.
        rows: of the table, one per image.
        summary: what happened, in a few sentences.
        trace: trace of the Spell.
        archive: zip file with the images and their certificates.
    """

    plain: list[Image.Image]
    shielded: list[Image.Image | None]
    names: list[str]
    columns: list[str]
    rows: list[list[Any]]
    summary: str
    trace: list[dict[str, Any]]
    archive: Path

    @property
    def table(self) -> str:
        """Columns and rows as HTML; what happened, the last column, stands below the others."""
        *columns, last = self.columns
        row = Markup("<tr>{}</tr>").format
        head = row(Markup("").join(Markup("<th>{}</th>").format(column) for column in columns))
        body = Markup("")
        for *cells, sentences in self.rows:
            body += row(Markup("").join(Markup("<td>{}</td>").format(cell) for cell in cells))
            below = Markup('<td colspan="{}" title="{}">{}</td>').format(len(columns), last, sentences)
            body += Markup('<tr class="below">{}</tr>').format(below)
        table = Markup("<table><thead>{}</thead><tbody>{}</tbody></table>").format(head, body)
        return str(Markup('<div class="scroll">{}</div>').format(table))


def result_of(pair: PairReport, archive: Path) -> Result:
    """Make what the page shows of a run with both sides."""
    several = len({row.prompt for row in pair.rows}) > 1
    columns, rows = table_of(pair, several)
    return Result(
        [row.without for row in pair.rows if row.without is not None],
        [row.with_ for row in pair.rows],
        [f"{row.prompt}, seed {row.seed}" if several else f"seed {row.seed}" for row in pair.rows],
        columns,
        rows,
        summary_of(pair),
        pair.spell.trace,
        archive,
    )


def table_of(pair: PairReport, several: bool = False) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of the table, read from the certificates and the trace; empty columns are left out."""
    steps = by_image(pair.spell.trace)
    rows = [_table_row(row, steps.get(i, ()), several) for i, row in enumerate(pair.rows)]
    used = [i for i in range(len(_COLUMNS)) if any(row[i] != "" for row in rows)]
    return [_COLUMNS[i] for i in used], [[row[i] for i in used] for row in rows]


def summary_of(pair: PairReport) -> str:
    """Say what happened, as Markdown."""
    lines, n = [], len(pair.rows)
    if pair.leaks_without is not None:
        lines.append(
            f"Closer than the radius to a protected image: **{pair.leaks_without} of {n} without SPELL, "
            f"{pair.leaks_with} with**."
        )
    if pair.copies_without is not None:
        kept = pair.copies_with or 0
        lines.append(f"Changed copies, by the descriptor: **{pair.copies_without} of {n} without SPELL, {kept} with**.")
    if pair.unresolved:
        lines.append(f"{len(pair.unresolved)} are still inside a shield or closer than the radius to another image.")
    if pair.refused:
        lines.append(f"{len(pair.refused)} could not be brought outside and are refused: they are not shown.")
    before, after = pair.plain.min_pair_distance, pair.with_.min_pair_distance
    if before is not None and after is not None:
        lines.append(f"The two images of a prompt that are most alike: {before:.1f} apart without, {after:.1f} with.")
    trace = pair.spell.trace
    if pair.corrected:
        steps = len({row["step"] for row in trace if row["push"] > 0})
        lines.append(
            f"{counted(pair.corrected, 'image')} moved, in {steps} of {max(row['step'] for row in trace) + 1} steps."
        )
    else:
        lines.append("No image came closer than the radius to anything, so nothing was changed; a larger radius acts.")
    released = [row for row in trace if row["released"]]
    if released:
        images = counted(len({row["image"] for row in released}), "image")
        lowest = min(row["noise_level"] for row in released)
        lines.append(f"Guidance let go for {images}, down to noise level {lowest:.2f}.")
    again = sum(row.attempts > 1 for row in pair.rows)
    if again:
        lines.append(f"{counted(again, 'image')} sampled again.")
    return "\n\n".join(lines)


def _table_row(row: Row, steps: Sequence[Any], several: bool) -> list[Any]:
    before, after = row.certificate_without, row.certificate_with
    found = after or before
    verdict = ""
    if after is not None:
        verdict = "inside" if after.inside else "copy" if copied_view(after) is not None else "outside"
    what = " ".join(reasons(row, steps)) or badge(row, steps)
    return [
        row.prompt if several else "",
        row.seed,
        "" if found is None else found.nearest_id,
        _rounded(row.distance_without),
        _rounded(row.distance_with),
        _rounded(None if after is None else after.decoded_distance),
        _rounded(None if found is None else found.radius),
        _rounded(None if before is None else before.copy_similarity),
        _rounded(None if after is None else after.copy_similarity),
        "refused" if row.refused else verdict,
        what,
    ]


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
