"""Checkpoints that a training run continues from, and the clock that its schedule follows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint to a temporary file and rename it, so that a run ended meanwhile leaves the old one whole."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `save`."""
    return torch.load(path, weights_only=True)


class Clock:
    """Minutes of training, counted over all the runs that a checkpoint has seen.

    Args:
        before: minutes that were trained when the checkpoint was written.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.before = before
        self.start = time.monotonic()

    @property
    def minutes(self) -> float:
        return self.before + (time.monotonic() - self.start) / 60
