"""A latent space that encodes by averaging patches, for tests of what happens around the encoder."""

import torch

from shielded import LatentSpace
from shielded.latent_space import to_pixels

SPACE = LatentSpace((4, 2, 2), (16, 16), vae_class="Averages", vae_sha256="0" * 64, vae=torch.nn.Identity())


def encode_by_averages(monkeypatch):
    """Encode by averaging patches, and load no model."""

    def encode(self, images, batch_size=8):
        if not len(images):
            return torch.zeros(0, 4, 2, 2)
        if isinstance(images, list):
            images = torch.stack([to_pixels(picture, (16, 16)) for picture in images])
        means = torch.nn.functional.avg_pool2d(images, 8)
        return torch.cat([means, means[:, :1]], 1)

    monkeypatch.setattr(LatentSpace, "encode", encode)
    monkeypatch.setattr(LatentSpace, "of", lambda *_: SPACE)
    monkeypatch.setattr("shielded.models.load", lambda *_: None)
