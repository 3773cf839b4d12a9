"""How each scheduler of diffusers turns a model output into x0, in one table.

With (α, σ) of the state x = α x0 + σ ε that the model has just seen, every supported scheduler computes

    x0 = a · sample + b · model_output

so adding Δ/b to the model output makes the scheduler derive x0 + Δ.

    prediction       a              b               source
    epsilon          1/α            −σ/α            Ho et al., DDPM, 2020
    v_prediction     α/(α²+σ²)      −σ/√(α²+σ²)     Salimans and Ho, Progressive Distillation, 2022
    sample           0              1
    flow_prediction  1              −σ              Lipman et al., Flow Matching, 2023
    EDM              s²/(σ²+s²)     ±σs/√(σ²+s²)    Karras et al., EDM, 2022, Table 1; s = sigma_data
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """x0 = a · sample + b · model_output, where sample = alpha · x0 + sigma · noise."""

    a: float
    b: float
    alpha: float
    sigma: float


class SchedulerFamily(NamedTuple):
    """One way to turn model outputs into x0, and the config options that make `step` bound x0 afterwards."""

    state: Callable[[Any, Any, Any], State]  # (scheduler, timestep, index, None where not counted) -> State
    bounds: tuple[str, ...] = ()


def x0_coefficients(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """Compute the two numbers that turn a model output into the predicted clean sample x0.

    `x0 = a * sample + b * model_output`, before the scheduler clips or thresholds it. `sample` is what `scheduler.step`
    gets, which is not scaled by `scale_model_input`. The scheduler is only read, never changed.

    Args:
        scheduler: a diffusers scheduler whose `set_timesteps` was called.
        timestep: an entry of `scheduler.timesteps`, as a number or a tensor. Where the same timestep occurs more than
            once, the occurrence that the scheduler would step now, otherwise the second one, as diffusers does.

    Returns:
        (a, b).

    Raises:
        TypeError: the scheduler class is unknown, or x0 is not an affine function of its model output.
        ValueError: the timestep is not in the schedule, or the scheduler's options leave x0 undefined.
    """
    state = step_state(scheduler, timestep)
    return state.a, state.b


def step_state(scheduler: Any, timestep: Any, index: int | None = None) -> State:
    """Compute the coefficients and the noise level of the state that the model has just seen.

    Args:
        scheduler: a diffusers scheduler.
        timestep: an entry of `scheduler.timesteps`.
        index: position in the schedule, for a scheduler that counts its steps and so ignores the timestep. None: look
            the timestep up.

    Raises:
        TypeError, ValueError: as `x0_coefficients`.
    """
    family = family_of(scheduler)
    _check_options(scheduler)
    if index is None and hasattr(scheduler, "step_index"):
        index = _lookup(scheduler, timestep)
    return family.state(scheduler, timestep, index)


def bounded_x0(scheduler: Any, x0: Tensor) -> Tensor:
    """Bound x0 (B, *S) as the scheduler will: clipped or dynamically thresholded as its config says.

    Dynamic thresholding is of Saharia et al., Imagen, 2022.
    """
    for option in family_of(scheduler).bounds:
        if not scheduler.config.get(option):
            continue
        if option == "thresholding" and not getattr(scheduler, "predict_x0", True):
            continue  # UniPC in its noise-predicting form ignores the option
        if option == "thresholding":
            return scheduler._threshold_sample(x0)
        limit = 1.0 if option == "clip_denoised" else scheduler.config.clip_sample_range
        return x0.clamp(-limit, limit)
    return x0


def family_of(scheduler: Any) -> SchedulerFamily:
    """Look up the row of the table for a scheduler; subclasses use the row of the class they extend.

    Raises:
        TypeError: the class is unknown or refused; says why and what to use instead.
    """
    name = type(scheduler).__name__
    for cls in type(scheduler).__mro__:
        if not cls.__module__.startswith("diffusers."):
            continue
        if cls.__name__ in SUPPORTED:
            return SUPPORTED[cls.__name__]
        if cls.__name__ in REFUSED:
            reason, instead = REFUSED[cls.__name__]
            raise TypeError(f"{name} is not supported: {reason}; {instead}.")
    raise TypeError(
        f"{name} is not a scheduler that shielded knows; use one of diffusers' DDIM, Euler, DPMSolver or FlowMatch "
        f"schedulers, or {_CALL_SPELL}."
    )


def last_index(scheduler: Any) -> int:
    """Find the index of the last entry of `scheduler.timesteps` at which the model is evaluated."""
    count = len(scheduler.timesteps)
    state = family_of(scheduler).state
    if state is _wuerstchen:  # its last timestep is the clean end, which is never passed to step
        return count - 2
    if state is _flow:  # some schedules list the clean end (sigma 0) as a timestep, where x0 is the sample itself
        return max(index for index in range(count) if _flow_level(scheduler, index) > 0)
    return count - 1


def position_of(scheduler: Any, timestep: Any, previous: int = -1) -> int | None:
    """Find the index in `scheduler.timesteps` of the step about to be taken.

    Args:
        scheduler: a diffusers scheduler.
        timestep: the argument of `step`.
        previous: position of the step before, because PNDM lists a timestep twice and does not count its steps.

    Returns:
        None where the timestep is not in the schedule, which stateless schedulers accept.
    """
    if hasattr(scheduler, "step_index"):
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)  # what step itself does first; honours begin_index
        return scheduler.step_index
    if family_of(scheduler).state is _wuerstchen:  # pipelines round the timestep to their dtype
        return int((scheduler.timesteps - _scalar(timestep)).abs().argmin())
    found = _occurrences(scheduler, timestep)
    return next((index for index in found if index > previous), found[0] if found else None)


# Families ---------------------------------------------------------------------------------------------------------


def _affine(scheduler: Any, alpha: float, sigma: float) -> State:
    """Coefficients of the three prediction types that VP and VE schedulers share."""
    prediction = scheduler.config.prediction_type
    if prediction == "epsilon":
        if alpha == 0:
            raise ValueError(
                f"{type(scheduler).__name__}: at zero terminal SNR the sample is pure noise, so epsilon says nothing "
                "about x0; use prediction_type='v_prediction' or rescale_betas_zero_snr=False."
            )
        return State(1 / alpha, -sigma / alpha, alpha, sigma)
    if prediction == "v_prediction":
        norm = math.hypot(alpha, sigma)
        return State(alpha / norm**2, -sigma / norm, alpha, sigma)
    if prediction in ("sample", "original_sample"):
        return State(0.0, 1.0, alpha, sigma)
    raise _unknown_prediction(scheduler, "'epsilon', 'v_prediction' or 'sample'")


def _vp(scheduler: Any, timestep: Any, index: int | None) -> State:
    """Variance preserving, with ᾱ looked up by the timestep itself."""
    value = _scalar(timestep)
    table = scheduler.alphas_cumprod
    if value != int(value) or not 0 <= value < len(table):
        raise ValueError(
            f"{type(scheduler).__name__}: timestep {value} is not an integer from 0 to {len(table) - 1}; pass an entry "
            "of scheduler.timesteps."
        )
    cumprod = float(table[int(value)])
    return _affine(scheduler, math.sqrt(cumprod), math.sqrt(1 - cumprod))


def _multistep(scheduler: Any, timestep: Any, index: int) -> State:
    """DPM-Solver and its relatives: VP or flow, given as the ratio σ/α per step."""
    sigma = float(scheduler.sigmas[index])
    flow = scheduler.config.get("use_flow_sigmas", False)
    alpha_t = 1 - sigma if flow else 1 / math.hypot(sigma, 1)
    sigma_t = sigma if flow else sigma * alpha_t
    if scheduler.config.prediction_type == "flow_prediction":
        return State(1.0, -sigma, alpha_t, sigma_t)
    if scheduler.config.prediction_type == "v_prediction":
        # These solvers keep the VP formula with flow sigmas too, where α² + σ² is not 1.
        return State(alpha_t, -sigma_t, alpha_t, sigma_t)
    return _affine(scheduler, alpha_t, sigma_t)


def _ve(scheduler: Any, timestep: Any, index: int) -> State:
    """Variance exploding: α = 1. Heun lists the sigma of its second half step under that step's index."""
    return _affine(scheduler, 1.0, float(scheduler.sigmas[index]))


