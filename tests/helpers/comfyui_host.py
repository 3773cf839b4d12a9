"""The node pack inside a real ComfyUI, on the CPU, with tiny denoisers in ComfyUI's own model classes.

    COMFYUI_PATH=path/to/ComfyUI python tests/helpers/comfyui_host.py            the table of docs/comfyui.md
    COMFYUI_PATH=path/to/ComfyUI python tests/helpers/comfyui_host.py --json     the same figures for test_comfyui.py

ComfyUI's own requirements must be installed; torchvision and torchaudio are replaced by empty modules where absent.
"""

import asyncio
import copy
import importlib.abc
import importlib.machinery
import inspect
import json
import logging
import math
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch
from PIL import Image

from helpers.fake_comfy import PACK, Mixture, Vae, example_workflows

STEPS, SIZE, RADIUS = 15, 8, 0.5
KINDS = {"eps (SD 1.5)": "SD15", "v (SD 2)": "SD20", "flow (SD 3)": "SD3"}


class Absent(ModuleType):
    """A package that is not installed, with whatever names are asked of it."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last: finds torchvision and torchaudio where they are not installed."""

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("torchvision", "torchaudio"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Absent(spec.name)

    def exec_module(self, module):
        pass


def start(folder):
    """Imports ComfyUI from COMFYUI_PATH and loads the pack as ComfyUI does."""
    if "COMFYUI_PATH" not in os.environ:
        sys.exit("COMFYUI_PATH must name a checkout of ComfyUI.")
    sys.meta_path.append(Finder())
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = ["comfyui", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import folder_paths
    import nodes

    folder_paths.set_user_directory(str(folder))
    folder_paths.set_input_directory(str(folder))
    Image.new("RGB", (100, 80), "red").save(Path(folder) / "example.png")
    logging.getLogger().setLevel(logging.ERROR)
    assert asyncio.run(nodes.load_custom_node(str(PACK)))
    return nodes.NODE_CLASS_MAPPINGS


class Tiny(torch.nn.Module):
    """A network whose prediction is that of the mixture, moved a little by the prompt."""

    dtype = torch.float32

    def __init__(self, host, shape):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.mixture = Mixture(shape)
        self.host = [host]  # in a list: it is no part of the network; nodes exchange its model_sampling
        self.kind = host.model_type.name

    def forward(self, x, t, context=None, **_):
        if self.kind == "FLOW":
            sigma = float(t[0]) / self.host[0].model_sampling.multiplier
            alpha = max(1 - sigma, 1e-3)
            return (x - self.predict(x / alpha, sigma / alpha, context)) / sigma
        sigma = float(self.host[0].model_sampling.sigma(t)[0])
        scale = math.sqrt(1 + sigma**2)
        x = x * scale
        x0 = self.predict(x, sigma, context)
        return (x - x0) / sigma if self.kind == "EPS" else (x / scale**2 - x0) * scale / sigma

    def predict(self, x, sigma, context):
        return self.mixture(x, sigma) + 0.1 * context.mean((1, 2)).view(-1, 1, 1, 1) + self.weight


def tiny_model(kind):
    """A MODEL of ComfyUI's own class of that kind."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, KINDS[kind])(
        {"disable_unet_model_creation": True, "in_channels": 4, "model_channels": 320}
    )
    family = comfy.model_base.SD3 if KINDS[kind] == "SD3" else comfy.model_base.BaseModel
    types = {"SD15": "EPS", "SD20": "V_PREDICTION", "SD3": "FLOW"}
    host = family(config, getattr(comfy.model_base.ModelType, types[KINDS[kind]]), device="cpu")
    host.diffusion_model = Tiny(host, (config.latent_format.latent_channels, SIZE, SIZE))
    return comfy.model_patcher.ModelPatcher(host, torch.device("cpu"), torch.device("cpu"))


def conditioning(value):
    return [[torch.full((1, 4, 8), value), {"pooled_output": torch.zeros(1, 8)}]]


def sample(model, sampler, seed=3, batch=1, mask=None):
    """Finished latents of KSampler, as a LATENT wire carries them. All images of the batch begin with equal noise."""
    import comfy.sample

    latent = torch.zeros(batch, model.get_model_object("latent_format").latent_channels, SIZE, SIZE)
    noise = comfy.sample.prepare_noise(latent[:1], seed).repeat(batch, 1, 1, 1)
    both = conditioning(1.0), conditioning(0.0)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, STEPS, 2.0, sampler, "normal", *both, latent, seed=seed, disable_pbar=True, noise_mask=mask
        )


def spell(pack, model, protected=None, overcompensation=1.0, radius=RADIUS, batch=False):
    options = (overcompensation, batch, 1.0, 0.0, "project", 1.0, 0.0, protected)
    return pack["ShieldedSpell"].execute(model, radius, *options).args[0]


def measure(pack, kind, sampler):
    """Distances in radii to the image that this seed gives without SPELL, which is what is protected."""
    model = tiny_model(kind)
    scaled = model.get_model_object("latent_format").process_in
    target = sample(model, sampler)
    unit = RADIUS * math.sqrt(target[0].numel())

    def distance(result):
        return float((scaled(result) - scaled(target)).flatten(1).norm(dim=1).min()) / unit

    far = scaled(target).add(100)
    away = model.get_model_object("latent_format").process_out(far)
    pair = sample(spell(pack, model, batch=True), sampler, batch=2)
    return {
        "before": distance(sample(model, sampler)),
        "after": distance(sample(spell(pack, model, target), sampler)),
        "overcompensated": distance(sample(spell(pack, model, target, 1.6), sampler)),
        "pair": float((scaled(pair[0]) - scaled(pair[1])).norm()) / unit,
        "idle_is_identical": torch.equal(sample(spell(pack, model, away), sampler), target),
        "unpatched_is_identical": torch.equal(sample(model, sampler), target),
    }


# The example workflows, with ComfyUI's own executor and cache ---------------------------------------------------------


class Clip:
    """A text encoder that reads nothing but the length."""

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        return conditioning(len(text) / 30)


class Checkpoint:
    """In the place of CheckpointLoaderSimple."""

    RETURN_TYPES, FUNCTION = ("MODEL", "CLIP", "VAE"), "load"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"ckpt_name": ("STRING", {})}})

    def load(self, ckpt_name):
        return tiny_model("eps (SD 1.5)"), Clip(), Vae()


class Save:
    """In the place of SaveImage: keeps what was generated, in ComfyUI's unscaled latents."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "keep", True
    INPUT_TYPES = classmethod(lambda cls: {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {})}})
    kept: ClassVar[list[torch.Tensor]] = []

    def keep(self, images, filename_prefix):
        self.kept.append(images)
        return {}


