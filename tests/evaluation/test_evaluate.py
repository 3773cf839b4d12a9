"""shielded evaluate, as a user calls it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from shielded.cli import app
from shielded.evaluation.extractors import features
from shielded.evaluation.metrics import frechet_distance, precision_recall, vendi

runner = CliRunner()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Blurred noise: 9 generated images, 12 reference ones; one is in both."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, count in (("generated", 9), ("reference", 12)):
        (root / name).mkdir()
        for i in range(count):
            small = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            small.resize((64, 64), Image.Resampling.BICUBIC).save(root / name / f"{i:02d}.png")
    (root / "reference" / "99.png").write_bytes((root / "generated" / "03.png").read_bytes())
    return root


def run(folders, *more):
    return runner.invoke(app, ["evaluate", str(folders / "generated"), str(folders / "reference"), *more])


def test_the_numbers_are_those_of_the_metrics(folders):
    result = run(folders, "--json", "-k", "3")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    load = lambda name: [Image.open(f) for f in sorted((folders / name).glob("*.png"))]  # noqa: E731
    generated, reference = (features().image_features(load(name)) for name in ("generated", "reference"))
    found = {name: m["value"] for name, m in report["metrics"].items()}
    assert (report["generated"], report["reference"], report["k"]) == (9, 13, 3)
    assert (found["precision"], found["recall"]) == pytest.approx(precision_recall(generated, reference, 3))
    assert found["vendi"] == pytest.approx(vendi(generated), rel=1e-5)
    assert found["frechet"] == pytest.approx(frechet_distance(generated, reference), rel=1e-4)
    nearest = torch.cdist(generated.double(), reference.double()).amin(dim=1)
    assert found["nearest"] == pytest.approx(nearest.mean().item(), abs=1e-5)
    assert report["metrics"]["nearest"]["minimum"] == pytest.approx(0, abs=1e-6)
    for metric in report["metrics"].values():
        assert metric["low"] <= metric["value"] <= metric["high"]


def test_the_table_names_every_metric(folders):
    result = run(folders)
    assert result.exit_code == 0
    for word in ("precision", "recall", "density", "coverage", "Vendi", "Fréchet", "nearest reference", "k = 5"):
        assert word in result.stdout


def test_files_that_are_no_pictures_are_skipped_and_named(folders, tmp_path):
    for file in (folders / "generated").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    result = runner.invoke(app, ["evaluate", str(tmp_path), str(folders / "reference"), "--json"])
    assert result.exit_code == 0
    assert "broken.png" in result.stderr
    assert json.loads(result.stdout)["generated"] == 9


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["-k", "0"], 2, ""),
        (["--nothing"], 2, ""),
        (["-k", "9"], 2, "too few for 9 neighbours"),
        (["--features", "magic"], 2, "--features takes emoji, clip, dinov2 or inception, not 'magic'"),
    ],
)
def test_errors_are_one_sentence_with_an_exit_code(folders, more, code, message):
    result = run(folders, *more)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_missing_folder_is_an_error(folders, tmp_path):
    result = runner.invoke(app, ["evaluate", str(tmp_path / "nothing"), str(folders / "reference")])
    assert result.exit_code == 2
    assert "nothing" in result.stderr
