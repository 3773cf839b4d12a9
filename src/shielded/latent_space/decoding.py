"""What a diffusers pipeline does between its sampler's last step and its decoder, read from its source.

The source is parsed and never run. Whatever is found there that is not known leads to a refusal: a wrong scale or
order of the latents would make every distance meaningless. tests/latent_space/test_decoding.py runs the same
statements of each accepted pipeline and compares.

Pipelines and their parts are typed `Any`: their methods and `config` depend on the class.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from typing import Any, NamedTuple

import torch
from torch import nn

from shielded.latent_space.layouts import CHANNELS_LAST, FRAMES_FIRST, PATCHES, TOKENS, restore


class Decoding(NamedTuple):
    """How latents of the sampler become the latents that the decoder is given.

    Args:
        scaling: they are divided by the autoencoder's `scaling_factor`.
        shift: its `shift_factor` is added.
        statistics: they are multiplied by its `latents_std`, and its `latents_mean` is added.
        norm: they are multiplied and shifted by the statistics of its batch norm.
        norm_eps: what is added to the variance there; None: the autoencoder's `batch_norm_eps`.
        sigma_data: they are divided by the scheduler's `sigma_data`.
        layout: their order, as `layouts.arrange` takes it.
        patch: side of the patches that a token or a channel holds; 1 without.
        video: the pipeline makes videos, or images as videos of one frame.
    """

    scaling: bool
    shift: bool
    statistics: bool
    norm: bool
    norm_eps: float | None
    sigma_data: bool
    layout: str | None
    patch: int
    video: bool


_DECODES = re.compile(r"self\.(?:vae\.decode|_?decode_latents)\(")
_HELPERS = re.compile(r"self\.(\w+)\(")

# What is handed to a scheduler: all of the latents, or another sampler's (a second track, a first stage).
_SAMPLED = (
    "latents",
    "latents.to(torch.float32)",
    "latents[:, :, :, :, :num_channels_latents]",  # Kandinsky 5: without the channels of its condition
    "latent_model_input",  # DiT
)
_OTHERS = ("audio_latents", "prior_latents", "t")

_METHODS = {  # called between sampler and decoder
    "_unpack_latents",
    "_unpack_latents_no_patch",
    "_unpack_latents_with_ids",
    "_unpatchify_latents",
    "_denormalize_latents",
    "decode_latents",
    "decode_latents_with_padding",
    "upcast_vae",
    "maybe_free_model_hooks",
    "_denormalize_audio_latents",
    "_unpack_audio_latents",
    "_encode_vae_image",  # for autoencoders that are told what was painted over
}
_CONFIG = {  # of the autoencoder, read there
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "latent_channels",
    "z_dim",
    "batch_norm_eps",
    "force_upcast",
    "timestep_conditioning",
}
_PERMUTATIONS = {"0, 2, 1, 3, 4": FRAMES_FIRST, "0, 1, 5, 2, 3, 4": CHANNELS_LAST}

_SOUND = "AudioPipelineOutput("


def read(pipe: Any, vae: Any, factor: int) -> Decoding:
    """Read how a pipeline brings its sampler's latents to its decoder.

    Args:
        pipe: a pipeline.
        vae: its autoencoder, without the wrappers of torch.compile.
        factor: number of pixels per latent, on each side.

    Raises:
        TypeError: says why that is not known.
    """
    call, path, sampled = _sources(type(pipe))
    if _SOUND in call:
        raise TypeError("it makes sound")
    if not path:
        raise TypeError("its way from the last step to the decoder cannot be read")
    other = [sample for sample in sampled if sample not in (*_SAMPLED, *_OTHERS)]
    if other or not sampled:
        raise TypeError(f"its sampler sees {' and '.join(other) or 'nothing'}, not all that is decoded")
    unknown = sorted(set(_HELPERS.findall(path)) - _METHODS)
    unknown += [name for name in ("decode_latents",) if f"self.{name}(" in path and not hasattr(pipe, name)]
    unknown += sorted(set(re.findall(r"vae\.config\.(\w+)", path)) - _CONFIG)
    if unknown:
        raise TypeError(f"it decodes by {', '.join(unknown)}")
    images = not works_on_videos(vae)
    layout, patch = _layout(pipe, path, images, factor)
    path = path.replace("vae_scale_factor", "")
    return Decoding(
        scaling="scaling_factor" in path,
        shift="shift_factor" in path,
        statistics="latents_mean" in path,
        norm=".bn." in path,
        norm_eps=float(eps[1]) if (eps := re.search(r"running_var[^\n]*? \+ (\d[\d.e-]*)", path)) else None,
        sigma_data="sigma_data" in path,
        layout=layout,
        patch=patch,
        video=hasattr(pipe, "video_processor"),
    )


def source(cls: type) -> str:
    """Return the source of a pipeline's call; empty if there is none to read."""
    return _sources(cls)[0]


