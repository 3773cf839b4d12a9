"""What the posterior radius needs to know about a model: the energy of its latents and its denoising error."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from shielded.files import write_json

FULL_RADIUS_BELOW = 0.2  # noise level t = σ/(α + σ) from which on shields have their full radius, whatever is estimated


@dataclass
class Calibration:
    """tr Cov(X_0|x_t), estimated.

    By the law of total variance E tr Cov(X_0|x_t) = E‖X_0‖² − E‖x0‖², so for one image about `energy` − ‖x0‖². Alone
    this would let a picture of little energy slip through: its estimate stays positive to the end. So the smaller of it
    and a bound that vanishes with the noise counts: the measured denoising error E‖X_0 − x0‖² at this noise level, or,
    where none was measured, energy·t², and nothing below t = 0.2.

    Args:
        energy: mean ‖X_0‖² of clean latents.
        levels: ascending noise levels t = σ/(α + σ) at which `error` was measured.
        error: mean ‖X_0 − x0‖² there.
    """

    energy: float
    levels: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)

    def posterior_variance(self, energy: Tensor, level: float) -> Tensor:
        """tr Cov for images with ‖x0‖² = `energy` (B,) at noise level t. (B,), not negative."""
        if level < FULL_RADIUS_BELOW:
            return energy.new_zeros(energy.shape)
        return (self.energy - energy).clamp(min=0, max=self._bound(level))

    def _bound(self, level: float) -> float:
        if not self.levels:
            return self.energy * level**2
        return float(np.interp(level, self.levels, self.error))

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        return cls(**json.loads(Path(path).read_text()))
