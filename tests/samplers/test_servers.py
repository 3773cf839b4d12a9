"""Servers, by stand-ins for how each calls its sampler: corrected exactly, or refused."""

import copy
import threading
import types

import diffusers
import pytest
import torch

from helpers.pipelines import randn
from shielded import Spell
from shielded.samplers.servers import Sharded, attach_step_post, shard

STEPS = 4
TARGET = randn(1, 2, 4, 4)


def flow():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    return scheduler


def velocity(x, sigma):
    return (x - (TARGET + 0.1 * x)) / sigma


def sampled(scheduler, x):
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, scheduler.sigmas[i]), t, x, return_dict=False)[0]
    return x


class OwnScheduler:
    """LightX2V's: latents of one image, the velocity in `noise_pred`, steps in `step_post`."""

    def __init__(self, latents):
        self.latents, self.infer_steps, self.step_index = latents, STEPS, 0
        self.sigmas = flow().sigmas

    def step_post(self):
        after, now = self.sigmas[self.step_index + 1], self.sigmas[self.step_index]
        self.latents = self.latents + (after - now) * self.noise_pred

    def run(self, batched=False):
        for self.step_index in range(STEPS):
            x = self.latents if batched else self.latents[None]
            predicted = velocity(x, self.sigmas[self.step_index])
            self.noise_pred = predicted if batched else predicted[0]
            self.step_post()
        return self.latents


# Copies of the scheduler, and rows at other steps ------------------------------------------------------------------


def test_copies_that_step_by_turns_are_refused():
    server = types.SimpleNamespace(scheduler=flow())
    with Spell(TARGET, 2.0, batch=False).attach(server):
        one, other = copy.deepcopy(server.scheduler), copy.deepcopy(server.scheduler)
        one.step(randn(1, 2, 4, 4), one.timesteps[0], randn(1, 2, 4, 4))
        with pytest.raises(RuntimeError, match="step by turns"):
            other.step(randn(1, 2, 4, 4), other.timesteps[0], randn(1, 2, 4, 4))


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "FlowMatchEulerDiscrete", "DPMSolverMultistep", "PNDM"])
@pytest.mark.parametrize("begun", [True, False])
def test_rows_at_different_steps_are_refused(name, begun):
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    scheduler.set_timesteps(STEPS)
    x = randn(2, 2, 4, 4)
    with Spell(TARGET + 50, 1.0, batch=False).attach(types.SimpleNamespace(scheduler=scheduler)):
        if begun or name == "PNDM":
            if hasattr(scheduler, "is_scale_input_called"):
                scheduler.scale_model_input(x, scheduler.timesteps[0])
            scheduler.step(x, scheduler.timesteps[0], x)
        with pytest.raises(ValueError, match="one number for the whole batch; rows of other noise levels step apart"):
            scheduler.step(x, scheduler.timesteps[[1, 3]], x)
        if not begun and name != "PNDM":
            scheduler.step(x, scheduler.timesteps[0], x)  # what is refused has left no trace


def test_schedulers_that_are_not_diffusers_own_are_refused():
    class Wrapper:  # xDiT's, which steps patches with the scheduler that it wraps
        def __init__(self, module):
            self.module = module

        def step(self, *args, **kwargs):
            return self.module.step(*args, **kwargs)

    spell = Spell(TARGET, 2.0, overcompensation=1.0, batch=False)
    for scheduler in (Wrapper(flow()), OwnScheduler(TARGET[0])):
        with pytest.raises(TypeError, match="not a scheduler that shielded knows"):  # noqa: SIM117
            with spell.attach(types.SimpleNamespace(scheduler=scheduler)):
                raise AssertionError
    wrapped = Wrapper(flow())
    with spell.attach(types.SimpleNamespace(scheduler=wrapped.module)):  # whole latents: what it wraps
        x = randn(1, 2, 4, 4, seed=5)
        for i, t in enumerate(wrapped.module.timesteps):
            x = wrapped.step(velocity(x, wrapped.module.sigmas[i]), t, x, return_dict=False)[0]
    assert (x - TARGET).norm().item() == pytest.approx(2.0, rel=1e-5)


