"""Spell: the options of a run, one step of it, its trace, and what it remembers."""

from shielded.spell.history import History
from shielded.spell.posterior import Calibration
from shielded.spell.spell import Spell

__all__ = ["Calibration", "History", "Spell"]
