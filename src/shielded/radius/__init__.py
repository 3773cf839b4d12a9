"""Choosing a radius: what a set, a model and altered copies say about it."""
