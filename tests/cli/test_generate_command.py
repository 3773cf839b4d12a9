"""`shielded generate` with all its options, on a small random model and on the embedded one."""

import errno
import html
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from helpers.models import LAYER, low_rank, save_lora, save_model
from shielded import files
from shielded.certificates import read_log
from shielded.cli import app
from shielded.generation import sampling
from shielded.models import load
from shielded.models.lora import add_lora
from shielded.protected import ProtectedSet
from shielded.runs import model_call

runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def space(model):
    return model_call.LatentSpace.of(load(str(model), "cpu"))


@pytest.fixture(autouse=True)
def opened(model, monkeypatch):
    """Load the small model once, however many runs there are."""
    pipes = {}

    def once(name, device=None, progress=True):
        if name not in pipes:
            pipes[name] = load(name, "cpu", progress=progress)
        return pipes[name]

    monkeypatch.setattr(model_call, "load", once)
    return pipes


@pytest.fixture
def run(model, tmp_path):
    def invoke(*arguments, out="out", code=0, options=("--steps", "2", "--radius", "1")):
        given = ["generate", *map(str, arguments), "--model", str(model), "--out", str(tmp_path / out), *options]
        result = runner.invoke(app, given)
        assert result.exit_code == code, result.output
        return result

    return invoke


