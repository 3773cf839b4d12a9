"""From prompts and seeds to finished images, and the repair of those that lie inside a shield."""

from shielded.generation.generated import Generated
from shielded.generation.sampling import generate

__all__ = ["Generated", "generate"]
