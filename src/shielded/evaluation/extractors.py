"""Feature extractors for the metrics: the embedded encoder, CLIP, DINOv2 and Inception."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shielded.models import DEFAULT_MODEL

Images = Sequence[Image.Image] | Tensor
SOURCES = {
    DEFAULT_MODEL: None,  # comes with the package
    "clip": "openai/clip-vit-large-patch14",
    "dinov2": "facebook/dinov2-base",
    "inception": None,  # torch-fidelity downloads the weights of the original FID
}
_MAX_IMAGES_PER_PASS = 32


@dataclass
class Features:
    """Feature extractor. Where the model reads text, both kinds of features have unit norm, so dot products score.

    Args:
        name: a key of `SOURCES`.
        image_features: PIL images, or a float tensor (n, 3, H, W) in [-1, 1], -> (n, d) float32.
        text_features: prompts -> (n, d) float32; None for models without text.
    """

    name: str
    image_features: Callable[[Images], Tensor]
    text_features: Callable[[Sequence[str]], Tensor] | None = None


def features(name: str = DEFAULT_MODEL, source: str | None = None, device: str = "cpu") -> Features:
    """Load a feature extractor by name.

    Args:
        name: "emoji", the embedded model's encoder; "clip" (Radford et al. 2021); "dinov2" (Oquab et al. 2023);
            "inception", the network of FID (Heusel et al. 2017), which needs the package torch-fidelity.
        source: for "clip" and "dinov2": a folder with a saved model, or a name on the Hugging Face hub.
        device: torch device to run on.

    Raises:
        ValueError: an unknown name, or a source for features that come from one place.
        OSError: the model is not on disk and cannot be downloaded.
        ModuleNotFoundError: the library of the model is not installed.
    """
    if name not in SOURCES:
        raise ValueError(f"the features {name!r} are not known; use one of {', '.join(SOURCES)}.")
    if source is not None and SOURCES[name] is None:
        raise ValueError(f"the features {name!r} come from one place; leave the source out, or use 'clip' or 'dinov2'.")
    build = {DEFAULT_MODEL: _embedded, "clip": _clip, "dinov2": _dinov2, "inception": _inception}[name]
    return build(source or SOURCES[name], device)


def _embedded(source: None, device: str) -> Features:
    from shielded.evaluation.encoder import encoder_of

    encoder = encoder_of(DEFAULT_MODEL)
    assert encoder is not None
    encoder.to(device)
    return Features(
        DEFAULT_MODEL,
        lambda images: encoder.image_features(images).cpu(),
        lambda prompts: encoder.text_features(prompts).cpu(),
    )


def _clip(source: str, device: str) -> Features:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model = _loaded(CLIPModel, source).to(device).eval()
    tokenizer, processor = _loaded(AutoTokenizer, source), _loaded(CLIPImageProcessor, source)

    @torch.no_grad()
    def image_features(images: Images) -> Tensor:
        parts = [processor(batch, return_tensors="pt").pixel_values.to(device) for batch in _batches(images)]
        return torch.cat([F.normalize(_projected(model.get_image_features(part)).float()).cpu() for part in parts])

    @torch.no_grad()
    def text_features(prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(device)
        return F.normalize(_projected(model.get_text_features(**tokens)).float()).cpu()

    return Features("clip", image_features, text_features)


def _dinov2(source: str, device: str) -> Features:
    from transformers import AutoImageProcessor, AutoModel

    model = _loaded(AutoModel, source).to(device).eval()
    processor = _loaded(AutoImageProcessor, source)

    @torch.no_grad()
    def image_features(images: Images) -> Tensor:
        parts = [processor(batch, return_tensors="pt").pixel_values.to(device) for batch in _batches(images)]
        return torch.cat([model(part).last_hidden_state[:, 0].float().cpu() for part in parts])

    return Features("dinov2", image_features)


def _inception(source: None, device: str) -> Features:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]  # optional
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise ModuleNotFoundError(
            "Inception features need the package torch-fidelity: pip install torch-fidelity, or use other features."
        ) from error
    model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()

    @torch.no_grad()
    def image_features(images: Images) -> Tensor:
        found = []
        for batch in _batches(images):
            for image in batch:  # sizes may differ
                pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device)
                found.append(model(pixels)[0].float().cpu())
        return torch.cat(found)

    return Features("inception", image_features)


def _loaded(kind: Any, source: str) -> Any:
    try:
        return kind.from_pretrained(source, use_safetensors=True)  # pickles can run code; others ignore it
    except (OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"{source} could not be loaded: give a folder with a saved model, or a network. {reason}"
        ) from error


def _projected(output: Any) -> Tensor:
    """Return the projected features; transformers 5 returns them as `pooler_output`."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _batches(images: Images) -> Iterator[list[Image.Image]]:
    if len(images) == 0:
        raise ValueError("there are no images to encode: pass at least one.")
    for first in range(0, len(images), _MAX_IMAGES_PER_PASS):
        batch = images[first : first + _MAX_IMAGES_PER_PASS]
        if isinstance(batch, Tensor):
            levels = ((batch.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            batch = [Image.fromarray(image) for image in levels]
        yield [image.convert("RGB") for image in batch]
