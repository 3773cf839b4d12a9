"""Patch a ComfyUI MODEL with SPELL: wrap the sampling run and correct each prediction that its guider returns."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from shielded import History, ProtectedSet, Spell
from shielded.samplers.rows import select_rows

from .memory import Memory, recall

_KEY = "spell"
_ROUNDS = 8  # in which several SPELL nodes take turns until an image is outside the shields of all
_HALF_PRECISION = "Usually half precision overflowed: start ComfyUI with"


@dataclass
class SpellPatch:
    """Settings of one SPELL node.

    Args:
        radius: shield radius in units of √dim, dim being the number of generated values; two unrelated latents of unit
            variance are 1.41 apart.
        options: further keyword arguments of `shielded.Spell`.
        protected: a set on disk, or latents (K, *S) as a LATENT wire carries them.
        memory: finished images of earlier runs.
    """

    radius: float
    options: dict[str, Any]
    protected: ProtectedSet | Tensor | None
    memory: Memory | None

    def patch(self, model: Any) -> Any:
        """Clone the MODEL and add the hooks to the clone, with those of SPELL nodes before this one."""
        patched = model.clone()
        functions = patched.model_options.get("sampler_post_cfg_function", [])
        before = [function.__self__ for function in functions if _run_of(function) is not None]
        run = SpellRun([patch for earlier in before for patch in earlier.patches] + [self])
        patched.model_options["sampler_post_cfg_function"] = [f for f in functions if _run_of(f) is None]
        for kind, function in ((WrappersMP.SAMPLER_SAMPLE, run.sample), (WrappersMP.PREDICT_NOISE, run.predict)):
            patched.remove_wrappers_with_key(kind, _KEY)
            patched.add_wrapper_with_key(kind, _KEY, function)
        patched.set_model_sampler_post_cfg_function(run.listen)
        return patched

    def spells(
        self, latent_format: Any, shape: tuple[int, ...], count: int, denoise_mask: Tensor | None
    ) -> list[Shielded]:
        """Build a `Spell` for the images of a batch, or, if their masks differ, one for each of the masks."""
        protected = self.protected
        if isinstance(protected, Tensor):
            protected = latent_format.process_in(protected)
            check_shape(tuple(protected.shape[1:]), shape, "images on SPELL's input 'protected'")
        elif protected is not None:
            check_space(protected, latent_format, shape)
        remembered = None if self.memory is None else recall(self.memory, latent_format, shape)
        made = []
        for rows, mask in groups_of_masks(denoise_mask, shape, count):
            history: History | bool = False
            if self.memory is not None and remembered is not None:
                history = History(self.memory.limit)
                if len(remembered):
                    history.add(remembered)
            dim = torch.Size(shape).numel() if mask is None else int(mask.sum())
            spell = Spell(protected, self.radius * sqrt(dim), history=history, mask=mask, **self.options)
            made.append(Shielded(rows, spell, self.radius))
        return made


class Shielded(NamedTuple):
    """Images of a batch, all if rows is None, and the `Spell` that corrects them."""

    rows: Tensor | None
    spell: Spell
    radius: float

    def of(self, batch: Tensor) -> Tensor:
        """Select the images of (B, ...)."""
        return batch if self.rows is None else batch[self.rows.to(batch.device)]

    def into(self, batch: Tensor, images: Tensor) -> Tensor:
        """Put the images back into (B, *S)."""
        if self.rows is None:
            return images
        return batch.index_copy(0, self.rows.to(batch.device), images)


class SpellRun:
    """The sampling run of a MODEL with one or more SPELL nodes.

    Nodes after SPELL clone the MODEL, and with it copy what it holds: this one stays the same object.

    Args:
        patches: the nodes, in the order of the graph.
    """

    def __init__(self, patches: list[SpellPatch]) -> None:
        self.patches = patches
        self.parts: list[Shielded] | None = None  # while a run is in progress
        self.guider: Any = None
        self.guided: dict[str, Any] | None = None  # what the model's guidance was made of at this evaluation
        self.evaluations = 0
        self.last_sigma = 0.0  # noise level of the last evaluation before the clean sample; 0 if the run ends noisy

    def __deepcopy__(self, memo: dict[int, Any]) -> SpellRun:
        return self

    def sample(
        self,
        executor: Callable[..., Tensor],
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        *rest: Any,
    ) -> Tensor:
        """Wrap the sampler's `sample`: build each `Spell` in the sampler's latent space, run, finish."""
        ends_clean = len(sigmas) > 1 and sigmas[-1] == 0
        self.last_sigma = float(sigmas[-2]) if ends_clean else 0.0
        self.guider, self.evaluations = guider, 0
        latent_format = guider.inner_model.latent_format
        shape = tuple(noise.shape[1:])
        parts = [made for p in self.patches for made in p.spells(latent_format, shape, len(noise), denoise_mask)]
        for part in parts:
            part.spell.start()
        functions = extra_args.get("model_options", {}).get("sampler_post_cfg_function")
        if functions:  # what later nodes make of the guidance comes first
            functions.sort(key=lambda function: _run_of(function) is self)
        wrappers = getattr(guider, "model_options", {}).get("wrappers", {}).get(WrappersMP.PREDICT_NOISE, {})
        for key in [key for key in wrappers if key != _KEY]:  # the first is the outermost, and has the last word
            wrappers[key] = wrappers.pop(key)
        self.parts = parts
        try:
            samples = executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *rest)
            if len(sigmas) > 1 and not self.evaluations:
                raise RuntimeError(_MISSED)
            if ends_clean:
                samples = self._finish(samples)
            for patch in self.patches:
                logging.info(report([part.spell for part in parts if part.radius == patch.radius], patch.radius))
            return samples
        finally:
            self.parts = self.guider = self.guided = None

    def listen(self, args: dict[str, Any]) -> Tensor:
        """Note what the guided prediction is made of; a post-CFG function that changes nothing."""
        if self.parts is None:
            raise RuntimeError(_MISSED)
        self.guided = args
        return args["denoised"]

    def predict(self, executor: Callable[..., Tensor], x: Tensor, sigma: Tensor, *rest: Any, **more: Any) -> Tensor:
        """Wrap the guider's `predict_noise`: push the clean image that it predicts out of the shields.

        This is behind everything that combines predictions: CFG, nodes that rescale it, and guiders of their own.
        """
        if self.parts is None:
            raise RuntimeError(_MISSED)
        self.guided = None
        denoised = executor(x, sigma, *rest, **more)
        self.evaluations += 1
        return self.correct(x, sigma, denoised)

    def correct(self, x: Tensor, sigmas: Tensor, denoised: Tensor) -> Tensor:
        """Correct the predicted clean images (B, *S) of the states x at noise levels (B,)."""
        assert self.parts is not None
        alpha, sigma = noise_level(self.guider.inner_model.model_sampling, sigmas)
        # Samplers may evaluate the model several times at the last noise level; any of these may be the last.
        at: dict[str, Any] = {"alpha": alpha, "sigma": sigma, "last": sigma <= self.last_sigma * (1 + 1e-6)}
        x0, released = denoised.float(), None
        rows = self._colliding(x0, at)
        if rows is not None and self.guided is not None and self.guided["denoised"] is denoised:
            unguided = at_scale(self.guided, self.parts[0].spell.release_scale)
            if unguided is not None:
                denoised = select_rows(rows, unguided, denoised)
                x0, released = denoised.float(), rows
        noise = (x.float() - alpha * x0) / sigma if sigma > 0 else None
        moved_at_all = False
        for _ in range(_ROUNDS if len(self.patches) > 1 else 1):
            moved = False
            for part in self.parts:
                direction = None if noise is None else part.of(noise)
                try:
                    delta = part.spell(
                        part.of(x0), direction, **at, released=None if released is None else part.of(released)
                    )
                except ValueError as error:
                    if "NaN" not in str(error):
                        raise
                    raise ValueError(
                        f"The model on SPELL's input 'model' predicts NaN or infinity at sigma {sigma:.4g}. "
                        f"{_HALF_PRECISION} --force-fp32 or --bf16-unet."
                    ) from error
                if delta.any():
                    x0, moved = part.into(x0, part.of(x0) + delta), True
            moved_at_all |= moved
            if not moved:
                break
        return x0.to(denoised.dtype) if moved_at_all else denoised

    def _colliding(self, x0: Tensor, at: dict[str, Any]) -> Tensor | None:
        """Find the images (B,) inside a shield whose guidance is to be released; None if there are none."""
        found = None
        for part in self.parts or ():
            rows = part.spell.colliding(part.of(x0), **at)
            if rows is not None:
                found = torch.zeros(len(x0), dtype=torch.bool, device=x0.device) if found is None else found
                found = found | part.into(torch.zeros_like(found), rows)
        return found

    def _finish(self, samples: Tensor) -> Tensor:
        assert self.parts is not None
        several = len(self.patches) > 1
        for _ in range(_ROUNDS if several else 0):
            before = samples
            for part in self.parts:
                spell = part.spell
                if spell.overlap == "project" and spell.window[1] == 0:
                    images = part.of(samples)
                    left = spell.leave(images)
                    samples = samples if left is images else part.into(samples, left)
            if samples is before:
                break
        for part in self.parts:
            samples = part.into(samples, part.spell.finish(part.of(samples)))
        return samples


_MISSED = (
    "SPELL missed the start of this sampling run, because the sampling node does not use ComfyUI's guider. Sample with "
    "KSampler or SamplerCustomAdvanced."
)


def _run_of(function: Any) -> SpellRun | None:
    run = getattr(function, "__self__", None)
    return run if isinstance(run, SpellRun) else None


def groups_of_masks(
    denoise_mask: Tensor | None, shape: tuple[int, ...], count: int
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Group the images of a batch by what is generated of them.

    Args:
        denoise_mask: (1 or B, ...), non-zero where an image is generated; broadcasts to (B, *shape).
        shape: of one latent.
        count: B.

    Returns:
        rows of a group, None for all images, and their mask of that shape, None where all of it is generated. An image
        of which nothing is generated is in no group.
    """
    if denoise_mask is None or not denoise_mask.any():
        return [(None, None)]
    masks = (denoise_mask != 0).expand(-1, *shape)
    alike = (masks == masks[:1]).flatten(1).all()
    if alike:
        return [(None, None if masks[0].all() else masks[0])]
    groups: list[tuple[list[int], Tensor]] = []
    for row, mask in enumerate(masks.expand(count, *shape) if len(masks) == 1 else masks[:count]):
        same = next((rows for rows, other in groups if torch.equal(other, mask)), None)
        if same is not None:
            same.append(row)
        elif mask.any():
            groups.append(([row], mask))
    return [(torch.tensor(rows), None if mask.all() else mask) for rows, mask in groups]


