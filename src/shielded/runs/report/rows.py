"""What grid and page show of each seed: pictures, captions and marks, read from certificates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from shielded.certificates.certificate import Certificate


@dataclass(frozen=True)
class Figure:
    """One picture as grid and page show it.

    Args:
        label: how it was made.
        image: None if it was refused.
        caption: what its certificate says of it, in a few words.
        inside: whether its certificate says that it lies inside a shield.
    """

    label: str
    image: Image.Image | None
    caption: str = ""
    inside: bool = False


@dataclass(frozen=True)
class Row:
    """One seed, without and with SPELL.

    Args:
        prompt: text the images were made from.
        seed: seed of both images.
        without: image of the model alone; None if there is none to compare with.
        with_: image of the same seed with SPELL; None if it was refused.
        certificate_without: measurement of `without` against the protected set; None without a set.
        certificate_with: measurement of `with_`; None without a set, or if the image was refused.
        protected: the protected image that the certificate names; None when it is not to be shown.
        attempts: how often the image with SPELL was sampled.
        repair: "restart" or "push" where that brought the image out of a shield.
        refused: why the image with SPELL was refused, or None.
    """

    prompt: str
    seed: int
    without: Image.Image | None
    with_: Image.Image | None
    certificate_without: Certificate | None = None
    certificate_with: Certificate | None = None
    protected: Image.Image | None = None
    attempts: int = 1
    repair: str | None = None
    refused: str | None = None

    @property
    def distance_without(self) -> float | None:
        """Latent L2 distance from `without` to its nearest protected image; None: not measured."""
        return None if self.certificate_without is None else self.certificate_without.nearest_distance

    @property
    def distance_with(self) -> float | None:
        """Latent L2 distance from `with_` to its nearest protected image; None: not measured."""
        return None if self.certificate_with is None else self.certificate_with.nearest_distance

    @property
    def pictures(self) -> list[Figure]:
        """The pictures of this seed from top to bottom."""
        refused = "refused" if self.with_ is None else ""
        before, after = self.certificate_without, self.certificate_with
        pictures = [
            Figure("without SPELL", self.without, caption(before), _leaked(before)),
            Figure("with SPELL", self.with_, refused or caption(after), _leaked(after)),
        ]
        pictures = pictures[self.without is None :]
        return pictures if self.protected is None else [*pictures, Figure("nearest protected", self.protected)]


@dataclass(frozen=True)
class Diversity:
    """One prompt and one batch of seeds, without and with SPELL between the images of the batch.

    Args:
        prompt: text the images were made from.
        seeds: seed of each image.
        without: images of the model alone, in the order of `seeds`.
        with_: images of the same seeds with SPELL.
        vendi_without: Vendi score of `without`: the effective number of different images.
        vendi_with: Vendi score of `with_`.
        radius: L2 distance in the latent space that SPELL kept between the images.

    Raises:
        ValueError: the lists are empty or differ in length.
    """

    prompt: str
    seeds: Sequence[int]
    without: Sequence[Image.Image]
    with_: Sequence[Image.Image]
    vendi_without: float
    vendi_with: float
    radius: float

    def __post_init__(self) -> None:
        sizes = len(self.seeds), len(self.without), len(self.with_)
        if len(set(sizes)) > 1 or not sizes[0]:
            raise ValueError(f"seeds, without and with_ need the same number of entries, at least one; got {sizes}")


def by_prompt(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by prompt, in the order in which the prompts first appear."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row)
    return groups


def number(value: float | None) -> str:
    """Write a number for a reader: two decimals, or three digits below 1.

    >>> number(9.527), number(0.01234), number(None)
    ('9.53', '0.0123', 'not measured')
    """
    if value is None:
        return "not measured"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def caption(certificate: Certificate | None) -> str:
    """Write the smaller distance and the verdict of a certificate: "9.53 · inside"; "" without a certificate."""
    if certificate is None:
        return ""
    verdict = "outside"
    if certificate.inside:  # a certificate of latents inside a shield names that shield and its radius
        verdict = "inside" if certificate.nearest_distance < certificate.radius else "inside once decoded"
    return f"{number(certificate.distance)} · {verdict}"


def _leaked(certificate: Certificate | None) -> bool:
    return certificate is not None and certificate.inside
