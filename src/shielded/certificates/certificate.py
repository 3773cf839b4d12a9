"""The distance of a finished image from its nearest protected image, measured exactly, and its record.

A certificate is evidence that anyone with the protected set can compute again, not a signature: whoever can write the
image can write a certificate. `shielded.certificates.verification` computes it again and compares.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from shielded import __version__
from shielded.certificates import reading
from shielded.certificates.copy_check import copy_fields
from shielded.files import file_sha256, replacing, sha256, write_json
from shielded.latent_space import to_rgb
from shielded.protected import ProtectedSet

PNG_KEY = "shielded"  # keyword of the PNG text chunk


@dataclass(frozen=True)
class Certificate:
    """The evidence for one image. Distances are L2 in the latent space of the protected set.

    It states how far the image's latents lie from the nearest protected latents, and how similar the set's descriptor
    finds it to a protected picture, no more: a picture outside every shield that is no copy by the descriptor can still
    resemble a protected one in ways that neither measures.

    Args:
        image: file name.
        sha256: of the file, whole. None in the copy inside the file, which cannot hold its own digest.
        nearest_id: the protected image that the sampler's finished latents are nearest to, or, if there is one, the
            nearest of those whose shield they are in.
        nearest_distance: from there to the finished latents.
        radius: of its shield.
        inside: the finished latents or the encoded picture lie inside a shield: a leak.
        attempts: how often the image was sampled.
        protected_set: fingerprint of the latent space.
        protected_version: of the set.
        protected_history: digest of the set's history up to this version; tells sets of one latent space apart.
        pixels_sha256: of size and RGB pixels alone, so that it holds for the same picture in another file.
        decoded_id: the protected image that the picture's pixels, encoded again, are nearest to. None: not measured.
        decoded_distance: from there to the encoded picture.
        copy_id: the protected image that the picture is most similar to by the set's descriptor; None: it has none.
        copy_similarity: cosine of the angle between their descriptors.
        copy_threshold: from which similarity on the set calls a picture a copy. None: it has no threshold.
        copy: whether the picture is called a copy. None: there is no threshold.
        descriptor: `name` and `sha256` of the descriptor.
        repair: "restart" or "push" if that brought the image out of a shield.
        prompt: the text that the image was made from.
        seed: of its initial noise.
        model: the name of the model.
        settings: of Spell and of the sampler.
        others: of each further set that the image was measured against, those of the fields above that depend on the
            set. The fields above are of the set that the image comes closest to, or whose shield it is in.
        package_version: of shielded.
    """

    image: str
    sha256: str | None
    nearest_id: str
    nearest_distance: float
    radius: float
    inside: bool
    attempts: int
    protected_set: str
    protected_version: int
    protected_history: str | None = None
    pixels_sha256: str | None = None
    decoded_id: str | None = None
    decoded_distance: float | None = None
    copy_id: str | None = None
    copy_similarity: float | None = None
    copy_threshold: float | None = None
    copy: bool | None = None
    descriptor: dict[str, str] | None = None
    repair: str | None = None
    prompt: str | None = None
    seed: int | None = None
    model: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    others: list[dict[str, Any]] = field(default_factory=list)
    package_version: str = __version__

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Certificate:
        """Read a JSON file.

        Raises:
            ValueError: it is not a certificate.
        """
        return cls.from_json(Path(path).read_text(errors="replace"))

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read the JSON of a certificate; fields of later versions of this package are left out.

        Raises:
            ValueError: the text is not a certificate.
        """
        try:
            return cls.from_content(reading.strict_json(text))
        except ValueError as error:
            raise ValueError(f"this is not a certificate: {error}.") from None

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> Certificate:
        """Read the fields of a certificate, as JSON types.

        Raises:
            ValueError: a field is missing, or of another type or range.
        """
        reading.check_fields(content, _CHECKS)
        missing = [f.name for f in fields(cls) if f.name in _REQUIRED and f.name not in content]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing")
        known = {f.name for f in fields(cls)}
        certificate = cls(**{key: value for key, value in content.items() if key in known})
        for other in certificate.others:
            reading.check_fields(other, {name: check for name, check in _CHECKS.items() if name in OF_A_SET})
        return certificate

    @property
    def views(self) -> list[Certificate]:
        """The certificate as it is for each of its sets, this one first."""
        others = [{key: value for key, value in other.items() if key in OF_A_SET} for other in self.others]
        return [self, *(replace(self, **other) for other in others)]

    @classmethod
    def joined(cls, certificates: Sequence[Certificate]) -> Certificate:
        """Make one certificate of those of one image against several sets."""
        first, *rest = sorted(certificates, key=lambda c: (not c.inside, not c.copy, c.distance - c.radius))
        others = [{name: getattr(c, name) for name in OF_A_SET} for c in rest]
        return replace(first, others=others)

    @property
    def distance(self) -> float:
        """The smaller of the distances of the finished latents and of the picture, encoded again."""
        decoded = self.decoded_distance
        return self.nearest_distance if decoded is None else min(self.nearest_distance, decoded)


