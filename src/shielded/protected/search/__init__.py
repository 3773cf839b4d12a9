"""Exact search among the references of a protected set."""

from shielded.protected.search.choose import MEMORY_BYTES, Search
from shielded.protected.search.interface import ExactSearch, Pairs, SearchableVectors, sorted_pairs

__all__ = ["MEMORY_BYTES", "ExactSearch", "Pairs", "Search", "SearchableVectors", "sorted_pairs"]
