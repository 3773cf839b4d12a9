"""Protected images on disk, and the exact search for those that a prediction comes too close to."""

from .images import AddedImages, add_images, load_images
from .protected_set import ProtectedSet
from .search import Hits
from .sources import find_images

__all__ = ["AddedImages", "Hits", "ProtectedSet", "add_images", "find_images", "load_images"]
