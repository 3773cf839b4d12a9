"""shielded: keep diffusion models away from protected images, and make their outputs differ (SPELL)."""
