import contextlib
import copy
import inspect
import types

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    RePaintScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from helpers.scheduler_cases import (
    BOUND,
    CASES,
    ONE_SCHEDULE,
    SHAPE,
    Push,
    case_id,
    corrected_error,
    make,
    pipeline,
    rows_0_and_2,
    sample,
    timesteps_of,
    traces_left,
    watch,
)
from shielded import Spell
from shielded.samplers import attach
from shielded.samplers.coefficients import last_index, step_state

# torchsde finds that diffusers asks for times a rounding outside its interval.
pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")


def scheduler_of(name, steps=5, **config):
    if name == "PNDMScheduler":  # as Stable Diffusion has it; the Runge-Kutta start needs four steps
        config = {"skip_prk_steps": True, **config}
    return make((name, config, {}), steps)


# The arithmetic, for every supported scheduler -----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_corrected_x0_lands(case):
    for dtype, bound in BOUND.items():
        landed = corrected_error(case, dtype)
        assert landed.error <= bound + landed.slack
        assert landed.read == landed.steps - (case[0] == "IPNDMScheduler")  # which ignores the model at pure noise


@pytest.mark.parametrize("case", ONE_SCHEDULE, ids=case_id)
def test_what_the_correction_is_told(case):
    push, seen, scheduler = Push(rows_0_and_2()), [], make(case)
    watch(scheduler, seen.append)
    with attach(pipeline(scheduler), push):
        latents, _ = sample(scheduler)
    for step, (x0, noise, alpha, sigma) in zip(seen, push.calls, strict=False):
        rebuilt = alpha * x0.double() + sigma * noise.double()
        assert (rebuilt - step.sample).abs().max() <= 1e-5 * (step.sample.abs().max() + alpha * x0.abs().max())
    start, *lasts, finish = push.events
    assert (start, finish) == ("start", "finish")
    assert len(lasts) == len(push.calls) == last_index(scheduler) + 1
    assert lasts[-1]
    assert lasts == [bool(t == timesteps_of(scheduler)[len(lasts) - 1]) for t in timesteps_of(scheduler)[: len(lasts)]]
    assert torch.equal(push.finished[0], latents)


@pytest.mark.parametrize("case", ONE_SCHEDULE, ids=case_id)
def test_zero_correction_changes_nothing_and_leaving_restores(case):
    assert traces_left(case, torch.float32) == traces_left(case, torch.bfloat16) == (True, True)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("call", "weight"), [(0, 1), (1, 1 / 2), (2, 3 / 2), (3, 23 / 12), (4, 55 / 24)])
def test_pndm_history(prediction, call, weight):
    """A push at one evaluation moves the output by its Adams-Bashforth weight times the DDIM step (PNDM paper)."""
    delta = rows_0_and_2()
    outputs = []
    for strength in (0, 1):
        scheduler = scheduler_of("PNDMScheduler", steps=6, prediction_type=prediction, skip_prk_steps=True)
        push = Push([strength * delta if step == call else 0 * delta for step in range(call + 1)])
        with attach(pipeline(scheduler), push):
            outputs.append(sample(scheduler, timesteps=scheduler.timesteps[: call + 1])[0].double())
    here, cumprod = scheduler.timesteps[call], scheduler.alphas_cumprod.double()
    start, end = (here + 166, here) if call == 1 else (here, here - 166)  # 1000 // 6; the second call repeats the first
    per_model_output = -delta.double() * cumprod[here].sqrt() / (1 - cumprod[here]).sqrt()  # of epsilon
    if prediction == "v_prediction":  # v of the passed timestep, turned into epsilon at the timestep of the step
        per_model_output = -delta.double() / (1 - cumprod[here]).sqrt() * cumprod[start].sqrt()
    a, b = cumprod[start], cumprod[end]
    step = -(b - a) / (a * (1 - b).sqrt() + (a * (1 - a) * b).sqrt())
    expected = weight * step * per_model_output
    assert (outputs[1] - outputs[0] - expected).abs().max() <= 1e-5 * outputs[0].abs().max()


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler"])
def test_heun_pushes_both_evaluations(name):
    """Each evaluation counts half: x0 + δ in both moves the step as in Euler, which is linear in x0."""
    delta = rows_0_and_2()
    outputs = []
    for push in (Push(), Push(delta)):
        scheduler = scheduler_of(name)
        with attach(pipeline(scheduler), push):
            ends = sample(scheduler, timesteps=scheduler.timesteps[:2], model=lambda x, t: torch.ones_like(x))
            outputs.append(ends[0].double())
    before, middle = scheduler.sigmas[:2].double()
    # d = (x − x0)/σ at both ends; the push is −δ/σ in each
    expected = -delta.double() * (1 / before + 1 / middle) / 2 * (middle - before)
    assert (outputs[1] - outputs[0] - expected).abs().max() <= 1e-5 * outputs[0].abs().max()


