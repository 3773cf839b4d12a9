"""How far a finished image is from its nearest protected image, measured exactly."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from shielded.files import write_json
from shielded.protected import ProtectedSet


@dataclass(frozen=True)
class Certificate:
    """The evidence for one image. Distances are L2 in the latent space of the protected set.

    What it says is that the image's latents lie so far from the nearest protected latents, no more: a picture outside
    every shield can still resemble a protected one in ways that this distance does not measure.
    """

    image: str  # file name
    sha256: str  # of the file
    nearest_id: str
    nearest_distance: float
    radius: float
    inside: bool  # closer than the radius to a protected image: a leak
    attempts: int  # how often the image was generated
    protected_set: str  # fingerprint of the latent space
    protected_version: int

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Certificate:
        return cls(**json.loads(Path(path).read_text()))


def certify(
    latents: Tensor,
    files: list[Path],
    protected: ProtectedSet,
    radius: float | None = None,
    attempts: int = 1,
) -> list[Certificate]:
    """Measure finished latents against a protected set.

    Args:
        latents: (B, *S) final latents of the sampler, row by row those of `files`.
        files: the written images.
        protected: what they are measured against.
        radius: of every shield; None: the set's own radii.
        attempts: how often the images were generated.

    Raises:
        ValueError: not one latent per file, or an empty set.
    """
    if len(latents) != len(files):
        raise ValueError(f"{len(files)} files but {len(latents)} latents; give one row of latents per file.")
    distances, rows = protected.nearest_rows(latents.float().cpu(), 1)
    # With radii of their own the nearest reference need not be the one whose shield the image is in.
    leaks = {}
    hits = protected.within(latents.float().cpu(), radius)
    for query, row, distance in zip(hits.query.tolist(), hits.row.tolist(), hits.distance.tolist(), strict=True):
        if query not in leaks or distance < leaks[query][1]:
            leaks[query] = row, distance
    certificates = []
    for i, file in enumerate(files):
        row, distance = leaks.get(i, (int(rows[i, 0]), float(distances[i, 0])))
        certificates.append(
            Certificate(
                image=file.name,
                sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
                nearest_id=str(protected.ids[row]),
                nearest_distance=distance,
                radius=float(protected.radii[row]) if radius is None else radius,
                inside=i in leaks,
                attempts=attempts,
                protected_set=protected.space.fingerprint,
                protected_version=protected.version,
            )
        )
    return certificates


def leaks(certificates: list[Certificate]) -> int:
    """How many of the images lie inside a shield."""
    return sum(certificate.inside for certificate in certificates)