def names(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def pixels(path):
    return np.asarray(Image.open(path))


def settings(out):
    """What the audit log says about how the images were made."""
    return json.loads((out / "with" / "audit.jsonl").read_text().splitlines()[0])["settings"]


# Prompts, seeds and names ---------------------------------------------------------------------------------------------


def test_prompts_of_the_command_line_and_of_a_file(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("owl\n\n  red heart \nowl\n")
    run("pizza", "owl", "--prompts", tmp_path / "prompts.txt", "--seeds", "1,5-6")
    made = [f"{prompt}-{seed}.png" for prompt in ("owl", "pizza", "red-heart") for seed in (1, 5, 6)]
    assert names(tmp_path / "out" / "with") == names(tmp_path / "out" / "without") == made


def test_an_image_depends_on_its_own_prompt_alone(run, tmp_path):
    """Several prompts in one run push their images apart within each prompt, as a run of one prompt does."""
    run("owl", "pizza", "-n", "2", "--batch", "3", "--radius", "8", options=("--steps", "3"))
    run("pizza", "-n", "2", "--radius", "8", out="alone", options=("--steps", "3"))
    for name in ("pizza-0.png", "pizza-1.png"):
        both = pixels(tmp_path / "out" / "with" / name), pixels(tmp_path / "alone" / "with" / name)
        assert np.abs(both[0].astype(int) - both[1]).max() <= 1  # a batch of another size rounds differently
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["min_pair_distance_with"] >= 8 * (1 - 1e-4)


def test_a_repeated_prompt_is_made_once_and_said(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("owl\npizza\n\npizza\n")
    said = run("owl", "--prompts", str(tmp_path / "prompts.txt"), "-n", "1").stderr
    assert "made once with every seed: 'pizza'." in said
    assert "made once with every seed: 'owl'." in said
    assert names(tmp_path / "out" / "with") == ["owl-0.png", "pizza-0.png"]


def test_prompts_of_the_same_words_get_different_files(run, tmp_path):
    run("red, heart", "red heart", "-n", "1")
    assert names(tmp_path / "out" / "with") == ["1-red-heart-0.png", "2-red-heart-0.png"]


def test_file_names_by_a_pattern(run, tmp_path):
    run("owl", "pizza", "-n", "1", "--seed", "7", "--name", "{number} {seed} {prompt}")
    assert names(tmp_path / "out" / "with") == ["0000 7 owl.png", "0001 7 pizza.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt"),
        (["owl", " "], "a prompt is empty"),
        (["owl", "--negative", "cat", "--guidance", "1"], "does nothing at a guidance scale of 1"),
        (["owl", "--prompts", "nowhere.txt"], "nowhere.txt does not exist"),
        (["owl", "--seeds", "1,1"], "names 1 twice"),
        (["owl", "--seeds", "1,x"], "whole numbers such as 1,5,9"),
        (["owl", "--seeds", "3-1"], "whole numbers"),
        (["owl", "--seeds", "99999999999"], "whole numbers"),
        (["owl", "--seeds", "1", "-n", "2"], "leave out -n"),
        (["owl", "--seeds", "1", "--seed", "2"], "leave out --seed"),
        (["owl", "--name", "{wonder}"], "its fields are {prompt}, {seed} and {number}"),
        (["owl", "--name", "{prompt"], "its fields are"),
        (["owl", "--name", "../{seed}"], "no file name"),
        (["owl", "--name", "{prompt}", "-n", "2"], "gives several images one name"),
        (["owl", "--size", "16"], "such as 768x512, not '16'"),
        (["owl", "--size", "0x16"], "such as 768x512"),
        (["owl", "--size", "17x16"], "multiple of 2 pixels; got 16x17"),
        (["owl", "--scheduler", "dimm"], "did you mean DDIMScheduler"),
        (["owl", "--scheduler", "euler:even"], "leading, linspace or trailing, not 'even'"),
        (["owl", "--scheduler", "heun:trailing", "--lora", "nowhere"], "no LoRA at nowhere"),
        (["owl", "--scheduler", "ipndm:trailing"], "leave out :trailing"),
        (["owl", "--scheduler", "RePaint"], "RePaintScheduler is not supported"),
        (["owl", "--scheduler", "flowmatcheuler"], "does not fit this model, which has PNDMScheduler"),
        (["owl", "--lora", "nowhere.safetensors"], "no LoRA at nowhere.safetensors"),
        (["owl", "--lora", "nowhere.safetensors:inf"], "finite number"),
        (["owl", "--image", "nowhere.png"], "no picture at nowhere.png"),
        (["owl", "--strength", "0.5"], "give one with --image"),
        (["owl", "--resume", "--overwrite"], "give one of them"),
        (["owl", "--batch", "0"], "--batch must be at least 1, not 0"),
        (["owl", "--steps", "2.5"], "--steps takes a whole number, not '2.5'"),
        (["owl", "--negative", ""], "--negative must not be empty"),
        (["owl", "--out", ""], "--out must not be empty"),
        (["owl", "--seed", "1", "--seed", "2"], "--seed may be given once only"),
        (["owl", "--no-compare", "--no-compare"], "--no-compare may be given once only"),
        (["owl", "--protect", "set", "--protect", "./set"], "given twice"),
    ],
)
def test_bad_use_is_answered_by_a_sentence(model, space, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    ProtectedSet.create("set", space).add(torch.randn(1, *space.shape), ["a"], 1.0)
    before = sorted(tmp_path.rglob("*"))
    result = runner.invoke(app, ["generate", *arguments, "--model", str(model)])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


# What the model is called with ----------------------------------------------------------------------------------------


def test_options_reach_the_pipeline(run, tmp_path, opened, model):
    """The images are those that the pipeline makes when it is called by hand."""
    import diffusers

    run("owl", "-n", "2", "--size", "24x16", "--negative", "pizza", "--scheduler", "ddim", "--guidance", "4")
    pipe = load(str(model), "cpu")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    made = pipe(
        ["owl"] * 2,
        negative_prompt=["pizza"] * 2,
        width=24,
        height=16,
        guidance_scale=4.0,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    ).images
    for seed, image in enumerate(made):
        assert np.array_equal(pixels(tmp_path / "out" / "without" / f"owl-{seed}.png"), np.asarray(image))
    assert settings(tmp_path / "out")["scheduler"] == "DDIMScheduler"
    assert settings(tmp_path / "out")["negative_prompt"] == "pizza"


def test_image_to_image(run, tmp_path, model):
    from diffusers import StableDiffusionImg2ImgPipeline

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    picture.save(tmp_path / "photo.png")
    run("owl", "-n", "2", "--image", tmp_path / "photo.png", "--strength", "0.5", options=("--steps", "4"))
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(load(str(model), "cpu"))
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        ["owl"] * 2,
        image=[picture] * 2,
        strength=0.5,
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    ).images
    for seed, image in enumerate(made):
        assert np.array_equal(pixels(tmp_path / "out" / "without" / f"owl-{seed}.png"), np.asarray(image))
    assert settings(tmp_path / "out")["image"]["file"] == "photo.png"


def test_a_file_that_is_no_picture_is_refused(run, tmp_path):
    (tmp_path / "photo.png").write_text("no picture")
    assert "not a picture that can be read" in run("owl", "--image", tmp_path / "photo.png", code=2).stderr


def test_the_script_of_the_report_makes_the_same_images(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_lora(tmp_path / "style.safetensors")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save("photo.png")
    options = ["--scheduler", "ddim", "--lora", "style.safetensors:0.5", "--image", "photo.png", "--strength", "0.8"]
    run("owl", "pizza", "--seeds", "3,8", "--negative", "cat", *options, options=("--steps", "3", "--radius", "1"))
    page = (tmp_path / "out" / "report.html").read_text()
    namespace = {}
    exec(html.unescape(re.search(r'<code id="code">(.*?)</code>', page, re.DOTALL)[1]), namespace)
    made = [f"{prompt}-{seed}.png" for prompt in ("owl", "pizza") for seed in (3, 8)]
    for name, image in zip(made, namespace["images"], strict=True):
        assert np.array_equal(pixels(tmp_path / "out" / "with" / name), np.asarray(image))


# LoRA ----------------------------------------------------------------------------------------------------------------


def kohya():
    a, b = low_rank()
    layer = f"lora_unet_{LAYER.replace('.', '_')}"
    return {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b, f"{layer}.alpha": torch.tensor(1.0)}


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_a_lora_adds_its_product_to_the_weights(model, tmp_path, layout):
    pipe = load(str(model), "cpu")
    before = pipe.unet.get_submodule(LAYER).weight.detach().double().clone()
    others = {name: weight.clone() for name, weight in pipe.unet.state_dict().items() if LAYER not in name}
    path = save_lora(tmp_path / "lora.safetensors")
    if layout == "kohya":
        save_file(kohya(), path)
    add_lora(pipe, path, 0.5)
    a, b = low_rank()
    share = 1 / 2 if layout == "kohya" else 1  # its alpha is 1, its rank 2
    expected = before + 0.5 * share * b.double() @ a.double()
    assert torch.allclose(pipe.unet.get_submodule(LAYER).weight.double(), expected, atol=1e-6)
    assert all(torch.equal(weight, others[name]) for name, weight in pipe.unet.state_dict().items() if name in others)


def test_a_lora_changes_the_images_and_its_digest_is_certified(run, tmp_path, opened):
    path = save_lora(tmp_path / "style.safetensors")
    run("owl", "-n", "1", out="plain")
    opened.clear()
    run("owl", "-n", "1", "--lora", f"{path}:8")
    opened.clear()
    assert not np.array_equal(pixels(tmp_path / "out/without/owl-0.png"), pixels(tmp_path / "plain/without/owl-0.png"))
    (entry,) = settings(tmp_path / "out")["lora"]
    assert (entry["file"], entry["scale"], len(entry["sha256"])) == ("style.safetensors", 8.0, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no safetensors", "no safetensors file"),
        ({"unet.nothing.lora_A.weight": (2, 8), "unet.nothing.lora_B.weight": (8, 2)}, "does not fit"),
        ({f"unet.{LAYER}.lora_A.weight": (2, 9), f"unet.{LAYER}.lora_B.weight": (8, 2)}, "another size"),
        ({f"unet.{LAYER}.lora_A.weight": (2, 8)}, "does not fit"),
        ({f"unet.{LAYER}.weight": (8, 8)}, "no pair of low-rank factors"),
    ],
)
def test_what_is_no_lora_of_the_model_is_refused(run, tmp_path, content, message):
    path = tmp_path / "lora.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file({name: torch.ones(shape) for name, shape in content.items()}, path)
    assert message in run("owl", "--lora", path, code=2).stderr
    assert not (tmp_path / "out").exists()


# Without comparison, quietly, and stopped -----------------------------------------------------------------------------


def test_without_the_run_without_spell(run, tmp_path):
    run("owl", "-n", "2", out="whole")
    result = run("owl", "-n", "2", "--no-compare")
    assert not (tmp_path / "out" / "without").exists()
    for name in names(tmp_path / "whole" / "with"):
        assert np.array_equal(pixels(tmp_path / "whole" / "with" / name), pixels(tmp_path / "out" / "with" / name))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["compared"], report["seconds_without"], report["vendi_without"]) == (False, None, None)
    assert "without SPELL" not in result.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "nothing to compare with" in page
    assert page.count("<img") == 2


