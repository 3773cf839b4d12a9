"""Sparse repellency on tensors: the correction, its projection, and the references it is computed from."""

from shielded.core.correction import Overlap, repellency
from shielded.core.references import Hits

__all__ = ["Hits", "Overlap", "repellency"]
