"""Describe images by unit vectors that copies have nearly in common with the picture that they were made of."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shielded.copies.network import SIDE, CopyNetwork
from shielded.files import file_sha256, sha256
from shielded.latent_space.pixels import check_images, to_pixels

WEIGHTS = Path(__file__).parent / "weights" / "descriptor.safetensors"
NAMES = ("shielded", "sscd", "dinov2")
_DINOV2 = "facebook/dinov2-small"
_SSCD_THRESHOLD = 0.75  # its authors name it for a precision of 90 % on DISC
_MAX_IMAGES_PER_PASS = 64
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of its pixels in 0..1


class Descriptor:
    """A network that describes images. `Descriptor.load` makes one.

    Attributes:
        name: which network it is.
        sha256: digest of its weights; vectors of other weights cannot be compared.
        dim: numbers of a vector.
        threshold: similarity from which on two pictures count as copies; None: not measured. It may be set before a
            protected set is made.

    Args:
        name: which network it is.
        sha256: digest of its weights.
        side: height and width of the pictures that the network takes, in pixels.
        embed: maps pixels (n, 3, side, side) in [-1, 1] to vectors (n, d).
        device: where it computes.
        threshold: similarity from which on two pictures count as copies.
    """

    def __init__(
        self,
        name: str,
        sha256: str,
        side: int,
        embed: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
        threshold: float | None = None,
    ) -> None:
        self.name, self.sha256, self.threshold = name, sha256, threshold
        self._side, self._embed, self._device = side, embed, torch.device(device)
        self.dim = self._vectors(torch.zeros(1, 3, side, side)).shape[1]

    @classmethod
    def load(cls, name: str = "shielded", path: str | Path | None = None, device: str | None = None) -> Descriptor:
        """Load a descriptor.

        Args:
            name: "shielded", which comes with this package; "sscd", Pizzi et al. 2022; or "dinov2", Oquab et al. 2023.
            path: its weights. For "shielded" a safetensors file of `training/copy_descriptor.py`, None: the one that
                comes along; for "sscd" the TorchScript file of its authors; for "dinov2" a folder of transformers,
                None: facebook/dinov2-small, from the Hugging Face hub.
            device: where it computes; None: the processor.

        Raises:
            ValueError: another name, or a file that does not hold such a network.
            FileNotFoundError: there is no such file.
        """
        if name not in NAMES:
            raise ValueError(f"There is no descriptor {name!r}; choose one of {', '.join(NAMES)}.")
        if name == "sscd" and path is None:
            raise ValueError(
                "sscd needs path=, the TorchScript file of its authors, such as sscd_disc_mixup.torchscript.pt."
            )
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"There is no descriptor at {path}.")
        return {"shielded": _load_own, "sscd": _load_sscd, "dinov2": _load_dinov2}[name](path, device or "cpu")

    @torch.no_grad()
    def of(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Describe images.

        Args:
            images: N PIL images of any size, each brought to the square that the network takes, whole; or a float
                tensor (N, 3, H, W) with values in [-1, 1].

        Returns:
            (N, d) float32 on the processor, of length one.

        Raises:
            TypeError: `images` is something else.
            ValueError: shape or range of a tensor are wrong.
        """
        size = (self._side, self._side)
        vectors, pending = [torch.empty(0, self.dim)], []
        for pixels in _batches(images):
            pending.append(F.interpolate(pixels, size, mode="bilinear", antialias=True).clamp(-1, 1))
            if sum(map(len, pending)) >= _MAX_IMAGES_PER_PASS:
                vectors.append(self._vectors(torch.cat(pending)))
                pending = []
        return torch.cat([*vectors, self._vectors(torch.cat(pending))] if pending else vectors)

    @property
    def record(self) -> dict[str, Any]:
        """Name, digest, dimension and threshold, as a protected set notes them."""
        return {"name": self.name, "sha256": self.sha256, "dim": self.dim, "threshold": self.threshold}

    @torch.no_grad()
    def _vectors(self, pixels: Tensor) -> Tensor:
        parts = [self._embed(part.to(self._device)).float().cpu() for part in pixels.split(_MAX_IMAGES_PER_PASS)]
        return F.normalize(torch.cat(parts).double(), dim=1).float()

    def __repr__(self) -> str:
        return f"Descriptor({self.name!r}, {self.dim} numbers, weights {self.sha256[:12]})"


