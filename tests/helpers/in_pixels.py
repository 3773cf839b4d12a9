"""A latent space without a model, where jobs in other processes would load one for seconds."""

from typing import Any

from shielded import LatentSpace, models
from shielded.protected.ray.ingest import EncodingActor

SPACE = LatentSpace.pixels((3, 16, 16), (-1, 1))


def replace_models(set_attribute: Any = setattr) -> None:
    """Whatever is loaded is nothing, and its latents are pixels."""
    set_attribute(models, "load", lambda *_: None)
    set_attribute(LatentSpace, "of", staticmethod(lambda _: SPACE))


class Actor(EncodingActor):
    """A worker of a cluster that does the same."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        replace_models()
        super().__init__(*arguments, **options)
