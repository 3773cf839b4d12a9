"""Every supported scheduler with its options, a small model to run it with, and x0 solved from what it returns."""

import importlib
import inspect
import sys
import types

import diffusers
import pytest
import torch

SHAPE = (3, 4, 4, 4)
EVS = ("epsilon", "v_prediction", "sample")
EV = ("epsilon", "v_prediction")


class FakeBrownianInterval:
    """Noise that depends on the seed and the interval alone."""

    def __init__(self, size, dtype, device, entropy, **kwargs):
        self.size, self.dtype, self.entropy = size, dtype, entropy

    def __call__(self, t0, t1):
        generator = torch.Generator().manual_seed(int(self.entropy) + int(1e4 * float(t0)))
        return torch.randn(self.size, generator=generator).to(self.dtype) * (float(t1) - float(t0)) ** 0.5


def scheduler_class(name):
    """The class; two of them need torchsde, for which the fake stands in where it is not installed."""
    modules = {
        "DPMSolverSDEScheduler": "scheduling_dpmsolver_sde",
        "CosineDPMSolverMultistepScheduler": "scheduling_cosine_dpmsolver_multistep",
    }
    if name not in modules:
        return getattr(diffusers.schedulers, name, None) or getattr(diffusers, name)
    with pytest.MonkeyPatch.context() as patch:
        try:
            importlib.import_module("torchsde")
        except ImportError:
            fake = types.ModuleType("torchsde")
            fake.BrownianInterval = FakeBrownianInterval
            patch.setitem(sys.modules, "torchsde", fake)
        return getattr(importlib.import_module(f"diffusers.schedulers.{modules[name]}"), name)


def make(case, steps=5):
    name, config, schedule = case
    scheduler = scheduler_class(name)(**config)
    scheduler.set_timesteps(**{"num_inference_steps": steps} | schedule)
    return scheduler


