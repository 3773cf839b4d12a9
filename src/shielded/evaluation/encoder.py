"""Small image and text encoder for the embedded model's domain, trained contrastively as in CLIP.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision". It gives caption scores
and features for the metrics without a network connection; `training/contrastive.py` trains it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from shielded.files import replacing
from shielded.models import preset_of

SIZE = 64  # height and width of the image tower's input, in pixels
_MAX_IMAGES_PER_PASS = 256


class Block(nn.Module):
    """Residual 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(channels // 16, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, C, H, W) to the same shape."""
        return x + self.conv(F.silu(self.norm(x)))


def image_tower(channels: Sequence[int], dim: int) -> nn.Sequential:
    """Build the network (n, 3, 64, 64) -> (n, dim).

    Each of the `channels` halves the resolution; the mean over space is projected to `dim`.
    """
    layers: list[nn.Module] = []
    for level, (before, after) in enumerate(zip((3, *channels), channels, strict=False)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(after // 16, after), nn.SiLU()]
        if level == 1:  # the one place where more depth is worth its time
            layers.append(Block(after))
    # Without the batch norm all images start in one narrow cone, and the contrast takes long to open it.
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(channels[-1]), nn.Linear(channels[-1], dim)]
    return nn.Sequential(*layers, *head)


def encoder_pixels(images: Sequence[Image.Image] | Tensor) -> Tensor:
    """Convert images to (n, 3, 64, 64) float32 in [-1, 1], resized by area.

    Args:
        images: PIL images of any size, or a float tensor (n, 3, H, W) in [-1, 1].

    Raises:
        TypeError: neither PIL images nor a tensor.
        ValueError: no image, another shape, or values that are not finite or clearly outside [-1, 1].
    """
    if len(images) == 0:
        raise ValueError("there are no images to encode: pass at least one.")
    if not isinstance(images, Tensor):
        if not all(isinstance(image, Image.Image) for image in images):
            raise TypeError("images must be a list of PIL images or a tensor (n, 3, H, W) in [-1, 1].")
        arrays = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]
        return torch.cat([encoder_pixels(array[None] / 127.5 - 1) for array in arrays])
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be float of shape (n, 3, H, W), got {images.dtype} {tuple(images.shape)}: "
            "add the batch dimension, or scale uint8 to [-1, 1]."
        )
    if not images.abs().amax() <= 1.5:  # decoders overshoot a little; NaN fails too
        raise ValueError(
            "images must lie in [-1, 1], but hold NaN or values beyond 1.5: scale 0..255 by x / 127.5 - 1."
        )
    # One memory layout, so that PIL images and tensors give the same bits.
    return F.interpolate(images.detach().float().contiguous(), size=(SIZE, SIZE), mode="area").clamp(-1, 1)


class Encoder(nn.Module):
    """Image and text towers with a common, normalised feature space.

    The text tower is the mean of the token embeddings and two linear layers: captions are short, and their word order
    says little.

    Args:
        tokenizer: the tokenizer of the text-to-image model.
        channels: of the image tower, one per halving of the resolution; multiples of 16.
        dim: number of features.
    """

    def __init__(self, tokenizer: CLIPTokenizer, channels: Sequence[int] = (32, 64, 128, 192), dim: int = 128) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.config = {"channels": list(channels), "dim": dim, "vocab_size": len(tokenizer)}
        self.image = image_tower(channels, dim)
        self.tokens = nn.EmbeddingBag(len(tokenizer), dim, mode="mean")
        self.text = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Compute features (n, d) of pixels (n, 3, 64, 64) in [-1, 1], with gradients."""
        return F.normalize(self.image(pixels).float(), dim=1)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Compute features (n, d) of n prompts, with gradients."""
        bags = self.tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids
        device = self.tokens.weight.device
        ends = torch.tensor([len(bag) for bag in bags]).cumsum(0)
        ids = torch.tensor([token for bag in bags for token in bag], dtype=torch.long)
        offsets = torch.cat([ends.new_zeros(1), ends[:-1]])
        return F.normalize(self.text(self.tokens(ids.to(device), offsets.to(device))).float(), dim=1)

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Compute features of images, comparable with each other and with `text_features` by their dot product.

        Args:
            images: PIL images of any size, or a float tensor (n, 3, H, W) in [-1, 1]; resized to 64x64 by area.

        Returns:
            (n, d) float32 of unit norm.

        Raises:
            TypeError: neither PIL images nor a tensor.
            ValueError: no image, another shape or range.
        """
        pixels = encoder_pixels(images).to(self.tokens.weight.device)
        return torch.cat([self.embed_images(batch) for batch in pixels.split(_MAX_IMAGES_PER_PASS)])

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Compute features of prompts.

        Returns:
            (n, d) float32 of unit norm.

        Raises:
            TypeError: a bare string, or something else than strings.
            ValueError: no prompt.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("prompts must be a list of strings: wrap a single one in [].")
        if len(prompts) == 0:
            raise ValueError("there are no prompts to encode: pass at least one.")
        return self.embed_prompts(prompts)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (float16); the tokenizer stays with the text-to-image model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: value.half() if value.is_floating_point() else value for name, value in self.state_dict().items()
        }
        with (
            replacing(folder / "config.json") as config_draft,
            replacing(folder / "model.safetensors") as weights_draft,
        ):
            save_file(weights, weights_draft)
            config_draft.write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, tokenizer: CLIPTokenizer | str | Path) -> Encoder:
        """Load a saved encoder in float32, ready for inference on the CPU.

        Args:
            folder: with `config.json` and `model.safetensors`.
            tokenizer: the tokenizer that the encoder was trained with, or its folder.

        Raises:
            FileNotFoundError: the folder does not hold an encoder.
            ValueError: the tokenizer has another number of tokens.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no encoder, {name} is missing: train one or check the path.")
        if isinstance(tokenizer, str | Path):
            tokenizer = cast(CLIPTokenizer, CLIPTokenizer.from_pretrained(str(tokenizer), local_files_only=True))
        config = json.loads((folder / "config.json").read_text())
        if len(tokenizer) != config["vocab_size"]:
            raise ValueError(
                f"the encoder in {folder} knows {config['vocab_size']} tokens, the tokenizer {len(tokenizer)}: "
                "pass the tokenizer that it was trained with."
            )
        with torch.device("meta"):  # no initial values, so no draws from the global random generator
            encoder = cls(tokenizer, config["channels"], config["dim"])
        weights = load_file(folder / "model.safetensors")
        encoder.load_state_dict(weights, assign=True)
        return encoder.float().eval().requires_grad_(False)


def encoder_of(model: str) -> Encoder | None:
    """Load the encoder that comes with a model; None: it has none.

    Args:
        model: as `shielded.models.load` takes it.
    """
    preset = preset_of(model)
    if preset.encoder is None or preset.tokenizer is None:
        return None
    return Encoder.from_pretrained(preset.encoder, preset.tokenizer)
