"""The command line as a user calls it."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from shielded.cli import app

runner = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, runner.invoke(app, ["demo", "--out", str(out), "--steps", "8", "--json"])


def test_demo_writes_grid_report_and_certificates(made):
    out, result = made
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert json.loads(result.stdout) == report
    assert report["leaks_without"] >= 0.9 * report["n"]
    assert report["leaks_with"] == 0
    assert report["min_distance_with"] >= report["radius"] > report["min_distance_without"]
    assert report["vendi_with"] > report["vendi_without"]
    assert len(report["certificates"]) == report["n"]
    assert {"image", "sha256", "nearest_id", "inside", "attempts", "protected_version"} <= set(
        report["certificates"][0]
    )
    assert Image.open(out / "grid.png").width > 300
    assert "<html" in (out / "report.html").read_text()
    assert len((out / "trace.csv").read_text().splitlines()) > 8


def test_an_existing_folder_is_kept(made):
    out, _ = made
    before = (out / "report.json").read_bytes()
    result = runner.invoke(app, ["demo", "--out", str(out)])
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert (out / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--radius", "-1"],
        ["demo", "--radius", "nan"],
        ["demo", "--overcompensation", "0"],
        ["demo", "--steps", "0"],
        ["demo", "--nothing"],
        ["nothing"],
    ],
)
def test_bad_usage_exits_with_2(arguments, tmp_path):
    extra = ["--out", str(tmp_path / "out")] if arguments[0] == "demo" else []
    assert runner.invoke(app, arguments + extra).exit_code == 2


def test_help_shows_an_example():
    result = runner.invoke(app, ["demo", "--help"])
    assert result.exit_code == 0
    assert "Example: shielded demo" in result.stdout
