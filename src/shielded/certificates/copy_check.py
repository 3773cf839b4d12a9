"""Compare finished pictures with a protected set by its descriptor, and check what certificates say of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from shielded.protected import ProtectedSet

if TYPE_CHECKING:
    from shielded.certificates.certificate import Certificate

TOLERANCE = 0.005  # what other hardware or precision may make of a similarity that is computed again


def copy_fields(pictures: Sequence[Image.Image], protected: ProtectedSet) -> list[dict[str, Any]]:
    """Compute the fields of a `Certificate` that tell copies, of each picture; none if the set has no descriptor."""
    record = protected.descriptor
    if record is None or not pictures:
        return [{} for _ in pictures]
    similarities, ids = protected.copies(pictures)
    threshold = protected.copy_threshold
    descriptor = {"name": record["name"], "sha256": record["sha256"]}
    return [
        {
            "copy_id": str(names[0]),
            "copy_similarity": similarity,
            "copy_threshold": threshold,
            "copy": None if threshold is None else similarity >= threshold,
            "descriptor": descriptor,
        }
        for similarity, names in zip(similarities[:, 0].tolist(), ids, strict=True)
    ]


def refuted_copy(claim: Certificate, found: dict[str, Any]) -> list[str]:
    """List what a certificate says of copies and does not hold.

    Args:
        claim: the certificate.
        found: `copy_fields` of its picture now, against the version of the set that it names.
    """
    if not found:
        if claim.descriptor is not None:
            return ["its certificate names a descriptor, and the set has none"]
        said = (claim.copy_id, claim.copy_similarity, claim.copy_threshold, claim.copy)
        if any(value is not None for value in said):
            return ["its certificate says whether it is a copy, and the set has no descriptor to tell that"]
        return []
    if claim.descriptor is None:
        return ["its certificate does not say whether it is a copy, and the set has a descriptor"]
    if claim.descriptor != found["descriptor"]:
        return ["its certificate is for another descriptor than that of this protected set"]
    problems = []
    if claim.copy_similarity is None or abs(claim.copy_similarity - found["copy_similarity"]) > TOLERANCE:
        problems.append(
            f"its certificate is forged: it says that the picture is similar to {claim.copy_id} by "
            f"{claim.copy_similarity}, measured is {found['copy_similarity']:.3f} to {found['copy_id']}"
        )
    elif claim.copy_threshold != found["copy_threshold"] or (claim.copy is None) != (claim.copy_threshold is None):
        problems.append("its certificate is for another threshold of copies than that of this protected set")
    elif claim.copy_threshold is not None and claim.copy != (claim.copy_similarity >= claim.copy_threshold):
        problems.append(
            f"its certificate contradicts itself: a similarity of {claim.copy_similarity:.3f} and a threshold of "
            f"{claim.copy_threshold:g} make {'no copy' if claim.copy else 'a copy'}"
        )
    return problems
