"""Content of the page's sections, in reading order: plain text, numbers and pictures; the template places them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from markupsafe import Markup

from shielded.runs.report.embedding import Level, choose_level, embedded
from shielded.runs.report.plots import MAX_LINES, distance_plot, known, trace_plot
from shielded.runs.report.reasons import badge, by_image, reasons
from shielded.runs.report.rows import Diversity, Figure, Row, number
from shielded.runs.report.script import script_of
from shielded.runs.report.summary import counted

_CELLS = ((16, 240), (64, 184), (10**9, 128))  # up to so many cards: width of a picture in pixels, where there is room
_GAP = 12  # pixels between the pictures of a card
_MAX_CARD = 540  # pixels: two cards fit side by side
_FOLDERS = {"without SPELL": "without", "with SPELL": "with"}  # of the image files, beside the page
_NUMERIC = ["Distance", "Encoded again", "Radius", "Distance / radius", "Attempts"]
_COLUMNS = ["Image", "Result", *_NUMERIC, "Repair", "Nearest protected", "SHA-256"]


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Args:
        name: anchor, and name of the macro that draws it.
        heading: title.
        content: argument of the macro.
    """

    name: str
    heading: str
    content: object


def sections_of(
    report: Mapping,
    rows: Sequence[Row],
    diversity: Diversity | None,
    trace: Sequence[Mapping],
    settings: Mapping[str, object],
    made_with: Mapping[str, object],
) -> list[Section]:
    """List the sections that have content; the arguments are those of `write_report`."""
    images = [figure.image for row in rows for figure in row.pictures if figure.image is not None]
    level = choose_level([*images, *(() if diversity is None else (*diversity.without, *diversity.with_))])
    sections = [
        Section("pictures", "Pictures", _pictures(report, rows, trace, level)),
        Section("distances", "Distances", _distances(report, rows)),
        Section("diversity", "Diversity", _diversity(diversity, level)),
        Section("sampling", "While sampling", _sampling(trace)),
        Section("guarantee", "What is guaranteed", _guaranteed(report)),
        Section("refused", "Refused", _refused(report.get("refused") or ())),
        Section("certificates", "Certificates", _certificates(report)),
        Section("settings", "Settings", script_of(report, rows, settings, made_with) if settings else None),
    ]
    return [section for section in sections if section.content]


# ----------------------------------------------------------------------------------------------------------------
# Sections. Each returns an empty value when it has nothing to show.


def _pictures(report: Mapping, rows: Sequence[Row], trace: Sequence[Mapping], level: Level) -> dict[str, object]:
    if not rows:
        return {}
    radius = report.get("radius")
    text = "Same prompt, same seed: first the model's own picture, then the one made with SPELL."
    if rows[0].without is None:
        text = "Pictures made with SPELL."
    if any(known(row.distance_without) or known(row.distance_with) for row in rows):
        text += " The number is the distance to the nearest protected image"
        text += "." if radius is None else f"; below {number(radius)} it lies inside a shield."
    steps = by_image(trace)
    cards: dict[str, list[dict[str, object]]] = {}
    for i, row in enumerate(rows):
        card = _card(row.prompt, row.seed, row.pictures, level, row.file)
        card |= {"badge": badge(row, steps.get(i, ())), "reasons": reasons(row, steps.get(i, ()))}
        cards.setdefault(row.prompt, []).append(card)
    galleries = [_gallery(prompt, group, len(rows)) for prompt, group in cards.items()]
    return {"text": text, "galleries": galleries}


def _distances(report: Mapping, rows: Sequence[Row]) -> dict[str, object]:
    plot = distance_plot(rows, report.get("radius"))
    many = len(rows) > MAX_LINES
    return {"plot": Markup(plot), "shaded": report.get("radius") is not None, "counted": many} if plot else {}


def _diversity(diversity: Diversity | None, level: Level) -> dict[str, object]:
    if diversity is None:
        return {}
    d = diversity
    cards = [
        _card(d.prompt, seed, [Figure("without SPELL", before), Figure("with SPELL", after)], level)
        for seed, before, after in zip(d.seeds, d.without, d.with_, strict=True)
    ]
    return {
        "text": f"One batch of {counted(len(d.seeds), 'image')}. With SPELL the images of a batch push each other away "
        f"while they are closer than {number(d.radius)}.",
        "vendi_without": number(d.vendi_without),
        "vendi_with": number(d.vendi_with),
        "images": len(d.seeds),
        "gallery": _gallery(d.prompt, cards, len(cards)),
    }


