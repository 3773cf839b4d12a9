"""The command line as a user calls it."""

import csv
import html
import json
import re
import shutil

import pytest
from PIL import Image
from typer.testing import CliRunner

from shielded.cli import app
from shielded.generation import sampling as generation
from shielded.protected import ProtectedSet
from shielded.runs.folder import RunFolder

runner = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, runner.invoke(app, ["demo", "--out", str(out), "--steps", "5", "--attempts", "2", "--json"])


def test_demo_writes_grid_report_and_certificates(made):
    out, result = made
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert json.loads(result.stdout) == report
    assert report["leaks_without"] >= 0.9 * report["n"]
    assert report["leaks_with"] == 0
    assert report["min_distance_with"] >= report["radius"] > report["min_distance_without"]
    assert report["vendi_with"] > report["vendi_without"]
    assert report["min_decoded_distance_with"] >= report["radius"] > report["min_decoded_distance_without"]
    assert len(report["certificates"]) + len(report["refused"]) == report["n"]
    assert {"image", "sha256", "nearest_id", "inside", "attempts", "protected_version"} <= set(
        report["certificates"][0]
    )
    assert Image.open(out / "grid.png").width > 300
    assert "<html" in (out / "report.html").read_text()
    assert len((out / "trace.csv").read_text().splitlines()) > 8


def test_verify_holds_for_what_the_demo_wrote_and_not_for_the_plain_images(made):
    out, _ = made
    arguments = ["--protect", str(out / "protected"), "--json"]
    result = runner.invoke(app, ["verify", str(out / "with"), "--certified", *arguments])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["leaks"], found["failed_certificates"]) == (0, 0)
    assert found["logs"] == {str(out / "with" / "audit.jsonl"): []}
    assert found["verdict"].startswith("Verdict: holds. 16 images measured, all outside every shield")
    assert not any(image["not_checked"] for image in found["images"])
    result = runner.invoke(app, ["verify", str(out / "without"), *arguments])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["leaks"] == 16


def test_verify_says_which_certificate_does_not_hold(made, tmp_path):
    out, _ = made
    shutil.copytree(out / "with", tmp_path / "with")
    image = sorted((tmp_path / "with").glob("*.png"))[0]
    image.with_suffix(".json").unlink()
    Image.open(image).convert("RGB").save(image)
    result = runner.invoke(app, ["verify", str(tmp_path / "with"), "--protect", str(out / "protected")])
    assert result.exit_code == 1
    assert [line for line in result.stdout.splitlines() if "stripped" in line] == [
        line for line in result.stdout.splitlines() if line.startswith(str(image))
    ]
    (tmp_path / "with" / "audit.jsonl").unlink()
    arguments = ["verify", str(image), "--protect", str(out / "protected")]
    assert runner.invoke(app, arguments).exit_code == 0
    assert runner.invoke(app, arguments).stdout.splitlines()[-1].startswith("Verdict: holds. 1 image measured")
    result = runner.invoke(app, [*arguments, "--certified"])
    assert result.exit_code == 1
    assert "no certificate" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(
        "Verdict: does not hold. Of 1 image measured: 1 with a certificate"
    )


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
        ["demo", "--on-leak", "hope"],
        ["demo", "--attempts", "0"],
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


@pytest.fixture(scope="module")
def protected(made):
    """The demo's plain owls and a file that is no picture, protected."""
    out, _ = made
    pictures = out.parent / "pictures"
    pictures.mkdir()
    for file in (out / "without").glob("owl-*.png"):
        (pictures / file.name).write_bytes(file.read_bytes())
    (pictures / "broken.png").write_bytes(b"no picture")
    target = out.parent / "set"
    return (
        pictures,
        target,
        runner.invoke(app, ["protect", str(pictures), "--out", str(target), "--radius", "8", "--json"]),
    )


def test_protect_names_what_it_skips(protected):
    _, _, result = protected
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["added"] == 4
    assert "broken.png" in result.stderr


def test_protect_again_adds_nothing_and_strict_refuses(protected, tmp_path):
    pictures, target, _ = protected
    again = runner.invoke(app, ["protect", str(pictures), "--out", str(target), "--add", "--json"])
    assert (json.loads(again.stdout)["added"], json.loads(again.stdout)["present"]) == (0, 4)
    strict = runner.invoke(app, ["protect", str(pictures), "--out", str(tmp_path / "set"), "--strict"])
    assert strict.exit_code == 1
    assert "broken.png" in strict.stderr
    assert runner.invoke(app, ["protect", str(pictures), "--out", str(target)]).exit_code == 2


def test_generate_keeps_away_from_the_set(protected, tmp_path):
    _, target, _ = protected
    arguments = [
        "generate",
        "owl",
        "--protect",
        str(target),
        "-n",
        "2",
        "--steps",
        "8",
        "--out",
        str(tmp_path),
        "--json",
    ]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["leaks_without"], report["leaks_with"]) == (2, 0)
    assert report["radius"] == 8  # the one that all images of the set have
    assert (tmp_path / "report.html").is_file()


