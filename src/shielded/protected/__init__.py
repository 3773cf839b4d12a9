"""Keep protected images on disk, and find exactly those that a prediction comes too close to."""

from shielded import alias
from shielded.core.references import Hits
from shielded.protected.ingest.encoding import AddedImages, add_images
from shielded.protected.ingest.job import ProtectResult, protect
from shielded.protected.ingest.sources import find_images, load_images
from shielded.protected.joined import open_sets, parts_of
from shielded.protected.protected_set import ProtectedSet

__all__ = [
    "AddedImages",
    "Hits",
    "ProtectResult",
    "ProtectedSet",
    "add_images",
    "find_images",
    "load_images",
    "open_sets",
    "parts_of",
    "protect",
]

alias("shielded.protected.images", "shielded.protected.ingest.encoding")
