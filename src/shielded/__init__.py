"""shielded: keep diffusion models away from protected images, and make their outputs differ (SPELL)."""

from shielded.calibration import Calibration
from shielded.certificate import Certificate
from shielded.history import History
from shielded.latent_space import LatentSpace
from shielded.protected import ProtectedSet
from shielded.repellency import repellency
from shielded.samplers import Guided, RepelledDenoiser, x0_coefficients
from shielded.spell import Spell

__all__ = [
    "Calibration",
    "Certificate",
    "Guided",
    "History",
    "LatentSpace",
    "ProtectedSet",
    "RepelledDenoiser",
    "Spell",
    "repellency",
    "x0_coefficients",
]
__version__ = "0.1.0"