def test_dpm_sde_pushes_both_evaluations():
    """Both halves are ancestral steps from the same sample, to the midpoint and to the end; each draws to x0."""
    delta = rows_0_and_2()
    outputs = []
    for push in (Push(), Push(delta)):
        scheduler = scheduler_of("DPMSolverSDEScheduler", noise_sampler_seed=0)
        with attach(pipeline(scheduler), push):
            ends = sample(scheduler, timesteps=scheduler.timesteps[:2], model=lambda x, t: torch.ones_like(x))
            outputs.append(ends[0].double())
    start, end = scheduler.sigmas[:2].double()
    # σ_down = σ_to²/σ_from, so a step moves by 1 − (σ_to/σ_from)² of x0; here x0 = x − σ moves with x
    half, full = 1 - end / start, 1 - (end / start) ** 2
    expected = full * (half + 1) * delta.double()
    assert (outputs[1] - outputs[0] - expected).abs().max() <= 1e-5 * outputs[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_without_a_push_keep_their_model_output(dtype):
    scheduler = scheduler_of("DDIMScheduler")  # clips, which must not show in the row without a push
    handed_on = []
    scheduler.step = spy = lambda m, t, x: handed_on.append(m) or type(scheduler).step(scheduler, m, t, x)
    m = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype) / 3
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).to(dtype)
    with attach(pipeline(scheduler), Push(rows_0_and_2())):
        scheduler.step(m, scheduler.timesteps[0], x)
    with attach(pipeline(scheduler), Push()):
        scheduler.step(m, scheduler.timesteps[0], x)
    pushed, same = handed_on  # one call each
    assert torch.equal(same, m)
    assert pushed.dtype == m.dtype
    assert torch.equal(pushed[1], m[1])
    assert not torch.equal(pushed[0], m[0])
    assert scheduler.step is spy


def test_learned_variance_is_left_alone():
    scheduler = scheduler_of("DDPMScheduler", variance_type="learned_range", clip_sample=False)
    generator = torch.Generator().manual_seed(0)
    x, m = torch.randn(SHAPE, generator=generator), torch.randn(3, 8, 4, 4, generator=generator)
    handed_on = []
    scheduler.step = lambda m, t, x: handed_on.append(m) or type(scheduler).step(scheduler, m, t, x)
    push = Push(rows_0_and_2())
    with attach(pipeline(scheduler), push):
        output = scheduler.step(m, scheduler.timesteps[0], x)
    assert torch.equal(handed_on[0][:, 4:], m[:, 4:])
    expected = push.calls[0][0] + push.delta
    assert (output.pred_original_sample - expected).abs().max() <= 1e-5 * expected.abs().max()
    with attach(pipeline(scheduler), Push()), pytest.raises(ValueError, match="twice its channels"):
        scheduler.step(m[:, :5], scheduler.timesteps[1], x)


def test_nothing_to_push_without_noise():
    """At the clean end x0 is the sample, whatever the model says."""
    scheduler = make(("LTXEulerAncestralRFScheduler", {}, {"sigmas": [1.0, 0.5, 0.0]}))
    assert step_state(scheduler, 0.0).b == 0
    push = Push(rows_0_and_2())
    with attach(pipeline(scheduler), push):
        latents, _ = sample(scheduler)
    assert push.events == ["start", False, True, "finish"]
    assert torch.equal(push.finished[0], latents)


# Trajectories --------------------------------------------------------------------------------------------------------

