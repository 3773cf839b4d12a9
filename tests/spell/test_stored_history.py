"""A history in a folder: what any process remembers, all of them keep away from."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from helpers.pipelines import randn
from shielded import History, LatentSpace, ProtectedSet, Spell

RADIUS = 3.0
ONE_AT_A_TIME = """
import os, sys, torch
from shielded import History, RepelledDenoiser, Spell

def make(folder, seeds):
    spell = Spell(radius=3.0, batch=False, history=History.open(folder), release=None)
    D = RepelledDenoiser(lambda x, sigma: 0.05 * x / (1 + sigma), spell)  # draws nearly one image at every seed
    for seed in seeds.split(","):
        x = 10 * torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(int(seed)))
        spell.start()
        for now, then in [(10.0, 4.0), (4.0, 1.0), (1.0, 0.0)]:  # Euler, three steps
            x = x + (then - now) / now * (x - D(x, now))
        spell.finish(x)

for seeds in sys.argv[2:]:  # a process for each, which knows nothing of the others; torch is imported once
    process = os.fork()
    if not process:
        try:
            make(sys.argv[1], seeds)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    assert os.waitpid(process, 0)[1] == 0
"""


def distances(folder):
    latents = ProtectedSet.open(folder).vectors(range(len(ProtectedSet.open(folder)))).flatten(1).double()
    return torch.pdist(latents)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "seen"


def test_one_image_at_a_time_over_three_processes(folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    seeds = "0", "1,2", "3"
    subprocess.run([sys.executable, "-c", ONE_AT_A_TIME, str(folder), *seeds], check=True, env=environment)
    found = distances(folder)
    assert len(found) == 6  # pairs of four images
    assert (found >= RADIUS * (1 - 1e-6)).all()


def test_what_another_one_remembers_counts_from_the_next_trajectory_on(folder):
    one, other = History.open(folder), History.open(folder)
    spell = Spell(radius=RADIUS, batch=False, history=other)
    one.add(torch.zeros(1, 2, 6))
    assert len(other) == 0
    spell.start()
    assert len(other) == 1
    x0 = 0.1 * randn(3, 2, 6)
    moved = (x0 + spell(x0)).flatten(1).norm(dim=1)
    assert (moved >= RADIUS).all()
    version = other.version
    spell.start()
    assert other.version == version  # nothing new, nothing copied again
    assert torch.equal(History.open(folder).latents, torch.zeros(1, 2, 6))


def test_amending_touches_the_own_images_alone(folder):
    one, other = History.open(folder), History.open(folder)
    one.add(torch.full((2, 3), 1.0))
    other.add(torch.full((1, 3), 2.0))
    one.amend(2, torch.full((1, 3), 3.0))
    assert History.open(folder).latents[:, 0].tolist() == [2, 3] == one.latents[:, 0].tolist()
    one.amend(1, torch.empty(0, 3))
    assert History.open(folder).latents[:, 0].tolist() == [2]


def test_the_oldest_are_deleted(folder):
    history = History.open(folder, limit=3)
    for number in range(8):
        history.add(torch.full((1, 2), float(number)))
        assert history.latents[:, 0].tolist() == list(range(max(0, number - 2), number + 1))
    assert len(ProtectedSet.open(folder)) <= 6
    history.forget()
    assert len(history) == len(ProtectedSet.open(folder)) == 0
    history.add(torch.ones(1, 2))
    assert len(History.open(folder)) == 1


def test_folders_of_something_else_are_refused(folder, tmp_path):
    ProtectedSet.create(tmp_path / "set", LatentSpace((2, 6))).add(randn(2, 2, 6), ["a", "b"])
    with pytest.raises(ValueError, match="a protected set and no history"):
        History.open(tmp_path / "set")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(ValueError, match="holds something else"):
        History.open(tmp_path / "photos")
    space = LatentSpace((4, 8, 8), vae_class="AutoencoderKL", vae_sha256="0" * 64)
    History.open(folder, space).add(randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"history in .* another latent space. .*weights"):
        History.open(folder, replace(space, vae_sha256="1" * 64))
    with pytest.raises(ValueError, match="NaN"):
        History.open(folder).add(torch.full((1, 4, 8, 8), float("nan")))
    # Samplers of pixels may leave the range; pictures do not.
    History.open(tmp_path / "pixels", LatentSpace.pixels((3, 8, 8))).add(3 * randn(1, 3, 8, 8))
    assert len(History.open(tmp_path / "pixels", LatentSpace.pixels((3, 8, 8)))) == 1
    assert not (tmp_path / "nothing").exists()
    assert len(History.open(tmp_path / "nothing")) == 0
    assert not (tmp_path / "nothing").exists()
