"""Sampler adapters: where x0 is read and corrected. They never know what repels."""

from shielded.samplers.coefficients import x0_coefficients
from shielded.samplers.denoiser import Guided, RepelledDenoiser
from shielded.samplers.diffusers import attach

__all__ = ["Guided", "RepelledDenoiser", "attach", "x0_coefficients"]