def noise_level(model_sampling: Any, sigma: Tensor) -> tuple[float, float]:
    """Read (alpha, sigma) of the state x = alpha x0 + sigma noise off the model's `noise_scaling`.

    ComfyUI samples eps and v models with alpha = 1, flow models with alpha = 1 - sigma.

    Args:
        model_sampling: the model's `model_sampling`.
        sigma: (B,) noise levels as ComfyUI counts them.

    Raises:
        ValueError: if the images of the batch are at different noise levels.
    """
    levels = sigma.flatten().float().cpu()
    level = levels[:1]
    if (levels != level).any():
        raise ValueError("SPELL needs one noise level for all images of a batch; sample them one by one.")
    zero, one = torch.zeros_like(level), torch.ones_like(level)
    alpha = model_sampling.noise_scaling(level, zero.clone(), one)
    scale = model_sampling.noise_scaling(level, one.clone(), zero)
    return float(alpha), float(scale)


def at_scale(args: dict[str, Any], scale: float) -> Tensor | None:
    """Compute the prediction at another guidance scale from a post-CFG function's arguments.

    Returns:
        (B, *S); None where the run has no guidance above that scale, as with models whose guidance is embedded.
    """
    cond, uncond = args.get("cond_denoised"), args.get("uncond_denoised")
    if cond is None or uncond is None or args.get("uncond") is None or not args.get("cond_scale", 1.0) > scale:
        return None
    return cond if scale == 1 else uncond + scale * (cond - uncond)


