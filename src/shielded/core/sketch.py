"""Lower bounds of distances from a few numbers of each row, which rule most references out before rows are read.

Let c be a centre and P a matrix with orthonormal rows. The map x ↦ (P (x − c), ‖(x − c) − PᵀP (x − c)‖) brings no two
points farther apart: along P it projects, and across P the lengths of two vectors differ by at most their distance. So
distances between sketches are lower bounds, whatever c and P are. They are close to the distances if c and P hold most
of the energy, so P is made of the principal components of some references. A blurred x0 has little energy elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shielded.core.distances import block_elements, squared_distances

if TYPE_CHECKING:
    from jaxtyping import Float, Float64

_SAMPLE_ROWS = 256  # whose principal components are taken
_COMPONENTS = 64
_MIN_ROWS = 16 * _SAMPLE_ROWS  # with fewer, or shorter ones, sketches cost about as much as they save
_ROUNDING = 1e-6  # share of ‖x − c‖: far above what cancels in the length across P, in float64


def pays(z: Float[Tensor, "k d"]) -> bool:
    """Say whether sketches of rows (K, D) save time."""
    return z.device.type == "cpu" and len(z) >= _MIN_ROWS and z.shape[1] >= 4 * _COMPONENTS


class Sketch:
    """Sketches of rows.

    Args:
        z: (K, D), K > 0.
    """

    def __init__(self, z: Float[Tensor, "k d"]) -> None:
        sample = z[torch.linspace(0, len(z) - 1, min(len(z), _SAMPLE_ROWS)).long()].double()
        self._centre = sample.mean(dim=0)
        sample -= self._centre
        values, vectors = torch.linalg.eigh(sample @ sample.T)  # ascending
        kept = values[-_COMPONENTS:] > 1e-10 * values[-1]
        self._basis = torch.linalg.qr(sample.T @ vectors[:, -_COMPONENTS:][:, kept]).Q  # (D, m)
        parts = z.split(max(1, block_elements(z.device) // z.shape[1]))
        sketches, slack = zip(*(self._sketched(part) for part in parts), strict=True)
        self._sketches, self._slack = torch.cat(sketches), torch.cat(slack)

    def _sketched(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the sketches (B, m + 1) of rows (B, D), and how far (B,) rounding may have moved them."""
        offset = x.double() - self._centre
        along, squared = offset @ self._basis, offset.square().sum(dim=1, keepdim=True)
        across = (squared - along.square().sum(dim=1, keepdim=True)).clamp(min=0).sqrt()
        return torch.cat([along, across], dim=1), _ROUNDING * squared[:, 0].sqrt()

    def lower_bounds(self, x: Float[Tensor, "b d"]) -> Float64[Tensor, "b k"]:
        """Bound the distances of x (B, D) to all rows from below, (B, K); NaN where a number overflows."""
        sketch, slack = self._sketched(x)
        squared, error = squared_distances(sketch, self._sketches)
        return (squared - error).clamp_(min=0).sqrt_().sub_(slack[:, None] + self._slack)
