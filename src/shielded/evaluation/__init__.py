"""Metrics of diversity and quality, and the encoder of the embedded model's domain that they run on."""
