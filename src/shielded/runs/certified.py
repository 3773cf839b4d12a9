"""From the images of both runs to rows with certificates: whatever repair has not measured is measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from PIL import Image
from torch import Tensor

from shielded.certificates.certificate import Certificate, Measured, certify_measured, measure
from shielded.evaluation.encoder import Encoder
from shielded.evaluation.metrics import vendi
from shielded.generation import Generated
from shielded.generation.copies import find_copies
from shielded.latent_space import LatentSpace
from shielded.protected import ProtectedSet, parts_of
from shielded.runs.report.rows import Row, copied_view
from shielded.runs.results import Side
from shielded.spell import Spell


def certified_rows(
    space: LatentSpace,
    before: Generated | None,
    after: Generated,
    spell: Spell,
    prompts: list[str],
    seeds: list[int],
    names: list[str],
    settings: dict[str, Any],
    show_protected: bool,
) -> list[Row]:
    """Put the images of both runs side by side, with their certificates if there is a protected set.

    Args:
        space: with the autoencoder.
        before: images of the model alone; None: there are none.
        after: images with SPELL, of the same prompts and seeds.
        spell: the correction, with the protected set.
        prompts: one per image, or more.
        seeds: likewise.
        names: of the files, likewise.
        settings: how the images were made, for the certificates.
        show_protected: whether rows hold the protected pictures that the certificates name.
    """
    certified_before: dict[int, Certificate] = {}
    certified_after: dict[int, Certificate] = {}
    pictures: dict[int, Image.Image] = {}
    copied: dict[int, int] = {}
    if isinstance(spell.protected, ProtectedSet):
        everything = list(range(len(after.images)))
        details = [
            {
                "attempts": after.attempts[i],
                "repair": after.repair[i],
                "prompt": prompts[i],
                "seed": seeds[i],
                "model": settings["model"],
                "settings": settings,
            }
            for i in everything
        ]
        found_after = _measured(after, everything if show_protected else after.kept, space, spell)
        if before is not None:
            found_before = _measured(before, everything, space, spell)
            certified_before = _certified(before, everything, names, found_before, spell)
        certified_after = _certified(after, after.kept, names, found_after, spell, details)
        if show_protected:
            copied = _copied(before, certified_before, spell.protected)
            copied |= _copied(after, certified_after, spell.protected)
            vectors = spell.protected.vectors([copied.get(i, found_after[i][0].row) for i in everything])
            pictures = dict(enumerate(space.decode(vectors)))
    return [
        Row(
            prompts[i],
            seeds[i],
            None if before is None else before.images[i],
            None if reason else after.images[i],
            certified_before.get(i),
            certified_after.get(i),
            pictures.get(i),
            after.attempts[i],
            after.repair[i],
            reason,
            i in copied,
            after.causes[i],
            names[i],
        )
        for i, reason in enumerate(after.refused)
    ]


def scored_sides(
    before: Generated | None, after: Generated, encoder: Encoder | None, prompts: list[str]
) -> tuple[Side | None, Side]:
    """Describe both runs as a whole, with Vendi scores if there is an encoder.

    Args:
        before: images of the model alone; None: there are none.
        after: images with SPELL.
        encoder: for the scores, which are of the images of one prompt, averaged over the prompts.
        prompts: one per image, or more.
    """
    with_ = _side(after, after.kept, encoder, prompts)
    return None if before is None else _side(before, range(len(before.images)), encoder, prompts), with_


def _side(made: Generated, rows: Iterable[int], encoder: Encoder | None, prompts: list[str]) -> Side:
    groups: dict[str, list[int]] = {}
    for i in rows:
        groups.setdefault(prompts[i], []).append(i)
    score = None
    if encoder is not None and groups:
        scores = [vendi(encoder.image_features([made.images[i] for i in group])) for group in groups.values()]
        score = sum(scores) / len(scores)
    return Side(made.latents, made.seconds, score, prompts[: len(made.images)])


def _copied(made: Generated | None, certified: dict[int, Certificate], protected: ProtectedSet) -> dict[int, int]:
    """Batch row -> row of the protected picture that its image is a copy of."""
    if made is None:
        return {}
    rows = [i for i, certificate in certified.items() if copied_view(certificate) is not None]
    found = dict(zip(rows, find_copies([made.images[i] for i in rows], protected), strict=True))
    return {i: copy.row for i, copy in {**dict(enumerate(made.copied)), **found}.items() if copy is not None}


def _measured(
    made: Generated, rows: list[int], space: LatentSpace, spell: Spell
) -> dict[int, tuple[Measured, Measured]]:
    """Batch row -> where its latents and its encoded picture lie; measured now only if repair has not done so."""
    if made.measured:
        return {i: made.measured[i] for i in rows}
    assert isinstance(spell.protected, ProtectedSet)
    if made.decoded is None:
        made.decoded = space.encode(made.images)
    found = (measure(z[rows], spell.protected, spell.radius) for z in (made.latents, made.decoded))
    return dict(zip(rows, zip(*found, strict=True), strict=True))


def _certified(
    made: Generated,
    rows: list[int],
    names: list[str],
    found: dict[int, tuple[Measured, Measured]],
    spell: Spell,
    details: list[dict[str, Any]] | None = None,
) -> dict[int, Certificate]:
    """Certificates of these batch rows, against each of the sets that count."""
    assert isinstance(spell.protected, ProtectedSet)
    parts, start = parts_of(spell.protected), 0
    certificates: list[list[Certificate]] = []
    for part in parts:
        latents, pictures = [found[i][0] for i in rows], [found[i][1] for i in rows]
        if len(parts) > 1:
            assert made.decoded is not None  # `_measured` or repair has encoded the images
            radius = spell.radius[start : start + len(part)] if isinstance(spell.radius, Tensor) else spell.radius
            latents, pictures = (measure(z[rows], part, radius) for z in (made.latents, made.decoded))
        start += len(part)
        certificates.append(
            certify_measured(
                [made.images[i] for i in rows],
                [names[i] for i in rows],
                part,
                latents,
                pictures,
                None if details is None else [details[i] for i in rows],
            )
        )
    joined = [Certificate.joined(of_one) if len(parts) > 1 else of_one[0] for of_one in zip(*certificates, strict=True)]
    return dict(zip(rows, joined, strict=True))
