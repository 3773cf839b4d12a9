"""The active shields of a step, those that images of a batch are to each other, and the way out of one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shielded.core.pairs import active_pairs, project_pairs
from shielded.core.references import Hits, References


@dataclass
class BatchShields:
    """Shields that images of a batch are to each other.

    Args:
        radius: (B, B), L2.
        repels: (B, B) bool, pairs that repel each other.
        groups: rows (n,) of each group of at least two images; None: all are one group. What is computed for a group
            is what would be computed for it alone.
    """

    radius: Tensor
    repels: Tensor
    groups: list[Tensor] | None = None

    @classmethod
    def of(cls, x: Tensor, radius: float, groups: Tensor | None, shrink: Tensor | None) -> BatchShields:
        """Make the shields of a batch (B, D).

        Args:
            x: (B, D).
            radius: L2.
            groups: (B,) ids; only images of one group repel each other. None: all do.
            shrink: (B,) subtracted from squared radii.

        Raises:
            ValueError: not one id per image.
        """
        rows: list[Tensor] | None = None
        if groups is None:
            repels = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device)
        elif len(groups) != len(x):
            raise ValueError(f"groups has {len(groups)} ids, but the batch has {len(x)} images; give one id each.")
        else:
            members: dict[int | float, list[int]] = {}
            for row, group in enumerate(groups.tolist()):
                members.setdefault(group, []).append(row)
            rows = [torch.tensor(part, device=x.device) for part in members.values() if len(part) > 1]
            groups = groups.to(x.device)
            repels = groups[:, None] == groups[None, :]
        squared = torch.full((len(x), len(x)), radius**2, device=x.device)
        if shrink is not None:  # both ends of a pair are uncertain, so both variances shorten its radius
            squared = squared - shrink[:, None] - shrink[None, :]
        return cls(squared.clamp(min=0).sqrt(), repels, rows)

    def active(self, x: Tensor, margin: float = 0.0) -> Tensor:
        """Find the pairs (B, B) of x (B, D) that are closer than their radius, less a share of it as margin."""
        radius = self.radius * (1 - margin) if margin else self.radius
        if self.groups is None:
            return active_pairs(x, radius, self.repels)
        close = torch.zeros_like(self.repels)
        for rows in self.groups:
            pairs = rows[:, None], rows
            close[pairs] = active_pairs(x[rows], radius[pairs], self.repels[pairs])
        return close

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the smallest joint move (B, D) that leaves them, and the rows (B,) that it leaves too close."""
        if self.groups is None:
            return project_pairs(x, self.radius, self.repels)
        move, unresolved = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for rows in self.groups:
            pairs = rows[:, None], rows
            move[rows], unresolved[rows] = project_pairs(x[rows], self.radius[pairs], self.repels[pairs])
        return move, unresolved

    def wider(self, factor: float) -> BatchShields:
        """Return these shields with `factor` times the radius."""
        return BatchShields(self.radius * factor, self.repels, self.groups)


@dataclass
class Active:
    """The active shields of one x0.

    Args:
        level: noise level t = σ/(α + σ).
        x: (B, D).
        finite: () bool, whether all of x is.
        inside_window: whether the Spell acts at this level.
        idle: whether no shield is active.
        references: protected images and history.
        hits: active shields among them.
        batch: the shields that images of the batch are to each other.
        close: (B, B) bool, active pairs among them.
        shrink: (B,) subtracted from squared radii.
    """

    level: float | None
    x: Tensor
    finite: Tensor
    inside_window: bool = True
    idle: bool = True
    references: References | None = None
    hits: Hits | None = None
    batch: BatchShields | None = None
    close: Tensor | None = None
    shrink: Tensor | None = None


def outward(x: Tensor, move: Tensor, direction: Tensor, references: References, nearest: Hits) -> Tensor:
    """Compute a step (B, D) of one radius along the move, for the images that are inside a shield.

    An image that is inside by a rounding error alone has no move to follow and goes straight away from the reference;
    one that equals the reference goes along `direction` (B, D).
    """
    along = move[nearest.query].double()  # float32 loses the squares of small offsets
    away = x[nearest.query].double() - references.vectors(nearest.row).double()
    along = torch.where((along != 0).any(dim=1, keepdim=True), along, away)
    along = torch.where((along != 0).any(dim=1, keepdim=True), along, direction[nearest.query].double())
    result = torch.zeros_like(x)
    step = nearest.radius[:, None] * along / along.norm(dim=1, keepdim=True)
    result[nearest.query] = step.to(x.dtype)
    return result
