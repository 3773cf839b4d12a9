"""Patch a ComfyUI MODEL with SPELL: wrap the sampling run and correct each prediction."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from shielded import History, ProtectedSet, Spell
from shielded.samplers.rows import select_rows

from .memory import Memory, recall


@dataclass
class SpellPatch:
    """Settings of the SPELL node, and the state of the sampling run in progress.

    Args:
        radius: shield radius in units of √dim, dim being the number of generated values; two unrelated latents of unit
            variance are 1.41 apart.
        options: further keyword arguments of `shielded.Spell`.
        protected: a set on disk, or latents (K, *S) as a LATENT wire carries them.
        memory: finished images of earlier runs.
        spell: the `Spell` of the run in progress.
        last_sigma: noise level of the last model evaluation before the clean sample; 0 if the run ends noisy.
    """

    radius: float
    options: dict[str, Any]
    protected: ProtectedSet | Tensor | None
    memory: Memory | None
    spell: Spell | None = None
    last_sigma: float = 0.0

    def patch(self, model: Any) -> Any:
        """Clone the MODEL and add the hooks to the clone."""
        patched = model.clone()
        patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "spell", self.sample)
        patched.set_model_sampler_post_cfg_function(self.correct)
        return patched

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
        """Wrap the sampler's `sample`: build the `Spell` in the sampler's latent space, run, finish."""
        ends_clean = len(sigmas) > 1 and sigmas[-1] == 0
        self.last_sigma = float(sigmas[-2]) if ends_clean else 0.0
        self.spell = self._spell(guider.inner_model.latent_format, tuple(noise.shape[1:]), denoise_mask)
        self.spell.start()
        try:
            samples = executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *rest)
            if ends_clean:
                samples = self.spell.finish(samples)
            logging.info(report(self.spell, self.radius))
            return samples
        finally:
            self.spell = None

    def correct(self, args: dict[str, Any]) -> Tensor:
        """Push the guided prediction of the clean image out of the shields; a post-CFG function."""
        if self.spell is None:
            raise RuntimeError(
                "SPELL missed the start of this sampling run, because the sampling node does not use ComfyUI's guider. "
                "Sample with KSampler or SamplerCustomAdvanced."
            )
        denoised = args["denoised"]
        alpha, sigma = noise_level(args["model"].model_sampling, args["sigma"])
        x0 = denoised.float()
        # Samplers may evaluate the model several times at the last noise level; any of these may be the last.
        last = sigma <= self.last_sigma * (1 + 1e-6)
        rows = self.spell.colliding(x0, alpha=alpha, sigma=sigma, last=last)
        unguided = None if rows is None else at_scale(args, self.spell.release_scale)
        if rows is not None and unguided is not None:
            denoised = select_rows(rows, unguided, denoised)
            x0 = denoised.float()
        noise = (args["input"].float() - alpha * x0) / sigma if sigma > 0 else None
        released = None if unguided is None else rows
        delta = self.spell(x0, noise=noise, alpha=alpha, sigma=sigma, last=last, released=released)
        return (x0 + delta).to(denoised.dtype) if delta.any() else denoised

    def _spell(self, latent_format: Any, shape: tuple[int, ...], denoise_mask: Tensor | None) -> Spell:
        protected = self.protected
        if isinstance(protected, Tensor):
            protected = latent_format.process_in(protected)
            check_shape(tuple(protected.shape[1:]), shape, "protected images")
        elif protected is not None:
            check_space(protected, latent_format, shape)
        history: History | bool = False
        if self.memory is not None:
            history = History(self.memory.limit)
            remembered = recall(self.memory, latent_format, shape)
            if len(remembered):
                history.add(remembered)
        mask, dim = None, torch.Size(shape).numel()
        if denoise_mask is not None and denoise_mask.any():
            mask = denoise_mask.amax(dim=0).expand(shape) != 0
            dim = int(mask.sum())
        return Spell(protected, self.radius * sqrt(dim), history=history, mask=mask, **self.options)


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
    check_shape(tuple(space.shape), sampled, f"protected images of {protected.path}")
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


def report(spell: Spell, radius: float) -> str:
    """Summarise a run in one line."""
    pushed = [row for row in spell.trace if row["push"] > 0]
    size = f"radius {radius:g} (L2 {spell.radius:.4g})"
    if not pushed:
        return f"SPELL: nothing came within {size}, so the result is unchanged. A larger radius acts more often."
    images = len({row["image"] for row in spell.trace})
    evaluations = len({row["step"] for row in spell.trace})
    line = (
        f"SPELL: {len({row['image'] for row in pushed})} of {images} images pushed, in "
        f"{len({row['step'] for row in pushed})} of {evaluations} evaluations, {size}."
    )
    released = len({row["image"] for row in spell.trace if row["released"]})
    line += f" Guidance was released for {released}." if released else ""
    stuck = {row["image"] for row in spell.trace if row["unresolved"] and row["step"] == spell.trace[-1]["step"]}
    return line + (f" {len(stuck)} could not be moved out of all shields: too many overlap." if stuck else "")
