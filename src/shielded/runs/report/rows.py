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
        inside: whether its certificate says that it lies inside a shield, or that it is a copy.
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
        protected: the protected picture to show beside them; None when it is not to be shown.
        attempts: how often the image with SPELL was sampled.
        repair: "restart" or "push" where that brought the image out of a shield.
        refused: why the image with SPELL was refused, or None.
        copied: whether `protected` is the picture that one of the two is a copy of; else it is the nearest one.
        cause: what was wrong with the image when it was first sampled, or None.
        file: name of both image files; None: they are not written.
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
    copied: bool = False
    cause: str | None = None
    file: str | None = None

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
        return pictures if self.protected is None else [*pictures, Figure(self.beside, self.protected, self._beside_id)]

    @property
    def beside(self) -> str:
        """What `protected` is to the pictures."""
        return "protected, copied" if self.copied else "nearest protected"

    @property
    def _beside_id(self) -> str:
        views = [copied_view(c) for c in (self.certificate_with, self.certificate_without)] if self.copied else []
        found = [view.copy_id for view in views if view is not None and view.copy_id is not None]
        if self.copied or self.certificate_with is None:
            return next(iter(found), "")
        return self.certificate_with.nearest_id


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
    """Write the smaller distance and the verdict of a certificate: "9.53 · inside"; "" without a certificate.

    A picture that the set's descriptor calls a copy gets its similarity, too: "12.40 · outside · copy, 0.93".
    """
    if certificate is None:
        return ""
    verdict = "outside"
    if certificate.inside:  # a certificate of latents inside a shield names that shield and its radius
        verdict = "inside" if certificate.nearest_distance < certificate.radius else "inside once decoded"
    copy = copied_view(certificate)
    similar = "" if copy is None or copy.copy_similarity is None else f" · copy, {copy.copy_similarity:.2f}"
    return f"{number(certificate.distance)} · {verdict}{similar}"


def copied_view(certificate: Certificate | None) -> Certificate | None:
    """Return the certificate as it is for the set that has the picture which this one is a copy of; None: no copy."""
    return None if certificate is None else next((view for view in certificate.views if view.copy), None)


def _leaked(certificate: Certificate | None) -> bool:
    return certificate is not None and (certificate.inside or copied_view(certificate) is not None)
