"""Every supported scheduler with its options, a small model to run it with, and the x0 that its step goes on with."""

import copy
import functools
import inspect
import sys
import types
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import pytest
import torch
from torch import Tensor

from shielded.samplers import attach
from shielded.samplers.coefficients import bounded_x0

SHAPE = (3, 4, 4, 4)
EVS = ("epsilon", "v_prediction", "sample")
EV = ("epsilon", "v_prediction")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of `corrected_error`, as docs/schedulers.md states them


def scheduler_class(name):
    """A class of diffusers; the test is skipped if the installed version does not have it yet."""
    for place in (diffusers.schedulers, diffusers):
        if hasattr(place, name):
            return getattr(place, name)
    pytest.skip(f"diffusers {diffusers.__version__} has no {name}")


def make(case, steps=5):
    name, config, _ = case
    if config.get("stochastic_sampling") and "randn_like" in inspect.getsource(scheduler_class(name).step):
        pytest.skip(f"stochastic_sampling of diffusers {diffusers.__version__} takes no generator")
    key = f"{name} {config}"
    if key not in _MADE:
        _MADE[key] = scheduler_class(name)(**config)
    scheduler = copy.deepcopy(_MADE[key])
    set_timesteps(scheduler, case, steps)
    return scheduler


_MADE = {}  # some take a second to construct


def set_timesteps(scheduler, case, steps=5):
    scheduler.set_timesteps(**{"num_inference_steps": steps} | case[2])


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
    yield from add("PNDMScheduler", EV, [{"skip_prk_steps": skip, "steps_offset": 1} for skip in (True, False)])
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


def prediction_of(case):
    """What the model predicts; some classes have no choice."""
    only = {
        "CMStochasticIterativeScheduler": "consistency",
        "DDPMWuerstchenScheduler": "epsilon",
        "IPNDMScheduler": "v_prediction",
    }
    name, config, _ = case
    return config.get("prediction_type") or only.get(name) or "velocity"


def timesteps_of(scheduler):
    """The timesteps that pipelines pass to step."""
    name = type(scheduler).__name__
    return scheduler.timesteps[:-1] if name == "DDPMWuerstchenScheduler" else scheduler.timesteps


def linear_model(x, t):
    """A fixed linear map over channels, the same at all times."""
    weight = torch.randn(x.shape[1], x.shape[1], generator=torch.Generator().manual_seed(3)) * 0.3
    return torch.einsum("oc,bchw->bohw", weight.to(x.dtype), x)


def sample(scheduler, *, seed=0, timesteps=None, dtype=torch.float32, model=linear_model, eta=0.5):
    """A pipeline's sampling loop."""
    generator = torch.Generator().manual_seed(seed)
    parameters = inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if "generator" in parameters else {}
    if "eta" in parameters:
        extra["eta"] = eta
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed + 1))
    x = (x * getattr(scheduler, "init_noise_sigma", 1.0)).to(dtype)
    for t in timesteps_of(scheduler) if timesteps is None else timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = model(seen, t)
        if type(scheduler).__name__ == "DDPMWuerstchenScheduler":
            t = t.expand(len(x))
        x = scheduler.step(m, t, x, **extra)[0]
    return x, generator


# What a step did with the model output that it was handed -------------------------------------------------------------


class Step(NamedTuple):
    before: Any  # a copy of the scheduler from before the step, in float64 and not attached to
    after: Any  # the scheduler itself
    output: Any
    model_output: Tensor  # as it was handed over
    timestep: Any
    sample: Tensor
    options: dict[str, Any]


def watch(scheduler, see):
    """Call `see` with each Step that the scheduler takes. Before attaching, so that it sees what is handed over."""
    plain = scheduler.step

    @functools.wraps(type(scheduler).step)
    def step(self, model_output, timestep, sample, **options):
        before = _in_float64(self)
        output = plain(model_output, timestep, sample, **options)
        see(Step(before, self, output, model_output, timestep, sample, options))
        return output

    scheduler.step = types.MethodType(step, scheduler)


def own_x0(step):
    """(x0 in float64, how): the x0 that the scheduler goes on with, and where it is read.

    "returned" by the step, "kept" in the history of a multistep solver, or "solved": the step repeated in float64 and
    without noise, and x0 solved from what it returns by the algebra of the solver's paper. None where the step does not
    use the model output.
    """
    x, scheduler = step.sample.double(), step.after
    if type(scheduler).__name__ == "LCMScheduler":
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(step.timestep)
        return (step.output.denoised.double() - skip * x) / out, "returned"
    if getattr(step.output, "pred_original_sample", None) is not None:
        return step.output.pred_original_sample.double(), "returned"
    if hasattr(scheduler, "model_outputs") and _keeps_x0(scheduler):
        return scheduler.model_outputs[-1].double(), "kept"
    twin = _in_float64(step.before)
    with mock.patch.object(sys.modules[type(twin).__module__], "randn_tensor", _no_noise, create=True):
        output = twin.step(step.model_output.double(), step.timestep, x, **step.options)
    return _solve(twin, step, x, output[0].double()), "solved"


