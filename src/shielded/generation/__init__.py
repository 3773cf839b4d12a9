"""From prompts and seeds to finished images, and the repair of those that lie inside a shield."""

from shielded.generation.sampling import Generated, generate

__all__ = ["Generated", "generate"]
