"""How inference servers call a sampler, and how each is corrected: stand-ins with one image that every seed draws.

python examples/servers.py

Prints the distance of the images from the protected one, and the radius, for each way of calling (docs/servers.md).
"""

import contextlib
import copy
import threading
import types

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from shielded import History, Spell
from shielded.samplers.servers import Sharded, attach_step_post, shard

RADIUS, STEPS = 4.0, 4
PROTECTED = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def velocity(x, sigma):
    """The velocity of a model that has memorised the protected image: x0 is nearly that image at every x."""
    return (x - (PROTECTED + 0.01 * x)) / sigma


def noise(*seeds):
    return torch.stack([torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def denoise(stepped, x):
    """Denoise x (B, C, H, W), one step at each `next`."""
    stepped.set_timesteps(STEPS)
    for i, t in enumerate(stepped.timesteps):
        x = stepped.step(velocity(x, stepped.sigmas[i]), t, x, return_dict=False)[0]
        yield x


def last(steps):
    return list(steps)[-1]


def report(way, *images):
    distances = (torch.cat(images) - PROTECTED).flatten(1).norm(dim=1)
    print(f"{way}: {distances.min():.3f} from the protected image, radius {RADIUS}")


def spell(**options):
    return Spell(PROTECTED, RADIUS, overcompensation=1.0, batch=False, **options)


# The shared scheduler is stepped (vLLM-Omni, xDiT without pipefusion): attach once, for as long as the server runs.
server = types.SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
with spell().attach(server):
    images = []
    for seed in range(2):
        images.append(last(denoise(server.scheduler, noise(seed))))
report("one scheduler", *images)

# Each request steps a deep copy of it (SGLang), one request after another: the copies are corrected.
with spell().attach(server):
    images = [last(denoise(copy.deepcopy(server.scheduler), noise(seed))) for seed in range(2)]
report("a copy for each request", *images)

# Requests take their steps by turns: each gets a scheduler and a Spell of its own. A shared history keeps later ones
# apart from those that are finished.
seen = History()
with contextlib.ExitStack() as open_requests:
    requests = []
    for seed in range(2):
        request = types.SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
        open_requests.enter_context(spell(history=seen).attach(request))
        requests.append(denoise(request.scheduler, noise(seed)))
    steps = [[next(request) for request in requests] for _ in range(STEPS)]
report("requests by turns", *steps[-1])

# Several requests in one batch, all at the same step: images repel within their own request.
with Spell(PROTECTED, RADIUS, overcompensation=1.0, groups=["first", "first", "second"]).attach(server):
    batch = last(denoise(server.scheduler, noise(0, 1, 2)))
report("requests in one batch", batch)

# Each process holds a part of the latents (sequence parallelism): x0 is gathered, here from two threads.
WORLD, parts, barrier, done = 2, {}, threading.Barrier(2), {}


def process(rank):
    def gather(part):
        parts[rank] = part
        barrier.wait()
        whole = torch.cat([parts[other] for other in range(WORLD)], dim=2)
        barrier.wait()
        return whole

    take = shard(rank, WORLD, 2)
    mine = types.SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
    mine.scheduler.set_timesteps(STEPS)
    correct = spell()
    with correct.attach(mine, through=Sharded(correct, gather, take)):
        x = take(noise(0, 1))
        for i, t in enumerate(mine.scheduler.timesteps):
            part = take(velocity(gather(x), mine.scheduler.sigmas[i]))  # of a model that sees whole images
            x = mine.scheduler.step(part, t, x, return_dict=False)[0]
    done[rank] = x


threads = [threading.Thread(target=process, args=(rank,)) for rank in range(WORLD)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
report("sharded latents", torch.cat([done[rank] for rank in range(WORLD)], dim=2))


# The scheduler keeps latents and velocity to itself and steps in step_post (LightX2V).
class OwnScheduler:
    def __init__(self, latents):
        self.latents, self.infer_steps, self.step_index = latents, STEPS, 0
        self.sigmas = torch.linspace(1, 0, STEPS + 1)

    def step_post(self):
        self.latents = (
            self.latents + (self.sigmas[self.step_index + 1] - self.sigmas[self.step_index]) * self.noise_pred
        )


own = OwnScheduler(noise(0)[0])
with attach_step_post(own, spell()):
    for own.step_index in range(STEPS):
        own.noise_pred = velocity(own.latents[None], own.sigmas[own.step_index])[0]
        own.step_post()
report("step_post", own.latents[None])