def check_shape(encoded: tuple[int, ...], sampled: tuple[int, ...], name: str) -> None:
    """Refuse references whose latents have another shape than the sampled ones.

    Raises:
        ValueError: saying whether the kind of model or the image size differs.
    """
    if encoded != sampled:
        same_model = len(encoded) == len(sampled) and encoded[0] == sampled[0]
        raise ValueError(
            f"The {name} were encoded for another {'image size' if same_model else 'kind of model'}: their latents are "
            f"{'×'.join(map(str, encoded))}, this workflow samples {'×'.join(map(str, sampled))}. Encode them again "
            "with this model's VAE at the size you generate."
        )


def check_space(protected: ProtectedSet, latent_format: Any, sampled: tuple[int, ...]) -> None:
    """Refuse a protected set whose layout, shape or scaling differs from the sampled latents.

    A set that records no VAE is compared by shape alone.

    Raises:
        ValueError: naming what differs.
    """
    space = protected.space
    if space.patch is not None:
        raise ValueError(
            f"The protected set at {protected.path} holds packed latents, as diffusers samples this kind of model; "
            "ComfyUI does not pack. Use SPELL Protect Folder for these images."
        )
    check_shape(tuple(space.shape), sampled, f"images of {protected.path}, on SPELL's input 'protected',")
    if space.vae_sha256 is None:
        return
    per_channel = (1, -1, *[1] * (len(sampled) - 1))
    mean = torch.tensor(space.mean or [space.shift]).view(per_channel)
    std = torch.tensor(space.std or [1.0]).view(per_channel)
    probe = torch.tensor([-1.0, 1.0]).view(2, *[1] * len(sampled)).expand(2, sampled[0], *per_channel[2:])
    if not torch.allclose(latent_format.process_in(probe), (probe - mean) * space.scaling / std, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"The protected set at {protected.path} was made for another kind of model: this model scales its latents "
            f"differently ({type(latent_format).__name__}). Make the set with the model you generate with."
        )