def test_progress_is_lines_where_nobody_watches(run):
    stderr = run("owl", "pizza", "-n", "2", "--batch", "2").stderr
    assert [line.split(",")[0] for line in stderr.splitlines()] == [
        "without SPELL: 4 of 4 images",
        "with SPELL: 4 of 4 images",
    ]


def test_quiet(run):
    result = run("owl", "-n", "1", "--quiet")
    assert (result.stdout, result.stderr) == ("", "")


def test_a_long_prompt_is_said_once(run):
    stderr = run(" ".join(["red heart"] * 20), "owl", "-n", "2").stderr
    said = [line for line in stderr.splitlines() if "tokens" in line]
    assert len(said) == 1
    assert said[0].startswith("The prompt 'red heart red heart")
    assert said[0].endswith("of which the model reads 16 and ignores the rest.")
    assert "truncated" not in stderr


def stop_after(monkeypatch, batches, error):
    sample, calls = sampling._sample, iter([False] * batches + [True])

    def stopping(*arguments):
        if next(calls):
            raise error
        return sample(*arguments)

    monkeypatch.setattr(sampling, "_sample", stopping)


@pytest.fixture
def protect(space, tmp_path):
    """Make a set of random latents near the origin, by name."""

    def make(name, seed=0, radius=20.0):
        protected = ProtectedSet.create(tmp_path / name, space)
        protected.add(torch.randn(3, *space.shape, generator=torch.Generator().manual_seed(seed)), list("abc"), radius)
        return tmp_path / name

    return make


