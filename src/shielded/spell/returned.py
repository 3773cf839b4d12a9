"""A call of a pipeline: the latents that its trajectories ended with, and those that it returned."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from shielded.spell.mask import flatten
from shielded.spell.static import StaticReferences

_TOLERANCE = 1e-3  # share of the radius that the rounding of what is returned may take


@dataclass
class Call:
    """A call that is under way.

    Args:
        one_image: its trajectories are passes for the same images.
        finished: latents (B, *S) of each trajectory that has ended.
        unresolved: (B,) bool, images of the last one that are known to be too close to something.
    """

    one_image: bool
    finished: list[Tensor] = field(default_factory=list)
    unresolved: Tensor | None = None

    @property
    def kept(self) -> list[Tensor]:
        """The latents of different images."""
        return self.finished[-1:] if self.one_image else self.finished


def check_returned(
    returned: Tensor, unresolved: Tensor | None, references: StaticReferences, mask: Tensor | None, promised: bool
) -> None:
    """Refuse latents that a pipeline changed after its last step so that they lie inside a shield.

    Args:
        returned: (B, *S).
        unresolved: (B,) bool, rows of which the trace says so already.
        references: protected images and history.
        mask: what distances are restricted to.
        promised: whether finished latents are outside every shield.

    Raises:
        RuntimeError: names the images.
    """
    found = references.at(returned) if promised else None
    if found is None:
        return
    hits = found.scan(flatten(returned, mask)).hits()
    inside = torch.zeros(len(returned), dtype=torch.bool, device=returned.device)
    inside[hits.query[hits.distance < (1 - _TOLERANCE) * hits.radius]] = True
    if unresolved is not None:
        inside &= ~unresolved.to(inside.device)
    if inside.any():
        raise RuntimeError(
            f"the pipeline changed its latents after the last step, and images {inside.nonzero().flatten().tolist()} "
            "lie inside a shield again; give Spell the part that it keeps as `mask`, or use another pipeline."
        )
