"""The paper's experiments: numbers from cells, resuming, and what is written. Sizes are the smallest that run."""

import base64
import csv
import io
import json
import math
import re
import tarfile

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from shielded import LatentSpace, Spell
from shielded.cli import app
from shielded.evaluation.baselines import Plain
from shielded.evaluation.metrics import frechet_distance, precision_recall, vendi
from shielded.evaluation.reproduce import SWEEPS, Setting, Study, emoji_prompts, reproduce, write_section
from shielded.evaluation.reproduce.experiments import levels, radii, shielding, variety_setting, verdict
from shielded.evaluation.reproduce.measures import SettingMetrics, flatten_row, front, hypervolume
from shielded.evaluation.reproduce.plots import plot_result
from shielded.evaluation.reproduce.reference import ReferenceImages, real_images
from shielded.evaluation.reproduce.report import html_page, markdown
from shielded.evaluation.reproduce.study import trace_tensors
from shielded.generation import generate
from shielded.models import load

runner = CliRunner()
PROMPTS = ["cat face", "pizza"]


@pytest.fixture(scope="module")
def pipe():
    return load("emoji", "cpu")


def study(out, pipe, **options) -> Study:
    made = Study(out, PROMPTS, **{"images": 4, "seeds": 1, "steps": 2, "device": "cpu", "progress": False, **options})
    made.__dict__["pipe"] = pipe  # loaded once for all tests
    return made


def timeless(result):
    """Without what a clock measured."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result["rows"]]
    for row in rows:
        if "change" in row:
            row["change"] = {k: v for k, v in row["change"].items() if k != "seconds"}
    return {**result, "rows": rows}


# Cells and resuming -------------------------------------------------------------------------------------------------


def test_a_cell_holds_the_images_of_the_plain_call(pipe, tmp_path):
    made = study(tmp_path, pipe, steps=3)
    made.__dict__["sampler"] = None
    cell = made.cell(Setting("plain"), "pizza", 2)
    direct = generate(pipe, ["pizza"] * 4, [20_000 + i for i in range(4)], steps=3, guidance_scale=3.0, progress=False)
    torch.testing.assert_close(cell["latents"], direct.latents, rtol=0, atol=1e-5)
    # Images went through 8 bits in one of the two.
    torch.testing.assert_close(cell["features"], made.features.image_features(direct.images), rtol=0, atol=0.02)
    pairs = torch.cdist(direct.latents.flatten(1), direct.latents.flatten(1)) + torch.diag(torch.full((4,), 1e9))
    torch.testing.assert_close(cell["pair"].float(), pairs.amin(dim=1), rtol=1e-3, atol=1e-3)


def test_a_cell_of_spell_is_spells_and_keeps_its_trace(pipe, tmp_path):
    made = study(tmp_path, pipe)
    setting = Setting("ours", "spell", 30.0, {"overlap": "sum"})
    cell = made.cell(setting, "pizza", 0)
    spell = Spell(radius=30.0, overlap="sum")
    with spell.attach(pipe):
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        pipe(["pizza"] * 4, num_inference_steps=2, guidance_scale=3.0, generator=generators, output_type="latent")
    assert cell["active"].shape == (2, 4)
    assert cell["active"].flatten().tolist() == [row["active"] for row in spell.trace]
    assert cell["ratio"].flatten().tolist() == pytest.approx([row["score_ratio"] for row in spell.trace], rel=1e-5)
    assert cell["pair"].min() > made.cell(Setting("plain"), "pizza", 0)["pair"].min()


def test_a_second_run_reads_cells_and_other_options_do_not(pipe, tmp_path, monkeypatch):
    made = study(tmp_path, pipe)
    first = made.cell(Setting("plain"), "pizza", 0)
    calls = []
    original = Study.make
    monkeypatch.setattr(Study, "make", lambda self, *args: calls.append(args) or original(self, *args))
    again = made.cell(Setting("called differently"), "pizza", 0)
    assert calls == []
    assert all(torch.equal(first[k], again[k]) for k in first)
    for other in (study(tmp_path, pipe, steps=3), study(tmp_path, pipe, images=5)):
        other.cell(Setting("plain"), "pizza", 0)
    made.cell(Setting("plain"), "pizza", 1)
    made.cell(Setting("plain"), "cat face", 0)
    made.cell(Setting("s", "spell", 20.0), "pizza", 0)
    made.cell(Setting("s", "spell", 20.0, {"overlap": "sum"}), "pizza", 0)
    assert len(calls) == 6


def test_smaller_batches_remember_the_ones_before(pipe, tmp_path):
    setting = Setting("ours", "spell", 25.0, {"overcompensation": 1.0})
    split = study(tmp_path, pipe, batch_size=2, steps=4).cell(setting, "pizza", 0)
    assert split["features"].shape[0] == 4
    assert split["active"].shape == (4, 4)
    assert split["pair"].min() >= 25.0 * (1 - 1e-3)  # also across the two batches


def test_a_killed_run_goes_on_and_gives_the_same_numbers(results, pipe, tmp_path, monkeypatch):
    whole = results[1]["diversity"]
    original, made = Study.make, []

    def killed(self, *args):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(args)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Study, "make", killed)
        with pytest.raises(KeyboardInterrupt) as stopped:
            reproduce("diversity", study(tmp_path / "killed", pipe), plots=False)
    assert "5 finished cells are in" in stopped.value.__notes__[0]
    assert not (tmp_path / "killed" / "diversity.json").exists()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "killed").rglob("*.safetensors")}
    assert len(before) == 5
    continued = reproduce("diversity", study(tmp_path / "killed", pipe), plots=False)
    assert timeless(continued) == timeless(whole)
    assert all(f.stat().st_mtime_ns == time for f, time in before.items())  # nothing was made twice
    # Once more from the cells alone: the very same files.
    files = [tmp_path / "killed" / f"diversity.{kind}" for kind in ("json", "csv", "html")]
    contents = [f.read_bytes() for f in files]
    reproduce("diversity", study(tmp_path / "killed", pipe), plots=False)
    assert [f.read_bytes() for f in files] == contents


def test_a_cell_that_was_cut_short_leaves_no_file(pipe, tmp_path, monkeypatch):
    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("shielded.evaluation.reproduce.study.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        study(tmp_path, pipe).cell(Setting("plain"), "pizza", 0)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_class_models_are_given_their_class(tmp_path):
    """A small random DiT, whose prompts are class names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = diffusers.DiTTransformer2DModel(
            sample_size=8, num_layers=1, attention_head_dim=4, num_attention_heads=2, out_channels=8, norm_num_groups=2
        ).eval()
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = diffusers.AutoencoderKL(block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2, **blocks).eval()
    pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(), id2label={0: "tench, fish", 7: "cock"})
    pipe.set_progress_bar_config(disable=True)
    made = study(tmp_path, pipe, model="dit")
    cell = made.cell(Setting("plain"), "cock", 0)
    watch = Plain()
    with watch.attach(pipe):
        pipe([7] * 4, num_inference_steps=2, generator=[torch.Generator().manual_seed(i) for i in range(4)])
    assert torch.equal(cell["latents"], watch.finished)


