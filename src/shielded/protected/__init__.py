"""Protected images on disk, and the exact search for those that a prediction comes too close to."""

from shielded.protected.ingest.images import AddedImages, add_images, load_images
from shielded.protected.ingest.sources import find_images
from shielded.protected.protected_set import ProtectedSet
from shielded.protected.search.search import Hits

__all__ = ["AddedImages", "Hits", "ProtectedSet", "add_images", "find_images", "load_images"]