def _batches(images: Sequence[Image.Image] | Tensor) -> Iterator[Tensor]:
    """Yield pixels (n, 3, H, W) in [-1, 1] of images of one size each, in order."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"Expected a float tensor (N, 3, H, W) with values in [-1, 1]; got {images.dtype} of shape "
                f"{tuple(images.shape)}."
            )
        if images.numel() and not images.abs().amax() <= 1.0001:  # NaN fails too
            raise ValueError("Pixels must lie in [-1, 1] and be finite; scale 0..255 by x / 127.5 - 1.")
        yield from images.detach().float().cpu().contiguous().split(_MAX_IMAGES_PER_PASS)
        return
    for image in check_images(images):
        yield to_pixels(image, (image.height, image.width))[None]


# Ours ---------------------------------------------------------------------------------------------------------------


def _load_own(path: str | Path | None, device: str) -> Descriptor:
    file = WEIGHTS if path is None else Path(path)
    try:
        with safe_open(file, "pt") as tensors:
            config = json.loads((tensors.metadata() or {})["config"])
            weights = {name: tensors.get_tensor(name).float() for name in tensors.keys()}  # noqa: SIM118 (no mapping)
        network = CopyNetwork(**config["network"], normalised=False)
        network.load_state_dict(weights)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{file} does not hold a descriptor of training/copy_descriptor.py: {error}") from None
    network = network.eval().to(device)
    views = [(float(cut), bool(mirrored)) for cut, mirrored in config["views"]]
    return Descriptor(
        "shielded", file_sha256(file), config["side"], _mean_of_views(network, views), device, config["threshold"]
    )


def _mean_of_views(network: CopyNetwork, views: list[tuple[float, bool]]) -> Callable[[Tensor], Tensor]:
    """Describe pictures by the mean over views of them.

    Args:
        network: describes one view.
        views: the share that is cut off at each edge, and whether the view is mirrored.
    """

    def embed(pixels: Tensor) -> Tensor:
        total = 0
        for cut, mirrored in views:
            margin = round(cut * pixels.shape[-1])
            view = pixels[..., margin : pixels.shape[-2] - margin, margin : pixels.shape[-1] - margin]
            view = F.interpolate(view, (SIDE, SIDE), mode="bilinear", antialias=True)
            total = total + network(view.flip(-1) if mirrored else view)
        return total  # pyright: ignore[reportReturnType]  # there is a view

    return embed


# Others -------------------------------------------------------------------------------------------------------------


def _standardised(pixels: Tensor) -> Tensor:
    """Convert pixels in [-1, 1] to the numbers that networks for ImageNet take."""
    mean, deviation = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in _IMAGENET)
    return ((pixels + 1) / 2 - mean) / deviation


def _load_sscd(path: str | Path | None, device: str) -> Descriptor:
    assert path is not None  # refused by `load`
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, in which SSCD is published
            network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a TorchScript file: {str(error).splitlines()[0]}") from None

    def embed(pixels: Tensor) -> Tensor:
        return network(_standardised(pixels))

    return Descriptor("sscd", file_sha256(path), 288, embed, device, _SSCD_THRESHOLD)


def _load_dinov2(path: str | Path | None, device: str) -> Descriptor:
    from transformers import Dinov2Model

    try:
        network = Dinov2Model.from_pretrained(_DINOV2 if path is None else str(path)).eval().to(device)  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise ValueError(f"DINOv2 cannot be loaded from {path or _DINOV2}: {str(error).splitlines()[0]}") from None
    digests = {name: sha256(weight.float().cpu().numpy().tobytes()) for name, weight in network.state_dict().items()}

    def embed(pixels: Tensor) -> Tensor:
        return network(pixel_values=_standardised(pixels)).last_hidden_state[:, 0]

    return Descriptor("dinov2", sha256(json.dumps(digests, sort_keys=True).encode()), 224, embed, device)