# Numbers ------------------------------------------------------------------------------------------------------------


def made_up_cells(prompts=5, seeds=2, images=6, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)

    def cell(prompt):
        features = torch.randn(images, 4, generator=generator) + 3 * prompt + shift
        return {
            "features": features,
            "pair": torch.rand(images, generator=generator),
            "seconds": torch.tensor(3.0, dtype=torch.float64),
            "caption": torch.rand(images, generator=generator),
        }

    cells = [cell(prompt) for _ in range(seeds) for prompt in range(prompts)]
    reference = [torch.randn(7, 4, generator=generator) + 3 * prompt for prompt in range(prompts)]
    return cells, reference


def test_metrics_are_per_prompt_then_averaged_and_frechet_is_over_all():
    cells, reference = made_up_cells()
    found = SettingMetrics(cells, reference).estimates()
    by_prompt = [(cells[p], cells[5 + p], reference[p]) for p in range(5)]
    scores = [(vendi(a["features"]) + vendi(b["features"])) / 2 for a, b, _ in by_prompt]
    assert found["vendi"]["value"] == pytest.approx(np.mean(scores))
    assert found["vendi"]["low"] < found["vendi"]["value"] < found["vendi"]["high"]
    recalls = [np.mean([precision_recall(c["features"], r, 3)[1] for c in (a, b)]) for a, b, r in by_prompt]
    assert found["recall"]["value"] == pytest.approx(np.mean(recalls))
    everything = torch.cat([c["features"] for c in cells])
    assert found["frechet"]["value"] == pytest.approx(frechet_distance(everything, torch.cat(reference)))
    assert found["caption"]["value"] == pytest.approx(np.mean([c["caption"].mean() for c in cells]))
    assert found["seconds"]["value"] == pytest.approx(0.5)
    pooled = [precision_recall(torch.cat([c["features"] for c in part]), torch.cat(reference), 3)[0]
              for part in (cells[:5], cells[5:])]  # fmt: skip
    assert found["precision_all"]["value"] == pytest.approx(np.mean(pooled))