def _sampling(trace: Sequence[Mapping]) -> dict[str, object]:
    plot = trace_plot(trace)
    if not plot:
        return {}
    active = [row["active"] for row in trace if known(row.get("active"))]
    text = (
        "At every step the model predicts the finished image. Where that prediction lies inside a shield, SPELL pushes "
        "it out of it; where it does not, SPELL changes nothing."
    )
    if active and not any(active):
        text += " In this run no shield was ever active."
    elif active:
        share = sum(a > 0 for a in active) / len(active)
        text += f" In this run a shield was active in {share:.0%} of all predictions."
    released = {row["image"] for row in trace if row.get("released")}
    if released:
        text += (
            f" For {counted(len(released), 'image')} guidance was let go while they were inside, so that they "
            "could become other pictures."
        )
    return {"text": text, "plot": Markup(plot)}


def _guaranteed(report: Mapping) -> bool:
    return report.get("leaks_with") is not None or bool(report.get("certificates"))


def _refused(refused: Sequence[Mapping]) -> list[dict[str, str]]:
    return [{key: _text(entry.get(key)) for key in ("prompt", "seed", "reason")} for entry in refused]


def _certificates(report: Mapping) -> dict[str, object]:
    certificates = report.get("certificates")
    if not certificates:
        return {}
    sets = dict.fromkeys((c.get("protected_set"), c.get("protected_version")) for c in certificates)
    repairs = [
        f"{counted(report[key], 'image')} {how}"
        for key, how in (("restarted", "left a shield by sampling again"), ("pushed", "by a push at the end"))
        if report.get(key)
    ]
    return {
        "sets": [{"name": name, "version": version} for name, version in sets if name is not None],
        "repairs": f"{', '.join(repairs)}." if repairs else "",
        "columns": [{"heading": heading, "numeric": heading in _NUMERIC} for heading in _COLUMNS],
        "certificates": [_certificate(c) for c in certificates],
    }


def _certificate(c: Mapping) -> dict[str, object]:
    distance, radius, inside, sha256 = (c.get(key) for key in ("nearest_distance", "radius", "inside", "sha256"))
    lengths = ["–" if length is None else number(length) for length in (distance, c.get("decoded_distance"), radius)]
    ratio = f"{distance / radius:.3f}" if known(distance) and radius else "–"
    return {
        "image": _text(c.get("image")),
        "inside": bool(inside),
        "result": "not measured" if inside is None else "outside",
        "numbers": [*lengths, ratio, _text(c.get("attempts"))],
        "repair": _text(c.get("repair")),
        "nearest": _text(c.get("nearest_id")),
        "sha256": f"{sha256[:12]}…" if sha256 else "",
    }


# ----------------------------------------------------------------------------------------------------------------
# Pieces.


def _gallery(prompt: str, cards: list[dict[str, object]], total: int) -> dict[str, object]:
    """Lay out the cards of a prompt, with pictures as large as the number of all cards allows."""
    across = max(len(card["figures"]) for card in cards)  # pyright: ignore[reportArgumentType]
    cell = next(cell for most, cell in _CELLS if total <= most)
    return {"prompt": prompt, "width": min(_MAX_CARD, across * (cell + _GAP) - _GAP), "cards": cards}


def _card(
    prompt: str, seed: int, figures: Sequence[Figure], level: Level, file: str | None = None
) -> dict[str, object]:
    shown = [_figure(figure, prompt, seed, level, file) for figure in figures]
    return {"seed": seed, "name": f"{prompt}, seed {seed}", "figures": shown, "badge": "", "reasons": []}


def _figure(figure: Figure, prompt: str, seed: int, level: Level, file: str | None) -> dict[str, object]:
    image = None
    if figure.image is not None:
        image = {"alt": f"{prompt}, seed {seed}, {figure.label}", **embedded(figure.image, level)}
        folder = _FOLDERS.get(figure.label)
        image["file"] = f"{folder}/{quote(file)}" if file and folder and image["reduced"] else None
    return {"image": image, "label": figure.label, "caption": figure.caption, "inside": figure.inside}


def _text(value: object) -> str:
    return "–" if value is None else str(value)
