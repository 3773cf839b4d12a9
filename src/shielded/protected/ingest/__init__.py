"""Bring images into a protected set: find, read, encode, resume."""