NAMES = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "DDPMWuerstchenScheduler",
)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_each_trajectory_starts_and_finishes_once(name, steps):
    if name == "LCMScheduler":
        steps = max(steps, 2)
    scheduler, push = scheduler_of(name), Push()
    with attach(pipeline(scheduler), push):
        ends = []
        for seed in (0, 1):
            scheduler.set_timesteps(num_inference_steps=steps)
            ends.append(sample(scheduler, seed=seed)[0])
    assert push.trajectories() == (2, 2)
    assert push.events[-1] == "finish"
    assert all(torch.equal(a, b) for a, b in zip(push.finished, ends, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_what_finish_returns_takes_the_place_of_the_latents(name, monkeypatch):
    monkeypatch.setattr(Push, "finish", lambda push, latents: latents + 1)
    scheduler = scheduler_of(name)
    with attach(pipeline(scheduler), Push()):
        latents, _ = sample(scheduler)
    assert torch.equal(latents, sample(scheduler_of(name))[0] + 1)


@pytest.mark.parametrize("return_dict", [True, False])
def test_finish_replaces_every_mention_of_the_latents(return_dict, monkeypatch):
    """The last step of LCM returns them twice, and its pipelines decode the second, `denoised`."""
    monkeypatch.setattr(Push, "finish", lambda push, latents: torch.full_like(latents, 7))
    scheduler, x = scheduler_of("LCMScheduler"), torch.ones(SHAPE)
    with attach(pipeline(scheduler), Push()):
        outputs = [scheduler.step(x, t, x, return_dict=return_dict) for t in scheduler.timesteps]
    assert isinstance(outputs[-1], tuple) != return_dict
    assert all((value == 7).all() for value in outputs[-1][:2])
    assert not any((value == 7).any() for value in outputs[0][:2])


def test_stateless_scheduler_may_run_again_without_set_timesteps():
    for steps in (1, 4):
        scheduler, push = scheduler_of("DDIMScheduler", steps), Push()
        with attach(pipeline(scheduler), push):
            for _ in range(3):
                sample(scheduler)
        assert push.trajectories() == (3, 3)


@pytest.mark.parametrize("name", NAMES[:-2])
def test_starting_in_the_middle(name):
    """Image to image: the first steps are left out."""
    scheduler, push = scheduler_of(name), Push(rows_0_and_2())
    first = 2 * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    with attach(pipeline(scheduler), push):
        latents, _ = sample(scheduler, timesteps=scheduler.timesteps[first:])
    assert push.trajectories() == (1, 1)
    assert len(push.calls) == len(scheduler.timesteps) - first
    assert torch.equal(push.finished[0], latents)
    if hasattr(scheduler, "sigmas"):
        assert push.calls[0][3] / push.calls[0][2] == pytest.approx(scheduler.sigmas[first].item(), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_stopping_early_does_not_finish(name):
    scheduler, push = scheduler_of(name), Push()
    with attach(pipeline(scheduler), push):
        sample(scheduler, timesteps=timesteps_of(scheduler)[:-1])
        scheduler.set_timesteps(num_inference_steps=3)
        sample(scheduler)
    assert push.trajectories() == (2, 1)


def test_timestep_outside_the_schedule():
    """Stateless schedulers accept it; it belongs to the trajectory but neither starts nor ends one."""
    scheduler, push = scheduler_of("DDIMScheduler"), Push()
    x = torch.zeros(SHAPE)
    with attach(pipeline(scheduler), push):
        for timestep in (777, 800, 600, 555):
            scheduler.step(x, timestep, x)
    assert push.events == ["start", False, False, False, False]


# The context ---------------------------------------------------------------------------------------------------------


def test_restores_after_exit_and_after_an_exception():
    scheduler = scheduler_of("EulerDiscreteScheduler")
    with attach(pipeline(scheduler), Push()):
        assert "step" in vars(scheduler)
        sample(scheduler)
    assert "step" not in vars(scheduler)
    with pytest.raises(KeyError, match="mine"), attach(pipeline(scheduler), Push()):
        raise KeyError("mine")
    assert "step" not in vars(scheduler)


@pytest.mark.parametrize("method", ["__call__", "start", "finish"])
def test_restores_when_the_correction_raises(method, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(Push, method, fail)
    scheduler = scheduler_of("DDIMScheduler")
    with pytest.raises(ZeroDivisionError), attach(pipeline(scheduler), Push()):
        sample(scheduler)
    assert "step" not in vars(scheduler)


def test_signature_is_the_schedulers():
    scheduler = scheduler_of("DDIMScheduler")
    plain = inspect.signature(scheduler.step)
    with attach(pipeline(scheduler), Push()):
        assert inspect.signature(scheduler.step) == plain
        sample(scheduler)


@pytest.mark.parametrize("return_dict", [True, False])
def test_arguments_by_name(return_dict):
    scheduler, push = scheduler_of("DDIMScheduler"), Push()
    x = torch.ones(SHAPE)
    with attach(pipeline(scheduler), push):
        for t in scheduler.timesteps:
            output = scheduler.step(model_output=x, timestep=t, sample=x, return_dict=return_dict)
    assert isinstance(output, tuple) != return_dict
    assert torch.equal(push.finished[0], output[0])


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "DDIMScheduler"])
def test_a_deep_copy_per_request_is_corrected(name):
    """Services copy the scheduler for each request: every request is a trajectory of its own."""
    reference = scheduler_of(name)
    with attach(pipeline(reference), Push(rows_0_and_2())):
        expected, _ = sample(reference)
    scheduler, push = scheduler_of(name), Push(rows_0_and_2())
    with attach(pipeline(scheduler), push):
        for _ in range(2):
            twin = copy.deepcopy(scheduler)
            twin.set_timesteps(5)
            assert torch.equal(sample(twin)[0], expected)
        sample(scheduler)
    assert len(push.calls) == 3 * 5
    assert len(push.finished) == 3
    scheduler.set_timesteps(5)
    assert torch.equal(sample(scheduler)[0], sample(scheduler_of(name))[0])


def test_two_copies_that_step_by_turns_are_an_error():
    scheduler = scheduler_of("DDIMScheduler")
    x = torch.ones(SHAPE)
    with attach(pipeline(scheduler), Push()):
        scheduler.step(x, scheduler.timesteps[0], x)
        twin = copy.deepcopy(scheduler)
        with pytest.raises(RuntimeError, match="step by turns"):
            twin.step(x, twin.timesteps[1], x)


class Service:
    """A pipeline that steps another scheduler than its own."""

    def __init__(self, how):
        self.scheduler, self.how = scheduler_of("DDIMScheduler"), how

    def __call__(self):
        with self.exchanged() as scheduler:
            return sample(scheduler)[0]

    @contextlib.contextmanager
    def exchanged(self):
        own = self.scheduler
        if self.how == "local":
            other = type(own).from_config(own.config)
            other.set_timesteps(5)
            yield other
        elif self.how == "state":  # the patch is in the state
            own.__dict__.pop("step", None)
            yield own
        else:
            self.scheduler = scheduler_of("EulerDiscreteScheduler" if self.how == "class" else "DDIMScheduler")
            yield self.scheduler
            self.scheduler = own


@pytest.mark.parametrize("how", ["local", "state", "class", "exchanged and put back"])
def test_no_step_of_the_pipeline_goes_uncorrected(how):
    pipe = Service(how)
    before, step = pipe.scheduler, type(pipe.scheduler).step
    with pytest.raises(RuntimeError, match="would go uncorrected"), attach(pipe, Push()):
        pipe()
    assert pipe.scheduler is before
    assert "step" not in vars(before)
    assert type(before).step is step


def test_other_pipelines_step_as_they_are_inside_the_context():
    pipe, other = pipeline(scheduler_of("DDIMScheduler")), Service("local")
    push = Push()
    with attach(pipe, push):
        plain = other()
        sample(pipe.scheduler)
    assert torch.equal(plain, other())
    assert len(push.calls) == 5


def test_contexts_may_end_in_any_order():
    first, second = pipeline(scheduler_of("DDIMScheduler")), pipeline(scheduler_of("DDIMScheduler"))
    kind = type(first.scheduler)
    plain = kind.step
    one, two = attach(first, Push()), attach(second, Push())
    one.__enter__()
    two.__enter__()
    sample(first.scheduler)
    one.__exit__(None, None, None)
    sample(second.scheduler)
    two.__exit__(None, None, None)
    assert inspect.unwrap(kind.step) is inspect.unwrap(plain)
    assert torch.equal(sample(first.scheduler)[0], sample(scheduler_of("DDIMScheduler"))[0])


def exchange_scheduler(pipe):
    pipe.scheduler = scheduler_of("DDIMScheduler")


def exchange_step(pipe):
    pipe.scheduler.step = None


@pytest.mark.parametrize("exchange", [exchange_scheduler, exchange_step])
def test_exchanged_scheduler(exchange):
    def swap_and(error=None):
        with attach(pipe, Push()):
            sample(pipe.scheduler)
            exchange(pipe)
            if error is not None:
                raise error

    scheduler = scheduler_of("DDIMScheduler")
    pipe = pipeline(scheduler)
    with pytest.raises(RuntimeError, match="exchanged inside the context"):
        swap_and()
    assert "step" not in vars(scheduler)
    with pytest.raises(KeyError, match="mine"):  # not masked
        swap_and(KeyError("mine"))


def test_pipeline_never_called():
    pipe = pipeline(scheduler_of("DDIMScheduler"))
    with pytest.raises(RuntimeError, match="never stepped inside the context"), attach(pipe, Push()):
        pass


def test_attached_twice():
    pipe = pipeline(scheduler_of("DDIMScheduler"))
    with attach(pipe, Push()):
        with pytest.raises(RuntimeError, match="already attached"), attach(pipe, Push()):
            pass
        sample(pipe.scheduler)
    with attach(pipe, Push()):
        sample(pipe.scheduler)


@pytest.mark.parametrize("pipe", [object(), types.SimpleNamespace(scheduler=None)])
def test_no_scheduler(pipe):
    with pytest.raises(TypeError, match="has no scheduler"), attach(pipe, Push()):
        pass


def test_pipeline_that_steps_only_copies():
    class SkyReelsV2DiffusionForcingPipeline:
        scheduler = scheduler_of("UniPCMultistepScheduler")

    with (
        pytest.raises(TypeError, match="copies of its scheduler"),
        attach(SkyReelsV2DiffusionForcingPipeline(), Push()),
    ):
        pass


def test_refused_scheduler():
    pipe = pipeline(RePaintScheduler())
    with pytest.raises(TypeError, match="RePaintScheduler is not supported"), attach(pipe, Push()):
        pass


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_x0_must_be_finite(bad):
    scheduler = scheduler_of("DDIMScheduler", clip_sample=False)
    x = torch.zeros(SHAPE)
    m = x.clone()
    m[[0, 2], 0, 0, 0] = bad
    with attach(pipeline(scheduler), Spell(radius=1e-3)):
        scheduler.step(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), scheduler.timesteps[0], x)
        with pytest.raises(ValueError, match=r"infinity at step 1, images \[0, 2\]"):
            scheduler.step(m, scheduler.timesteps[1], x)


def test_correction_must_have_the_shape_of_x0():
    scheduler = scheduler_of("DDIMScheduler")
    with attach(pipeline(scheduler), Push(torch.ones(1))), pytest.raises(ValueError, match="shape"):
        sample(scheduler)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("EulerDiscreteScheduler", {"s_churn": 0.5}),
        ("FlowMatchHeunDiscreteScheduler", {"s_churn": 0.5}),
        ("EDMEulerScheduler", {"pred_original_sample": torch.zeros(SHAPE)}),
        ("FlowMatchEulerDiscreteScheduler", {"per_token_timesteps": torch.zeros(3, 4)}),
    ],
)
def test_refused_arguments(name, extra):
    scheduler = scheduler_of(name)
    x = torch.ones(SHAPE)
    with attach(pipeline(scheduler), Push()), pytest.raises(ValueError, match=next(iter(extra))):
        scheduler.step(x, scheduler.timesteps[0], x, **extra)


