"""Protected images and history as one set of references, kept until one of them changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shielded.core.references import Joined, References, Scan, TensorReferences
from shielded.protected import ProtectedSet
from shielded.protected.references import SetReferences
from shielded.spell.history import History
from shielded.spell.mask import flatten
from shielded.spell.ranges import compare_ranges


class StaticReferences:
    """The references that do not change from step to step.

    Args:
        protected: what images are kept away from.
        history: finished images of earlier calls.
        radius: L2, one number, or (K,) for protected references; None: the protected set's own radii.
        nearest: only so many protected references of each image, the nearest ones; None: all.
        mask: restricts distances to a part of the latents (`shielded.spell.mask`); None: all of it.
        margin: share of the radius by which the shields of protected references are wider.
        constant_history: whether the history keeps its full radius at every noise level.
    """

    def __init__(
        self,
        protected: ProtectedSet | Tensor | None,
        history: History | None,
        radius: float | Tensor | None,
        nearest: int | None,
        mask: Tensor | None,
        margin: float = 0.0,
        constant_history: bool = False,
    ) -> None:
        self._protected, self._history, self._radius, self._nearest = protected, history, radius, nearest
        self._mask, self._margin, self._constant_history = mask, margin, constant_history
        self._cached: tuple[tuple[Any, ...], References | None] | None = None
        self._compared = protected is None

    def at(self, x0: Tensor) -> References | None:
        """Return the references for x0 (B, *S), on its device; None if there are none."""
        protected = self._protected
        version = 0 if protected is None or isinstance(protected, Tensor) else protected.version
        key = (version, self._history.version if self._history else 0, x0.shape[1:], x0.device)
        if self._cached is None or self._cached[0] != key:
            self._cached = key, self._joined(x0)
        return self._cached[1]

    def compare(self, latents: Tensor) -> None:
        """Warn, once, if finished latents (B, *S) have another range of values than the protected references."""
        if not self._compared and self._protected is not None:
            self._compared = True
            compare_ranges(self._protected, latents)

    def name(self, row: int) -> str:
        """Return the id of a reference, for the trace."""
        protected = self._protected
        known = 0 if protected is None else len(protected)
        if protected is None or row >= known:
            return f"history {row - known}"
        return str(row) if isinstance(protected, Tensor) else str(protected.ids[row])

    def _joined(self, x0: Tensor) -> References | None:
        parts: list[References] = []
        sizes: list[int] = []
        if self._protected is not None:
            parts.append(self._protected_references(self._protected, x0))
            sizes.append(len(self._protected))
        if self._history is not None and len(self._history):
            assert self._radius is not None  # Spell requires one for a history
            latents = _fitting(self._history.latents, x0, "remembered images")
            references = TensorReferences(flatten(latents, self._mask), self._radius)
            parts.append(ConstantRadius(references) if self._constant_history else references)
            sizes.append(len(latents))
        return Joined(parts, sizes) if len(parts) > 1 else parts[0] if parts else None

    def _protected_references(self, protected: ProtectedSet | Tensor, x0: Tensor) -> References:
        if isinstance(protected, Tensor):
            assert self._radius is not None  # Spell requires one for a tensor
            vectors = flatten(_fitting(protected, x0, "protected references"), self._mask)
            return TensorReferences(vectors, (1 + self._margin) * self._radius, self._nearest)
        if tuple(protected.space.shape) != tuple(x0.shape[1:]):
            raise ValueError(
                f"the protected set holds latents of shape {tuple(protected.space.shape)}, the sampler works on "
                f"{tuple(x0.shape[1:])}; protect the images at the size that is generated."
            )
        radius = protected.radii if self._radius is None else self._radius
        require_radii(radius)
        radius = (1 + self._margin) * radius
        if self._mask is None:
            return SetReferences(protected, radius, x0.device, self._nearest)
        vectors = protected.vectors(torch.arange(len(protected)))
        return TensorReferences(flatten(vectors.to(x0.device), self._mask), radius, self._nearest)


class ConstantRadius:
    """References that keep their full radius while that of others shrinks.

    Args:
        references: what is searched.
    """

    def __init__(self, references: References) -> None:
        self._references = references
        self.vectors = references.vectors

    def scan(self, x0: Tensor, shrink: Tensor | None = None) -> Scan:
        """Search for the active shields of x0 (B, D); `shrink` is not used."""
        return self._references.scan(x0)


def require_radii(radius: float | Tensor) -> None:
    """Refuse radii (K,) of a protected set of which some are missing (NaN).

    Raises:
        ValueError: says where to give one.
    """
    if isinstance(radius, Tensor) and radius.isnan().any():
        raise ValueError(
            "some protected images have no radius of their own; pass radius=... to Spell, or --radius to a command."
        )


def _fitting(references: Tensor, x0: Tensor, name: str) -> Tensor:
    if references.shape[1:] != x0.shape[1:]:
        raise ValueError(
            f"the {name} have shape {tuple(references.shape[1:])} each, x0 has {tuple(x0.shape[1:])}; "
            "references must be in the sampler's latent space at the generated size."
        )
    if not references.is_floating_point():
        raise ValueError(f"the {name} are {references.dtype}; latents are floating point, so these are something else.")
    if not torch.isfinite(references).all():
        raise ValueError(f"the {name} contain NaN or infinity.")
    return references.to(x0.device)