def test_changes_are_paired_by_prompt_and_relative_for_vendi_and_frechet():
    cells, reference = made_up_cells()
    others, _ = made_up_cells(seed=5, shift=0.5)
    plain, moved = SettingMetrics(cells, reference), SettingMetrics(others, reference)
    change = moved.changes(plain)
    assert change["vendi"]["value"] == pytest.approx(
        moved.estimates()["vendi"]["value"] / plain.estimates()["vendi"]["value"] - 1
    )
    expected = moved.estimates()["frechet"]["value"] / plain.estimates()["frechet"]["value"] - 1
    assert change["frechet"]["value"] == pytest.approx(expected)
    same = plain.changes(plain)
    assert all(v == pytest.approx(0) for estimate in same.values() for v in estimate.values())


def test_the_front_and_its_area_match_brute_force():
    generator = np.random.default_rng(0)
    points = [tuple(p) for p in generator.random((12, 2)).round(2)]
    expected = [p for p in set(points) if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]
    assert front(points) == sorted(expected)
    grid = (np.arange(1000) + 0.5) / 1000
    covered = np.zeros((1000, 1000), dtype=bool)
    for x, y in points:
        covered |= (grid[:, None] < x) & (grid[None] < y)
    assert hypervolume(points, (0.0, 0.0)) == pytest.approx(covered.mean(), abs=1e-9)
    inner = covered[200:, 300:].sum() / 1e6
    assert hypervolume(points, (0.2, 0.3)) == pytest.approx(inner, abs=1e-9)
    assert hypervolume([(0.1, 0.9)], (0.2, 0.0)) == 0


def test_the_verdict_says_who_wins_and_where_we_lose():
    ours = variety_setting(1.0).label
    fronts = [
        {"across": "recall", "up": "precision", "label": ours, "hypervolume": 0.5},
        {"across": "recall", "up": "precision", "label": "CADS", "hypervolume": 0.7},
        {"across": "vendi", "up": "caption", "label": ours, "hypervolume": 0.9},
        {"across": "vendi", "up": "caption", "label": "CADS", "hypervolume": 0.2},
    ]
    first, second = verdict(fronts)
    assert first.endswith(f"{ours} loses to CADS.")
    assert second.endswith(f"{ours} dominates the largest area.")


def test_levels_count_touched_images_and_the_push_over_the_score():
    level = torch.tensor([[0.95], [0.85], [0.83], [0.2]]).expand(4, 3)
    active = torch.tensor([[1, 1, 0], [0, 2, 0], [1, 0, 0], [0, 0, 0]]).float()
    ratio = torch.tensor([[0.1, 0.3, 0.0], [0.0, 0.5, 0.0], [0.2, 0.0, 0.0], [0.0, 0.0, 0.0]])
    rows = levels([{"level": level, "active": active, "ratio": ratio}])
    assert [(row["from"], row["to"]) for row in rows] == [(1.0, 0.9), (0.9, 0.8), (0.2, 0.1)]
    assert [row["touched"]["value"] for row in rows] == pytest.approx([2 / 3, 2 / 3, 0])
    assert rows[0]["ratio_median"] == pytest.approx(0.1, abs=0.01) or rows[0]["ratio_median"] == pytest.approx(0.3)
    assert rows[1]["ratio_max"] == pytest.approx(0.5)
    assert "ratio_max" not in rows[2]


def test_a_trace_becomes_steps_by_images():
    trace = [{"noise_level": 1 - step / 4, "active": step * 10 + image, "score_ratio": 0.0, "image": image}
             for step in range(2) for image in range(3)]  # fmt: skip
    tensors = trace_tensors(trace, 3)
    assert tensors["active"].tolist() == [[0, 1, 2], [10, 11, 12]]
    assert tensors["level"].tolist() == [[1, 1, 1], [0.75, 0.75, 0.75]]
    assert trace_tensors([], 3) == {}


# References and prompts ---------------------------------------------------------------------------------------------