def test_verify_exits_with_1_for_a_leak(protected, made):
    pictures, target, _ = protected
    result = runner.invoke(app, ["verify", str(pictures / "owl-0.png"), "--protect", str(target)])
    assert result.exit_code == 1
    assert "inside" in result.stdout
    assert "changed copies are not looked for" in result.stderr
    hearts = str(made[0] / "without" / "red-heart-0.png")
    result = runner.invoke(app, ["verify", hearts, "--protect", str(target)])
    assert result.exit_code == 0
    assert "outside" in result.stdout


def generate_owls(target, out, *options):
    arguments = ["generate", "owl", "--protect", str(target), "-n", "2", "--steps", "4", "--out", str(out)]
    return runner.invoke(app, [*arguments, *options])


def test_refused_images_are_listed_and_not_written(protected, tmp_path):
    _, target, _ = protected
    result = generate_owls(target, tmp_path, "--on-leak", "refuse", "--margin", "0", "--release", "1", "--radius", "5")
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["refused"]) == 2
    assert "inside the radius 5" in report["refused"][0]["reason"]
    assert (report["certificates"], report["leaks_with"], report["min_distance_with"]) == ([], 0, None)
    assert not list((tmp_path / "with").glob("*.png"))
    assert "2 images were refused" in (tmp_path / "report.html").read_text()
    assert result.exit_code == 1  # nothing is left
    assert "Refused: owl, seed 1" in result.stdout


