"""What works without the extras, each in a fresh process in which their packages cannot be imported."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKED = """
import sys
for name in {names!r}:
    sys.modules[name] = None
"""
# What `pip install shielded` does not install; torch itself brings jinja2.
OPTIONAL = (
    "accelerate",
    "diffusers",
    "gradio",
    "jinja2",
    "matplotlib",
    "numba",
    "pyarrow",
    "ray",
    "transformers",
    "typer",
)

ON_TENSORS = """
import tempfile, torch
from shielded import History, LatentSpace, ProtectedSet, RepelledDenoiser, Spell, repellency
x0, z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 4, 8, 8)
assert (x0 + repellency(x0, z, radius=30.0)).flatten(1).norm(dim=1).min() > 29.99
folder = tempfile.mkdtemp()
protected = ProtectedSet.create(folder, LatentSpace(shape=(4, 8, 8)), overwrite=True)
protected.add(z, ["a"], 30.0)
assert ProtectedSet.open(folder).nearest(x0)[1] == [["a"], ["a"]]
spell = Spell(protected, 30.0, batch=False, history=History(4))
denoise = RepelledDenoiser(lambda x, sigma: 0 * x, spell)
spell.start()
assert spell.finish(denoise(x0, torch.tensor(1.0))).flatten(1).norm(dim=1).min() > 29.99
assert "torch" in sys.modules
"""


def run(code, *names):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED.format(names=names) + code], capture_output=True, text=True, check=False
    )


def test_tensors_sets_and_denoisers_need_none_of_them():
    done = run(ON_TENSORS, *OPTIONAL)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "package", "message"),
    [
        ("from shielded.__main__ import main; main()", "typer", "Commands need the extra `cli`"),
        ("from shielded.models import load; load('emoji')", "diffusers", "diffusers need the extra `diffusers`"),
        ("from shielded.models import load; load('emoji')", "transformers", "diffusers need the extra `diffusers`"),
    ],
)
def test_what_needs_one_names_it(code, package, message):
    done = run(code, package)
    assert done.returncode == 1
    assert message in done.stderr


def test_the_core_depends_on_few_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {line.split(">")[0] for line in project["dependencies"]}
    assert names == {"torch", "numpy", "safetensors", "tqdm", "pillow", "filelock"}
    for extra in ("cli", "diffusers"):
        assert not names & {line.split(">")[0] for line in project["optional-dependencies"][extra]}
