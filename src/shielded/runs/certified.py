"""From the images of both runs to rows with certificates: whatever repair has not measured is measured."""

from __future__ import annotations

from typing import Any

from PIL import Image

from shielded.certificates.certificate import Certificate, Measured, certify_measured, measure
from shielded.evaluation.encoder import Encoder
from shielded.evaluation.metrics import vendi
from shielded.generation import Generated
from shielded.latent_space import LatentSpace
from shielded.protected import ProtectedSet
from shielded.runs.folder import image_name
from shielded.runs.report.rows import Row
from shielded.runs.results import Side
from shielded.spell import Spell


def certified_rows(
    space: LatentSpace,
    before: Generated,
    after: Generated,
    spell: Spell,
    prompts: list[str],
    seeds: list[int],
    settings: dict[str, Any],
    show_protected: bool,
) -> list[Row]:
    """Put the images of both runs side by side, with their certificates if there is a protected set.

    Args:
        space: with the autoencoder.
        before: images of the model alone.
        after: images with SPELL, of the same prompts and seeds.
        spell: the correction, with the protected set.
        prompts: one per image, or more.
        seeds: likewise.
        settings: how the images were made, for the certificates.
        show_protected: whether rows hold the protected pictures that the certificates name.
    """
    certified_before: dict[int, Certificate] = {}
    certified_after: dict[int, Certificate] = {}
    pictures: dict[int, Image.Image] = {}
    if isinstance(spell.protected, ProtectedSet):
        everything = list(range(len(before.images)))
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
        found_before = _measured(before, everything, space, spell)
        found_after = _measured(after, everything if show_protected else after.kept, space, spell)
        names = [image_name(prompts[i], seeds[i]) for i in everything]
        certified_before = _certified(before, everything, names, found_before, spell.protected)
        certified_after = _certified(after, after.kept, names, found_after, spell.protected, details)
        if show_protected:
            vectors = spell.protected.vectors([found_after[i][0].row for i in everything])
            pictures = dict(enumerate(space.decode(vectors)))
    return [
        Row(
            prompts[i],
            seeds[i],
            before.images[i],
            None if reason else after.images[i],
            certified_before.get(i),
            certified_after.get(i),
            pictures.get(i),
            after.attempts[i],
            after.repair[i],
            reason,
        )
        for i, reason in enumerate(after.refused)
    ]


def scored_sides(before: Generated, after: Generated, encoder: Encoder | None) -> tuple[Side, Side]:
    """Describe both runs as a whole, with Vendi scores if there is an encoder."""
    scores: list[float | None] = [None, None]
    if encoder is not None:
        kept = [after.images[i] for i in after.kept]
        scores = [vendi(encoder.image_features(images)) if images else None for images in (before.images, kept)]
    sides = zip((before, after), scores, strict=True)
    without, with_ = (Side(made.latents, made.seconds, score) for made, score in sides)
    return without, with_


def _measured(
    made: Generated, rows: list[int], space: LatentSpace, spell: Spell
) -> dict[int, tuple[Measured, Measured]]:
    """Batch row -> where its latents and its encoded picture lie; measured now only if repair has not done so."""
    if made.measured:
        return {i: made.measured[i] for i in rows}
    assert isinstance(spell.protected, ProtectedSet)
    encoded = space.encode([made.images[i] for i in rows]) if made.decoded is None else made.decoded[rows]
    latents = measure(made.latents[rows], spell.protected, spell.radius)
    return dict(zip(rows, zip(latents, measure(encoded, spell.protected, spell.radius), strict=True), strict=True))


def _certified(
    made: Generated,
    rows: list[int],
    names: list[str],
    found: dict[int, tuple[Measured, Measured]],
    protected: ProtectedSet,
    details: list[dict[str, Any]] | None = None,
) -> dict[int, Certificate]:
    """Certificates of these batch rows."""
    certificates = certify_measured(
        [made.images[i] for i in rows],
        [names[i] for i in rows],
        protected,
        [found[i][0] for i in rows],
        [found[i][1] for i in rows],
        None if details is None else [details[i] for i in rows],
    )
    return dict(zip(rows, certificates, strict=True))