@pytest.mark.parametrize(("kind", "batches"), [("set", 1), ("set", 6), ("variety", 0), ("variety", 5)])
def test_a_stopped_run_goes_on_and_makes_what_one_run_makes(run, tmp_path, protect, monkeypatch, kind, batches):
    arguments = ["owl", "pizza", "-n", "4", "--batch", "2", "--on-leak", "push"]
    arguments += ["--protect", protect("set")] if kind == "set" else []
    if not (tmp_path.parent / f"whole-{kind}").exists():
        run(*arguments, out=f"../whole-{kind}")
    whole = tmp_path.parent / f"whole-{kind}"
    with monkeypatch.context() as patch:
        stop_after(patch, batches, KeyboardInterrupt)
        stopped = run(*arguments, code=1).stderr
    if not batches:
        assert "nothing is kept" in stopped
        assert not (tmp_path / "out").exists()
        return
    if batches > 4:
        assert "--resume goes on" in stopped
    assert not json.loads((tmp_path / "out" / "unfinished" / "request.json").read_bytes())["no-compare"]
    with monkeypatch.context() as patch:
        stop_after(patch, 8 - batches, RuntimeError("a batch was sampled once more"))
        run(*arguments, "--resume")
    out = tmp_path / "out"
    assert not (out / "unfinished").exists()
    for side in ("without", "with"):
        assert names(out / side) == names(whole / side)
        for name in names(whole / side):
            assert np.array_equal(pixels(out / side / name), pixels(whole / side / name))
    found, expected = (json.loads((folder / "report.json").read_bytes()) for folder in (out, whole))
    for report in (found, expected):
        for key in ("audit_log", "seconds_with", "seconds_without"):
            del report[key]
        for certificate in [*report["certificates"], *report["certificates_without"]]:
            certificate["protected_history"] = ""
            certificate["sha256"] = ""
    assert found == expected
    assert (out / "trace.csv").read_text() == (whole / "trace.csv").read_text()
    records, problems = read_log(out / "with" / "audit.jsonl")
    assert not problems
    if batches > 4:  # the run with SPELL had begun
        assert [record["earlier"] for record in records if record["event"] == "resumed"] == ["audit-1.jsonl"]


