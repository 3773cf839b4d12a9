"""`LatentSpace`: encode images as the sampler sees them, decode them again, and refuse what cannot be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shielded._extras import RequestError
from shielded.latent_space import families
from shielded.latent_space.layouts import PATCHES, TOKENS, arrange, arranged_shape, channel_axis, restore
from shielded.latent_space.pixels import (
    check_images,
    check_pixels,
    check_range,
    clip_to_pixels,
    from_range,
    to_pil,
    to_range,
)


@dataclass(frozen=True)
class LatentSpace:
    """A latent space as a sampler sees it, with its encoder.

    Distances only mean something between latents of one space, so whatever is stored carries the `fingerprint` of
    the space it was made for. `LatentSpace(shape)` describes a space by its shape alone; `LatentSpace.of(pipe)` reads
    everything off a pipeline; `LatentSpace.pixels(shape, range)` is that of a model without an autoencoder.

    A latent is `(z - shift) * scaling` for the mode z of the encoder's distribution, or `(z - mean) * scaling / std`
    where the autoencoder has statistics per channel; z is packed into tokens first where the sampler sees tokens.

    Args:
        shape: shape of one latent, without the batch axis.
        image_size: (height, width) in pixels of the images that the space stands for.
        num_frames: number of frames of the videos that the space stands for; None: images.
        patch: the sampler sees tokens of patch × patch latents each; None: it sees latents as they are.
        scaling: the autoencoder's `scaling_factor`.
        shift: the autoencoder's `shift_factor`.
        mean: the autoencoder's `latents_mean`, one number per channel of what the sampler sees.
        std: the autoencoder's `latents_std`, likewise.
        vae_class: class name of the autoencoder.
        vae_sha256: digest of the weights of its encoder, as float16.
        vae: the autoencoder itself. It is neither stored nor compared.
        pixel_range: values of black and white where the sampler sees pixels; None: it sees latents.
        layout: where the sampler sees latents in another order that is not tokens: "patches" (C · patch², H, W),
            "frames first" (F, C, H, W) or "channels last" (F, H, W, C).
        tiling: the encoder cuts images of this size into overlapping tiles, whose latents it blends: its settings of
            them; None: it does not.
    """

    shape: tuple[int, ...]
    image_size: tuple[int, int] | None = None
    num_frames: int | None = None
    patch: int | None = None
    scaling: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    vae_class: str | None = None
    vae_sha256: str | None = None
    vae: nn.Module | None = field(default=None, repr=False, compare=False)
    pixel_range: tuple[float, float] | None = None
    layout: str | None = None
    tiling: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.shape)
        if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(
                f"shape must be positive integers such as (4, 64, 64), without the batch axis; got {shape}."
            )
        object.__setattr__(self, "shape", shape)
        if self.pixel_range is not None:
            object.__setattr__(self, "pixel_range", check_range(self.pixel_range))

    @classmethod
    def pixels(cls, shape: Sequence[int], range: tuple[float, float] = (-1.0, 1.0)) -> LatentSpace:
        """Describe the space of a sampler that works on pixels: DDPM, Simple Diffusion, ADM.

        It encodes and decodes without a model: an image is resized, cut and brought to the range.

        Args:
            shape: (3, height, width), or (1, height, width) for models of grey images.
            range: values of black and white.

        Raises:
            ValueError: another shape, or a range that does not rise.

        Example:
            >>> LatentSpace.pixels((3, 64, 64)).dim
            12288
        """
        space = cls(tuple(shape), image_size=(shape[-2], shape[-1]) if len(shape) == 3 else None, pixel_range=range)
        if space.image_size is None or space.shape[0] not in (1, 3):
            raise ValueError(f"pixels have the shape (3, height, width), or (1, height, width); got {space.shape}.")
        return space

    @classmethod
    def of(
        cls, pipe: Any, height: int | None = None, width: int | None = None, num_frames: int | None = None
    ) -> LatentSpace:
        """Read the latent space off a diffusers pipeline.

        Pipelines of diffusers that work on pixels (DDPM, DDIM, PNDM, consistency models, DeepFloyd IF) have
        `LatentSpace.pixels`.

        Scale, shift, statistics and order of the latents are read from the code that brings the pipeline's latents to
        its decoder, and from its autoencoder's configuration. docs/latent_spaces.md lists the pipelines of diffusers
        that this understands, and why not the others.

        PixArt and Sana replace a size by the nearest one that they were trained on, unless they are called with
        `use_resolution_binning=False`; the space is that of the size given here.

        Args:
            pipe: a pipeline.
            height: height of the images in pixels; the pipeline's default if left out.
            width: width of the images in pixels; the pipeline's default if left out.
            num_frames: number of frames, for videos; the pipeline's default if left out.

        Returns:
            The space of the latents that `pipe.scheduler.step` is given.

        Raises:
            TypeError: if the pipeline is of a kind that is not supported.
            ValueError: if a size does not fit the pipeline, or the encoder's weights are not at hand.
        """
        pixels = families.pixel_shape(pipe)
        if pixels is not None:
            given = (height or pixels[1], width or pixels[2])
            if given != pixels[1:] or num_frames is not None:
                size = f"{pixels[1]}x{pixels[2]}"
                raise RequestError(f"{type(pipe).__name__} makes images of {size} pixels; leave the size out.")
            return cls.pixels(pixels)
        vae, denoiser, decoding = families.parts(pipe)
        if height is None or width is None:
            rows, columns = families.default_size(pipe, vae, denoiser)
            height, width = height or rows, width or columns
        multiple = families.spatial_factor(vae) * families.patch_of(denoiser, decoding)
        if height % multiple or width % multiple:
            raise RequestError(f"{type(pipe).__name__} needs a multiple of {multiple} pixels; got {height}x{width}.")
        if decoding.video:
            num_frames = num_frames or families.default_num_frames(pipe, denoiser)
            if (num_frames - 1) % families.temporal_factor(vae):
                raise ValueError(
                    f"{type(pipe).__name__} needs one frame more than a multiple of {families.temporal_factor(vae)}; "
                    f"got {num_frames}."
                )
        elif num_frames is not None:
            raise ValueError(f"{type(pipe).__name__} makes images; leave num_frames out.")
        grid = families.grid(vae, (height, width), num_frames)
        tokens = decoding.layout == TOKENS
        return cls(
            shape=arranged_shape(grid, decoding.layout, decoding.patch),
            image_size=(height, width),
            num_frames=num_frames,
            patch=decoding.patch if decoding.layout in (TOKENS, PATCHES) else None,
            layout=None if tokens else decoding.layout,
            tiling=families.tiling(vae, (height, width), num_frames),
            vae_class=type(vae).__name__,
            vae_sha256=families.encoder_sha256(vae),
            vae=vae,
            **families.statistics(pipe, vae, decoding),
        )

    @property
    def dim(self) -> int:
        """Number of components of one latent."""
        return int(np.prod(self.shape))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that two spaces share when their latents can be compared."""
        parts: dict[str, Any] = {"shape": list(self.shape)}
        if self.vae_sha256 is not None:
            parts = self.to_json() | {"distribution": "mode"}
        elif self.pixel_range is not None:
            parts = {"shape": list(self.shape), "pixel_range": list(self.pixel_range)}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return everything but the autoencoder, in JSON types; `from_json` reads it back."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "vae"}
        # Sets of earlier versions do not have these, and keep their fingerprint.
        later = ("pixel_range", "layout", "tiling")
        values = {name: value for name, value in values.items() if value is not None or name not in later}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatentSpace:
        """Make the space that `to_json` described. It has no autoencoder, so it cannot encode."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)

    def require_same(self, other: LatentSpace) -> None:
        """Refuse a space whose latents cannot be compared with those of this one: another shape or another encoder.

        Args:
            other: the space to compare with.

        Raises:
            ValueError: naming what differs.
        """
        # Tokens of two sizes can have one shape; a space by shape alone says nothing about sizes.
        sizes = () if None in (self.image_size, other.image_size) else ("image_size", "num_frames")
        _refuse(self._differences(other, "shape", *sizes) + self._encoder_differences(other))

    def require_same_encoder(self, other: LatentSpace) -> None:
        """Like `require_same`, for spaces whose images may differ in size.

        A space by shape alone says nothing about an encoder, so it passes.

        Args:
            other: the space to compare with.

        Raises:
            ValueError: naming what differs.
        """
        _refuse(self._encoder_differences(other))

    def _differences(self, other: LatentSpace, *names: str) -> list[str]:
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [
            name if name in ("mean", "std") else f"{name} {mine} against {theirs}"  # these have up to 128 numbers
            for name, mine, theirs in pairs
            if mine != theirs
        ]

    def _encoder_differences(self, other: LatentSpace) -> list[str]:
        if any(space.vae_sha256 is None and space.pixel_range is None for space in (self, other)):
            return []
        names = ("vae_class", "patch", "layout", "scaling", "shift", "mean", "std", "pixel_range")
        different = self._differences(other, *names)
        if self.tiling != other.tiling and self.image_size == other.image_size:
            different.append("tiling of the encoder, which changes the latents of images larger than a tile")
        if not different and self.vae_sha256 != other.vae_sha256:
            kinds = {families.weights_kind(space.vae) for space in (self, other) if space.vae is not None}
            loaded = f"; here they are {' and '.join(sorted(kinds))}" if kinds else ""
            return [
                "the encoder's weights (loaded as float32 or float16 they are the same, as bfloat16 or quantised they "
                f"are not{loaded})"
            ]
        return different

    @torch.no_grad()
    def encode(self, images: Sequence[Any] | Tensor, batch_size: int = 16) -> Tensor:
        """Encode images into the latents that a sampler would have to produce for them.

        Args:
            images: PIL images, or arrays (height, width, 3) of bytes, which are brought to `image_size` (alpha over
                white, short side resized, centre cut out), or a float tensor (B, 3, height, width) with values in
                [-1, 1]. For videos each is a list of `num_frames` images, in a tensor (B, 3, num_frames, height,
                width); a single image is a video that does not move.
            batch_size: images per call of the encoder.

        Returns:
            Latents (B, *shape), float32, on the CPU.

        Raises:
            TypeError: if `images` is something else.
            ValueError: if the space has no autoencoder, or size or range of a tensor or a number of frames are wrong.
        """
        image_size = self._require_image_size()
        if isinstance(images, Tensor):
            if self.shape[0] == 1 and images.shape[1:2] == (1,):
                images = images.expand(-1, 3, *images.shape[2:])  # grey, as pixels of three equal channels
            images = check_pixels(images, image_size, self.num_frames)
        else:
            images = check_images(images, self.num_frames)
        latents = [torch.empty(0, *self.shape)]
        batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
        pixels = (
            batch
            if isinstance(batch, Tensor)
            else torch.stack([clip_to_pixels(item, image_size, self.num_frames) for item in batch])
            for batch in batches
        )
        if self.pixel_range is not None:
            channels, around = self.shape[0], self.pixel_range
            return torch.cat(latents + [to_range(batch.float().cpu(), channels, around) for batch in pixels])
        vae = self._require_vae()
        if families.tiling(vae, image_size, self.num_frames) != self.tiling:
            raise RequestError("The encoder's tiling was switched on or off; read the latent space again.")
        mean, scale = self._normalisation()
        with families.ready(vae) as (device, dtype):
            for batch in pixels:
                z = families.vae_encode(vae, batch.to(device, dtype)).float().cpu()
                latents.append((arrange(z, *self._order()) - mean) * scale)
        return torch.cat(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 16) -> list[Any]:
        """Decode latents of the sampler.

        Args:
            latents: (B, *shape), any device.
            batch_size: latents per call of the decoder.

        Returns:
            B images of `image_size`; for videos, B lists of `num_frames` images.

        Raises:
            ValueError: if the space has no autoencoder or the shape is wrong.
        """
        image_size = self._require_image_size()
        if tuple(latents.shape[1:]) != self.shape:
            raise ValueError(
                f"latents must have the shape (B, {', '.join(map(str, self.shape))}); got {tuple(latents.shape)}."
            )
        if self.pixel_range is not None:
            return to_pil(from_range(latents.detach().float().cpu(), self.pixel_range))
        vae = self._require_vae()
        mean, scale = self._normalisation()
        images: list[Any] = []
        with families.ready(vae) as (device, dtype):
            for batch in latents.split(batch_size):
                z = batch.detach().float().cpu() / scale + mean
                if self._order()[0] is not None:
                    z = restore(z, *self._order(), families.grid(vae, image_size, self.num_frames))
                pixels = families.vae_decode(vae, z.to(device, dtype)).float().cpu()
                images += [to_pil(clip) for clip in pixels.transpose(1, 2)] if pixels.ndim == 5 else to_pil(pixels)
        return images

    def _normalisation(self) -> tuple[Tensor | float, Tensor | float]:
        """Return (mean, scale) with latent = (z - mean) * scale."""
        if self.mean is None or self.std is None:
            return self.shift, self.scaling
        channels = [1] * (len(self.shape) + 1)
        channels[channel_axis(self._order()[0])] = -1
        return torch.tensor(self.mean).view(channels), self.scaling / torch.tensor(self.std).view(channels)

    def _order(self) -> tuple[str | None, int]:
        """Return layout and patch as `layouts.arrange` takes them."""
        return TOKENS if self.layout is None and self.patch is not None else self.layout, self.patch or 1

    def _require_image_size(self) -> tuple[int, int]:
        if self.image_size is None or (self.vae is None and self.pixel_range is None):
            raise ValueError("This latent space has no autoencoder; LatentSpace.of(pipe) gives one that can encode.")
        return self.image_size

    def _require_vae(self) -> nn.Module:
        self._require_image_size()
        assert self.vae is not None  # the one way to have no autoencoder and an image size is pixels
        return self.vae


def _refuse(differences: list[str]) -> None:
    if differences:
        raise RequestError(f"These latent spaces differ, so distances would mean nothing: {'; '.join(differences)}.")