# The fields that depend on the protected set.
OF_A_SET = (
    "nearest_id",
    "nearest_distance",
    "radius",
    "inside",
    "protected_set",
    "protected_version",
    "protected_history",
    "decoded_id",
    "decoded_distance",
    "copy_id",
    "copy_similarity",
    "copy_threshold",
    "copy",
    "descriptor",
)

# What a reader of a certificate may rely on, whoever wrote it.
_CHECKS: dict[str, reading.Check] = {
    "image": reading.FILE_NAME,
    "sha256": reading.or_none(reading.DIGEST),
    "nearest_id": reading.TEXT,
    "nearest_distance": reading.LENGTH,
    "radius": reading.RADIUS,
    "inside": reading.BOOL,
    "attempts": reading.ATTEMPTS,
    "protected_set": reading.TEXT,
    "protected_version": reading.COUNT,
    "protected_history": reading.or_none(reading.DIGEST),
    "pixels_sha256": reading.or_none(reading.DIGEST),
    "decoded_id": reading.or_none(reading.TEXT),
    "decoded_distance": reading.or_none(reading.LENGTH),
    "copy_id": reading.or_none(reading.TEXT),
    "copy_similarity": reading.or_none(reading.SIMILARITY),
    "copy_threshold": reading.or_none(reading.SIMILARITY),
    "copy": reading.or_none(reading.BOOL),
    "descriptor": reading.or_none(reading.OBJECT),
    "repair": reading.or_none(reading.REPAIR),
    "prompt": reading.or_none((lambda value: isinstance(value, str), "text")),
    "seed": reading.or_none(reading.COUNT),
    "model": reading.or_none(reading.TEXT),
    "settings": reading.OBJECT,
    "others": reading.OBJECTS,
    "package_version": reading.TEXT,
}
_REQUIRED = {f.name for f in fields(Certificate) if f.default is MISSING and f.default_factory is MISSING}


@dataclass(frozen=True)
class Measured:
    """The position of one latent among the protected images.

    Args:
        id: the nearest protected image.
        distance: to it.
        radius: of its shield.
        leak: (id, distance, radius) of the nearest protected image whose shield it is inside of, or None. With radii
            of their own that need not be the nearest of all.
        row: row of the protected image that `evidence` names.
    """

    id: str
    distance: float
    radius: float
    leak: tuple[str, float, float] | None
    row: int = -1

    @property
    def evidence(self) -> tuple[str, float, float]:
        """(id, distance, radius) of the shield that it is inside of, or else of the nearest protected image."""
        return self.leak or (self.id, self.distance, self.radius)


def measure(latents: Tensor, protected: ProtectedSet, radius: float | Tensor | None = None) -> list[Measured]:
    """Measure latents (B, *S) against a protected set, exactly.

    Args:
        latents: in the latent space of the set.
        protected: what they are measured against.
        radius: of every shield, one number or (K,); None: the set's own radii.

    Raises:
        ValueError: an empty set, latents of another shape, or a missing radius.
    """
    latents = latents.detach().float().cpu()
    radii = protected.radii if radius is None else torch.as_tensor(radius, dtype=torch.float64).expand(len(protected))
    distances, rows = protected.nearest_rows(latents, 1)
    hits = protected.within(latents, radius)
    nearest_hit: dict[int, tuple[float, int]] = {}
    for query, row, distance in zip(hits.query.tolist(), hits.row.tolist(), hits.distance.tolist(), strict=True):
        nearest_hit[query] = min(nearest_hit.get(query, (distance, row)), (distance, row))

    def at(row: int, distance: float) -> tuple[str, float, float]:
        return str(protected.ids[row]), distance, float(radii[row])

    leak = {query: at(row, distance) for query, (distance, row) in nearest_hit.items()}
    return [
        Measured(*at(row, distance), leak.get(i), nearest_hit[i][1] if i in nearest_hit else row)
        for i, (row, distance) in enumerate(zip(rows[:, 0].tolist(), distances[:, 0].tolist(), strict=True))
    ]