def test_resume_needs_the_same_command(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt)
        run("owl", "-n", "2", "--batch", "1", code=1)
    result = run("owl", "-n", "3", "--batch", "1", "--resume", code=2)
    assert "was another one (seeds differ)" in result.stderr
    before = (tmp_path / "out" / "without" / "owl-0.png").read_bytes()
    run("owl", "-n", "2", "--batch", "1", "--resume")
    assert (tmp_path / "out" / "without" / "owl-0.png").read_bytes() == before
    again = run("owl", "-n", "2", "--batch", "1", "--resume")
    assert "nothing is left to do" in again.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    assert "holds no run that was stopped" in run("owl", "--resume", out="mine", code=2).stderr


# Several sets ---------------------------------------------------------------------------------------------------------


def test_every_set_counts_and_is_certified(run, tmp_path, protect, model):
    """Each set alone would let the images into the shields of the other."""
    pipe = load(str(model), "cpu")
    latents = sampling.generate(pipe, ["owl"] * 2, [0, 1], steps=2, progress=False).latents
    radius = (latents[0] - latents[1]).norm().item() / 2
    sets = [tmp_path / "first", tmp_path / "second"]
    for number, path in enumerate(sets):
        rows = [latents[number], *[latents[number] + 1e3] * number]
        ProtectedSet.create(path, model_call.LatentSpace.of(pipe)).add(
            torch.stack(rows), ["owl", "far"][: len(rows)], radius
        )
    given = ["--on-leak", "report", *(word for path in sets for word in ("--protect", path))]
    said = run("owl", "-n", "2", *given, options=("--steps", "2")).stderr
    assert said.count("no descriptor") == 1
    assert f"{sets[0]} and {sets[1]} have no descriptor" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["leaks_without"], report["leaks_with"]) == (2, 0)
    for certificate in report["certificates"]:
        assert len(certificate["others"]) == 1
        histories = {certificate["protected_history"], certificate["others"][0]["protected_history"]}
        assert len(histories) == 2
    log = json.loads((tmp_path / "out" / "with" / "audit.jsonl").read_text().splitlines()[0])
    assert [entry["set"] for entry in log["sets"]] == [str(path) for path in sets]
    for path in sets:
        arguments = ["verify", str(tmp_path / "out" / "with"), "--protect", str(path), "--model", str(model)]
        found = runner.invoke(app, [*arguments, "--certified", "--json"])
        assert found.exit_code == 0, found.output
        assert not any(image["problems"] for image in json.loads(found.stdout)["images"])
    shutil.rmtree(tmp_path / "out")
    run("owl", "-n", "2", *given[:4], options=("--steps", "2"))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["leaks_without"] == 1


def test_a_set_without_a_radius_gets_the_suggested_one(run, tmp_path, model):
    space = model_call.LatentSpace.of(load(str(model), "cpu"))
    protected = ProtectedSet.create(tmp_path / "set", space)
    protected.add(torch.randn(1, *space.shape, generator=torch.Generator().manual_seed(0)), ["a"])
    result = run("owl", "--protect", tmp_path / "set", options=("--steps", "2"))
    assert "The set has no radius; " in result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["radius"] == pytest.approx(0.25 * space.dim**0.5)
    assert {certificate["radius"] for certificate in report["certificates"]} == {report["radius"]}
    protected.add(torch.ones(1, *space.shape), ["b"], 1.0)
    refused = run("owl", "--protect", tmp_path / "set", out="other", code=2, options=("--steps", "2"))
    assert "1 of 2 protected images have no radius" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_foreign_sets_are_refused(run, tmp_path, protect):
    from shielded import LatentSpace

    ProtectedSet.create(tmp_path / "foreign", LatentSpace((4, 9, 9))).add(torch.zeros(1, 4, 9, 9), ["a"], 1.0)
    run("owl", "--protect", tmp_path / "foreign", code=2)
    assert "differ" in run("owl", "--protect", protect("set"), "--protect", tmp_path / "foreign", code=2).stderr
    assert not (tmp_path / "out").exists()


