"""Exact search in large sets, through an index on disk and compiled loops."""
