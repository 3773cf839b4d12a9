"""Measure generated images: metrics and the features they are taken of, baselines, and the paper's experiments."""