class Server:
    """What the executor reports to."""

    client_id = last_node_id = None

    def send_sync(self, *_):
        pass


def example(name):
    """An example workflow as a prompt, at a size and with settings for which the figures are exact."""
    prompt = example_workflows()[name][1]
    for node in prompt.values():
        size = {"width": 8 * SIZE, "height": 8 * SIZE}
        exact = {"radius": RADIUS, "overcompensation": 1.0, "window_end": 0.0}
        node["inputs"].update({"EmptyLatentImage": size, "ShieldedSpell": exact}.get(node["class_type"], {}))
    return prompt


def run(executor, prompt):
    """Queues a prompt; how many images have been saved so far."""
    import execution

    prompt = copy.deepcopy(prompt)  # the executor writes into it
    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("test", prompt, None))
    assert valid, (error, node_errors)
    assert not node_errors, node_errors
    executor.execute(prompt, "test", {}, outputs)
    assert executor.success, executor.status_messages
    return len(Save.kept)


def node_of(prompt, kind):
    return next(key for key, node in prompt.items() if node["class_type"] == kind)


def takes_caching(execution):
    return "cache_args" in inspect.signature(execution.PromptExecutor.__init__).parameters


def examples(pack):
    """Runs the example workflows; variety.json again and again, with the same seed."""
    import execution
    import folder_paths

    from shielded import ProtectedSet

    pack.update(CheckpointLoaderSimple=Checkpoint, SaveImage=Save)
    caching = {"ram": 16.0, "lru": 0}  # which newer versions read
    executor = execution.PromptExecutor(Server(), **({"cache_args": caching} if takes_caching(execution) else {}))
    variety = example("variety")
    sampled = [run(executor, variety) for _ in range(4)]
    # What Vae decodes to is the latent itself.
    images = torch.stack(Save.kept).flatten(1) * 0.18215
    closest = float(torch.nn.functional.pdist(images).min()) / (RADIUS * math.sqrt(images.shape[1]))

    # Only remembering: the sampler's result is cached, and is not remembered twice.
    plain = example("variety")
    plain[node_of(plain, "KSampler")]["inputs"]["model"] = [node_of(plain, "CheckpointLoaderSimple"), 0]
    plain[node_of(plain, "ShieldedMemory")]["inputs"]["name"] = "plain"
    for _ in range(3):
        run(executor, plain)
    remembered = ProtectedSet.open(f"{folder_paths.get_user_directory()}/shielded/plain/SD15-4x{SIZE}x{SIZE}")

    memory = node_of(variety, "ShieldedMemory")
    variety["forget"] = {"class_type": "ShieldedForget", "inputs": {"memory": [memory, 0]}}
    variety[node_of(variety, "ShieldedSpell")]["inputs"]["memory"] = ["forget", 0]
    run(executor, variety)
    first_again = torch.equal(Save.kept[-1], Save.kept[0])

    run(executor, example("protect"))
    return {
        "sampled": sampled,
        "closest": closest,
        "remembered_without_spell": len(remembered),
        "first_again_after_forgetting": first_again,
    }