def _kdpm2(scheduler: Any, timestep: Any, index: int) -> State:
    sigmas = scheduler.sigmas_interpol if _second_half(scheduler, index) else scheduler.sigmas
    return _affine(scheduler, 1.0, float(sigmas[index]))


def _kdpm2_ancestral(scheduler: Any, timestep: Any, index: int) -> State:
    half = _second_half(scheduler, index)
    sigma = scheduler.sigmas_interpol[index - 1] if half else scheduler.sigmas[index]
    return _affine(scheduler, 1.0, float(sigma))


def _dpm_sde(scheduler: Any, timestep: Any, index: int) -> State:
    sigma = float(scheduler.sigmas[index])
    if _second_half(scheduler, index):  # the midpoint in log sigma
        sigma = math.sqrt(float(scheduler.sigmas[index - 1]) * sigma)
    return _affine(scheduler, 1.0, sigma)


def _edm(scheduler: Any, timestep: Any, index: int) -> State:
    """EDM preconditioning; v_prediction flips the sign of c_out."""
    sign = {"epsilon": 1, "v_prediction": -1}.get(scheduler.config.prediction_type)
    if sign is None:
        raise _unknown_prediction(scheduler, "'epsilon' or 'v_prediction'")
    sigma, data = float(scheduler.sigmas[index]), scheduler.config.sigma_data
    norm = math.hypot(sigma, data)
    return State((data / norm) ** 2, sign * sigma * data / norm, 1.0, sigma)