# A real pipeline -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)  # the models have no generator argument
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    return {
        "unet": unet,
        "vae": vae,
        "text_encoder": None,
        "tokenizer": None,
        "safety_checker": None,
        "feature_extractor": None,
    }


def run_pipeline(cls, parts, scheduler, push=None, **extra):
    pipe = cls(**parts, scheduler=scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    arguments = {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": embeds * 0,
        "num_images_per_prompt": 3,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **extra,
    }
    if push is None:
        return pipe(**arguments).images
    with attach(pipe, push):
        return pipe(**arguments).images


PIPELINES = [
    (StableDiffusionPipeline, {"height": 16, "width": 16}),
    (StableDiffusionImg2ImgPipeline, {"image": torch.zeros(1, 3, 16, 16), "strength": 0.5}),
]


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "EulerAncestralDiscrete", "HeunDiscrete"])
@pytest.mark.parametrize(("cls", "extra"), PIPELINES, ids=["text", "image"])
def test_pipeline_with_zero_correction(cls, extra, name, parts):
    push = Push()
    plain = run_pipeline(cls, parts, scheduler_of(f"{name}Scheduler"), **extra)
    attached = run_pipeline(cls, parts, scheduler_of(f"{name}Scheduler"), push, **extra)
    assert torch.equal(plain, attached)
    assert push.trajectories() == (1, 1)
    assert torch.equal(push.finished[0], plain)


@pytest.mark.parametrize(("cls", "extra"), PIPELINES, ids=["text", "image"])
def test_pipeline_correction_lands(cls, extra, parts):
    """DDIM's last step returns x0 itself, so the latents are the last x0 plus the correction."""
    scheduler = scheduler_of("DDIMScheduler", clip_sample=False, set_alpha_to_one=True)
    delta = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    push = Push(delta)
    latents = run_pipeline(cls, parts, scheduler, push, **extra)
    expected = push.calls[-1][0] + delta
    assert (latents - expected).abs().max() <= 1e-5 * expected.abs().max()