def main():
    as_json = "--json" in sys.argv
    with tempfile.TemporaryDirectory() as folder:
        pack = start(folder)
        import comfy.samplers

        few = ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "lcm"]
        names = few if as_json else comfy.samplers.SAMPLER_NAMES
        figures = {kind: {name: measure(pack, kind, name) for name in names} for kind in KINDS}
        from helpers import comfyui_after

        after = {kind: comfyui_after.measure(pack, kind) for kind in KINDS}
        if as_json:
            print(json.dumps({"samplers": figures, "after": after, "examples": examples(pack)}))
            return
    print("| sampler | λ = 1 | λ = 1.6 | two equal images, λ = 1 |")
    print("|---|---|---|---|")
    for name in names:
        rows = [figures[kind][name] for kind in KINDS]
        cells = [" / ".join(f"{row[key]:.3f}" for row in rows) for key in ("after", "overcompensated", "pair")]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| after SPELL | " + " / ".join(KINDS) + " |\n|---|---|")
    for name in after[next(iter(KINDS))]:
        values = [after[k][name] for k in KINDS]
        cells = ["+".join(f"{v:.3f}" for v in value) if isinstance(value, list) else f"{value:.3f}" for value in values]
        print(f"| {name} | {' / '.join(cells)} |")
    every = [row for samplers in figures.values() for row in samplers.values()]
    idle = sum(row["idle_is_identical"] for row in every)
    unpatched = sum(row["unpatched_is_identical"] for row in every)
    print(f"\nLargest distance without SPELL: {max(row['before'] for row in every):.3f}.", end=" ")
    print(f"Bit-identical where nothing is near: {idle} of {len(every)}.", end=" ")
    print(f"Model without the node unchanged: {unpatched} of {len(every)}.")


if __name__ == "__main__":
    sys.modules["helpers.comfyui_host"] = sys.modules["__main__"]
    main()
