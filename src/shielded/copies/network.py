"""Small convolutional network whose unit vectors stay close together under the changes that copies go through.

Trained by `training/copy_descriptor.py` after Pizzi et al. 2022, "A Self-Supervised Descriptor for Image Copy
Detection" (SSCD). Features are pooled by generalised means, Radenović et al. 2018, "Fine-tuning CNN Image Retrieval
with No Human Annotation".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from shielded.files import replacing

SIDE = 64  # height and width of the input, in pixels


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut: (n, C, H, W) to the same shape."""

    def __init__(self, channels: int, normalised: bool) -> None:
        super().__init__()
        self.conv1 = convolution(channels, channels, normalised)
        self.conv2 = convolution(channels, channels, normalised)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


def convolution(before: int, after: int, normalised: bool, stride: int = 1) -> nn.Sequential:
    """Build a 3x3 convolution, with batch norm or without."""
    norm = nn.BatchNorm2d(after) if normalised else nn.Identity()
    return nn.Sequential(nn.Conv2d(before, after, 3, stride=stride, padding=1), norm)


class CopyNetwork(nn.Module):
    """Compute unit vectors of pictures.

    Each level halves the resolution; the last two are pooled and projected together, so that both what is there and
    what lies beside it count.

    Args:
        channels: of each level.
        blocks: residual blocks of each level.
        dim: numbers of a vector.
        normalised: with batch norms, to train; `fold` puts them into the convolutions.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128, 256),
        blocks: Sequence[int] = (0, 1, 2, 1),
        dim: int = 256,
        normalised: bool = True,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"channels": list(channels), "blocks": list(blocks), "dim": dim}
        self.levels = nn.ModuleList(
            nn.Sequential(
                convolution(before, after, normalised, stride=2),
                nn.ReLU(),
                *[Residual(after, normalised) for _ in range(count)],
            )
            for before, after, count in zip((3, *channels), channels, blocks, strict=False)
        )
        self.power = nn.Parameter(torch.tensor([3.0, 3.0]))
        self.project = nn.Linear(channels[-2] + channels[-1], dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (n, 3, H, W) in [-1, 1] to unit vectors (n, dim) float32.

        The pictures are standardised first, so that brightness and contrast hardly count.
        """
        x = (pixels - pixels.mean(dim=(1, 2, 3), keepdim=True)) / (pixels.std(dim=(1, 2, 3), keepdim=True) + 0.05)
        x = x.contiguous(memory_format=torch.channels_last)
        pooled: list[Tensor] = []
        for level in self.levels:
            x = level(x)
            pooled = [*pooled[-1:], x]
        features = [_generalised_mean(map_, power) for map_, power in zip(pooled, self.power, strict=True)]
        return F.normalize(self.project(torch.cat(features, dim=1)).float(), dim=1)


def _generalised_mean(x: Tensor, power: Tensor) -> Tensor:
    """Pool (n, C, H, W) to (n, C): mean over space of x^power, and its root."""
    return x.float().clamp(min=1e-4).pow(power).mean(dim=(2, 3)).pow(1 / power)


def save_network(
    network: CopyNetwork,
    path: str | Path,
    views: Sequence[tuple[float, bool]],
    side: int,
    threshold: float | None = None,
) -> None:
    """Write a network in half precision, its batch norms folded, as `Descriptor.load` reads it.

    Args:
        network: as it was trained; it is changed.
        path: a safetensors file.
        views: whose mean describes a picture: the share that is cut off at each edge, and whether mirrored.
        side: height and width of a picture before views of it are taken, in pixels.
        threshold: similarity from which on two pictures count as copies, as measured.
    """
    fold(network.eval())
    weights = {name: weight.detach().half().contiguous() for name, weight in network.state_dict().items()}
    config = {"network": network.config, "views": [list(view) for view in views], "side": side, "threshold": threshold}
    with replacing(path) as draft:
        save_file(weights, draft, {"config": json.dumps(config)})


def fold(network: nn.Module) -> None:
    """Put batch norms into the convolutions before them, in place; they stay as identities."""
    for module in network.modules():
        parts = list(module) if isinstance(module, nn.Sequential) else []
        if len(parts) == 2 and isinstance(parts[0], nn.Conv2d) and isinstance(parts[1], nn.BatchNorm2d):
            cast("nn.Sequential", module)[0] = fuse_conv_bn_eval(parts[0].eval(), parts[1].eval())
            cast("nn.Sequential", module)[1] = nn.Identity()
