"""What a protected set does with its descriptor: describe images that are added, and find copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shielded._extras import RequestError
from shielded.copies import Descriptor
from shielded.core.inputs import float_tensor
from shielded.latent_space.pixels import require_range

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from shielded.protected.columns import Id
    from shielded.protected.snapshot import Reader, Snapshot
    from shielded.protected.writer import Writer


def require_copy_threshold(threshold: float | None, described: bool) -> None:
    """Require that a threshold is a cosine or none, and that the set has a descriptor."""
    if threshold is not None and not -1 <= threshold <= 1:
        raise RequestError(f"a similarity lies between -1 and 1, such as 0.9; got {threshold}.")
    if not described:
        raise RequestError(
            "This protected set has no descriptor, so it has no copy threshold; one made with descriptor='shielded' "
            "(--descriptor shielded) has."
        )


class Described:
    """The part of `ProtectedSet` that knows its descriptor.

    Args:
        reader: an open version of the set.
        descriptor: the network, if it is loaded.

    Raises:
        ValueError: the network is not that of the set.
    """

    def __init__(self, reader: Reader, descriptor: Descriptor | None) -> None:
        self._reader, self._network = reader, descriptor
        if descriptor is not None:
            self._require(descriptor)

    if TYPE_CHECKING:

        def _writable(self) -> Snapshot: ...
        def _writing(self, current: Snapshot) -> AbstractContextManager[Writer]: ...

    @property
    def descriptor(self) -> dict[str, Any] | None:
        """`name`, `sha256` of the weights, `dim` and `threshold` of the set's descriptor; None: it has none."""
        return self._reader.manifest.get("descriptor")

    @property
    def copy_threshold(self) -> float | None:
        """Similarity from which on this version of the set calls a picture a copy; None: it has no threshold."""
        record = self.descriptor or {}
        earlier = [value for version, value in record.get("thresholds", []) if version <= self._reader.version]
        return earlier[-1] if earlier else record.get("threshold")

    def set_copy_threshold(self, threshold: float | None) -> None:
        """Change the similarity from which on the set calls a picture a copy, as a new version of the set.

        Args:
            threshold: from -1 to 1, as `shielded calibrate` suggests one; None: none.

        Raises:
            ValueError: another number, or the set has no descriptor.
            RuntimeError: another process is writing, or the set was opened with `ray`.
            OSError: the disk is full or the folder read-only.
        """
        require_copy_threshold(threshold, self.descriptor is not None)
        with self._writing(self._writable()) as changes:
            changes.set_copy_threshold(threshold)

    def describe(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Describe images by the set's descriptor, cut to the shape of the set's pictures as its encoder does.

        Args:
            images: N PIL images, or a float tensor (N, 3, H, W) in [-1, 1].

        Returns:
            Unit vectors (N, d) float32.

        Raises:
            ValueError: the set has no descriptor, or the one that can be loaded has other weights.
        """
        if self.descriptor is None:
            raise ValueError(
                "This protected set has no descriptor, so it cannot find changed copies; it works by distance alone. "
                "Protect the images again to add one."
            )
        if self._network is None:
            if self.descriptor["name"] != "shielded":
                raise ValueError(
                    f"This protected set was made with the descriptor {self.descriptor['name']!r}; load it and pass it "
                    "to ProtectedSet.open(path, descriptor=Descriptor.load(name, path))."
                )
            network = Descriptor.load()
            self._require(network)
            self._network = network
        if isinstance(images, Tensor) or self._reader.space.image_size is None:
            return self._network.of(images)
        height, width = self._reader.space.image_size
        return self._network.of([cut(image, width / height) for image in images])

    def copies(self, images: Sequence[Image.Image] | Tensor, k: int = 1) -> tuple[Tensor, list[list[Id]]]:
        """Find the k protected images that are most similar by the set's descriptor, exactly.

        Args:
            images: B PIL images, a float tensor (B, 3, H, W) in [-1, 1], or their descriptors (B, d).
            k: how many, at most the number of rows.

        Returns:
            Similarities (B, k) float64 on the processor, the largest first, and for each image the k ids; of equal
            similarities the earlier row comes first.

        Raises:
            ValueError: the set has no descriptor, other weights or fewer than k rows, or the images are not as above.
        """
        similarities, rows = self.copy_rows(images, k)
        names = self._reader.ids.take(rows.flatten().numpy())
        return similarities, [names[i : i + k] for i in range(0, len(names), k)]

    def copy_rows(self, images: Sequence[Image.Image] | Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Find copies like `copies`, with row numbers (B, k) instead of ids."""
        if isinstance(images, Tensor) and images.ndim == 2 and self.descriptor is not None:
            vectors = images.detach().cpu().float()
            if vectors.shape[1] != self.descriptor["dim"]:
                raise ValueError(f"descriptors must be (B, {self.descriptor['dim']}); got {tuple(vectors.shape)}.")
        else:
            vectors = self.describe(images)
        if not 1 <= k <= len(self._reader):
            raise ValueError(f"k must be between 1 and the {len(self._reader)} rows of the set; got {k}.")
        similarities, rows = self._reader.similar(vectors.numpy(), k)
        return torch.from_numpy(similarities), torch.from_numpy(rows)

    def descriptors(self, rows: Sequence[int]) -> Tensor:
        """Read the descriptors (P, d) float32 of the given rows.

        Raises:
            ValueError: the set has no descriptor.
        """
        if self.descriptor is None:
            raise ValueError("This protected set has no descriptor.")
        return torch.from_numpy(self._reader.take_descriptors(np.asarray(rows, np.int64)))

    def _described(self, given: Tensor | Sequence[Any] | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Split what `add` was given into latents and descriptors; encode and describe images."""
        space = self._reader.space
        if isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, Tensor) for part in given):
            latents, described = given
        elif isinstance(given, Sequence) and not isinstance(given, str):
            latents, described = space.encode(given), None if self.descriptor is None else self.describe(given)
        else:
            latents, described = float_tensor(given, "latents"), None
        if space.pixel_range is not None and isinstance(latents, Tensor):
            require_range(latents, space.pixel_range)
        return latents, described

    def _require(self, descriptor: Descriptor) -> None:
        if self.descriptor is None:
            raise ValueError("This protected set has no descriptor; open it without one.")
        if descriptor.sha256 != self.descriptor["sha256"]:
            raise ValueError(
                f"This protected set was made with the descriptor {self.descriptor['name']!r} of the digest "
                f"{self.descriptor['sha256'][:12]}, and {descriptor.name!r} has {descriptor.sha256[:12]}: vectors of "
                "other weights cannot be compared. Protect the images again, or load the descriptor that made the set."
            )


def cut(image: Image.Image, aspect: float) -> Image.Image:
    """Cut the centre of this ratio of width to height out of an image."""
    width, height = min(image.width, round(image.height * aspect)), min(image.height, round(image.width / aspect))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)) if (width, height) != image.size else image
