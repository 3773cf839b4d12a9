"""Measure images again, against a protected set and against the claims of their certificates.

A file is enough to compute again its digests, the distance of the encoded picture, which set and version. The
distance of the sampler's finished latents cannot, since the file does not hold them; generating again from the prompt,
seed, model and settings in the certificate gives them, and the run's audit log shows whether the certificate is the one
that was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from shielded.certificates.audit import LOG, read_log
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
from shielded.certificates.copy_check import copy_fields, refuted_copy
from shielded.latent_space import LatentSpace
from shielded.protected import ProtectedSet

TOLERANCE = 0.01  # of the radius: what other hardware or precision may make of a distance that is computed again


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
        one result per image, and path of a log -> what is wrong with it, for every audit log beside the images.

    Raises:
        ValueError: there is no radius to measure with.
    """
    papers = [_Certificates(file) for file, _ in loaded]
    decoded = space.encode([image for _, image in loaded])
    logs = {
        folder: read_log(folder / LOG) for folder in {file.parent for file, _ in loaded} if (folder / LOG).is_file()
    }
    opened: dict[int, Any] = {}
    results = []
    copies = copy_fields([image for _, image in loaded], protected)
    for (file, image), paper, z, copy in zip(loaded, papers, decoded, copies, strict=True):
        records, _ = logs.get(file.parent, ([], []))
        found = measure(z[None], protected, _radius(radius, protected, paper, records, file))[0]
        problems = [*paper.problems, *_disagreements(file, image, paper), *_unlogged(file, paper, records)]
        for claim in paper.claims:
            problems += _refuted(claim, image, found, protected, z, opened, copy)
        name, distance, own = found.leak or (found.id, found.distance, found.radius)
        problems = list(dict.fromkeys(problems))
        result = Verified(str(file), name, distance, own, found.leak is not None, bool(paper.claims), problems)
        own_copy = {key: copy[key] for key in ("copy_id", "copy_similarity", "copy") if copy}
        results.append(replace(result, **own_copy))
    return results, {str(folder / LOG): problems for folder, (_, problems) in logs.items()}


class _Certificates:
    """The certificates of an image file: the one beside it, the one inside it, and what is wrong with their text."""

    def __init__(self, file: Path) -> None:
        with Image.open(file) as image:
            image.load()  # text may follow the pixels
            inner = getattr(image, "text", {}).get(PNG_KEY)
        outer = beside(file).read_text(errors="replace") if beside(file).is_file() else None
        self.problems: list[str] = []
        self.outer = self._parsed(outer, f"beside it ({beside(file).name})")
        self.inner = self._parsed(inner, "inside it")
        claims = [replace(c, sha256=None) for c in (self.outer, self.inner) if c is not None]
        self.claims = claims[:1] if len(claims) == 2 and claims[0] == claims[1] else claims

    def _parsed(self, text: str | None, where: str) -> Certificate | None:
        try:
            return None if text is None else Certificate.from_json(text)
        except ValueError as error:
            self.problems.append(f"the certificate {where} cannot be read: {error}")
            return None


def _radius(
    radius: float | None, protected: ProtectedSet, paper: _Certificates, records: list[dict[str, Any]], file: Path
) -> float | None:
    if radius is not None or not protected.radii.isnan().any():
        return radius
    logged = [record.get("settings", {}).get("radius") for record in records[:1] if record.get("event") == "start"]
    known = [value for value in (*logged, *(claim.radius for claim in paper.claims)) if value is not None]
    if not known:
        raise ValueError(f"the protected set has no radii of its own and {file} no certificate; pass --radius.")
    return known[0]


def _disagreements(file: Path, image: Image.Image, paper: _Certificates) -> list[str]:
    """List contradictions between the file, the certificate beside it and the one inside it."""
    problems = []
    outer, inner = paper.outer, paper.inner
    if outer is not None and outer.sha256 != file_sha256(file) and outer.pixels_sha256 == pixels_sha256(image):
        stripped = file.suffix.lower() == ".png" and inner is None
        what = "its certificate was stripped from its metadata" if stripped else "the file was written anew"
        problems.append(f"{what}; the pixels are those that were certified")
    if len(paper.claims) == 2:
        one, other = map(asdict, paper.claims)
        names = ", ".join(f.name for f in fields(Certificate) if one[f.name] != other[f.name])
        problems.append(f"the certificates beside and inside it differ ({names}), so one of them is forged")
    return problems


def _unlogged(file: Path, paper: _Certificates, records: list[dict[str, Any]]) -> list[str]:
    """List contradictions between the certificates and the run's audit log."""
    entry = next((r for r in records if r.get("event") == "certified" and r.get("image") == file.name), None)
    if entry is None:
        return ["the audit log beside it does not list it"] if records and paper.claims else []
    if not paper.claims:
        return ["its certificate was stripped: the audit log lists one"]
    if any(certificate_sha256(claim) != entry.get("certificate_sha256") for claim in paper.claims):
        return ["its certificate is forged: it is not the one in the audit log"]
    return []


def _refuted(
    claim: Certificate,
    image: Image.Image,
    found: Measured,
    protected: ProtectedSet,
    decoded: Tensor,
    opened: dict[int, Any],
    copy: dict[str, Any],
) -> list[str]:
    """List the claims that do not hold for this picture and set; `opened` caches earlier versions of the set."""
    problems = []
    if claim.pixels_sha256 != pixels_sha256(image):
        problems.append("the picture was edited after it was certified: its pixels are others")
    if claim.nearest_distance < claim.radius and not claim.inside:
        problems.append(
            f"its certificate contradicts itself: at {claim.nearest_distance:.2f} it lies inside the radius "
            f"{claim.radius:g}, but is certified as outside"
        )
    if claim.protected_set != protected.space.fingerprint:
        return [*problems, "its certificate is for another latent space than that of this protected set"]
    version = claim.protected_version
    if version not in opened:
        try:
            then = protected if version == protected.version else protected.at(version)
            opened[version] = then, history_sha256(then)
        except (ValueError, TypeError) as error:
            opened[version] = error, None
    then, history = opened[version]
    if isinstance(then, Exception):
        return [*problems, f"its certificate cannot be checked: {then}"]
    if claim.protected_history != history:
        return [*problems, "its certificate is for another protected set"]
    if claim.pixels_sha256 == pixels_sha256(image):
        problems += refuted_copy(claim, copy if then is protected else copy_fields([image], then)[0])
    if claim.decoded_distance is None or problems:
        return problems
    distance, name = found.distance, found.id
    if then is not protected:
        distances, ids = then.nearest(decoded[None], 1)
        distance, name = float(distances[0, 0]), ids[0][0]
    if abs(distance - claim.decoded_distance) > TOLERANCE * claim.radius:
        problems.append(
            f"its certificate is forged: it says that the picture lies {claim.decoded_distance:.2f} from "
            f"{claim.decoded_id}, measured is {distance:.2f} from {name}"
        )
    return problems