def _keeps_x0(scheduler):
    noise_forms = ("deis", "dpmsolver", "sde-dpmsolver", "noise_prediction")
    return scheduler.config.get("algorithm_type") not in noise_forms and getattr(scheduler, "predict_x0", True)


def _no_noise(shape, **kwargs):
    return torch.zeros(shape)


def _in_float64(scheduler):
    """A copy that computes in float64, as far as it does not cast by itself."""
    twin = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(twin, name, value.to(torch.float64, copy=True))
        elif isinstance(value, list):  # histories, which steps extend in place
            setattr(twin, name, [v.double() if isinstance(v, Tensor) else v for v in value])
    vars(twin).pop("step", None)
    return twin


def _solve(twin, step, x, prev):
    """x0 from a step without noise from x to prev, both in float64."""
    name, config, t = type(twin).__name__, twin.config, step.timestep
    if name == "PNDMScheduler":
        return _solve_pndm(step.before, t, x, prev)
    if name == "DDPMWuerstchenScheduler":
        here, after = (twin._alpha_cumprod(time[:1], "cpu").double() for time in (t, twin.previous_timestep(t)))
        alpha = here / after
        epsilon = (x - prev * alpha.sqrt()) * (1 - here).sqrt() / (1 - alpha)
        return (x - (1 - here).sqrt() * epsilon) / here.sqrt()
    if step.before.step_index is None:
        step.before._init_step_index(t)
    index = step.before.step_index
    if name == "TCDScheduler":
        after = twin.timesteps[index + 1].long() if index + 1 < len(twin.timesteps) else 0
        return _solve_ddim(prev, x, twin.alphas_cumprod[t], twin.alphas_cumprod[after])
    if name == "IPNDMScheduler":  # keeps its noise predictions
        alpha, sigma = twin.alphas[index], twin.betas[index]
        return None if alpha == 0 else (x - sigma * twin.ets[-1]) / alpha
    if hasattr(twin, "model_outputs"):  # keeps its noise predictions
        alpha, sigma = twin._sigma_to_alpha_sigma_t(twin.sigmas[index])
        return (x - sigma * twin.model_outputs[-1]) / alpha
    if name == "CMStochasticIterativeScheduler":
        return prev
    sigma, after = twin.sigmas[index], twin.sigmas[min(index + 1, len(twin.sigmas) - 1)]
    if name == "LTXEulerAncestralRFScheduler":
        if sigma == 0:
            return None
        down = after * (1 + (after / sigma - 1) * config.eta)
        return (prev - down / sigma * x) / (1 - down / sigma)
    if name == "FlowMatchLCMScheduler" or config.get("stochastic_sampling"):
        return prev / (1 - after)
    if name == "FlowMatchHeunDiscreteScheduler" and step.before.dt is not None:  # second half, of two slopes
        slope = 2 * (prev - step.before.sample) / step.before.dt - step.before.prev_derivative
        return x - sigma * slope
    assert name.startswith("FlowMatch"), f"no way to see x0 of {name}; add one here"
    distance = 1 - sigma if config.get("invert_sigmas") else -sigma
    return x + distance * (prev - x) / (after - sigma)


def _solve_ddim(prev, x, cumprod, cumprod_after):
    """x0 from prev = √ᾱ' x0 + √(1−ᾱ') ε with ε = (x − √ᾱ x0)/√(1−ᾱ)."""
    alpha, sigma = cumprod.sqrt(), (1 - cumprod).sqrt()
    alpha_after, sigma_after = cumprod_after.sqrt(), (1 - cumprod_after).sqrt()
    return (prev - sigma_after / sigma * x) / (alpha_after - sigma_after * alpha / sigma)