def _flow(scheduler: Any, timestep: Any, index: int) -> State:
    """Rectified flow: x = (1 − σ) x0 + σ ε. Inverted sigmas run up to the data, and the velocity points to it."""
    level = _flow_level(scheduler, index)
    inverted = scheduler.config.get("invert_sigmas", False)
    return State(1.0, level if inverted else -level, 1 - level, level)


def _consistency(scheduler: Any, timestep: Any, index: int) -> State:
    """Consistency models (Song et al., 2023), Appendix C: c_skip and c_out with the boundary at sigma_min."""
    sigma = float(scheduler.sigmas[index])
    data, above = scheduler.config.sigma_data, sigma - scheduler.config.sigma_min
    return State(data**2 / (above**2 + data**2), above * data / math.hypot(sigma, data), 1.0, sigma)


def _ipndm(scheduler: Any, timestep: Any, index: int) -> State:
    """v prediction on a VP schedule given as the pair (alphas, betas)."""
    alpha, sigma = float(scheduler.alphas[index]), float(scheduler.betas[index])
    return State(alpha, -sigma, alpha, sigma)


def _wuerstchen(scheduler: Any, timestep: Any, index: int | None) -> State:
    """Continuous cosine schedule over timesteps in [0, 1]; the model predicts epsilon."""
    _scalar(timestep)
    time = torch.as_tensor(timestep).flatten()[:1]
    cumprod = float(scheduler._alpha_cumprod(time, time.device))
    alpha, sigma = math.sqrt(cumprod), math.sqrt(1 - cumprod)
    return State(1 / alpha, -sigma / alpha, alpha, sigma)


_CLIP = ("thresholding", "clip_sample")