def picture(color) -> Image.Image:
    return Image.new("RGB", (128, 128), color)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A webdataset tar with four images of each prompt, and one image of a third caption."""
    path = tmp_path_factory.mktemp("tar") / "real.tar"
    with tarfile.open(path, "w") as tar:
        names = [*(p for p in PROMPTS for _ in range(4)), "anchor"]
        for i, caption in enumerate(names):
            buffer = io.BytesIO()
            picture((40 * (i % 4), 255 - 25 * i, 20 * i)).save(buffer, "PNG")
            for suffix, content in ((".json", json.dumps({"caption": caption}).encode()), (".png", buffer.getvalue())):
                info = tarfile.TarInfo(f"{i:05d}{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_real_images_from_a_tar_and_from_folders(archive, tmp_path):
    found = real_images(archive)
    assert {caption: len(images) for caption, images in found.items()} == {"cat face": 4, "pizza": 4, "anchor": 1}
    for i, image in enumerate(found["pizza"]):
        (tmp_path / "pizza").mkdir(exist_ok=True)
        image.save(tmp_path / "pizza" / f"{i}.png")
    again = real_images(tmp_path)
    assert [i.tobytes() for i in again["pizza"]] == [i.tobytes() for i in found["pizza"]]
    with pytest.raises(FileNotFoundError, match="--reference"):
        real_images(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images with captions"):
        real_images(tmp_path / "empty")


def test_prompts_repeat_and_have_enough_references(archive, pipe, tmp_path):
    assert emoji_prompts(5) == emoji_prompts(9)[:5]
    assert len(set(emoji_prompts(50))) == 50
    assert sorted(emoji_prompts(2, archive)) == sorted(PROMPTS)
    with pytest.raises(ValueError, match="2 captions to choose from"):
        emoji_prompts(3, archive)
    made = study(tmp_path, pipe)
    made.prompts = ["anchor"]
    with pytest.raises(ValueError, match="fewer than 4 images"):
        ReferenceImages(made, archive)


# Experiments --------------------------------------------------------------------------------------------------------


SHORTER = {name: lambda *radii, sweep=SWEEPS[name]: sweep(*radii)[:2] for name in ("interval", "noise")}


@pytest.fixture(scope="module")
def results(pipe, archive, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    small = study(out, pipe)
    with pytest.MonkeyPatch.context() as patch:
        for name, sweep in SHORTER.items():
            patch.setitem(SWEEPS, name, sweep)
        tradeoff = reproduce("tradeoff", small, plots=False, methods=list(SHORTER))
    return out, {
        "diversity": reproduce("diversity", small, plots=False),
        "tradeoff": tradeoff,
        "sparsity": reproduce("sparsity", small, plots=False),
        "shielding": reproduce("shielding", small, archive, plots=False),
    }


def test_diversity_rows_and_changes(results):
    rows = results[1]["diversity"]["rows"]
    assert [row["method"] for row in rows] == ["plain", "spell", "spell", "spell"]
    assert rows[1]["options"] == {
        "overlap": "sum",
        "overcompensation": 1.6,
        "radius_schedule": "constant",
        "release": None,
    }
    assert rows[1]["vendi"]["value"] > rows[0]["vendi"]["value"]
    assert rows[1]["change"]["vendi"]["value"] == pytest.approx(
        rows[1]["vendi"]["value"] / rows[0]["vendi"]["value"] - 1
    )


def test_tradeoff_has_all_points_and_fronts(results):
    result = results[1]["tradeoff"]
    swept = [s for sweep in SHORTER.values() for s in sweep(26.0, 26.0)]
    assert [(r["label"], r["strength"]) for r in result["rows"]] == [
        ("plain", 0.0),
        *((s.label, s.strength) for s in swept),
    ]
    assert len(result["fronts"]) == 6
    assert len(result["verdict"]) == 3


def test_sparsity_is_of_the_settings_of_diversity(results):
    rows = results[1]["sparsity"]["rows"]
    assert all(0 <= row["touched"]["value"] <= 1 for row in rows)
    assert max(row["touched"]["value"] for row in rows) == 1


def test_shielding_moves_images_out(results):
    result = results[1]["shielding"]
    inside = {row["label"]: row["inside"]["value"] for row in result["rows"]}
    assert result["protected"] == 8
    assert inside["plain"] == 1 / 8  # the tenth that the radius is chosen to hold, of 8 images
    assert inside["SPELL, guidance kept"] == 0
    assert result["rows"][3]["nearest_protected"] >= result["radius"]


def test_shielding_protects_plain_images_of_other_seeds_without_a_reference(results, pipe):
    made = study(results[0], pipe)
    result = shielding(made, ReferenceImages(made), radius=5.0)
    assert result["protected"] == 2 * len(PROMPTS) * 4
    assert result["radius"] == 5.0


def test_radii_are_measured_or_asked_for_or_per_root_dimension(pipe, tmp_path):
    made = study(tmp_path, pipe)
    assert radii(made, 3.0) == (3.0, 3.0)
    root = LatentSpace.of(pipe).dim ** 0.5
    assert radii(made) == pytest.approx((0.8125 * root, 0.45 * root))
    made.model = "sd1.5"  # its preset, with the latents of the pipeline at hand
    assert radii(made) == pytest.approx((0.78 * root, 0.45 * root))


def test_unknown_methods_are_an_error(pipe, tmp_path):
    with pytest.raises(ValueError, match="use some of spell"):
        reproduce("tradeoff", study(tmp_path, pipe), methods=["magic"])
    with pytest.raises(ValueError, match="at least one prompt"):
        Study(tmp_path, [])


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["diversity", "tradeoff", "sparsity", "shielding"])
def test_json_csv_page_and_table_hold_the_result(results, name):
    out, found = results[0], results[1][name]
    assert json.loads((out / f"{name}.json").read_text()) == json.loads(json.dumps(found))
    with (out / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found["rows"])
    column = "touched" if name == "sparsity" else "vendi"
    assert [float(r[column]) for r in rows] == [r[column]["value"] for r in found["rows"]]
    assert not list(out.rglob("*.tmp"))
    text = (out / f"{name}.html").read_text()
    numbers, pictures = text.split("<h2>Pictures</h2>")
    assert numbers.count("<tr>") == len(rows) + 1
    methods = {row["label"] for row in rows}
    assert pictures.count('<th scope="row">') == len(methods)
    sources = re.findall(r'src="data:image/webp;base64,([^"]+)"', pictures)
    assert len(sources) == len(methods) * len(PROMPTS) * 4
    assert Image.open(io.BytesIO(base64.b64decode(sources[0]))).size == (128, 128)
    assert markdown(found).count("\n| ") == len(rows) + 1


def test_nested_rows_become_columns():
    row = {"label": "a", "vendi": {"value": 1.5, "low": 1.0}, "change": {"vendi": {"value": 0.2, "low": 0.1}}}
    assert flatten_row(row) == {
        "label": "a",
        "vendi": 1.5,
        "vendi_low": 1.0,
        "change_vendi": 0.2,
        "change_vendi_low": 0.1,
    }


@pytest.mark.parametrize("name", ["diversity", "tradeoff", "sparsity", "shielding"])
def test_plots_show_every_point(results, name, tmp_path):
    pytest.importorskip("matplotlib")
    found = results[1][name]
    files = plot_result(found, tmp_path)
    assert files
    for file in files:
        assert Image.open(file.with_suffix(".png")).width > 300
        assert "<svg" in file.read_text()
    text = html_page(found, files)
    assert text.count("<svg") == len(files)
    if name == "tradeoff":
        svg = files[0].read_text()
        assert all(re.search(rf"<!-- {s.strength:g} -->", svg) for s in SHORTER["noise"](1.0, 1.0))


def test_plots_without_matplotlib_are_one_clear_sentence(results, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"'\.\[plot\]'"):
        plot_result(results[1]["diversity"], tmp_path)


def test_a_section_of_the_documentation_is_renewed(results, tmp_path):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- diversity:begin -->\nold\n<!-- diversity:end -->\nafter\n")
    write_section(document, results[1]["diversity"])
    first = document.read_text()
    assert first.startswith("before\n")
    assert first.endswith("\nafter\n")
    assert "old" not in first
    assert "| plain |" in first
    write_section(document, results[1]["diversity"])
    assert document.read_text() == first
    with pytest.raises(ValueError, match="no section"):
        write_section(document, results[1]["sparsity"])


# The command --------------------------------------------------------------------------------------------------------


def test_the_command_runs_and_prints_json(tmp_path):
    out = tmp_path / "study"
    arguments = ["reproduce", "diversity", "--prompts", "1", "--images", "4", "--seeds", "1", "--steps", "1"]
    result = runner.invoke(app, [*arguments, "--out", str(out), "--no-plots", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((out / "diversity.json").read_text())
    assert math.isfinite(json.loads(result.stdout)["rows"][0]["frechet"]["value"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["reproduce", "nothing"],
        ["reproduce", "diversity", "--prompts", "0"],
        ["reproduce", "diversity", "--prompts", "no-such-file.txt"],
        ["reproduce", "diversity", "--images", "1"],
        ["reproduce", "diversity", "--methods", "cads"],
        ["reproduce", "tradeoff", "--methods", "magic"],
        ["reproduce", "shielding", "--radius", "-3"],
        ["reproduce", "diversity", "--prompts", "3", "--model", "some/model"],
    ],
)
def test_bad_usage_exits_with_2(arguments, tmp_path):
    assert runner.invoke(app, [*arguments, "--out", str(tmp_path / "out")]).exit_code == 2