# Parts of latents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("options", [{"batch": True}, {"batch": False, "history": True}])
def test_shards_are_corrected_as_the_whole_is_bit_for_bit(dim, options):
    world, x = 2, randn(3, 2, 4, 4, seed=7)
    alone = Spell(TARGET, 3.0, **options)
    with alone.attach(types.SimpleNamespace(scheduler=(scheduler := flow()))):
        expected = sampled(scheduler, x)
    parts, done, barrier = {}, {}, threading.Barrier(world, timeout=20)

    def process(rank):
        def gather(part):
            parts[rank] = part
            barrier.wait()
            whole = torch.cat([parts[other] for other in range(world)], dim=dim)
            barrier.wait()
            return whole

        take, spell, mine = shard(rank, world, dim), Spell(TARGET, 3.0, **options), flow()
        with spell.attach(types.SimpleNamespace(scheduler=mine), through=Sharded(spell, gather, take)):
            part = take(x)
            for i, t in enumerate(mine.timesteps):
                predicted = take(velocity(gather(part), mine.sigmas[i]))
                part = mine.step(predicted, t, part, return_dict=False)[0]
        done[rank] = part, spell

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.cat([done[rank][0] for rank in range(world)], dim=dim), expected)
    for _, spell in done.values():
        assert torch.equal(spell.finished, alone.finished)
        assert spell.trace == alone.trace
        assert spell.history is None or torch.equal(spell.history.latents, alone.history.latents)


def test_shards_without_gathering_are_refused():
    with Spell(TARGET, 3.0, batch=False).attach(types.SimpleNamespace(scheduler=(scheduler := flow()))):
        part = randn(3, 2, 2, 4)
        with pytest.raises(ValueError, match="have shape"):
            scheduler.step(part, scheduler.timesteps[0], part)


# step_post ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
def test_step_post_is_corrected_as_diffusers_step_is(batched):
    x = randn(3, 2, 4, 4, seed=7)
    spell = Spell(TARGET, 3.0, batch=batched)
    with spell.attach(types.SimpleNamespace(scheduler=(scheduler := flow()))):
        expected = sampled(scheduler, x if batched else x[:1])
    own, again = OwnScheduler(x if batched else x[0]), Spell(TARGET, 3.0, batch=batched)
    with attach_step_post(own, again, batched):
        found = own.run(batched)
    torch.testing.assert_close(found if batched else found[None], expected, rtol=1e-5, atol=1e-5)
    assert ((expected - TARGET).flatten(1).norm(dim=1) >= 3 * (1 - 1e-5)).all()
    assert [row["active"] for row in again.trace] == [row["active"] for row in spell.trace]
    assert "step_post" not in vars(own)


def test_step_post_without_an_active_shield_changes_nothing():
    x = randn(2, 4, 4, seed=7)
    own = OwnScheduler(x)
    with attach_step_post(own, Spell(TARGET + 50, 1.0, batch=False)):
        found = own.run()
    assert torch.equal(found, OwnScheduler(x).run())


def test_step_post_of_another_kind_is_refused():
    spell = Spell(TARGET, 3.0, batch=False)
    inner = types.SimpleNamespace(step_post=None, step_index=0, infer_steps=4, sigmas=None, scheduler=flow())
    for scheduler, message in [(flow(), "it has no `step_post`"), (inner, "attach to its `scheduler`")]:
        with pytest.raises(TypeError, match=message), attach_step_post(scheduler, spell):
            raise AssertionError
    own = OwnScheduler(TARGET[0])
    with pytest.raises(RuntimeError, match="never called"), attach_step_post(own, spell):
        pass
    with pytest.raises(TypeError, match="latents of its own"), attach_step_post(own, spell):
        own.step_post(TARGET)
