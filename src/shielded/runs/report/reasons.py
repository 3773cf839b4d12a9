"""Why an image was moved, released, sampled again or refused: one word for its badge, and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shielded.runs.report.plots import known
from shielded.runs.report.rows import Row
from shielded.runs.report.summary import counted


def by_image(trace: Sequence[Mapping]) -> dict[int, list[Mapping]]:
    """Group the rows of a trace by their image."""
    groups: dict[int, list[Mapping]] = {}
    for entry in trace:
        groups.setdefault(entry["image"], []).append(entry)
    return groups


def badge(row: Row, steps: Sequence[Mapping]) -> str:
    """Name what became of an image; "" if nothing is known of its steps.

    Args:
        row: the image.
        steps: its rows of the trace.
    """
    if row.refused is not None:
        return "refused"
    if row.repair is not None:
        return "moved at the end" if row.repair == "push" else "sampled again"
    if not steps:
        return ""
    return "moved" if _pushed(steps) else "unchanged"


def reasons(row: Row, steps: Sequence[Mapping]) -> list[str]:
    """Say in sentences why an image is another one than without SPELL.

    Args:
        row: the image.
        steps: its rows of the trace.
    """
    sentences = []
    pushed = _pushed(steps)
    if pushed:
        first = pushed[0]
        near = dict.fromkeys(entry["nearest_id"] for entry in pushed if entry.get("nearest_id") is not None)
        if near:
            more = f" and {counted(len(near) - 1, 'other')}" if len(near) > 1 else ""
            what = f"{next(iter(near))}{more}"
        else:
            what = "another image"
        level = first.get("noise_level")
        when = f", the first at noise level {level:.2f}" if known(level) else ""
        sentences.append(f"Moved in {len(pushed)} of {counted(len(steps), 'step')}{when}: it came too close to {what}.")
    elif steps:
        sentences.append("Not moved: it came close to nothing.")
    released = sum(bool(entry.get("released")) for entry in steps)
    if released:
        sentences.append(f"Guidance was let go in {counted(released, 'step')}, so that it becomes another picture.")
    if row.attempts > 1:
        times = "twice" if row.attempts == 2 else f"{row.attempts} times"
        sentences.append(f"Sampled {times}{_because(row)}.")
    if row.repair == "push":
        sentences.append(f"Moved out of a shield at the end{'' if row.attempts > 1 else _because(row)}.")
    if row.refused is not None:
        sentences.append(f"Refused: {row.refused}.")
    return sentences


def _pushed(steps: Sequence[Mapping]) -> list[Mapping]:
    return [entry for entry in steps if known(entry.get("push")) and entry["push"] > 0]


def _because(row: Row) -> str:
    return "" if row.cause is None else f", because at first {row.cause}"