SUPPORTED = {
    "CMStochasticIterativeScheduler": SchedulerFamily(_consistency, ("clip_denoised",)),
    "CogVideoXDDIMScheduler": SchedulerFamily(_vp),  # has clip_sample in its config but does not clip
    "CosineDPMSolverMultistepScheduler": SchedulerFamily(_edm),
    "DDIMParallelScheduler": SchedulerFamily(_vp, _CLIP),
    "DDIMScheduler": SchedulerFamily(_vp, _CLIP),
    "DDPMParallelScheduler": SchedulerFamily(_vp, _CLIP),
    "DDPMScheduler": SchedulerFamily(_vp, _CLIP),
    "DDPMWuerstchenScheduler": SchedulerFamily(_wuerstchen),
    "DEISMultistepScheduler": SchedulerFamily(_multistep, ("thresholding",)),
    "DPMSolverMultistepScheduler": SchedulerFamily(_multistep, ("thresholding",)),
    "DPMSolverSDEScheduler": SchedulerFamily(_dpm_sde),
    "DPMSolverSinglestepScheduler": SchedulerFamily(_multistep, ("thresholding",)),
    "EDMDPMSolverMultistepScheduler": SchedulerFamily(_edm, ("thresholding",)),
    "EDMEulerScheduler": SchedulerFamily(_edm),
    "EulerAncestralDiscreteScheduler": SchedulerFamily(_ve),
    "EulerDiscreteScheduler": SchedulerFamily(_ve),
    "FlowMatchEulerDiscreteScheduler": SchedulerFamily(_flow),
    "FlowMatchHeunDiscreteScheduler": SchedulerFamily(_flow),
    "FlowMatchLCMScheduler": SchedulerFamily(_flow),
    "HeunDiscreteScheduler": SchedulerFamily(_ve, ("clip_sample",)),
    "IPNDMScheduler": SchedulerFamily(_ipndm),
    "KDPM2AncestralDiscreteScheduler": SchedulerFamily(_kdpm2_ancestral),
    "KDPM2DiscreteScheduler": SchedulerFamily(_kdpm2),
    "LCMScheduler": SchedulerFamily(_vp, _CLIP),
    "LMSDiscreteScheduler": SchedulerFamily(_ve),
    "LTXEulerAncestralRFScheduler": SchedulerFamily(_flow),
    "PNDMScheduler": SchedulerFamily(_vp),
    "SASolverScheduler": SchedulerFamily(_multistep, ("thresholding",)),
    "TCDScheduler": SchedulerFamily(_vp),  # has clip_sample and thresholding in its config but applies neither
    "UnCLIPScheduler": SchedulerFamily(_vp, ("clip_sample",)),
    "UniPCMultistepScheduler": SchedulerFamily(_multistep, ("thresholding",)),
}

_CALL_SPELL = "call the Spell on x0 in your own sampling loop"
_IMAGE = "use an image or video pipeline with a Gaussian diffusion or flow model"
_DDIM = "use DDIMScheduler"