def report(spells: list[Spell], radius: float) -> str:
    """Summarise what one SPELL node did in a run, in one line."""
    traces = [spell.trace for spell in spells]
    l2 = " and ".join(dict.fromkeys(f"{spell.radius:.4g}" for spell in spells))
    size = f"radius {radius:g} (L2 {l2})"
    pushed = [[row for row in trace if row["push"] > 0] for trace in traces]
    if not any(pushed):
        return f"SPELL: nothing came within {size}, so the result is unchanged. A larger radius acts more often."
    evaluations = max(len({row["step"] for row in trace}) for trace in traces)
    steps = max(len({row["step"] for row in rows}) for rows in pushed)
    line = (
        f"SPELL: {_images(pushed)} of {_images(traces)} images pushed, in {steps} of {evaluations} evaluations, {size}."
    )
    released = _images([[row for row in trace if row["released"]] for trace in traces])
    line += f" Guidance was released for {released}." if released else ""
    stuck = _images([[r for r in trace if r["unresolved"] and r["step"] == trace[-1]["step"]] for trace in traces])
    return line + (f" {stuck} could not be moved out of all shields: too many overlap." if stuck else "")


def _images(traces: list[list[dict[str, Any]]]) -> int:
    return sum(len({row["image"] for row in trace}) for trace in traces)
