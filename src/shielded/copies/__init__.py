"""Find changed copies of images: a descriptor, and the exact search among the vectors of many images."""

from shielded.copies.bank import Bank, Descriptors
from shielded.copies.descriptor import Descriptor

__all__ = ["Bank", "Descriptor", "Descriptors"]
