"""Exact search among the references of a protected set."""
