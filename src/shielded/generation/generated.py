"""Finished images and what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from shielded.certificates.certificate import Measured
from shielded.generation.copies import Copied


@dataclass
class Generated:
    """Images, one per prompt and seed, and what is known of them.

    Args:
        images: decoded.
        latents: (B, *S) float32, what they were decoded from.
        seconds: wall-clock time of sampling, measuring and repairing all of them.
        decoded: (B, *S) the images encoded again; None: not encoded.
        attempts: how often each was sampled.
        repair: "restart" or "push" where that brought the image out of a shield, else None.
        refused: why an image is refused, or None. A refused image lies inside a shield or is a copy: look at it, never
            hand it out.
        measured: per image, where its latents and where its encoded picture lie; empty: not measured.
        copied: per image, the protected picture that it is a copy of, or None.
        causes: per image, what was wrong with it when it was first sampled, or None.
    """

    images: list[Image.Image]
    latents: Tensor
    seconds: float = 0.0
    decoded: Tensor | None = None
    attempts: list[int] = field(default_factory=list)
    repair: list[str | None] = field(default_factory=list)
    refused: list[str | None] = field(default_factory=list)
    measured: list[tuple[Measured, Measured]] = field(default_factory=list)
    copied: list[Copied | None] = field(default_factory=list)
    causes: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.images)
        self.attempts = self.attempts or [1] * count
        self.repair = self.repair or [None] * count
        self.refused = self.refused or [None] * count
        self.copied = self.copied or [None] * count
        self.causes = self.causes or [None] * count

    @property
    def kept(self) -> list[int]:
        """Batch rows of the images that are not refused."""
        return [i for i, reason in enumerate(self.refused) if reason is None]

    @classmethod
    def joined(cls, parts: Sequence[Generated]) -> Generated:
        """Concatenate batches, at least one."""
        decoded = [part.decoded for part in parts if part.decoded is not None]
        return cls(
            [image for part in parts for image in part.images],
            torch.cat([part.latents for part in parts]),
            sum(part.seconds for part in parts),
            torch.cat(decoded) if len(decoded) == len(parts) else None,
            [n for part in parts for n in part.attempts],
            [how for part in parts for how in part.repair],
            [reason for part in parts for reason in part.refused],
            [found for part in parts for found in part.measured],
            [copy for part in parts for copy in part.copied],
            [cause for part in parts for cause in part.causes],
        )

    def first(self, n: int) -> Generated:
        """Keep the first n images, with their share of the time."""
        return Generated(
            self.images[:n],
            self.latents[:n],
            self.seconds * n / len(self.images),
            None if self.decoded is None else self.decoded[:n],
            self.attempts[:n],
            self.repair[:n],
            self.refused[:n],
            self.measured[:n],
            self.copied[:n],
            self.causes[:n],
        )
