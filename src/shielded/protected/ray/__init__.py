"""Ingest and search on a Ray cluster."""
