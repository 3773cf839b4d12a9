"""The sentences and numbers at the top of the page, as plain text; the template escapes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shielded.runs.report.rows import number


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
    n, radius, prompt = report.get("n"), report.get("radius"), report.get("prompt")
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
    unresolved = len(report.get("unresolved") or ())
    if unresolved:
        verb, them = ("is", "it") if unresolved == 1 else ("are", "them")
        sentences.append(
            f"{counted(unresolved, 'image')} {verb} still inside a shield or closer than the radius to another image: "
            f"SPELL found no way out for {them}."
        )
    refused = len(report.get("refused") or ())
    if refused:
        verb, reason = ("was", "it lies") if refused == 1 else ("were", "they lie")
        sentences.append(
            f"{counted(refused, 'image')} {verb} refused and not written, because {reason} inside a shield."
        )
    return " ".join(sentences)


def warning(report: Mapping) -> str:
    """Warn of images with SPELL that lie inside a shield; "" if there are none."""
    n = report.get("leaks_with")
    if not n:
        return ""
    return (
        f"{counted(n, 'image')} with SPELL still {'lies' if n == 1 else 'lie'} inside a shield. "
        "The certificates below say which; do not rely on the distance there."
    )


def facts(report: Mapping) -> list[Fact]:
    """List the quantities that were measured without or with SPELL."""
    n, radius = report.get("n"), report.get("radius")
    reach = "smallest distance" if radius is None else f"radius {number(radius)}"
    quantities: list[tuple[str, str, Callable[[float], str], str]] = [
        ("leaks", "Images inside a shield", str, "" if n is None else f"of {n}"),
        ("min_distance", "Nearest protected image", number, reach),
        ("min_decoded_distance", "The same, pictures encoded again", number, reach),
        ("min_pair_distance", "The two images that are most alike", number, f"apart; radius {number(radius)}"),
        ("vendi", "Vendi score", number, "effective number of images"),
        ("seconds", "Time", lambda seconds: f"{seconds:.1f} s", "" if n is None else f"for {counted(n, 'image')}"),
    ]
    found = []
    for key, label, write, note in quantities:
        values = report.get(f"{key}_without"), report.get(f"{key}_with")
        if values != (None, None):
            before, after = (None if value is None else write(value) for value in values)
            found.append(Fact(label, before, after, note))
    return found


def counted(n: int, noun: str, plural: str | None = None) -> str:
    """Write a number of things: "1 image", "2 images"."""
    return f"{n} {noun if n == 1 else plural or noun + 's'}"