def works_on_videos(vae: Any) -> bool:
    """Tell whether an autoencoder encodes videos rather than images."""
    encoder = getattr(vae, "encoder", vae)
    if "temperal_downsample" in getattr(vae, "config", {}):
        return True
    return any(isinstance(module, nn.Conv3d) for module in encoder.modules())


def _layout(pipe: Any, path: str, images: bool, factor: int) -> tuple[str | None, int]:
    """Find the layout of the sampler's latents and the side of its patches."""
    if "_unpack_latents_no_patch" in path and not getattr(pipe, "do_patching", False):
        return TOKENS, 1
    if "_unpack_latents" in path:
        return TOKENS, _patch(pipe, factor)
    if "_unpatchify_latents" in path:
        return PATCHES, 2
    orders = re.findall(r"permute\(([\d, ]+)\)", path)
    if images and "latents.flatten(0, 1)" in path:
        return FRAMES_FIRST, 1
    if images and orders == ["0, 2, 1, 3, 4"]:
        return None, 1  # each frame is decoded as an image
    if len(orders) > 1 or not set(orders) <= _PERMUTATIONS.keys() or re.search(r"\.view\(batch|flatten\(0, 1\)", path):
        raise TypeError("the order of its latents' axes is not known")
    return (_PERMUTATIONS[orders[0]] if orders else None), 1


def _patch(pipe: Any, factor: int) -> int:
    """Return the side of the patches that a token holds, after the pipeline itself has unpacked such tokens.

    Raises:
        TypeError: the pipeline unpacks tokens in another order.
    """
    patch = getattr(pipe, "transformer_spatial_patch_size", 2)
    unpack = getattr(pipe, "_unpack_latents", None)
    if unpack is None:  # FLUX.2 looks each token up by its position
        return patch
    shape = (3, 2 * patch, 4 * patch)
    tokens = torch.arange(float(3 * 8 * patch**2)).view(1, 8, 3 * patch**2)
    parameters = inspect.signature(unpack).parameters
    unit = 1 if "num_frames" in parameters else factor  # latents or pixels
    known = {
        "latents": tokens,
        "height": 2 * patch * unit,
        "width": 4 * patch * unit,
        "num_frames": 1,
        "patch_size": patch,
        "patch_size_t": 1,
        "vae_scale_factor": getattr(pipe, "vae_scale_factor", factor),
    }
    try:
        unpacked = unpack(**{name: known[name] for name in parameters}).reshape(1, *shape)
    except (KeyError, RuntimeError, ValueError):
        unpacked = None
    if unpacked is None or not torch.equal(unpacked, restore(tokens, TOKENS, patch, shape)):
        raise TypeError("it unpacks its tokens in an order that is not known")
    return patch


@functools.lru_cache(maxsize=512)
def _sources(cls: type) -> tuple[str, str, tuple[str, ...]]:
    """Read the source of a pipeline's call, its part between sampler and decoder, and what its sampler is handed."""
    for base in cls.__mro__:
        if "__call__" not in vars(base):
            continue
        try:
            call = textwrap.dedent(inspect.getsource(inspect.unwrap(vars(base)["__call__"])))
            body = next(n for n in ast.walk(ast.parse(call)) if isinstance(n, ast.FunctionDef)).body
        except (OSError, TypeError, SyntaxError, StopIteration):
            continue  # made in a session
        path = _between(call, body)
        if path:
            return call, path + _bodies(cls, path), tuple(_sampled(body))
    return "", "", ()


def _between(call: str, body: list[ast.stmt]) -> str:
    """Return the statements after the sampling loop up to the call of the decoder."""
    last = max((n for n, statement in enumerate(body) if _steps(call, statement)), default=None)
    if last is None:
        return ""
    after = "\n".join(ast.unparse(statement) for statement in body[last + 1 :])
    found = _DECODES.search(after)
    return "" if found is None else after[: after.find("\n", found.end())]


def _steps(call: str, statement: ast.stmt) -> bool:
    return "scheduler.step(" in "\n".join(call.splitlines()[statement.lineno - 1 : statement.end_lineno])


def _bodies(cls: type, path: str) -> str:
    """Return the source of the methods on this path that scale or reorder latents."""
    found = ""
    for name in dict.fromkeys(_HELPERS.findall(path)):
        if name not in ("decode_latents", "_denormalize_latents") or not hasattr(cls, name):
            continue
        source = ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(getattr(cls, name)))))
        end = _DECODES.search(source)
        found += "\n" + (source if end is None else source[: source.find("\n", end.end())])
    return found


def _sampled(body: list[ast.stmt]) -> list[str]:
    """Return what the steps of the pipeline's scheduler are handed as their sample."""
    found = []
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step":
            if not ast.unparse(node.func.value).endswith("scheduler"):
                continue
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            sample = node.args[2] if len(node.args) > 2 else keywords.get("sample")
            found += [] if sample is None else [ast.unparse(sample)]
    return list(dict.fromkeys(found))