def certify(
    latents: Tensor,
    files: list[Path],
    protected: ProtectedSet,
    radius: float | None = None,
    attempts: int = 1,
    decoded: Tensor | None = None,
    details: list[dict[str, Any]] | None = None,
) -> list[Certificate]:
    """Measure finished images against a protected set.

    Args:
        latents: (B, *S) final latents of the sampler, row by row those of `files`.
        files: the written images.
        protected: what they are measured against.
        radius: of every shield; None: the set's own radii.
        attempts: how often the images were generated.
        decoded: (B, *S) the written pictures, encoded again; None: not measured.
        details: further fields of each certificate.

    Raises:
        ValueError: not one latent per file, or an empty set.
    """
    if len(latents) != len(files):
        raise ValueError(f"{len(files)} files but {len(latents)} latents; give one row of latents per file.")
    finished = measure(latents, protected, radius)
    again = None if decoded is None else measure(decoded, protected, radius)
    pictures = []
    for file in files:
        with Image.open(file) as image:
            pictures.append(to_rgb(image))
    details = [{"attempts": attempts, **more} for more in details or [{}] * len(files)]
    certificates = certify_measured(pictures, [file.name for file in files], protected, finished, again, details)
    return [replace(c, sha256=file_sha256(file)) for c, file in zip(certificates, files, strict=True)]


def certify_measured(
    pictures: Sequence[Image.Image],
    names: Sequence[str],
    protected: ProtectedSet,
    finished: Sequence[Measured],
    decoded: Sequence[Measured] | None = None,
    details: Sequence[dict[str, Any]] | None = None,
) -> list[Certificate]:
    """Put measurements of finished images into certificates. There are no files yet, so no digests of files.

    Args:
        pictures: the images, in RGB.
        names: of the files that they will be written to.
        protected: what they were measured against.
        finished: where the sampler's finished latents lie.
        decoded: where the pictures, encoded again, lie; None: not measured.
        details: further fields of each certificate.
    """
    history = history_sha256(protected)
    again = [None] * len(pictures) if decoded is None else decoded
    certificates = []
    for picture, name, here, there, copy, more in zip(
        pictures, names, finished, again, copy_fields(pictures, protected), details or [{}] * len(pictures), strict=True
    ):
        nearest, distance, radius = here.evidence
        certificate = Certificate(
            image=name,
            sha256=None,
            nearest_id=nearest,
            nearest_distance=distance,
            radius=radius,
            inside=here.leak is not None or (there is not None and there.leak is not None),
            attempts=1,
            protected_set=protected.space.fingerprint,
            protected_version=protected.version,
            protected_history=history,
            pixels_sha256=pixels_sha256(picture),
            decoded_id=None if there is None else there.id,
            decoded_distance=None if there is None else there.distance,
        )
        certificates.append(replace(certificate, **copy, **more))
    return certificates


def leaks(certificates: Sequence[Certificate]) -> int:
    """Count the images that lie inside a shield."""
    return sum(certificate.inside for certificate in certificates)


# Certificates on disk -----------------------------------------------------------------------------------------------


def beside(file: Path) -> Path:
    """Return the path of an image file's certificate: image.json beside image.png."""
    return file.with_suffix(".json")


def attach_certificate(file: Path, certificate: Certificate) -> Certificate:
    """Write a certificate into a PNG file's metadata and as JSON beside it.

    Returns:
        The certificate with the digest of the file as it is now, as it stands in the JSON.
    """
    text = PngImagePlugin.PngInfo()
    text.add_itxt(PNG_KEY, json.dumps(asdict(replace(certificate, sha256=None))))
    with Image.open(file) as image:
        image.load()
    with replacing(file) as draft:
        image.save(draft, format="PNG", pnginfo=text)
    certificate = replace(certificate, sha256=file_sha256(file))
    certificate.write(beside(file))
    return certificate


# Digests ------------------------------------------------------------------------------------------------------------


def pixels_sha256(image: Image.Image) -> str:
    """Compute the SHA-256 of width, height and the RGB pixels."""
    picture = to_rgb(image)
    return sha256(f"{picture.width}x{picture.height} RGB\n".encode() + picture.tobytes())


def history_sha256(protected: ProtectedSet) -> str:
    """Compute the SHA-256 of a set's history up to its version."""
    return sha256(json.dumps(protected.history, sort_keys=True).encode())


def certificate_sha256(certificate: Certificate | Mapping[str, Any]) -> str:
    """Compute the SHA-256 of a certificate's content, the same for the copies beside a file and inside it.

    Args:
        certificate: the certificate, or its content as it was read, with fields that this version does not know.
    """
    content = asdict(certificate) if isinstance(certificate, Certificate) else dict(certificate)
    return sha256(json.dumps({**content, "sha256": None}, sort_keys=True).encode())
