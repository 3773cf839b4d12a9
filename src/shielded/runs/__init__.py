"""Whole runs: with and without SPELL at the same seeds, measured and reported."""