REFUSED = {  # name: (reason, what to use instead)
    "AmusedScheduler": ("it samples discrete tokens, which have no x0 to push", _IMAGE),
    "BlockRefinementScheduler": ("it samples discrete tokens, which have no x0 to push", _IMAGE),
    "CogVideoXDPMScheduler": (
        "its step takes other arguments and mixes in the x0 of the step before",
        "use CogVideoXDDIMScheduler",
    ),
    "ConsistencyDecoderScheduler": (
        "it decodes finished latents into pixels, too late to push",
        "attach to the pipeline that makes the latents",
    ),
    "DDIMInverseScheduler": ("it runs from an image to noise", _DDIM),
    "DPMSolverMultistepInverseScheduler": ("it runs from an image to noise", "use DPMSolverMultistepScheduler"),
    "DiscreteDDIMScheduler": ("it samples discrete tokens, which have no x0 to push", _IMAGE),
    "EntropyBoundScheduler": ("it samples discrete tokens, which have no x0 to push", _IMAGE),
    "FlowMapEulerDiscreteScheduler": (
        "its model predicts the mean velocity between two times, not x0",
        "use FlowMatchEulerDiscreteScheduler with a flow matching model",
    ),
    "HeliosDMDScheduler": ("its step takes other arguments and changes resolution on the way", _CALL_SPELL),
    "HeliosScheduler": (
        "its pyramid stages change resolution on the way, so x0 of a stage is not in the final latent space",
        _CALL_SPELL,
    ),
    "KarrasVeScheduler": (
        "its step takes other arguments, for churned samples",
        "use EulerDiscreteScheduler or HeunDiscreteScheduler",
    ),
    "MiniMaxH3Scheduler": (
        "its velocity has the opposite sign and its noise level is read from the timestep",
        _CALL_SPELL,
    ),
    "PiflowScheduler": ("its model predicts a whole policy over a time span, not one x0", _CALL_SPELL),
    "RFD4ProteinaScheduler": ("it samples masked atom coordinates, up to translation", _CALL_SPELL),
    "RePaintScheduler": (
        "it pastes the known image into each step and jumps back in time",
        f"{_DDIM} with an inpainting pipeline",
    ),
    "SCMScheduler": (
        "its latents are scaled by sigma_data, so distances to references would be measured in another space",
        _CALL_SPELL,
    ),
    "ScoreSdeVeScheduler": (
        "it has no single step, but a predictor and a corrector",
        "use EulerAncestralDiscreteScheduler",
    ),
    "ScoreSdeVpScheduler": ("it has no single step, but a predictor", "use DDPMScheduler"),
    "VQDiffusionScheduler": ("it samples discrete tokens, which have no x0 to push", _IMAGE),
}


# Reading a scheduler ----------------------------------------------------------------------------------------------


def _check_options(scheduler: Any) -> None:
    name = type(scheduler).__name__
    if getattr(scheduler, "_scale_factors", None) and getattr(scheduler, "_upscale_mode", None):
        raise ValueError(f"{name}: scale_factors change the resolution on the way; set scale_factors=None.")
    renoises = hasattr(scheduler, "set_scale_factors") or scheduler.config.get("stochastic_sampling", False)
    if scheduler.config.get("invert_sigmas", False) and renoises:
        raise ValueError(
            f"{name}: with invert_sigmas this step still reads sigma as a noise level, so its x0 is not the clean "
            "sample; use FlowMatchEulerDiscreteScheduler without stochastic_sampling."
        )


def _unknown_prediction(scheduler: Any, known: str) -> ValueError:
    prediction = scheduler.config.prediction_type
    return ValueError(f"{type(scheduler).__name__}: prediction_type={prediction!r} is not known; use {known}.")


def _second_half(scheduler: Any, index: int) -> bool:
    """Whether this is the second evaluation of a two-evaluation step; they alternate, starting with a first one."""
    if index == scheduler.step_index:
        return not scheduler.state_in_first_order
    return index % 2 == 1


def _flow_level(scheduler: Any, index: int) -> float:
    sigma = float(scheduler.sigmas[index])
    return 1 - sigma if scheduler.config.get("invert_sigmas", False) else sigma


def _lookup(scheduler: Any, timestep: Any) -> int:
    found = _occurrences(scheduler, timestep)
    if not found:
        raise ValueError(
            f"{type(scheduler).__name__}: timestep {_scalar(timestep)} is not one of scheduler.timesteps; call "
            "set_timesteps first and pass one of its timesteps."
        )
    current = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
    return current if current in found else found[min(1, len(found) - 1)]


def _occurrences(scheduler: Any, timestep: Any) -> list[int]:
    value = _scalar(timestep)
    timesteps = [] if scheduler.timesteps is None else torch.as_tensor(scheduler.timesteps).tolist()
    return [index for index, known in enumerate(timesteps) if known == value]


def _scalar(timestep: Any) -> float:
    values = torch.as_tensor(timestep).flatten().tolist()
    if len(set(values)) != 1:
        raise ValueError("timestep must be one number for the whole batch; different noise levels per row do not work.")
    return values[0]
