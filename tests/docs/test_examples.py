"""Each example is run as a script, and what it prints is checked."""

import re
import runpy
import sys
import types
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from shielded import History, ProtectedSet

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = {
    "diffusers_pipeline",
    "edm2_guidance",
    "epsilon_model",
    "history",
    "inpainting",
    "k_diffusion_sampler",
    "modular_block",
    "protected_folder",
    "servers",
}


@pytest.fixture
def run(monkeypatch, capsys):
    def run(name, *arguments):
        """The lines that it prints, as (text up to the first number, the numbers)."""
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with torch.random.fork_rng():
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        numbers = r"-?\d+(?:\.\d+)?"
        lines = capsys.readouterr().out.splitlines()
        return [(re.split(numbers, line)[0].strip(), [float(n) for n in re.findall(numbers, line)]) for line in lines]

    return run


def test_all_examples_are_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == RUN
    listed = re.findall(r"\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text())
    assert set(listed) == RUN


def test_diffusers_pipeline(run):
    (_, before), (_, after) = run("diffusers_pipeline")
    assert before[0] == 0
    assert before[1] < 15
    assert min(after) >= 15


def test_protected_folder(run, tmp_path):
    (_, (count,)), *distances = run("protected_folder", "--out", tmp_path)
    assert count == len(ProtectedSet.open(tmp_path / "set")) == 2
    assert [name for name, _ in distances] == ["without SPELL:"] * 2 + ["with SPELL:"] * 2
    assert all(numbers[0] < 15 for _, numbers in distances[:2])  # decoded and encoded again, so not quite 0
    assert all(numbers[0] >= 15 for _, numbers in distances[2:])
    assert Image.open(tmp_path / "kept-1.png").size == (128, 128)


def test_protected_folder_of_ones_own(run, tmp_path):
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (200, 100), "red").save(tmp_path / "mine" / "red.png")
    (_, (count,)), *distances = run("protected_folder", "--out", tmp_path / "out", "--images", tmp_path / "mine")
    assert count == 1
    assert all(numbers[0] >= 15 for _, numbers in distances[2:])


def test_history(run, tmp_path):
    lines = [run("history", "--history", tmp_path / "seen", "--seed", seed) for seed in range(3)]
    assert [numbers[0] for ((_, numbers),) in lines] == [1, 2, 3]
    assert all(numbers[1] >= 26 for ((_, numbers),) in lines[1:])
    points = History.open(tmp_path / "seen").latents.double().flatten(1)
    assert torch.pdist(points).min() >= 26 * (1 - 1e-6)


def test_servers(run):
    lines = run("servers")
    assert len(lines) == 6
    assert all(distance >= radius for _, (distance, radius) in lines)


def test_inpainting(run):
    (_, (hole, radius)), (_, (elsewhere,)) = run("inpainting")
    assert hole >= radius
    assert elsewhere == 0


@pytest.mark.skipif(
    tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 36),
    reason="blocks of diffusers 0.35 take no network made in memory",
)
def test_modular_block(run):
    (_, (before, radius)), (_, (after, _)) = run("modular_block")
    assert before == 0
    assert after >= radius


@pytest.mark.parametrize("name", ["edm2_guidance", "epsilon_model"])
def test_memorising_models(run, name):
    (_, before), (_, (nearest, farthest, radius)) = run(name)
    assert before[:2] == [0, 0]
    assert nearest == farthest == radius


def test_k_diffusion_sampler(run, monkeypatch):
    from helpers.k_diffusion import sampling  # skips this test where k-diffusion is not installed

    monkeypatch.setitem(sys.modules, "k_diffusion", types.ModuleType("k_diffusion"))
    monkeypatch.setitem(sys.modules, "k_diffusion.sampling", sampling)
    (_, (before, radius)), (_, (after, _)) = run("k_diffusion_sampler")
    assert before == 0
    assert after >= radius
