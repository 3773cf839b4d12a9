import copy
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from helpers.scheduler_cases import (
    BOUND,
    CASES,
    ONE_SCHEDULE,
    case_id,
    make,
    own_x0,
    prediction_of,
    sample,
    scheduler_class,
    watch,
)
from shielded.samplers import x0_coefficients
from shielded.samplers.coefficients import REFUSED, SUPPORTED, bounded_x0, last_index, step_state

# torchsde finds that diffusers asks for times a rounding outside its interval.
pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")


def exported():
    names = set(dir(diffusers)) | set(dir(diffusers.schedulers))
    # Those of Flax, in older versions, are of JAX.
    return sorted(name for name in names if name.endswith("Scheduler") and not name.startswith("Flax"))


def test_table_covers_what_diffusers_exports():
    """All of it; older versions than the one in constraints.txt do not have all that the table names."""
    assert set(exported()) <= {*SUPPORTED, *REFUSED}
    if f"diffusers=={diffusers.__version__}\n" in (Path(__file__).parents[2] / "constraints.txt").read_text():
        assert exported() == sorted([*SUPPORTED, *REFUSED])
    assert not set(SUPPORTED) & set(REFUSED)


def test_every_supported_class_is_run():
    assert {name for name, *_ in CASES} == set(SUPPORTED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_by_name(name):
    cls = scheduler_class(name)
    scheduler = cls.__new__(cls)  # several need arguments, and none is read
    with pytest.raises(TypeError, match=rf"{name} is not supported: .+; \w+"):
        x0_coefficients(scheduler, 1)


def test_documented_tables():
    """docs/schedulers.md names every case and every refusal, and its figures keep the bounds that tests assert."""
    page = Path(__file__).parents[2] / "docs" / "schedulers.md"
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    split = next(i for i, row in enumerate(rows) if row[0] == "refused")
    supported = {(name, prediction): cells for name, prediction, *cells in rows[2:split]}
    assert supported.keys() == {(case[0], prediction_of(case)) for case in CASES}
    for key, (_, count, single, half, _, same, restored) in supported.items():
        assert int(count) == sum((case[0], prediction_of(case)) == key for case in CASES)
        assert float(single) <= BOUND[torch.float32]
        assert float(half) <= BOUND[torch.bfloat16]
        assert (same, restored) == ("yes", "yes")
    assert {name: (reason, instead) for name, reason, instead in rows[split + 2 :]} == REFUSED


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_x0_is_the_schedulers_own(case):
    checked, before, scheduler = [], None, make(case)

    def see(step):
        expected, _ = own_x0(step)
        if expected is None:
            return
        a, b = before
        x0 = bounded_x0(scheduler, a * step.sample + b * step.model_output).double()
        assert (x0 - expected).abs().max() <= 1e-5 * expected.abs().max()
        checked.append(before)

    def model(x, t):
        nonlocal before
        before = x0_coefficients(scheduler, t)
        assert all(type(number) is float for number in before)
        return x.roll(1, dims=1) * 0.5

    watch(scheduler, see)
    sample(scheduler, model=model, eta=0.0)
    assert len(checked) >= last_index(scheduler)


@pytest.mark.parametrize("case", ONE_SCHEDULE, ids=case_id)
def test_state_splits_the_sample(case):
    """x = α x0 + σ ε with the ε that the prediction means, and the scheduler stays as it was."""
    scheduler = make(case)
    state = copy.deepcopy(vars(scheduler))
    for timestep in scheduler.timesteps[:-1]:
        a, b, alpha, sigma = step_state(scheduler, timestep)
        assert 0 <= alpha <= 1
        assert sigma > 0
        prediction = scheduler.config.get("prediction_type")
        if prediction == "epsilon" and "EDM" not in case[0] and "Cosine" not in case[0]:
            x0, noise = 0.7, -1.3
            assert a * (alpha * x0 + sigma * noise) + b * noise == pytest.approx(x0, rel=1e-9)
        if case[0].startswith("FlowMatch"):
            x0, noise = 0.7, -1.3
            velocity = (x0 - noise) if case[1].get("invert_sigmas") else (noise - x0)
            assert a * (alpha * x0 + sigma * noise) + b * velocity == pytest.approx(x0, rel=1e-9)
    assert vars(scheduler).keys() == state.keys()
    for key, value in vars(scheduler).items():
        arrays = isinstance(value, torch.Tensor | np.ndarray)
        assert np.array_equal(value, state[key], equal_nan=True) if arrays else value == state[key]


def test_closed_forms():
    scheduler = make(("DDIMScheduler", {}, {}))
    cumprod = scheduler.alphas_cumprod[500].item()
    assert x0_coefficients(scheduler, 500) == pytest.approx((cumprod**-0.5, -((1 / cumprod - 1) ** 0.5)))
    scheduler = make(("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, {}))
    sigma = scheduler.sigmas[2].item()
    expected = (1 / (1 + sigma**2), -sigma / (1 + sigma**2) ** 0.5)
    assert x0_coefficients(scheduler, scheduler.timesteps[2]) == pytest.approx(expected)
    scheduler = make(("FlowMatchEulerDiscreteScheduler", {}, {}))
    assert x0_coefficients(scheduler, scheduler.timesteps[3]) == (1.0, -scheduler.sigmas[3].item())


@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda t: torch.tensor([t, t])])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_timestep_as_any_number(name, kind):
    scheduler = make((name, {"timestep_spacing": "leading"}, {}))
    timestep = scheduler.timesteps[2]
    assert x0_coefficients(scheduler, kind(int(timestep))) == x0_coefficients(scheduler, timestep)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "KDPM2DiscreteScheduler"])
