"""Node definitions: names, inputs, outputs, and the function that each one runs."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from shielded import ProtectedSet
from shielded.models import PROTECTION, VARIETY_RADIUS

from .hook import SpellPatch
from .images import encode, from_folder, from_tensor, size_of
from .memory import Memory, forget, named, parse_seeds, remember, seeds_of, state

CATEGORY = "SPELL"
ProtectedImages = io.Custom("SPELL_SET")
MemoryWire = io.Custom("SPELL_MEMORY")


class Spell(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShieldedSpell",
            display_name="SPELL",
            category=CATEGORY,
            description="Keeps generated images away from protected images, from remembered images, and from the other "
            "images of the batch. Nodes after it keep what it corrects; several of them hold together.",
            inputs=[
                io.Model.Input("model"),
                io.Float.Input(
                    "radius",
                    default=VARIETY_RADIUS,
                    min=0.01,
                    max=5.0,
                    step=0.01,
                    tooltip="Distance to keep, in a unit that fits all models and sizes: 0 is the same image, 1.41 the "
                    "distance of two unrelated images. The paper takes 0.78 for SD3, without letting go of guidance.",
                ),
                io.Float.Input(
                    "overcompensation",
                    default=0.0,
                    min=0.0,
                    max=5.0,
                    step=0.1,
                    tooltip="1 pushes exactly to the radius; more pushes farther and needs fewer steps. 0 chooses: "
                    f"{PROTECTION['overcompensation']:g} with protected images, 1.6 without.",
                ),
                io.Boolean.Input(
                    "within_batch", default=True, tooltip="Images of one batch keep the radius from each other."
                ),
                io.Float.Input(
                    "window_start",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Noise level at which SPELL starts to act; 1 is pure noise, the start of sampling.",
                ),
                io.Float.Input(
                    "window_end",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Noise level at which SPELL stops; 0 is the finished image, and what protection needs.",
                ),
                io.Combo.Input(
                    "overlap",
                    options=["project", "sum"],
                    default="project",
                    tooltip="Correction where shields overlap: project is the smallest move out of all of them, sum is "
                    "the paper's formula.",
                ),
                io.Float.Input(
                    "release",
                    optional=True,  # workflows of earlier versions have none
                    default=PROTECTION["release"],
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Above this noise level, images inside a shield are predicted without guidance, so that "
                    "they become clean other pictures instead of bent ones. 1 keeps the guidance.",
                ),
                io.Float.Input(
                    "margin",
                    optional=True,  # workflows of earlier versions have none
                    default=PROTECTION["margin"],
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Share of the radius by which protected images are given a wider berth, so that the "
                    "picture is still outside once it is decoded.",
                ),
                ProtectedImages.Input("protected", optional=True, tooltip="Images to stay away from."),
                MemoryWire.Input("memory", optional=True, tooltip="Images of earlier runs to stay away from."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        radius: float,
        overcompensation: float,
        within_batch: bool,
        window_start: float,
        window_end: float,
        overlap: str,
        release: float = PROTECTION["release"],
        margin: float = PROTECTION["margin"],
        protected: Any = None,
        memory: Any = None,
    ) -> io.NodeOutput:
        if window_start <= window_end:
            raise ValueError(
                f"window_start ({window_start:g}) must be larger than window_end ({window_end:g}): the noise level "
                "falls from 1 to 0."
            )
        if not within_batch and protected is None and memory is None:
            raise ValueError(
                "SPELL has no references: switch within_batch on, or connect protected images or a memory."
            )
        options = {
            "batch": within_batch,
            "window": (window_start, window_end),
            "overlap": overlap,
            "release": release,
            "margin": margin,
        }
        if overcompensation or protected is not None:
            options["overcompensation"] = overcompensation or PROTECTION["overcompensation"]
        return io.NodeOutput(SpellPatch(radius, options, protected, memory).patch(model))


class ProtectImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShieldedProtectImages",
            display_name="SPELL Protect Images",
            category=CATEGORY,
            description="Encodes images for SPELL to keep away from.",
            inputs=[
                io.Image.Input("images"),
                io.Vae.Input("vae"),
                io.Latent.Input("latent", tooltip="The latent that enters the sampler; images are resized to fit it."),
            ],
            outputs=[ProtectedImages.Output(display_name="protected")],
        )

    @classmethod
    def execute(cls, images: Any, vae: Any, latent: Any) -> io.NodeOutput:
        return io.NodeOutput(encode(from_tensor(images), vae, size_of(latent, vae), "SPELL Protect Images"))


class ProtectFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShieldedProtectFolder",
            display_name="SPELL Protect Folder",
            category=CATEGORY,
            description="Encodes all images of a folder and its subfolders for SPELL to keep away from.",
            inputs=[
                io.String.Input("folder", tooltip="An absolute path, or one below ComfyUI's input folder."),
                io.Vae.Input("vae"),
                io.Latent.Input("latent", tooltip="The latent that enters the sampler; images are resized to fit it."),
            ],
            outputs=[ProtectedImages.Output(display_name="protected")],
        )

    @classmethod
    def execute(cls, folder: str, vae: Any, latent: Any) -> io.NodeOutput:
        return io.NodeOutput(encode(from_folder(_input(folder)), vae, size_of(latent, vae), "SPELL Protect Folder"))

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_: Any) -> str:
        return state(_input(folder))


class OpenSet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShieldedOpenSet",
            display_name="SPELL Open Set",
            category=CATEGORY,
            description="Opens a protected set that `shielded protect` made for the model and size you generate.",
            inputs=[io.String.Input("folder", tooltip="An absolute path, or one below ComfyUI's input folder.")],
            outputs=[ProtectedImages.Output(display_name="protected")],
        )

    @classmethod
    def execute(cls, folder: str) -> io.NodeOutput:
        return io.NodeOutput(ProtectedSet.open(_input(folder)))

    @classmethod
    def fingerprint_inputs(cls, folder: str) -> str:
        return state(_input(folder))


class UseMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShieldedMemory",
            display_name="SPELL Memory",
            category=CATEGORY,
            description="Keeps images of earlier runs on disk. Connect it to SPELL, which keeps away from them, and to "
            "SPELL Remember, which adds to them.",
            inputs=[
                io.String.Input("name", default="default", tooltip="Name of the memory; each name is a separate one."),
                io.Int.Input(
                    "limit",
                    default=256,
                    min=1,
                    max=100_000,
                    tooltip="Most images to keep for one model and size; the oldest are forgotten first.",
                ),
            ],
            outputs=[MemoryWire.Output(display_name="memory")],
        )

    @classmethod
    def execute(cls, name: str, limit: int) -> io.NodeOutput:
        return io.NodeOutput(_memory(name, limit))

    @classmethod
    def fingerprint_inputs(cls, name: str, limit: int) -> str:
        # Each remembered image makes ComfyUI run everything after this node again, also with the same seed.
        return state(_memory(name, limit).folder)


class Remember(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShieldedRemember",
            display_name="SPELL Remember",
            category=CATEGORY,
            description="Adds finished latents to a memory, so that later runs keep away from them. Place it after the "
            "sampler.",
            inputs=[
                io.Latent.Input("latent", tooltip="The sampler's output."),
                io.Model.Input("model", tooltip="The model that generated the latent."),
                MemoryWire.Input("memory"),
                io.Int.Input(
                    "seed",
                    optional=True,
                    default=-1,
                    min=-1,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="The seed that made the latent, so that SPELL Seeds can find it; -1: not noted. Convert it "
                    "to an input and connect the seed of the sampler.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The latent, unchanged.")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, latent: Any, model: Any, memory: Memory, seed: int = -1) -> io.NodeOutput:
        latent_format = model.get_model_object("latent_format")
        samples = latent_format.process_in(latent["samples"].float())
        count = remember(memory, latent_format, samples, None if seed < 0 else seed)
        logging.info(f"SPELL: memory {memory.folder.name!r} holds {count} images of this model and size.")
        return io.NodeOutput(latent)


class Seeds(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShieldedSeeds",
            display_name="SPELL Seeds",
            category=CATEGORY,
            description="Takes only the images of some seeds from a memory, so that the same seeds give the same "
            "images again, and lists the seeds that it holds.",
            inputs=[
                MemoryWire.Input("memory"),
                io.String.Input(
                    "seeds", default="", tooltip="Seeds to keep away from, such as 7, 12-15. Empty: all of the memory."
                ),
            ],
            outputs=[MemoryWire.Output(display_name="memory"), io.String.Output(display_name="seeds")],
        )

    @classmethod
    def execute(cls, memory: Memory, seeds: str) -> io.NodeOutput:
        chosen = dataclasses.replace(memory, seeds=parse_seeds(seeds))
        return io.NodeOutput(chosen, ", ".join(map(str, seeds_of(chosen))))


class Forget(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShieldedForget",
            display_name="SPELL Forget",
            category=CATEGORY,
            description="Empties a memory each time it runs. Bypass it afterwards.",
            inputs=[MemoryWire.Input("memory")],
            outputs=[MemoryWire.Output(display_name="memory")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, memory: Memory) -> io.NodeOutput:
        forget(memory)
        return io.NodeOutput(memory)


NODES = [Spell, ProtectImages, ProtectFolder, OpenSet, UseMemory, Remember, Seeds, Forget]


def _input(path: str) -> Path:
    return Path(folder_paths.get_input_directory()) / Path(path.strip()).expanduser()


def _memory(name: str, limit: int) -> Memory:
    return named(Path(folder_paths.get_user_directory()) / "shielded", name, limit)