def _cases():
    def add(name, predictions=(None,), options=({},), schedule=None):
        for option in options:
            for prediction in predictions:
                config = dict(option) if prediction is None else {"prediction_type": prediction, **option}
                yield name, config, schedule or {}

    sigmas = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
    snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for name in ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler"):
        yield from add(name, EVS, [{"clip_sample": False}, {"clip_sample": True}])
        yield from add(name, EVS[:1], [{"thresholding": True, "sample_max_value": 3.0}])
        yield from add(name, options=[{"clip_sample": False, **snr}])
    yield from add("UnCLIPScheduler", ("epsilon", "sample"), [{"clip_sample": False}, {"clip_sample": True}])
    yield from add("CogVideoXDDIMScheduler", EVS)
    yield from add("PNDMScheduler", EV, [{"skip_prk_steps": True}, {"skip_prk_steps": False}])
    yield from add("LCMScheduler", EVS, [{}, {"clip_sample": True}])
    yield from add("TCDScheduler", EVS)
    yield from add("EulerDiscreteScheduler", EVS, sigmas)
    yield from add("EulerDiscreteScheduler", options=[snr, {**snr, "timestep_type": "continuous"}])
    yield from add("EulerAncestralDiscreteScheduler", EV, [{}, {"timestep_spacing": "trailing"}])
    yield from add("LMSDiscreteScheduler", EVS, sigmas)
    yield from add("HeunDiscreteScheduler", EVS, [*sigmas, {"clip_sample": True}])
    for name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
        yield from add(name, EV, sigmas)
    yield from add("DPMSolverSDEScheduler", EV, [{"noise_sampler_seed": 0}])
    yield from add("DPMSolverSDEScheduler", EV, [{"noise_sampler_seed": 0, "use_karras_sigmas": True}])

    flow = {"use_flow_sigmas": True, "flow_shift": 3.0}
    limit = {"thresholding": True, "sample_max_value": 3.0}
    for name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"):
        yield from add(name, EVS, [*sigmas, {"algorithm_type": "sde-dpmsolver++"}, flow, limit])
        yield from add(name, ("flow_prediction",), [flow])
        yield from add(name, EVS, [{"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}])
    yield from add("DPMSolverMultistepScheduler", EVS, [{"use_lu_lambdas": True}, {"solver_order": 3}])
    yield from add(
        "DPMSolverMultistepScheduler", EVS, [{"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}]
    )
    yield from add("DEISMultistepScheduler", (*EVS, "flow_prediction"), [flow])
    yield from add("DEISMultistepScheduler", EVS, [*sigmas, limit])
    # At a last sigma of 0, UniPC's own noise form returns NaN.
    noise_form = {"predict_x0": False, "final_sigmas_type": "sigma_min"}
    yield from add("UniPCMultistepScheduler", EVS, [*sigmas, noise_form, {**limit, **noise_form}])
    yield from add("UniPCMultistepScheduler", (*EVS, "flow_prediction"), [flow])
    yield from add("UniPCMultistepScheduler", EVS, [limit])
    yield from add("SASolverScheduler", EVS, [*sigmas, {"algorithm_type": "noise_prediction"}, limit])
    yield from add("SASolverScheduler", (*EVS, "flow_prediction"), [flow])
    yield from add("EDMEulerScheduler", EV)
    yield from add("EDMDPMSolverMultistepScheduler", EV, [{}, {"algorithm_type": "sde-dpmsolver++"}, limit])
    yield from add("CosineDPMSolverMultistepScheduler", EV)

    yield from add(
        "FlowMatchEulerDiscreteScheduler",
        options=[*sigmas, {"shift": 3.0}, {"stochastic_sampling": True}, {"shift_terminal": 0.1}],
    )
    yield from add("FlowMatchEulerDiscreteScheduler", options=[{"invert_sigmas": True}])
    yield from add("FlowMatchEulerDiscreteScheduler", options=[{"use_dynamic_shifting": True}], schedule={"mu": 0.8})
    yield from add("FlowMatchHeunDiscreteScheduler", options=[{}, {"shift": 3.0}])
    yield from add("FlowMatchLCMScheduler", options=[{}, {"shift": 3.0}])
    yield from add("LTXEulerAncestralRFScheduler", options=[{"s_noise": 0.0}])
    yield from add(
        "LTXEulerAncestralRFScheduler", options=[{"s_noise": 0.0}], schedule={"sigmas": [1.0, 0.9, 0.6, 0.2, 0.0]}
    )
    yield from add(
        "CMStochasticIterativeScheduler", options=[{"s_noise": 0.0, "clip_denoised": False}, {"s_noise": 0.0}]
    )
    yield from add("IPNDMScheduler")
    yield from add("DDPMWuerstchenScheduler", options=[{}, {"scaler": 2.0}])


CASES = list(_cases())
SCHEDULES = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"}
ONE_SCHEDULE = [case for case in CASES if not case[1].keys() & SCHEDULES]


def case_id(case):
    return "-".join([case[0].removesuffix("Scheduler"), *(f"{k}={v}" for k, v in case[1].items()), *case[2]])


def timesteps_of(scheduler):
    """The timesteps that pipelines pass to step."""
    name = type(scheduler).__name__
    return scheduler.timesteps[:-1] if name == "DDPMWuerstchenScheduler" else scheduler.timesteps


def linear_model(x, t):
    """A fixed linear map over channels, the same at all times."""
    weight = torch.randn(x.shape[1], x.shape[1], generator=torch.Generator().manual_seed(3)) * 0.3
    return torch.einsum("oc,bchw->bohw", weight.to(x.dtype), x)


def sample(scheduler, *, seed=0, timesteps=None, dtype=torch.float32, model=linear_model, watch=None):
    """A pipeline's sampling loop. `watch` sees each step: (scheduler, output, x, m, t, index, noise).

    `noise` is what the step draws first, read from a copy of the generator's state.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if "generator" in parameters else {}
    if "eta" in parameters:
        extra["eta"] = 0.0 if watch else 0.5  # without noise, x0 can be solved from the output
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed + 1))
    x = (x * getattr(scheduler, "init_noise_sigma", 1.0)).to(dtype)
    for t in timesteps_of(scheduler) if timesteps is None else timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = model(seen, t)
        if type(scheduler).__name__ == "DDPMWuerstchenScheduler":
            t = t.expand(len(x))
        index = getattr(scheduler, "step_index", None)
        if index is None and hasattr(scheduler, "_init_step_index"):
            index = scheduler.timesteps.tolist().index(float(t)) if scheduler.begin_index is None else None
            index = scheduler.begin_index if index is None else index
        copy = torch.Generator().set_state(generator.get_state())
        output = scheduler.step(m, t, x, **extra)
        if watch is not None:
            watch(scheduler, output, x, m, t, index, torch.randn(SHAPE, generator=copy))
        x = output[0]
    return x, generator


def own_x0(scheduler, output, x, m, t, index, noise):
    """(x0, slack): the x0 that the scheduler used in this step, and how much float32 rounding solving for it costs.

    None where a multistep formula mixes it with earlier ones; those steps are checked elsewhere.
    """
    name, config = type(scheduler).__name__, scheduler.config
    x, prev = x.double(), output[0].double()
    noise = noise.double()
    if name == "LCMScheduler":
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        return (output.denoised.double() - skip * x) / out, 0
    if hasattr(output, "pred_original_sample") and output.pred_original_sample is not None:
        return output.pred_original_sample.double(), 0
    if hasattr(scheduler, "model_outputs"):
        kept = scheduler.model_outputs[-1].double()
        noise_form = config.get("algorithm_type") in ("deis", "dpmsolver", "sde-dpmsolver", "noise_prediction")
        if not noise_form and getattr(scheduler, "predict_x0", True):
            return kept, 0
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index].double())
        return (x - sigma * kept) / alpha, 3e-7 * float(sigma / alpha * kept.abs().max())
    if name == "TCDScheduler":
        after = scheduler.timesteps[index + 1] if index + 1 < len(scheduler.timesteps) else torch.tensor(0)
        return _solve_ddim(prev, x, scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[after])
    if name == "PNDMScheduler":
        if scheduler.counter != 1 or not config.skip_prk_steps:
            return None, 0
        ratio = config.num_train_timesteps // scheduler.num_inference_steps
        return _solve_ddim(prev, x, scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - ratio])
    if name == "IPNDMScheduler":
        alpha, sigma = scheduler.alphas[index].double(), scheduler.betas[index].double()
        if alpha == 0:  # pure noise: the step does not use the model output
            return None, 0
        return (x - sigma * scheduler.ets[-1].double()) / alpha, 3e-7 * float(x.abs().max() / alpha)
    if name == "DDPMWuerstchenScheduler":
        here = scheduler._alpha_cumprod(t[0], "cpu").double()
        after = scheduler._alpha_cumprod(scheduler.previous_timestep(t)[0], "cpu").double()
        alpha = here / after
        if scheduler.previous_timestep(t)[0] != 0:
            prev = prev - ((1 - alpha) * (1 - after) / (1 - here)).sqrt() * noise
        epsilon = (x - prev * alpha.sqrt()) * (1 - here).sqrt() / (1 - alpha)
        return (x - (1 - here).sqrt() * epsilon) / here.sqrt(), 3e-6 * float(x.abs().max() / here.sqrt())
    sigma, after = (scheduler.sigmas[i].double() for i in (index, min(index + 1, len(scheduler.sigmas) - 1)))
    if name == "CMStochasticIterativeScheduler":
        return prev, 0
    if name == "LTXEulerAncestralRFScheduler":
        if sigma == 0:
            return None, 0
        if after == 0:
            return prev, 0
        down = after * (1 + (after / sigma - 1) * config.eta)
        return (prev - down / sigma * x) / (1 - down / sigma), 1e-6 * float(x.abs().max() * sigma / (sigma - down))
    if name == "FlowMatchLCMScheduler" or config.get("stochastic_sampling"):
        return (prev - after * noise) / (1 - after), 0
    if name == "FlowMatchHeunDiscreteScheduler" and scheduler.state_in_first_order and after != 0:
        return None, 0  # second half: averaged with the first
    if name.startswith("FlowMatch"):
        distance = 1 - sigma if config.get("invert_sigmas") else -sigma
        return x + distance * (prev - x) / (after - sigma), 3e-7 * float(x.abs().max() / (after - sigma).abs())
    raise AssertionError(f"no way to see x0 of {name}; add one here")


def _solve_ddim(prev, x, cumprod, cumprod_after):
    """x0 from prev = √ᾱ' x0 + √(1−ᾱ') ε with ε = (x − √ᾱ x0)/√(1−ᾱ)."""
    alpha, sigma = cumprod.double().sqrt(), (1 - cumprod.double()).sqrt()
    alpha_after, sigma_after = cumprod_after.double().sqrt(), (1 - cumprod_after.double()).sqrt()
    weight = alpha_after - sigma_after * alpha / sigma
    return (prev - sigma_after / sigma * x) / weight, 3e-7 * float(x.abs().max() / weight)