def test_a_radius_that_nothing_can_keep_fails_with_a_reason(protected, tmp_path):
    result = generate_owls(protected[1], tmp_path, "--radius", "500")
    assert result.exit_code == 2
    assert "cannot be kept" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "cat", "--model", "nothing"], "emoji"),
        (["generate", "cat", "--protect", "nowhere"], "nowhere"),
        (["verify", "nowhere.png", "--protect", "nowhere"], "nowhere"),
        (["verify", "nowhere", "--protect", "nowhere"], "No images at nowhere"),
        (["protect", "nowhere", "--out", "set"], "nowhere"),
        (["protect", "--out", "nowhere", "--remove", "a"], "no protected set at nowhere"),
        (["calibrate", "--protect", "nowhere"], "no protected set at nowhere"),
        (["calibrate", "--images", "nowhere"], "No images at nowhere"),
        (["calibrate", "--prompts", "nowhere.txt"], "nowhere.txt does not exist"),
        (["evaluate", "nowhere", "nowhere"], "No images at nowhere"),
        (["reproduce", "diversity", "--reference", "nowhere"], "nowhere"),
        (
            ["generate", "cat", "--radius-schedule", "posterior", "--calibration", "none.json"],
            "none.json does not exist",
        ),
    ],
)
def test_what_is_not_there_is_bad_usage(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not any(tmp_path.iterdir())


# Runs without a set, and what goes with any run ----------------------------------------------------------------------


def test_generate_without_a_set_says_how_far_apart_the_images_are(tmp_path):
    arguments = ["generate", "red heart", "-n", "2", "--steps", "4", "--overwrite", "--out", str(tmp_path / "out")]
    result = runner.invoke(app, [*arguments, "--radius", "30"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["min_pair_distance_with"] >= report["radius"] > report["min_pair_distance_without"]
    without, with_ = (f"{report[f'min_pair_distance_{side}']:.2f}" for side in ("without", "with"))
    assert f"SPELL moved 2 of 2 apart: the two closest are now at a distance of {with_} instead of {without}" in (
        result.stdout
    )
    assert "Vendi score" in result.stdout
    assert "most alike" in (tmp_path / "out" / "report.html").read_text()
    again = runner.invoke(app, [*arguments, "--radius", "0.1"])
    assert "SPELL changed nothing" in again.stdout


def test_generate_pushes_early_alone_where_it_is_told_so(tmp_path):
    options = ["-n", "2", "--steps", "4", "--radius", "44", "--window-end", "0.85", "--out", str(tmp_path / "out")]
    result = runner.invoke(app, ["generate", "cat face", *options])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["window"], report["radius"]) == ([1.0, 0.85], 44.0)
    assert report["min_pair_distance_with"] > report["min_pair_distance_without"]
    assert "may come closer than the radius later" in result.stdout
    trace = list(csv.DictReader((tmp_path / "out" / "trace.csv").open()))
    levels = {float(row["noise_level"]) for row in trace if float(row["push"]) > 0}
    assert levels
    assert min(levels) >= 0.85


def test_guidance_and_posterior_radius_reach_the_run(protected, tmp_path):
    options = ["--guidance", "1.5", "--radius-schedule", "posterior", "--on-leak", "report", "--seed", "7"]
    assert generate_owls(protected[1], tmp_path / "a", *options).exit_code == 0
    settings = json.loads((tmp_path / "a" / "report.json").read_text())["certificates"][0]["settings"]
    assert (settings["guidance_scale"], settings["radius_schedule"]) == (1.5, "posterior")
    page = (tmp_path / "a" / "report.html").read_text()
    assert "calibration=Calibration.load(" in page
    assert generate_owls(protected[1], tmp_path / "b", "--on-leak", "report", "--seed", "7").exit_code == 0
    images = [(tmp_path / name / "without" / "owl-7.png").read_bytes() for name in "ab"]
    assert images[0] != images[1]


def test_the_nearest_protected_pictures_are_shown_where_that_is_allowed(protected, tmp_path):
    pages = {}
    for name, options in {"hidden": [], "shown": ["--show-protected"]}.items():
        assert generate_owls(protected[1], tmp_path / name, "--on-leak", "report", *options).exit_code == 0
        pages[name] = (tmp_path / name / "report.html").read_text()
    assert pages["hidden"].count("nearest protected</b>") == 0
    assert pages["shown"].count("nearest protected</b>") == 2
    assert pages["shown"].count("<img") == pages["hidden"].count("<img") + 2


def test_settings_of_the_report_make_the_same_images_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["generate", "red heart", "-n", "2", "--seed", "3", "--steps", "4", "--guidance", "2", "--out", "out"]
    assert runner.invoke(app, arguments).exit_code == 0
    page = (tmp_path / "out" / "report.html").read_text()
    code = html.unescape(re.search(r'<code id="code">(.*?)</code>', page, re.DOTALL)[1])
    namespace = {}
    exec(code, namespace)
    for seed, image in zip((3, 4), namespace["images"], strict=True):
        assert image.tobytes() == Image.open(tmp_path / "out" / "with" / f"red-heart-{seed}.png").tobytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_a_run_that_stops_keeps_what_is_finished(protected, tmp_path, monkeypatch, error):
    batches = iter([False] * 5 + [True])  # five images are three batches; the last one with SPELL fails
    sample = generation._sample

    def stopping(*arguments):
        if next(batches):
            raise error
        return sample(*arguments)

    monkeypatch.setattr(generation, "_sample", stopping)
    arguments = ["generate", "cat", "-n", "5", "--batch", "2", "--steps", "2", "--on-leak", "refuse"]
    result = runner.invoke(app, [*arguments, "--protect", str(protected[1]), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert f"4 of 5 images are finished: {tmp_path / 'out' / 'report.html'}" in result.stderr
    assert len(list((tmp_path / "out" / "without").glob("*.png"))) == 5
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["n"] == 4 == len(report["certificates"]) + len(report["refused"])
    trace = (tmp_path / "out" / "trace.csv").read_text().splitlines()[1:]
    assert {int(row.split(",")[2]) for row in trace} == set(range(4))
    verified = runner.invoke(app, ["verify", str(tmp_path / "out" / "with"), "--protect", str(protected[1])])
    assert verified.exit_code == 0, verified.output
    assert '"event": "stopped"' in (tmp_path / "out" / "with" / "audit.jsonl").read_text()


def test_a_run_that_stops_before_shields_keeps_the_plain_images(tmp_path, monkeypatch):
    sample, calls = generation._sample, iter([False, True])

    def stopping(*arguments):
        if next(calls):
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(generation, "_sample", stopping)
    result = runner.invoke(app, ["generate", "cat", "-n", "2", "--steps", "2", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "2 of 2 images without SPELL are in" in result.stderr
    assert "with --resume goes on" in result.stderr
    assert len(list((tmp_path / "out" / "without").glob("*.png"))) == 2


def test_only_a_run_that_can_go_on_says_how(tmp_path):
    folder = RunFolder(tmp_path / "out")  # of the demo and the studio
    assert folder.how_to_go_on == ""
    folder.start({})
    assert "--resume" in folder.how_to_go_on


def test_debug_shows_where(tmp_path):
    assert isinstance(runner.invoke(app, ["evaluate", "nowhere", "nowhere", "--debug"]).exception, FileNotFoundError)


def test_a_set_with_some_radii_is_refused_before_the_model_is_loaded(protected, tmp_path, monkeypatch):
    pictures, target = protected[0], tmp_path / "set"
    assert runner.invoke(app, ["protect", str(pictures / "owl-0.png"), "--out", str(target)]).exit_code == 0
    opened = ProtectedSet.open(target)
    opened.add(opened.vectors([0]) + 1, ["another"], 9.0)
    monkeypatch.setattr("shielded.runs.model_call.load", lambda *_: pytest.fail("loaded"))
    result = generate_owls(target, tmp_path / "out")
    assert result.exit_code == 2
    assert "1 of 2 protected images have no radius; give one with --radius" in result.stderr


def test_radii_that_stay_are_named(protected):
    pictures, target, _ = protected
    result = runner.invoke(app, ["protect", str(pictures), "--out", str(target), "--add", "--radius", "9"])
    assert "4 were in the set already and keep the radius" in result.stderr
    same = runner.invoke(app, ["protect", str(pictures), "--out", str(target), "--add", "--radius", "8"])
    assert "keep the radius" not in same.stderr


def test_nothing_is_left_of_a_set_that_got_no_image(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    arguments = ["protect", str(tmp_path / "broken.png"), "--out", str(tmp_path / "set")]
    for _ in range(2):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 1
        assert "none of the images could be read" in result.stderr
        assert not (tmp_path / "set").exists()
