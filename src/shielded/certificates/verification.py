"""Measure images again, against a protected set and against the claims of their certificates.

A file is enough to compute again its digests, the distance of the encoded picture, which set and version. The
distance of the sampler's finished latents cannot, since the file does not hold them; generating again from the prompt,
seed, model and settings in the certificate gives them, and the run's audit log shows whether the certificate is the one
that was written. What is neither computed nor in a log that holds is listed as not checked.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from shielded.certificates.audit import LOG, read_log, reported_logs
from shielded.certificates.certificate import (
    PNG_KEY,
    Certificate,
    Measured,
    beside,
    certificate_sha256,
    file_sha256,
    history_sha256,
    measure,
    pixels_sha256,
)
from shielded.certificates.container import hidden_content
from shielded.certificates.copy_check import copy_fields, refuted_copy
from shielded.certificates.reading import is_number, strict_json
from shielded.latent_space import LatentSpace
from shielded.protected import ProtectedSet
from shielded.protected.columns import Id, Ids

TOLERANCE = 0.01  # of the radius: what other hardware or precision may make of a distance that is computed again
_SAME_RADIUS = 1e-6  # relative; radii are stored in other precisions

# What a file and a set alone do not show.
_UNSEEN = (
    "nearest_id",
    "nearest_distance",
    "attempts",
    "repair",
    "prompt",
    "seed",
    "model",
    "settings",
    "package_version",
)


@dataclass(frozen=True)
class Verified:
    """The result for one image file.

    Args:
        image: path.
        nearest_id: the protected image that the encoded picture is nearest to, or, if there is one, the nearest of
            those whose shield it is in.
        distance: from there.
        radius: of its shield.
        inside: whether the encoded picture lies inside a shield.
        certified: whether the file has a certificate, beside it or inside.
        problems: a sentence for each claim of its certificate that does not hold.
        copy_id: the protected image that it is most similar to by the set's descriptor; None: the set has none.
        copy_similarity: to that image.
        copy: whether that is at least the set's threshold; None: there is none.
        not_checked: fields of its certificate, and parts of its file, that nothing at hand can confirm.
    """

    image: str
    nearest_id: str
    distance: float
    radius: float
    inside: bool
    certified: bool
    problems: list[str]
    copy_id: str | None = None
    copy_similarity: float | None = None
    copy: bool | None = None
    not_checked: list[str] = field(default_factory=list)


def verify_images(
    loaded: Sequence[tuple[Path, Image.Image]],
    space: LatentSpace,
    protected: ProtectedSet,
    radius: float | None = None,
) -> tuple[list[Verified], dict[str, list[str]]]:
    """Measure image files and check their certificates, and the audit logs beside them.

    Args:
        loaded: path and RGB picture of each.
        space: with the autoencoder.
        protected: the set, as it is now.
        radius: of every shield. None: the set's own radii, or, where it has none, that of the audit log or of the
            image's certificate.

    Returns:
        one result per image, and path of a log -> what is wrong with it, for every audit log beside the images, and for
        every one that is missing although the run's `report.json` names it.

    Raises:
        ValueError: there is no radius to measure any image with.
    """
    decoded = space.encode([image for _, image in loaded])
    logs: dict[Path, _Log] = {}
    problems: dict[str, list[str]] = {}
    for folder in dict.fromkeys(file.parent for file, _ in loaded):
        path = folder / LOG
        logs[folder] = log = _Log(*read_log(path)) if os.path.lexists(path) else _Log([], [])
        if os.path.lexists(path):
            problems[str(path)] = log.problems
        for name, reported in reported_logs(folder).items():
            log.problems += reported
            problems[name] = log.problems
    sets = _Versions(protected)
    copies = copy_fields([image for _, image in loaded], protected)
    checks = [
        _Check(file, image, z, copy, logs[file.parent], sets, radius)
        for (file, image), z, copy in zip(loaded, decoded, copies, strict=True)
    ]
    if checks and all(check.radius is None and check.needs_radius for check in checks):
        raise ValueError(
            f"the protected set has no radii of its own and {checks[0].file} no certificate with one; pass --radius."
        )
    return [check.result() for check in checks], problems


class _Log:
    """An audit log: its records and what is wrong with it."""

    def __init__(self, records: list[dict[str, Any]], problems: list[str]) -> None:
        self.problems = problems
        self.is_there = bool(records)
        self.certified: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            if record.get("event") == "certified":
                self.certified.setdefault(str(record.get("image")), []).append(record)
        settings = records[0].get("settings", {}) if records and records[0].get("event") == "start" else {}
        radius = settings.get("radius")
        self.radius = float(radius) if is_number(radius) and radius > 0 else None


class _Versions:
    """A protected set, as it is now and as certificates name it."""

    def __init__(self, protected: ProtectedSet) -> None:
        self.now = protected
        self._opened: dict[int, tuple[ProtectedSet, str] | Exception] = {}

    def at(self, version: int) -> tuple[ProtectedSet, str]:
        """Open a version, with the digest of its history.

        Raises:
            ValueError: it does not exist (any more), or cannot be read.
        """
        if version not in self._opened:
            try:
                then = self.now if version == self.now.version else self.now.at(version)
                self._opened[version] = then, history_sha256(then)
            except Exception as error:  # a damaged version must not end the check of other images
                self._opened[version] = error
        found = self._opened[version]
        if isinstance(found, Exception):
            raise ValueError(str(found)) from None
        return found


@dataclass(frozen=True)
class _Claim:
    """A certificate and the JSON that it was read from."""

    certificate: Certificate
    content: dict[str, Any]

    @property
    def unknown(self) -> list[str]:
        """Fields of later versions of this package, or of nobody."""
        return sorted(self.content.keys() - {f.name for f in fields(Certificate)})


class _Check:
    """All that is checked of one image file."""

    def __init__(
        self,
        file: Path,
        image: Image.Image,
        decoded: Tensor,
        copy: dict[str, Any],
        log: _Log,
        sets: _Versions,
        radius: float | None,
    ) -> None:
        self.file, self.image, self.decoded, self.log, self.sets = file, image, decoded[None], log, sets
        self.copy, self.given = copy, radius
        self.problems: list[str] = []
        self.not_checked: list[str] = []
        self.inner = self.outer = None
        try:
            self.inner = self._parsed(_inner_text(file), "inside it")
            self.outer = self._parsed(_outer_text(file), f"beside it ({beside(file).name})")
        except Exception as error:  # decoders raise all kinds of errors on broken files
            self.problems.append(f"its certificate cannot be read: {error or type(error).__name__}")
        claims = [claim for claim in (self.outer, self.inner) if claim is not None]
        same = len(claims) == 2 and len({certificate_sha256(claim.content) for claim in claims}) == 1
        self.claims = claims[:1] if same else claims

    def _parsed(self, text: str | None, where: str) -> _Claim | None:
        if text is None:
            return None
        try:
            content = strict_json(text)
            return _Claim(self._for_this_set(Certificate.from_content(content)), content)
        except ValueError as error:
            self.problems.append(f"the certificate {where} cannot be read: this is not a certificate: {error}")
            return None

    def _for_this_set(self, certificate: Certificate) -> Certificate:
        """Choose what a certificate against several sets says of this one."""
        for view in certificate.views[1:]:
            try:
                found = self.sets.at(view.protected_version)[1] == view.protected_history
            except ValueError:
                continue
            if found:
                certificate = view
        if certificate.others:
            self.not_checked.append("what it says of other protected sets")
        return certificate

    # The radius ---------------------------------------------------------------------------------------------------

    @cached_property
    def needs_radius(self) -> bool:
        """Whether the set does not say how far to keep away."""
        return bool(self.sets.now.radii.isnan().any())

    @cached_property
    def verified_radius(self) -> float | None:
        """The radius to measure with if the set has none: from outside the certificate."""
        return self.given if self.given is not None else self.log.radius

    @cached_property
    def radius(self) -> float | None:
        """The radius of every shield; None: the set's own."""
        if self.given is not None or not self.needs_radius:
            return self.given
        known = [self.verified_radius, *(claim.certificate.radius for claim in self.claims)]
        return next((value for value in known if value is not None), None)

    # The checks ---------------------------------------------------------------------------------------------------

    def result(self) -> Verified:
        """Run all checks; an error in one of them is a problem of this image alone."""
        own_copy = {key: self.copy[key] for key in ("copy_id", "copy_similarity", "copy") if self.copy}
        if self.radius is None and self.needs_radius:
            self.problems.append("there is no radius to measure it with; pass --radius")
            distances, ids = self.sets.now.nearest(self.decoded, 1)
            where = str(ids[0][0]), float(distances[0, 0])
            return Verified(str(self.file), *where, 0.0, False, bool(self.claims), self.problems, **own_copy)
        found = measure(self.decoded, self.sets.now, self.radius)[0]
        try:
            self._check_file()
            self._check_log()
            for claim in self.claims:
                self._check_claim(claim.certificate)
        except Exception as error:  # one certificate never ends the check of the others
            self.problems.append(f"its certificate cannot be checked: {type(error).__name__}: {error}")
        name, distance, own = found.evidence
        problems = list(dict.fromkeys(self.problems))
        return Verified(
            str(self.file),
            name,
            distance,
            own,
            found.leak is not None,
            bool(self.claims),
            problems,
            not_checked=list(dict.fromkeys(self.not_checked)),
            **own_copy,
        )

    def _check_file(self) -> None:
        """Compare file, certificate beside it and certificate inside it; look for what nobody measures."""
        outer, inner, pixels = self.outer, self.inner, pixels_sha256(self.image)
        digest = file_sha256(self.file)
        if outer is not None and outer.certificate.sha256 != digest and outer.certificate.pixels_sha256 == pixels:
            stripped = self.file.suffix.lower() == ".png" and inner is None
            what = "its certificate was stripped from its metadata" if stripped else "the file was written anew"
            self.problems.append(f"{what}; the pixels are those that were certified")
        if inner is not None and inner.certificate.sha256 is not None:
            self.problems.append("the certificate inside it claims to hold the digest of the file that holds it")
        if len(self.claims) == 2:
            one, other = (claim.content for claim in self.claims)
            names = [k for k in one.keys() | other.keys() if k != "sha256" and one.get(k, one) != other.get(k, other)]
            differ = ", ".join(sorted(names))
            if names:
                self.problems.append(
                    f"the certificates beside and inside it differ ({differ}), so one of them is forged"
                )
        hidden, unseen = hidden_content(self.file, PNG_KEY)
        certified = bool(self.claims) or self.file.name in self.log.certified
        # Files of others may hold what they like, as long as it is said that nobody looked at it.
        (self.problems if certified else self.not_checked).extend(hidden)
        self.not_checked += unseen

    def _check_log(self) -> None:
        """Compare file and certificates with the run's audit log."""
        entries = self.log.certified.get(self.file.name, [])
        if not entries:
            if self.log.is_there and self.claims:
                self.problems.append("the audit log beside it does not list it")
        elif not self.claims:
            self.problems.append("its certificate was stripped: the audit log lists one")
        elif any(certificate_sha256(c.content) != entries[0].get("certificate_sha256") for c in self.claims):
            self.problems.append("its certificate is forged: it is not the one in the audit log")
        if entries and self.claims:
            missing = [name for name, claim in (("beside", self.outer), ("inside", self.inner)) if claim is None]
            self.problems += [f"the certificate {name} it was removed" for name in missing]
        if entries and entries[0].get("sha256") != file_sha256(self.file):
            self.problems.append("the file is not the one in the audit log: it has another digest")
        if len(entries) > 1:
            self.problems.append(f"the audit log lists it {len(entries)} times")
        if self.claims and (not entries or self.log.problems):
            why = "the audit log beside it does not hold" if self.log.problems else "no audit log lists it"
            for claim in self.claims:
                held = [name for name in _UNSEEN if getattr(claim.certificate, name) not in (None, {})]
                self.not_checked += [f"{name} ({why})" for name in [*held, *claim.unknown]]

    def _check_claim(self, claim: Certificate) -> None:
        """Compute again what the picture and the set show of a certificate."""
        problems = self.problems
        if claim.pixels_sha256 != pixels_sha256(self.image):
            problems.append("the picture was edited after it was certified: its pixels are others")
        if claim.image != self.file.name:
            problems.append(f"its certificate is for another file, {claim.image}")
        if claim.nearest_distance < claim.radius and not claim.inside:
            problems.append(
                f"its certificate contradicts itself: at {claim.nearest_distance:.2f} it lies inside the radius "
                f"{claim.radius:g}, but is certified as outside"
            )
        attempts = claim.settings.get("attempts")
        if is_number(attempts) and claim.attempts > attempts:
            problems.append(
                f"its certificate contradicts itself: {claim.attempts} attempts, where {attempts} were allowed"
            )
        if claim.repair == "restart" and claim.attempts < 2:
            problems.append("its certificate contradicts itself: a restart takes a second attempt")
        model = claim.settings.get("model", claim.model)
        if model != claim.model:
            problems.append("its certificate contradicts itself: it names two models")
        if claim.protected_set != self.sets.now.space.fingerprint:
            problems.append("its certificate is for another latent space than that of this protected set")
            return
        try:
            then, history = self.sets.at(claim.protected_version)
        except ValueError as error:
            problems.append(f"its certificate cannot be checked: {error}")
            return
        if claim.protected_history != history:
            problems.append("its certificate is for another protected set")
            return
        if claim.pixels_sha256 == pixels_sha256(self.image):
            problems += refuted_copy(claim, self.copy if then is self.sets.now else copy_fields([self.image], then)[0])
        self._check_distances(claim, then)

    def _check_distances(self, claim: Certificate, then: ProtectedSet) -> None:
        """Compare radius, names, distances and verdict of a certificate with a version of the set."""
        names = claim.nearest_id, claim.decoded_id, claim.copy_id
        rows = _rows(then, names)
        missing = [name for name in names if name is not None and name not in rows]
        if missing:
            self.problems.append(f"its certificate names {', '.join(missing)}, which the protected set does not hold")
        own = float(then.radii[rows[claim.nearest_id]]) if claim.nearest_id in rows else math.nan
        known = [r for r in (own, self.log.radius) if r is not None and not math.isnan(r)]
        known = known or ([] if self.given is None else [self.given])
        agreed = next((r for r in known if abs(claim.radius - r) <= _SAME_RADIUS * r), None)
        if not known:
            self.not_checked.append("radius (the protected set has none of its own; pass --radius)")
        elif agreed is None:
            self.problems.append(f"its certificate is for the radius {claim.radius:g}, not for {known[0]:g}")
        radius = agreed or next(iter(known), claim.radius)
        of_the_set = radius == own and not then.radii.isnan().any()
        found = measure(self.decoded, then, None if of_the_set else radius)[0]
        # From what was measured and the set, never from the claim.
        tolerance = TOLERANCE * (radius if known else found.distance)
        if claim.decoded_distance is None or claim.decoded_id is None:
            self.problems.append("its certificate does not say how far the picture itself lies from the nearest image")
        elif abs(found.distance - claim.decoded_distance) > tolerance:
            self.problems.append(
                f"its certificate is forged: it says that the picture lies {claim.decoded_distance:.2f} from "
                f"{claim.decoded_id}, measured is {found.distance:.2f} from {found.id}"
            )
        elif claim.decoded_id in rows and claim.decoded_id != found.id:
            other = then.vectors([rows[claim.decoded_id]]).double().flatten() - self.decoded.double().flatten().cpu()
            if float(other.norm()) - found.distance > tolerance:
                self.problems.append(
                    f"its certificate names {claim.decoded_id}, but the picture is nearest to {found.id}"
                )
        self._check_verdict(claim, found, tolerance)

    def _check_verdict(self, claim: Certificate, found: Measured, tolerance: float) -> None:
        _, distance, radius = found.evidence
        if abs(distance - radius) <= tolerance:  # another encoder may put it on the other side
            return
        if claim.inside and found.leak is None and claim.nearest_distance >= claim.radius:
            self.problems.append("its certificate contradicts itself: it says inside, and both distances are outside")
        if not claim.inside and found.leak is not None:
            self.problems.append(
                f"its certificate says outside, but the picture lies {distance:.2f} from {found.leak[0]}"
            )


def _inner_text(file: Path) -> str | None:
    with Image.open(file) as image:
        image.load()  # text may follow the pixels
        return getattr(image, "text", {}).get(PNG_KEY)


def _outer_text(file: Path) -> str | None:
    path = beside(file)
    if os.path.lexists(path) and not path.is_file():
        raise OSError(f"{path.name} is no file")
    return path.read_text(errors="replace") if path.is_file() else None


def _rows(protected: ProtectedSet, names: Sequence[str | None]) -> dict[str, int]:
    """Find the rows of ids; certificates hold the text of an id, and a set may have numbers."""
    keys: list[Id] = [name for name in names if name is not None]
    keys += [int(name) for name in keys if isinstance(name, str) and re.fullmatch("-?[0-9]{1,999}", name)]
    if isinstance(protected.ids, Ids):
        found = protected.ids.rows(keys)
    else:
        found = {name: row for row, name in enumerate(protected.ids) if name in keys}
    return {str(key): row for key, row in found.items()}
