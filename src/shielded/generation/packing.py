"""Finished images as bytes, to send them to another process or to keep them for a run that goes on later."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from shielded.certificates.certificate import Measured
from shielded.generation.copies import Copied
from shielded.generation.generated import Generated


def pack(made: Generated, **more: Any) -> bytes:
    """Write images with all that is known of them, and further content in JSON types, without any loss."""
    message = {
        "seconds": made.seconds,
        "attempts": made.attempts,
        "repair": made.repair,
        "refused": made.refused,
        "measured": [[asdict(latents), asdict(picture)] for latents, picture in made.measured],
        "causes": made.causes,
        "copied": [None if copy is None else asdict(copy) for copy in made.copied],
        "more": more,
    }
    tensors = {"message": as_tensor(json.dumps(message).encode()), "latents": made.latents.contiguous()}
    tensors |= {} if made.decoded is None else {"decoded": made.decoded.contiguous()}
    tensors |= {f"image {i}": as_tensor(_png(image)) for i, image in enumerate(made.images)}
    return save(tensors)


def unpack(data: bytes) -> tuple[Generated, dict[str, Any]]:
    """Read what `pack` wrote: the images and the further content."""
    tensors = load(data)
    message = json.loads(tensors["message"].numpy().tobytes())
    pngs = [tensors[f"image {i}"].numpy().tobytes() for i in range(len(tensors["latents"]))]
    made = Generated(
        [Image.open(io.BytesIO(png)).copy() for png in pngs],
        tensors["latents"],
        message["seconds"],
        tensors.get("decoded"),
        message["attempts"],
        message["repair"],
        message["refused"],
        [(_measured(latents), _measured(picture)) for latents, picture in message["measured"]],
        [None if copy is None else Copied(**copy) for copy in message["copied"]],
        message["causes"],
    )
    return made, message["more"]


def as_tensor(data: bytes) -> Tensor:
    """Copy bytes to a tensor (n,) uint8."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _measured(content: dict[str, Any]) -> Measured:
    leak = content["leak"]
    return Measured(**{**content, "leak": None if leak is None else tuple(leak)})


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