def _solve_pndm(before, t, x, prev):
    """Liu et al., PNDM, 2022: Equation 11 solved for the combined noise, that for the newest evaluation (12, 13)."""
    count, ratio = before.counter, before.config.num_train_timesteps // before.num_inference_steps
    runge_kutta = not before.config.skip_prk_steps and count < len(before.prk_timesteps)
    if runge_kutta:
        start = int(before.prk_timesteps[count // 4 * 4])
        end = int(t) - (0 if count % 2 else ratio // 2)
        base = x if count % 4 == 0 else before.cur_sample
    else:
        start, end = (int(t) + ratio, int(t)) if count == 1 else (int(t), int(t) - ratio)
        base = before.cur_sample if count == 1 else x
    cumprod = before.alphas_cumprod
    after = cumprod[end] if end >= 0 else before.final_alpha_cumprod
    base_x0 = _solve_ddim(prev, base, cumprod[start], after)
    velocity = before.config.prediction_type == "v_prediction"

    def model_output(x, x0, cumprod):  # of a model that predicts x0 from x
        epsilon = (x - cumprod.sqrt() * x0) / (1 - cumprod).sqrt()
        return (epsilon - (1 - cumprod).sqrt() * x) / cumprod.sqrt() if velocity else epsilon

    newest = model_output(base, base_x0, cumprod[start])
    if runge_kutta and count % 4 == 3:  # (m1 + 2 m2 + 2 m3 + m4) / 6
        newest = 6 * (newest - before.cur_model_output)
    elif not runge_kutta and count == 1:  # the second evaluation of the first timestep
        newest = 2 * newest - before.ets[-1]
    elif not runge_kutta:
        first, *older = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12)}.get(
            len(before.ets[-3:]) + 1, (55 / 24, -59 / 24, 37 / 24, -9 / 24)
        )
        newest = (newest - sum(w * e for w, e in zip(older, reversed(before.ets[-3:]), strict=True))) / first
    alpha, sigma = cumprod[t].sqrt(), (1 - cumprod[t]).sqrt()
    return alpha * x - sigma * newest if velocity else (x - sigma * newest) / alpha


class Push:
    """A correction that notes what it is told."""

    def __init__(self, delta=None):
        self.delta = delta  # None: zero, a tensor: the same at every step, a list: one for each step
        self.calls = []  # what each step was given
        self.events = []  # "start", one entry per step (its `last`), "finish"
        self.finished = []

    def __call__(self, x0, *, noise, alpha, sigma, last):
        assert x0.dtype == noise.dtype == torch.float32
        assert x0.shape == noise.shape
        self.calls.append((x0.clone(), noise.clone(), alpha, sigma))
        self.events.append(last)
        if isinstance(self.delta, list):
            return self.delta[len(self.calls) - 1]
        return torch.zeros_like(x0) if self.delta is None else self.delta

    def start(self):
        self.events.append("start")

    def finish(self, latents):
        self.events.append("finish")
        self.finished.append(latents.clone())

    def trajectories(self):
        return self.events.count("start"), self.events.count("finish")


def rows_0_and_2():
    """A push for the first and the last row of the batch; the middle one stays."""
    delta = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    delta[1] = 0
    return delta


def pipeline(scheduler):
    return types.SimpleNamespace(scheduler=scheduler)


class Landed(NamedTuple):
    """How well x0 + Δ was reproduced in one run."""

    error: float  # largest |x0' − (x0 + Δ)| over largest |x0 + Δ|, over all steps
    slack: float  # bound on what rounding adds to it where x0 is clipped or thresholded, otherwise 0
    how: str  # "returned", "kept" or "solved", see `own_x0`
    steps: int
    read: int  # steps in which x0 could be read
    push: Push
    latents: Tensor


def corrected_error(case, dtype=torch.float32):
    """Run a scheduler with a correction Δ at each step, and compare the x0 that it goes on with with x0 + Δ."""
    push, errors, ways = Push(rows_0_and_2()), [], set()

    def see(step):
        actual, how = own_x0(step)
        if actual is None:
            return
        x0, _, alpha, _ = push.calls[-1]
        expected = bounded_x0(scheduler, x0 + push.delta).double()
        clipped = not torch.equal(bounded_x0(scheduler, 1e3 * x0), 1e3 * x0)
        # What is clipped off is made up for in the model output, and has to cancel in its dtype.
        slack = 4 * torch.finfo(dtype).eps * float(step.sample.abs().max()) / alpha if clipped else 0.0
        scale = float(expected.abs().max())
        errors.append((float((actual - expected).abs().max()) / scale, slack / scale))
        ways.add(how)

    scheduler = make(case)
    watch(scheduler, see)
    with attach(pipeline(scheduler), push):
        latents, _ = sample(scheduler, dtype=dtype, eta=0.0)
    error, slack = torch.tensor(errors).max(dim=0).values.tolist()  # NaN stays NaN
    (how,) = ways
    return Landed(error, slack, how, len(push.calls), len(errors), push, latents)


def traces_left(case, dtype=torch.float32):
    """(identical, restored): a zero correction changes nothing, and a real one is gone after leaving the context."""
    scheduler = make(case)
    plain, plain_generator = sample(scheduler, dtype=dtype)
    runs = []
    for push in (Push(), Push(rows_0_and_2())):
        scheduler = make(case)
        with attach(pipeline(scheduler), push):
            latents, generator = sample(scheduler, dtype=dtype)
            runs.append(torch.equal(latents, plain) and torch.equal(generator.get_state(), plain_generator.get_state()))
        assert latents.dtype == plain.dtype
    set_timesteps(scheduler, case)
    return runs[0], "step" not in vars(scheduler) and torch.equal(sample(scheduler, dtype=dtype)[0], plain)
