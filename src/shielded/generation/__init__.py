"""From prompts and seeds to finished images, and the repair of those that lie inside a shield."""

from shielded.generation.generated import Generated
from shielded.generation.guidance import GUIDANCE_OPTIONS, guidance_option
from shielded.generation.sampling import generate

__all__ = ["GUIDANCE_OPTIONS", "Generated", "generate", "guidance_option"]
