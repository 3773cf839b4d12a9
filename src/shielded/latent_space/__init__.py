"""The space a sampler works in: which autoencoder, how it is scaled and laid out, how large."""

from shielded.latent_space.pixels import to_pixels, to_rgb
from shielded.latent_space.space import LatentSpace

__all__ = ["LatentSpace", "to_pixels", "to_rgb"]
