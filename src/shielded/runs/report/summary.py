"""The sentences and numbers at the top of the page, as plain text; the template escapes them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shielded.runs.report.rows import number

_MAX_LEAD_COLUMNS = 160  # of the prompts


@dataclass(frozen=True)
class Fact:
    """One quantity without and with SPELL.

    Args:
        label: name of the quantity.
        before: value without SPELL; None: not measured.
        after: value with SPELL; None: not measured.
        note: what to compare it with.
    """

    label: str
    before: str | None
    after: str | None
    note: str


def lead(report: Mapping) -> str:
    """Summarise the run in one paragraph."""
    n, radius, prompt = report.get("n"), report.get("radius"), shorten(report.get("prompt") or "", _MAX_LEAD_COLUMNS)
    subject = ("The images" if n is None else counted(n, "image")) + (f" of “{prompt}”" if prompt else "")
    verb, seeds = ("was", "seed") if n == 1 else ("were", "seeds")
    sentences = [f"{subject} {verb} generated twice from the same {seeds}: by the model alone, and with SPELL."]
    if report.get("compared") is False:
        sentences = [f"{subject} {verb} generated with SPELL, and not without it, so there is nothing to compare with."]
    pairs = report.get("min_pair_distance_without"), report.get("min_pair_distance_with")
    if None not in pairs:
        sentences.append(
            f"SPELL pushes images apart that are closer than {number(radius)} to each other: the two that are most "
            f"alike were {number(pairs[0])} apart without it and {number(pairs[1])} with it."
        )
    before, after = report.get("leaks_without"), report.get("leaks_with")
    if before is not None and after is not None:
        reach = "their radius" if radius is None else f"the radius of {number(radius)}"
        sentences.append(f"Closer to a protected image than {reach}: {before} without SPELL, {after} with it.")
    before, after = report.get("copies_without"), report.get("copies_with")
    if after is not None:
        instead = "" if before is None else f"{before} without SPELL, "
        sentences.append(f"Copies of a protected image by the set's descriptor: {instead}{after} with it.")
    unresolved = len(report.get("unresolved") or ())
    if unresolved:
        verb, them = ("is", "it") if unresolved == 1 else ("are", "them")
        sentences.append(
            f"{counted(unresolved, 'image')} {verb} still inside a shield or closer than the radius to another image: "
            f"SPELL found no way out for {them}."
        )
    refused = len(report.get("refused") or ())
    if refused:
        verb, reason, is_ = ("was", "it lies", "is") if refused == 1 else ("were", "they lie", "are")
        sentences.append(
            f"{counted(refused, 'image')} {verb} refused and not written, because {reason} inside a shield or {is_} "
            "too similar to a protected one."
        )
    return " ".join(sentences)


def warning(report: Mapping) -> tuple[str, str] | None:
    """Warn of images with SPELL that lie inside a shield or are copies; a heading and a text, or None."""
    n, copies = report.get("leaks_with"), report.get("copies_with")
    sentences = []
    if n:
        sentences.append(f"{counted(n, 'image')} with SPELL still {'lies' if n == 1 else 'lie'} inside a shield.")
    if copies:
        called = "is a copy" if copies == 1 else "are copies"
        sentences.append(f"{counted(copies, 'image')} with SPELL {called} of a protected one by the set's descriptor.")
    if not sentences:
        return None
    sentences.append("The certificates below say which; do not rely on what is promised there.")
    return "The distance was not kept everywhere." if n else "There are copies.", " ".join(sentences)


def facts(report: Mapping) -> list[Fact]:
    """List the quantities that were measured without or with SPELL."""
    n, radius = report.get("n"), report.get("radius")
    reach = "smallest distance" if radius is None else f"radius {number(radius)}"
    of = "" if n is None else f"of {n}"
    quantities: list[tuple[str, str, Callable[[float], str], str]] = [
        ("leaks", "Inside a shield", str, of),
        ("copies", "Copies", str, of),
        ("nearest", "Nearest protected", "{:.2f}".format, reach),
        ("min_pair_distance", "Two most alike", "{:.2f}".format, f"apart; radius {number(radius)}"),
        ("vendi", "Vendi score", number, "effective number of images"),
        ("seconds", "Time", lambda seconds: f"{seconds:.1f} s", "" if n is None else f"for {counted(n, 'image')}"),
    ]
    if "diversity" in report:  # the score is of other images, and stands with them
        quantities = [quantity for quantity in quantities if quantity[0] != "vendi"]
    nearest = dict(zip(("nearest_without", "nearest_with"), smallest_distances(report), strict=True))
    found = []
    for key, label, write, note in quantities:
        values = [{**report, **nearest}.get(f"{key}_{side}") for side in ("without", "with")]
        if values != [None, None]:
            before, after = (None if value is None else write(value) for value in values)
            found.append(Fact(label, before, after, note))
    return found


def smallest_distances(report: Mapping) -> list[float | None]:
    """Return the smallest distance from a protected image without and with SPELL, of latents or decoded pictures."""
    found = []
    for side in ("without", "with"):
        distances = [report.get(f"{key}_{side}") for key in ("min_distance", "min_decoded_distance")]
        found.append(min((distance for distance in distances if distance is not None), default=None))
    return found


def shorten(text: str, columns: int) -> str:
    """Cut text to a number of columns, East Asian wide characters counting two; a cut ends in an ellipsis."""
    text = " ".join(text.split())
    used = 0
    for i, character in enumerate(text):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used > columns:
            return text[:i].rstrip() + "…"
    return text


def counted(n: int, noun: str, plural: str | None = None) -> str:
    """Write a number of things: "1 image", "2 images"."""
    return f"{n} {noun if n == 1 else plural or noun + 's'}"
