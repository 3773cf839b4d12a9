"""Just enough of ComfyUI to run the node pack without it, and a denoiser small enough for tests."""

import copy
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

PACK = Path(__file__).parents[2] / "comfyui"


class Mixture:
    """The exact denoiser of a mixture of Gaussians around a few targets, for x = x0 + sigma noise."""

    def __init__(self, shape, spread=0.3, seed=7):
        self.targets = torch.randn(6, *shape, generator=torch.Generator().manual_seed(seed)).double()
        self.spread = spread

    def __call__(self, x, sigma):
        variance = self.spread**2 + sigma**2
        gaps = (x.double()[:, None] - self.targets).flatten(2).square().sum(2)
        mean = (torch.softmax(-gaps / (2 * variance), dim=1) @ self.targets.flatten(1)).view_as(x)
        return (mean + self.spread**2 / variance * (x - mean)).float()


class Eps:
    def noise_scaling(self, sigma, noise, latent_image):
        return noise * sigma + latent_image


class Flow:
    def noise_scaling(self, sigma, noise, latent_image):
        return sigma * noise + (1 - sigma) * latent_image


class Scaled:
    """A latent format."""

    def __init__(self, scale=0.5, shift=0.1):
        self.scale, self.shift = scale, shift

    def process_in(self, latent):
        return (latent - self.shift) * self.scale

    def process_out(self, latent):
        return latent / self.scale + self.shift


class Model:
    """A MODEL with ComfyUI's two hooks, and an Euler sampler that calls them as ComfyUI does."""

    def __init__(self, shape=(4, 8, 8), sampling=None, cond_scale=1.0):
        self.denoiser, self.cond_scale = Mixture(shape), cond_scale
        self.inner = SimpleNamespace(model_sampling=sampling or Eps(), latent_format=Scaled())
        self.wrappers, self.model_options = {"sampler_sample": {}, "predict_noise": {}}, {}

    def clone(self):
        clone = Model.__new__(Model)
        wrappers = {kind: {key: [*of] for key, of in keys.items()} for kind, keys in self.wrappers.items()}
        clone.__dict__ = {**self.__dict__, "wrappers": wrappers, "model_options": copy.deepcopy(self.model_options)}
        return clone

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers[kind].setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers[kind].pop(key, None)

    def set_model_sampler_post_cfg_function(self, function):
        self.model_options["sampler_post_cfg_function"] = [*self.post_cfg, function]

    @property
    def post_cfg(self):
        return self.model_options.get("sampler_post_cfg_function", [])

    def wrapped(self, kind, run):
        for wrapper in [wrapper for key in self.wrappers[kind].values() for wrapper in key][::-1]:
            run = partial(wrapper, run)
        return run

    def get_model_object(self, name):
        return getattr(self.inner, name)

    def denoise(self, x, sigma):
        flow = isinstance(self.inner.model_sampling, Flow)
        if flow:  # the same state, divided by alpha
            denoised = self.denoiser(x / max(1 - sigma, 1e-3), sigma / max(1 - sigma, 1e-3))
        else:
            denoised = self.denoiser(x, sigma)
        levels = torch.full((len(x),), sigma)
        args = {"input": x, "sigma": levels, "model": self.inner, "cond_scale": self.cond_scale}
        args |= {"cond": [], "cond_denoised": denoised, "uncond": None, "uncond_denoised": torch.zeros_like(denoised)}
        if self.cond_scale != 1:
            uncond = 0.8 * denoised + 0.1
            args |= {"uncond": [], "uncond_denoised": uncond}
            denoised = uncond + self.cond_scale * (denoised - uncond)
        for function in self.post_cfg:
            denoised = function({**args, "denoised": denoised})
        return denoised

    def combine(self, x, sigma):
        """What a guider makes of the predictions; another guider in some tests."""
        return self.denoise(x, float(sigma[0]))

    def euler(self, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask):
        sampling = self.inner.model_sampling
        x = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise))
        for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            denoised = self.wrapped("predict_noise", self.combine)(x, torch.full((len(x),), sigma))
            if denoise_mask is not None:
                denoised = denoised * denoise_mask + latent_image * (1 - denoise_mask)
            x = denoised + (x - denoised) * following / sigma
        return x

    def sample(self, noise, sigmas=None, latent_image=None, denoise_mask=None):
        """Finished latents, as a LATENT wire carries them."""
        flow = isinstance(self.inner.model_sampling, Flow)
        if sigmas is None:
            sigmas = torch.linspace(1, 0, 13) if flow else torch.cat([torch.logspace(1, -2, 12), torch.zeros(1)])
        run = self.wrapped("sampler_sample", self.euler)
        guider = SimpleNamespace(inner_model=self.inner, model_options={"wrappers": self.wrappers})
        extra = {"model_options": self.model_options}
        samples = run(guider, sigmas, extra, None, noise, latent_image, denoise_mask)
        return self.inner.latent_format.process_out(samples)


class Vae:
    """Encodes to 1/8 of the size: mean grey values of the pixels, in four channels. Decodes to the latent itself."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        grey = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8).mean(1, keepdim=True)
        return 4 * grey.expand(-1, 4, -1, -1) - 2

    def decode(self, latents):
        return latents


def install(monkeypatch, folder):
    """Puts the fake host in place and returns the pack, loaded as ComfyUI loads it."""

    class Port:
        Input = staticmethod(lambda id, **options: SimpleNamespace(id=id, **options))
        Output = staticmethod(lambda **options: SimpleNamespace(**options))

    class Node:
        pass

    class Output:
        def __init__(self, *args):
            self.args = args

    names = ("Model", "Image", "Vae", "Latent", "Float", "Int", "Boolean", "String", "Combo")
    io = SimpleNamespace(
        **dict.fromkeys(names, Port),
        Custom=lambda name: type(name, (Port,), {}),
        Schema=lambda **options: SimpleNamespace(**options),
        ComfyNode=Node,
        NodeOutput=Output,
    )
    modules = {
        "comfy_api": {},
        "comfy_api.latest": {"io": io, "ComfyExtension": object},
        "comfy": {},
        "comfy.patcher_extension": {
            "WrappersMP": SimpleNamespace(SAMPLER_SAMPLE="sampler_sample", PREDICT_NOISE="predict_noise")
        },
        "folder_paths": {
            "get_user_directory": lambda: str(folder / "user"),
            "get_input_directory": lambda: str(folder / "input"),
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("spell_pack", "spell_pack.nodes", "spell_pack.hook", "spell_pack.memory", "spell_pack.images"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("spell_pack", PACK / "__init__.py")
    pack = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "spell_pack", pack)
    spec.loader.exec_module(pack)
    return pack


def example_workflows():
    """The example workflows by name, as files and as prompts: what the frontend sends when they are queued."""
    workflows = {}
    for path in sorted((PACK / "example_workflows").glob("*.json")):
        workflow = json.loads(path.read_text())
        links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
        prompt = {}
        for node in workflow["nodes"]:
            if node["type"] == "Note":
                continue
            inputs, values = {}, iter(node["widgets_values"])
            for port in node["inputs"]:
                if "widget" in port:
                    inputs[port["name"]] = next(values)
                    if port["name"] == "seed":
                        next(values)  # what becomes of the seed after each run; the frontend's own
                elif port["link"] is not None:
                    inputs[port["name"]] = links[port["link"]]
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
        workflows[path.stem] = workflow, prompt
    return workflows
