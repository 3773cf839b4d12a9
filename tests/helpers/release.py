"""A correction that only lets guidance go, and how each of the small pipelines is expected to do so."""

import torch

WAYS = {
    "sd15": "batched",
    "sd2": "batched",
    "lcm": "embedded",
    "sd-turbo": None,
    "img2img": "batched",
    "inpaint": "batched",
    "controlnet": "batched",
    "sdxl": "batched",
    "sdxl-turbo": None,
    "sd3": "batched",
    "dit": "batched",
    "pixart-sigma": "batched",
    "sana": "batched",
    "z-image": "batched",
    "flux": "embedded",
    "flux-schnell": None,
    "flux2": "embedded",
    "qwen-image": "separate",
    "wan": "separate",
    "ltx": "batched",
}
OFF = {"qwen-image": {"true_cfg_scale": 1.0}, "z-image": {"guidance_scale": 0.0}}
ROWS = torch.tensor([False, True, False, True])


class Release:
    """A correction that moves nothing and lets guidance go in some rows."""

    def __init__(self, rows=ROWS, scale=1.0):
        self.rows, self.release, self.release_scale = rows, 0.0, scale
        self.guidance = self.finished = None
        self.steps = []

    def __call__(self, x0, *, noise, alpha, sigma, last=False, released=None):
        self.steps.append(released)
        return torch.zeros_like(x0)

    def colliding(self, x0, *, alpha, sigma, last=False):
        return self.rows

    def start(self):
        pass

    def finish(self, latents):
        self.finished = latents
