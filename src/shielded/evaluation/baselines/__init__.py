"""Other methods for diversity, with the interface of `Spell`: `with method("cads", 0.25).attach(pipe): pipe(...)`.

Each is written from its paper alone. At strength 0 the images are bit-identical to the plain pipeline's.
"""

from __future__ import annotations

from typing import Any

from shielded.evaluation.baselines.cads import CADS
from shielded.evaluation.baselines.interval import IntervalGuidance, WithInterval
from shielded.evaluation.baselines.noise import FarthestNoise
from shielded.evaluation.baselines.particle import ParticleGuidance
from shielded.evaluation.baselines.plain import Plain
from shielded.evaluation.baselines.sgf import SafetyGuidedFlow
from shielded.spell import Spell

METHODS: dict[str, Any] = {
    "plain": Plain,
    "spell": Spell,
    "particle": ParticleGuidance,
    "cads": CADS,
    "interval": IntervalGuidance,
    "sgf": SafetyGuidedFlow,
    "noise": FarthestNoise,
}

__all__ = [
    "CADS",
    "METHODS",
    "FarthestNoise",
    "IntervalGuidance",
    "ParticleGuidance",
    "Plain",
    "SafetyGuidedFlow",
    "method",
]


def method(name: str, strength: float = 0.0, interval: float = 0.0, **options: Any) -> Any:
    """Return a method by name, ready for `attach(pipe)`; after a run its `finished` holds the final latents.

    Args:
        name: a key of `METHODS`.
        strength: see the docstring of the method's class; for "spell" the radius. 0 changes nothing.
        interval: strength of Interval Guidance on top; 0: none.
        **options: further arguments of the method's class.

    Raises:
        ValueError: an unknown name, or a strength that is negative or not finite.
    """
    if name not in METHODS:
        raise ValueError(f"the method {name!r} is not known; use one of {', '.join(METHODS)}.")
    if not 0 <= strength < float("inf"):
        raise ValueError(f"the strength of {name!r} must be 0 or more and finite, not {strength}.")
    if name == "plain" or strength == 0:
        found = Plain()
    else:
        found = Spell(radius=strength, **options) if name == "spell" else METHODS[name](strength, **options)
    return WithInterval(found, interval) if interval else found