def test_any_timestep_before_and_after_a_step(name):
    """The lookup follows the timestep, not the step counter."""
    scheduler = make((name, {}, {}))
    fresh = [x0_coefficients(scheduler, t) for t in scheduler.timesteps]
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps[:3]:
        scheduler.scale_model_input(x, t)
        scheduler.step(x, t, x)
        assert [x0_coefficients(scheduler, t) for t in scheduler.timesteps] == fresh


def test_begin_index_chooses_among_equal_timesteps():
    scheduler = make(("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, {}), steps=40)
    timesteps = scheduler.timesteps.tolist()
    repeated = next(i for i, t in enumerate(timesteps[:-1]) if timesteps.count(t) > 1)
    assert step_state(scheduler, timesteps[repeated]) == step_state(scheduler, None, repeated + 1)  # as diffusers does
    scheduler.set_begin_index(repeated)
    assert step_state(scheduler, timesteps[repeated]) == step_state(scheduler, None, repeated)


def test_subclass_uses_the_row_of_its_base():
    class Mine(scheduler_class("DDIMScheduler")):
        pass

    assert x0_coefficients(Mine(), 10) == x0_coefficients(scheduler_class("DDIMScheduler")(), 10)


def test_unknown_class():
    class DDIMScheduler:  # the name alone is not enough
        pass

    with pytest.raises(TypeError, match="DDIMScheduler is not a scheduler that shielded knows"):
        x0_coefficients(DDIMScheduler(), 1)


@pytest.mark.parametrize(
    ("name", "config", "timestep", "message"),
    [
        ("DDIMScheduler", {}, 1000, "not an integer from 0 to 999"),
        ("DDIMScheduler", {}, -1, "not an integer from 0 to 999"),
        ("DDIMScheduler", {}, 3.5, "not an integer from 0 to 999"),
        ("DDIMScheduler", {}, torch.tensor([1, 2]), "one number for the whole batch"),
        ("DDIMScheduler", {"prediction_type": "flow"}, 1, "prediction_type='flow' is not known"),
        ("EDMEulerScheduler", {"prediction_type": "sample"}, None, "prediction_type='sample' is not known"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, 999, "zero terminal SNR"),
        ("EulerDiscreteScheduler", {}, 12345, "not one of scheduler.timesteps"),
        ("FlowMatchLCMScheduler", {"scale_factors": [2.0], "upscale_mode": "nearest"}, None, "scale_factors"),
        ("FlowMatchLCMScheduler", {"invert_sigmas": True}, None, "invert_sigmas"),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"invert_sigmas": True, "stochastic_sampling": True},
            None,
            "invert_sigmas",
        ),
    ],
)
def test_refused_options(name, config, timestep, message):
    scheduler = make((name, config, {}))
    with pytest.raises(ValueError, match=message):
        x0_coefficients(scheduler, scheduler.timesteps[0] if timestep is None else timestep)


def test_schedule_not_set():
    scheduler = scheduler_class("LTXEulerAncestralRFScheduler")()
    with pytest.raises(ValueError, match="call set_timesteps first"):
        x0_coefficients(scheduler, 1.0)
