"""Nodes of a real ComfyUI after SPELL: what they do to the distance that SPELL keeps, in radii."""

import importlib
import math

import torch

from helpers import comfyui_host as host

STEPS = 15


def node(module, name, **inputs):
    """Runs one of ComfyUI's own nodes, of its old or its new kind; its first output."""
    cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    if hasattr(cls, "define_schema"):
        return cls.execute(**inputs).args[0]
    return getattr(cls(), cls.FUNCTION)(**inputs)[0]


def lora(model):
    """What LoraLoader does with the weights that it has read."""
    patched = model.clone()
    assert patched.add_patches({"diffusion_model.weight": ("diff", (torch.ones(1),))}, 0.3)
    return patched


def nodes_after(kind):
    """Nodes that clone the MODEL, by name; for an eps, v or flow model."""
    advanced = "nodes_model_advanced"
    free = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
    sampling = {
        "eps (SD 1.5)": lambda m: node(advanced, "ModelSamplingDiscrete", model=m, sampling="eps", zsnr=False),
        "v (SD 2)": lambda m: node(advanced, "ModelSamplingDiscrete", model=m, sampling="v_prediction", zsnr=False),
        "flow (SD 3)": lambda m: node(advanced, "ModelSamplingSD3", model=m, shift=2.0),
    }
    return {
        "LoRA": lora,
        "FreeU": lambda m: node("nodes_freelunch", "FreeU_V2", model=m, **free),
        "RescaleCFG": lambda m: node(advanced, "RescaleCFG", model=m, multiplier=0.7),
        "ModelSampling": sampling[kind],
        "Mahiro": lambda m: node("nodes_mahiro", "Mahiro", model=m),
        "EpsilonScaling": lambda m: node("nodes_eps", "EpsilonScaling", model=m, scaling_factor=1.01),
    }


def guiders(model):
    """Guiders that combine more than two predictions, by name."""
    positive, middle, negative = (host.conditioning(value) for value in (1.0, 0.5, 0.0))
    dual = {"model": model, "cond1": positive, "cond2": middle, "negative": negative}
    dual |= {"cfg_conds": 3.0, "cfg_cond2_negative": 2.0}
    perp = {"model": model, "positive": positive, "negative": negative, "empty_conditioning": middle}
    return {
        "DualCFG regular": node("nodes_custom_sampler", "DualCFGGuider", **dual, style="regular"),
        "DualCFG nested": node("nodes_custom_sampler", "DualCFGGuider", **dual, style="nested"),
        "PerpNeg": node("nodes_perpneg", "PerpNegGuider", **perp, cfg=3.0, neg_scale=1.0),
    }


def guided(guider, name="euler", seed=3):
    """Finished latents of SamplerCustomAdvanced."""
    import comfy.sample
    import comfy.samplers

    model = guider.model_patcher
    latent = torch.zeros(1, model.get_model_object("latent_format").latent_channels, host.SIZE, host.SIZE)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    noise, sampler = comfy.sample.prepare_noise(latent, seed), comfy.samplers.sampler_object(name)
    with torch.inference_mode():
        return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=seed)


def measure(pack, kind):
    """Distances in radii, of each node and guider after SPELL, of two SPELL nodes, and of images with own masks."""
    model = host.tiny_model(kind)
    scaled = model.get_model_object("latent_format").process_in

    def distance(result, target, values=None):
        unit = host.RADIUS * math.sqrt(values or target[0].numel())
        return float((scaled(result) - scaled(target)).norm()) / unit

    figures = {}
    for name, after in nodes_after(kind).items():
        target = host.sample(after(model), "euler")
        kept = host.sample(after(host.spell(pack, model, target)), "euler")
        figures[name] = distance(kept, target)
    for name, guider in guiders(model).items():
        target = guided(guider)
        figures[name] = distance(guided(guiders(host.spell(pack, model, target))[name]), target)

    one = host.sample(model, "euler")
    other = host.sample(
        host.spell(pack, model, one), "euler"
    )  # what the first SPELL leads to, in the way of the second
    both = host.sample(host.spell(pack, host.spell(pack, model, one), other), "euler")
    figures["two SPELL"] = min(distance(both, one), distance(both, other))
    figures["two SPELL, RescaleCFG between and after"] = rescaled(pack, model, kind, distance)

    masks = torch.zeros(2, 1, host.SIZE, host.SIZE)
    masks[0, ..., : host.SIZE // 2] = 1
    masks[1, :, : host.SIZE // 4] = 1
    plain = host.sample(model, "euler", batch=2, mask=masks)
    pushed = host.sample(host.spell(pack, model, plain), "euler", batch=2, mask=masks)
    channels = plain.shape[1]
    holes = [channels * int(mask.sum()) for mask in masks]
    each = [distance(pushed[i : i + 1], plain[i : i + 1], holes[i]) for i in range(2)]
    figures["masks"] = each
    figures["outside the masks"] = float(((pushed - plain) * (1 - masks)).abs().max())
    return figures


def rescaled(pack, model, kind, distance):
    """Two SPELL nodes with another node between and behind them."""
    rescale = nodes_after(kind)["RescaleCFG"]
    one = host.sample(rescale(rescale(model)), "euler")
    first = rescale(host.spell(pack, model, one))
    other = host.sample(rescale(first), "euler")
    both = host.sample(rescale(host.spell(pack, first, other)), "euler")
    return min(distance(both, one), distance(both, other))
