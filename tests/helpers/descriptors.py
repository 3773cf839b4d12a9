"""A small random copy descriptor, and pictures that it tells apart."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shielded.copies import Descriptor
from shielded.copies.network import CopyNetwork, save_network


def write_network(path: Path, seed: int = 0, views=((0.0, False), (0.0, True))) -> Path:
    """Write a random network with batch norms that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    network = CopyNetwork(channels=(4, 4, 8, 8), blocks=(0, 1, 0, 0), dim=12)
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.ndim and name != "power":
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
                if "running_var" in name:
                    tensor.abs_().add_(0.5)
        # Random features of pictures share their mean, beside which the pictures hardly count.
        seen = []
        network.project.register_forward_hook(lambda module, inputs, output: seen.append(output))
        arrays = np.stack([np.array(image.resize((64, 64))) for image in pictures(64, seed=9)])
        network.eval()(torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1)
        network.project.bias.sub_(seen[0].mean(dim=0))
    save_network(network, path, views, 64, threshold=0.9)
    return path


def small_descriptor(folder: Path, seed: int = 0) -> Descriptor:
    return Descriptor.load("shielded", write_network(folder / f"descriptor{seed}.safetensors", seed))


def pictures(count: int, side: int = 32, seed: int = 0) -> list[Image.Image]:
    """Draw `count` pictures of coarse random colours."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return [Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC) for values in coarse]
