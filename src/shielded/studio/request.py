"""What a visitor asks for, and what the library takes where nothing is asked."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from shielded.models import PROTECTION, PROTECTION_RADIUS, VARIETY, VARIETY_RADIUS
from shielded.spell import Spell

MOST_PROMPTS = 8
_SPELL = inspect.signature(Spell).parameters


@dataclass(frozen=True)
class Settings:
    """Input of the page. What is None is taken from the preset of the job (`job_of`).

    Args:
        prompt: what the images shall show; several lines are several prompts.
        n: images of each prompt.
        seed: first seed of each prompt.
        steps: of the sampler.
        radius: per √dim, so that it means the same for all models.
        overcompensation: λ.
        release: noise level down to which guidance is let go for an image in a shield; 1: never.
        window_end: noise level down to which SPELL acts.
        apart: whether the images of a run keep the radius from each other.
        remember: whether they keep it from those of earlier runs.
    """

    prompt: str
    n: int = 4
    seed: int = 0
    steps: int = 25
    radius: float | None = None
    overcompensation: float | None = None
    release: float | None = None
    window_end: float = 0.0
    apart: bool = True
    remember: bool = True

    @property
    def prompts(self) -> list[str]:
        """The prompts, each once.

        Raises:
            ValueError: there are none, or too many.
        """
        found = list(dict.fromkeys(line.strip() for line in self.prompt.splitlines() if line.strip()))
        if not found:
            raise ValueError("there is no prompt; write what the images shall show.")
        if len(found) > MOST_PROMPTS:
            raise ValueError(f"{len(found)} prompts at once; {MOST_PROMPTS} are the most.")
        return found


def job_of(protect: bool) -> dict[str, Any]:
    """Return the radius per √dim and the options of Spell that the library takes for protection, or for variety."""
    radius, preset = (PROTECTION_RADIUS, PROTECTION) if protect else (VARIETY_RADIUS, VARIETY)
    return {"radius": radius, "overcompensation": _SPELL["overcompensation"].default, **preset}
