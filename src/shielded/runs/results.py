"""The typed report of a pair of runs: rows with certificates, and what is counted from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shielded.certificates.certificate import Certificate, leaks
from shielded.protected import ProtectedSet
from shielded.runs.report.rows import Row
from shielded.spell import Spell


@dataclass(frozen=True)
class Side:
    """One of the two runs of a pair.

    Args:
        latents: (B, *S) finished latents, those of refused images included.
        seconds: wall-clock time.
        vendi: Vendi score of the images that were kept, averaged over prompts; None: not computed.
        prompts: one per latent; None: all have the same.
    """

    latents: Tensor
    seconds: float
    vendi: float | None = None
    prompts: Sequence[str] | None = None

    @cached_property
    def min_pair_distance(self) -> float | None:
        """Smallest L2 distance between the latents of two images of one prompt; None if no prompt has two."""
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(self.prompts or [""] * len(self.latents)):
            groups.setdefault(prompt, []).append(i)
        vectors = self.latents.double().flatten(1)
        pairs = [torch.pdist(vectors[rows]).min().item() for rows in groups.values() if len(rows) > 1]
        return min(pairs, default=None)


@dataclass(frozen=True)
class PairReport:
    """The images of the same seeds without and with SPELL, and their certificates.

    Args:
        rows: one per prompt and seed that is finished in both runs.
        without: the run of the model alone; None: it was left out.
        with_: the run with SPELL.
        spell: the correction; its trace covers all rows.
        settings: how the images were made, in JSON types, as certificates hold it.
        requested: number of images asked for.
        stopped: the exception that ended the run early, or None.
    """

    rows: list[Row]
    without: Side | None
    with_: Side
    spell: Spell
    settings: dict[str, Any]
    requested: int
    stopped: BaseException | None = None

    @property
    def plain(self) -> Side:
        """The run of the model alone, where it was not left out."""
        assert self.without is not None
        return self.without

    @property
    def protected(self) -> ProtectedSet | None:
        """The protected set that the images were measured against."""
        return self.spell.protected if isinstance(self.spell.protected, ProtectedSet) else None

    @property
    def radius(self) -> float | None:
        """Radius of all shields, latent L2; None: they differ."""
        if isinstance(self.spell.radius, float):
            return self.spell.radius
        radii = self.protected.radii.unique() if self.spell.radius is None and self.protected is not None else []
        return radii[0].item() if len(radii) == 1 else None

    @property
    def certificates_without(self) -> list[Certificate]:
        """Measurements of the images of the model alone; empty without a set."""
        return [row.certificate_without for row in self.rows if row.certificate_without is not None]

    @property
    def certificates(self) -> list[Certificate]:
        """Certificates of the images with SPELL that were not refused; empty without a set."""
        return [row.certificate_with for row in self.rows if row.certificate_with is not None]

    @property
    def leaks_without(self) -> int | None:
        """Number of images of the model alone that lie inside a shield; None without a set or without them."""
        return None if self.protected is None or self.without is None else leaks(self.certificates_without)

    @property
    def leaks_with(self) -> int | None:
        """Number of images with SPELL, refused ones excluded, that lie inside a shield; None without a set."""
        return None if self.protected is None else leaks(self.certificates)

    @property
    def copies_without(self) -> int | None:
        """Number of images of the model alone that are copies; None: they are not there, or no set can tell."""
        return _copies(self.certificates_without)

    @property
    def copies_with(self) -> int | None:
        """Number of images with SPELL, refused ones excluded, that are copies; None: no set can tell."""
        return _copies(self.certificates)

    @property
    def refused(self) -> list[Row]:
        """Rows whose image with SPELL was refused."""
        return [row for row in self.rows if row.refused is not None]

    @property
    def corrected(self) -> int:
        """Number of images that SPELL pushed in at least one step."""
        return len({row["image"] for row in self.spell.trace if row["push"] > 0})

    @property
    def unresolved(self) -> list[Row]:
        """Rows whose image with SPELL ended too close to something, as the trace says; no repaired or refused ones."""
        last: dict[int, dict[str, Any]] = {}
        for entry in self.spell.trace:
            last[entry["image"]] = entry
        ended = {image for image, entry in last.items() if entry["unresolved"]}
        return [r for i, r in enumerate(self.rows) if i in ended and r.refused is None and r.repair is None]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `report.json` that all commands share, without the audit log."""
        before, after = self.certificates_without, self.certificates
        return {
            "prompt": ", ".join(dict.fromkeys(row.prompt for row in self.rows)),
            "n": len(self.rows),
            "radius": self.radius,
            "leaks_without": self.leaks_without,
            "leaks_with": self.leaks_with,
            "copies_without": self.copies_without,
            "copies_with": self.copies_with,
            "min_distance_without": _least(c.nearest_distance for c in before),
            "min_distance_with": _least(c.nearest_distance for c in after),
            "min_decoded_distance_without": _least(c.decoded_distance for c in before),
            "min_decoded_distance_with": _least(c.decoded_distance for c in after),
            "compared": self.without is not None,
            "vendi_without": None if self.without is None else self.without.vendi,
            "vendi_with": self.with_.vendi,
            "seconds_without": None if self.without is None else self.without.seconds,
            "seconds_with": self.with_.seconds,
            "samplings": sum(row.attempts for row in self.rows),
            "restarted": _count(self.rows, "restart"),
            "pushed": _count(self.rows, "push"),
            "unresolved": [{"prompt": row.prompt, "seed": row.seed} for row in self.unresolved],
            "refused": [
                {"prompt": row.prompt, "seed": row.seed, "attempts": row.attempts, "reason": row.refused}
                for row in self.refused
            ],
            "certificates": [asdict(c) for c in after],
            "certificates_without": [asdict(c) for c in before],
        }


def _least(distances: Iterable[float | None]) -> float | None:
    return min((distance for distance in distances if distance is not None), default=None)


def _copies(certificates: Sequence[Certificate]) -> int | None:
    verdicts = [[view.copy for view in certificate.views if view.copy is not None] for certificate in certificates]
    return sum(map(any, verdicts)) if any(verdicts) else None


def _count(rows: Sequence[Row], repair: str) -> int:
    return sum(row.repair == repair for row in rows)