# Disks and folders that fail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writes", [0, 3, 9])
def test_a_full_disk_is_one_sentence_and_nothing_is_half_written(run, tmp_path, monkeypatch, writes):
    synced, count = files.sync, iter(range(100))

    def full(path):
        if next(count) >= writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(path)

    monkeypatch.setattr(files, "sync", full)
    result = run("owl", "-n", "2", "--quiet", code=1)
    assert result.stderr.count("\n") == 1
    assert re.match(rf"Error: {tmp_path}/out/\S+: No space left on device\.", result.stderr)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    for path in (tmp_path / "out").rglob("*.png"):
        Image.open(path).load()


@pytest.mark.parametrize("batches", [1, 3])
def test_a_folder_that_vanishes_is_one_sentence(run, tmp_path, monkeypatch, batches):
    sample, count = sampling._sample, iter(range(100))

    def vanishing(*arguments):
        if next(count) == batches:
            shutil.rmtree(tmp_path / "out")
        return sample(*arguments)

    monkeypatch.setattr(sampling, "_sample", vanishing)
    result = run("owl", "-n", "2", "--batch", "1", "--quiet", code=1)
    assert result.stderr.count("\n") == 1
    assert re.match(rf"Error: {tmp_path}/out\S* is gone", result.stderr)


# What a newcomer stumbled over ---------------------------------------------------------------------------------------


def test_one_image_at_a_time_keeps_away_from_all_before(run, tmp_path):
    reports, outputs = [], []
    for seed in range(3):
        given = ("owl", "-n", "1", "--seed", seed, "--history", tmp_path / "seen", "--radius", "80")
        outputs.append(run(*given, out=str(seed), options=("--steps", "3")).output)
        reports.append(json.loads((tmp_path / str(seed) / "report.json").read_text())["history"])
    seen = ProtectedSet.open(tmp_path / "seen")
    assert torch.pdist(seen.vectors([0, 1, 2]).double().flatten(1)).min() >= 80 * (1 - 1e-4)
    assert [report["before"] for report in reports] == [0, 1, 2]
    assert reports[2]["min_distance_without"] < 80 * (1 - 1e-4) <= reports[2]["min_distance_with"]
    assert "remembers 1 image now" in outputs[0]
    assert re.search(r"Nearest of 2 earlier images in .*seen: \d\S* away instead of \S+\.", outputs[2])
    assert settings(tmp_path / "2")["history"] == 2
    output = run("owl", "--history", tmp_path / "0", out="more", code=2).output
    assert "holds something else; give a history a folder of its own" in " ".join(output.split())


def test_images_of_different_batches_are_not_called_far_apart(run, tmp_path):
    result = run("owl", "--seeds", "1,2", "--batch", "1", options=("--steps", "2", "--radius", "1000"))
    assert "Images of different batches do not keep apart" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cat", "--seeds", "1", "--resume"], "a finished run of other prompts or seeds"),
        (["owl", "--seeds", "2", "--resume"], "a finished run of other prompts or seeds"),
        (["owl", "--seeds", "0-4294967295"], "more than 1,000,000 seeds"),
        (["owl", "--name", "x" * 250, "--overwrite"], "too long for a file"),
    ],
)
def test_requests_that_would_do_something_else_are_refused(run, tmp_path, arguments, message):
    run("owl", "--seeds", "1")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert message in run(*arguments, code=2).stderr
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_resume_without_a_run(run, tmp_path):
    assert "a new one begins" in run("owl", "--seeds", "1", "--resume").stderr
    assert "nothing is left to do" in run("owl", "--seeds", "1", "--resume").stderr
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "report.json").write_text("{}")
    assert "holds no run that was stopped" in run("owl", "--resume", out="foreign", code=2).stderr
