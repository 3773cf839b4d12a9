"""The page in a browser: `session.py` is what a visitor makes, `page.py` is how it looks."""

from shielded.studio.page import build, serve

__all__ = ["build", "serve"]
