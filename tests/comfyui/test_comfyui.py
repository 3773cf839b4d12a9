"""The ComfyUI node pack: against a fake host, and inside a real one where COMFYUI_PATH names a checkout."""

import asyncio
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from helpers.fake_comfy import PACK, Eps, Flow, Model, Scaled, Vae, example_workflows, install
from shielded import LatentSpace, ProtectedSet, Spell
from shielded.models import PROTECTION, VARIETY, VARIETY_RADIUS

SHAPE = (4, 8, 8)
RADIUS = 0.5
UNIT = RADIUS * math.sqrt(4 * 8 * 8)


@pytest.fixture
def pack(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path)


@pytest.fixture
def nodes(pack):
    extension = asyncio.run(pack.comfy_entrypoint())
    return {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}


def spell(nodes, model, radius=RADIUS, overcompensation=1.0, batch=False, start=1.0, end=0.0, **more):
    """The node; with guidance kept and no margin unless told otherwise."""
    node, more = nodes["ShieldedSpell"], {"release": 1.0, "margin": 0.0, **more}
    return node.execute(model, radius, overcompensation, batch, start, end, "project", **more).args[0]


def test_the_node_starts_with_the_settings_of_the_commands(nodes):
    node = nodes["ShieldedSpell"]
    values = {port.id: port.default for port in node.define_schema().inputs if hasattr(port, "default")}
    expected = VARIETY_RADIUS, PROTECTION["release"], VARIETY["release"], PROTECTION["margin"]
    assert (values["radius"], values["release"], values["release"], values["margin"]) == expected
    model = Model(SHAPE)
    settings = {name: value for name, value in values.items() if value is not None}
    for wires, expected in (({}, 1.6), ({"protected": torch.zeros(1, *SHAPE)}, PROTECTION["overcompensation"])):
        patched = node.execute(model, **settings, **wires).args[0]
        options = patched.post_cfg[0].__self__.patches[0].options
        spell = Spell(torch.zeros(1, *SHAPE), 1.0, **options)
        assert spell.overcompensation == expected
        assert (spell.release, spell.margin, spell.window) == (values["release"], values["margin"], (1.0, 0.0))


def noise(count=1, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def distance(a, b):
    """In radii, in the sampler's space: Scaled halves what is on a LATENT wire."""
    return float((a.double() - b.double()).norm()) * 0.5 / UNIT


@pytest.mark.parametrize("sampling", [Eps(), Flow()])
@pytest.mark.parametrize("on_disk", [False, True])
def test_protected_image_of_this_seed(nodes, tmp_path, sampling, on_disk):
    model = Model(SHAPE, sampling)
    target = model.sample(noise())
    protected = target
    if on_disk:
        ProtectedSet.create(tmp_path / "input" / "set", LatentSpace(SHAPE)).add(Scaled().process_in(target), ["a"])
        protected = nodes["ShieldedOpenSet"].execute("set").args[0]
    patched = spell(nodes, model, protected=protected)
    assert distance(model.sample(noise()), target) == 0
    assert distance(patched.sample(noise()), target) == pytest.approx(1, abs=1e-5)
    further = spell(nodes, model, overcompensation=1.6, protected=protected).sample(noise())
    assert distance(further, target) > 1.001
    assert not any(model.wrappers.values())
    assert not model.post_cfg


@pytest.mark.parametrize("sampling", [Eps(), Flow()])
def test_nothing_near_nothing_changed(nodes, sampling):
    model = Model(SHAPE, sampling)
    plain = model.sample(noise(3))
    away = spell(nodes, model, radius=0.05, protected=plain + 100)
    assert torch.equal(away.sample(noise(3)), plain)


@pytest.mark.parametrize(("sampling", "alpha"), [(Eps(), 1.0), (Flow(), 0.3)])
def test_noise_level_and_last(nodes, monkeypatch, sampling, alpha):
    """x = alpha x0 + sigma noise holds for what Spell is told, and `last` is at the last evaluation alone."""
    hook = sys.modules["spell_pack.hook"]
    calls = []

    def told(self, x0, noise=None, alpha=None, sigma=None, last=False, released=None):
        calls.append((alpha * x0 + sigma * noise, alpha, sigma, last))
        return torch.zeros_like(x0)

    monkeypatch.setattr(hook.Spell, "__call__", told)
    model = Model(SHAPE, sampling)
    states = []
    model.set_model_sampler_post_cfg_function(lambda args: states.append(args["input"]) or args["denoised"])
    spell(nodes, model, batch=True).sample(noise(), sigmas=torch.tensor([0.7, 0.4, 0.2, 0.0]))
    assert [round(sigma, 6) for _, _, sigma, _ in calls] == [0.7, 0.4, 0.2]
    assert [last for *_, last in calls] == [False, False, True]
    assert calls[0][1] == pytest.approx(alpha)
    for (state, *_), expected in zip(calls, states, strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)
    calls.clear()
    spell(nodes, model, batch=True).sample(noise(), sigmas=torch.tensor([0.7, 0.4, 0.2]))
    assert not any(last for *_, last in calls)  # another sampler goes on from here


@pytest.mark.parametrize("sampling", [Eps(), Flow()])
def test_guidance_is_released_in_a_shield(nodes, monkeypatch, sampling):
    """Rows in a shield are those of the model without guidance; the others keep their bits."""
    hook = sys.modules["spell_pack.hook"]
    rows = torch.tensor([True, False])
    monkeypatch.setattr(hook.Spell, "colliding", lambda self, x0, **_: rows)
    monkeypatch.setattr(hook.Spell, "__call__", lambda self, x0, *_, **__: torch.zeros_like(x0))
    start = noise(2, 3)
    guided, unguided = (Model(SHAPE, sampling, scale).sample(start) for scale in (3.0, 1.0))
    target = torch.full_like(guided[:1], 1e3)
    samples = spell(nodes, Model(SHAPE, sampling, 3.0), protected=target).sample(start)
    assert torch.equal(samples[1], guided[1])
    assert not torch.allclose(samples[0], guided[0], rtol=1e-3)
    torch.testing.assert_close(samples[0], unguided[0])
    monkeypatch.setattr(hook.Spell, "colliding", lambda self, x0, **_: ~rows | rows)
    assert torch.equal(spell(nodes, Model(SHAPE, sampling), protected=target).sample(start), unguided)


def test_window(nodes):
    model = Model(SHAPE)
    target = model.sample(noise())
    early = spell(nodes, model, start=1.0, end=0.999, protected=target)
    assert torch.equal(early.sample(noise()), target)  # sigma starts at 10, which is t = 0.91
    middle = spell(nodes, model, start=0.9, end=0.1, protected=target).sample(noise())
    assert 0 < distance(middle, target) < 1


def test_batch(nodes):
    model = Model(SHAPE)
    same = noise().repeat(2, 1, 1, 1)
    plain = model.sample(same)
    assert distance(plain[0], plain[1]) == 0
    pair = spell(nodes, model, batch=True).sample(same)
    assert distance(pair[0], pair[1]) == pytest.approx(1, abs=1e-4)
    both = spell(nodes, model, batch=True, protected=plain[:1]).sample(same)
    assert min(distance(both[0], both[1]), *(distance(image, plain[0]) for image in both)) > 1 - 1e-4


def test_each_run_starts_afresh(nodes, caplog):
    caplog.set_level("INFO")
    model = Model(SHAPE)
    patched = spell(nodes, model, protected=model.sample(noise()))
    first = patched.sample(noise())
    assert torch.equal(patched.sample(noise()), first)
    messages = [r.message for r in caplog.records if r.message.startswith("SPELL")]
    assert len(messages) == 2
    assert messages[0] == messages[1]
    assert "1 of 1 images pushed" in messages[0]
    far = spell(nodes, model, radius=0.05, protected=model.sample(noise()) + 50)
    far.sample(noise())
    assert "nothing came within radius 0.05" in caplog.messages[-1]


def test_two_spells_on_one_model(nodes):
    model = Model(SHAPE)
    one, other = model.sample(noise()), model.sample(noise(seed=1))
    both = spell(nodes, spell(nodes, model, protected=one), protected=other)
    for seed, target in ((0, one), (1, other)):
        assert distance(both.sample(noise(seed=seed)), target) == pytest.approx(1, abs=1e-5)


def test_nodes_after_spell_change_nothing_of_what_it_keeps(nodes):
    """A later node clones the MODEL and changes the guided prediction."""

    def later(model):
        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(lambda args: 0.7 * args["denoised"] + 0.2)
        return clone

    target = later(Model(SHAPE)).sample(noise())
    kept = later(spell(nodes, Model(SHAPE), protected=target)).sample(noise())
    assert distance(kept, target) == pytest.approx(1, abs=1e-5)


def test_guiders_of_their_own_are_measured_on_what_they_return(nodes, monkeypatch):
    monkeypatch.setattr(Model, "combine", lambda self, x, sigma: 2.5 * self.denoise(x, float(sigma[0])) - 0.5)
    target = Model(SHAPE, cond_scale=3.0).sample(noise())
    kept = spell(nodes, Model(SHAPE, cond_scale=3.0), protected=target, release=0.1).sample(noise())
    assert 1 - 1e-5 < distance(kept, target) < 1.001


def test_spells_in_each_others_way_both_hold(nodes):
    """The second protects what the first leads to; images of a batch keep apart, too."""
    model = Model(SHAPE)
    one = model.sample(noise())
    other = spell(nodes, model, protected=one).sample(noise())
    both = spell(nodes, spell(nodes, model, protected=one), radius=0.4, protected=other).sample(noise())
    assert distance(both, one) > 1 - 1e-5
    assert distance(both, other) > 0.8 - 1e-5
    apart = spell(nodes, spell(nodes, model, protected=one), batch=True).sample(noise().repeat(2, 1, 1, 1))
    assert min(distance(apart[0], one[0]), distance(apart[1], one[0]), distance(apart[0], apart[1])) > 1 - 1e-4


def test_each_image_has_a_mask_of_its_own(nodes):
    model, start = Model(SHAPE), noise(3)
    masks = torch.zeros(3, *SHAPE)
    masks[0, ..., 4:], masks[1, :, :2] = 1, 1  # nothing is generated of the third
    known = Scaled().process_in(model.sample(noise(3, seed=5)))
    plain = model.sample(start, latent_image=known, denoise_mask=masks)
    pushed = spell(nodes, model, protected=plain).sample(start, latent_image=known, denoise_mask=masks)
    assert torch.equal(pushed * (1 - masks), plain * (1 - masks))
    for row, share in ((0, 0.5), (1, 0.25)):
        assert distance(pushed[row], plain[row]) == pytest.approx(math.sqrt(share), abs=1e-5)
    assert torch.equal(pushed[2], plain[2])


def test_inpainting_counts_the_hole_alone(nodes):
    model = Model(SHAPE)
    mask = torch.zeros(1, *SHAPE)
    mask[..., 4:] = 1
    known = Scaled().process_in(model.sample(noise(seed=5)))
    target = model.sample(noise(), latent_image=known, denoise_mask=mask)
    pushed = spell(nodes, model, protected=target).sample(noise(), latent_image=known, denoise_mask=mask)
    assert torch.equal(pushed[..., :4], target[..., :4])
    # The radius is a share of what is generated: half of the values, 1/sqrt(2) of the length.
    assert distance(pushed, target) == pytest.approx(math.sqrt(0.5), abs=1e-5)


# Protected images ----------------------------------------------------------------------------------------------------


def latent(height=8, width=8):
    return {"samples": torch.zeros(1, 4, height, width)}


def test_images_are_encoded_at_the_size_of_the_latent(nodes):
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    encoded = nodes["ShieldedProtectImages"].execute(images, Vae(), latent()).args[0]
    torch.testing.assert_close(encoded, Vae().encode(images), atol=0.02, rtol=0)  # 8-bit colours
    wide = nodes["ShieldedProtectImages"].execute(images, Vae(), latent(4, 16)).args[0]
    assert wide.shape == (2, 4, 4, 16)


def test_folder_of_images(nodes, tmp_path, caplog):
    folder = tmp_path / "input" / "photos"
    (folder / "more").mkdir(parents=True)
    Image.new("RGB", (90, 64), "white").save(folder / "a.png")
    Image.new("L", (64, 90), 0).save(folder / "more" / "b.png")
    (folder / "broken.jpg").write_bytes(b"nothing")
    node = nodes["ShieldedProtectFolder"]
    encoded = node.execute("photos", Vae(), latent()).args[0]
    assert encoded.mean((1, 2, 3)).tolist() == pytest.approx([2, -2], abs=1e-5)
    assert re.search("skipped .*broken.jpg", caplog.text)
    before = node.fingerprint_inputs(folder="photos", vae=None, latent=None)
    assert before == node.fingerprint_inputs(folder=str(folder))
    Image.new("RGB", (64, 64), "red").save(folder / "c.png")
    assert node.fingerprint_inputs(folder="photos") != before
    with pytest.raises(FileNotFoundError, match="No images"):
        node.execute("nowhere", Vae(), latent())
    (folder / "only").mkdir()
    (folder / "only" / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="None of the images"):
        node.execute("photos/only", Vae(), latent())


def test_open_set_is_read_again_when_it_changes(nodes, tmp_path):
    made = ProtectedSet.create(tmp_path / "input" / "set", LatentSpace(SHAPE))
    before = nodes["ShieldedOpenSet"].fingerprint_inputs("set")
    made.add(noise(), ["a"])
    assert nodes["ShieldedOpenSet"].fingerprint_inputs("set") != before
    assert nodes["ShieldedOpenSet"].execute(str(made.path)).args[0].ids == ["a"]
    with pytest.raises(FileNotFoundError, match="no protected set"):
        nodes["ShieldedOpenSet"].execute("nowhere")


def scaled_set(path, **space):
    protected = ProtectedSet.create(path, LatentSpace(vae_class="AutoencoderKL", vae_sha256="0", **space))
    protected.add(torch.zeros(1, *protected.space.shape), ["a"])
    return protected


def test_sets_of_another_space_are_refused(nodes, tmp_path):
    model = Model(SHAPE)
    cases = {
        "another image size": {"shape": (4, 16, 16)},
        "another kind of model: their": {"shape": (16, 8, 8)},
        "another kind of model: this model scales its latents": {"shape": SHAPE, "scaling": 0.13, "shift": 0.1},
        "packed latents": {"shape": (16, 16), "patch": 2},
    }
    for number, (message, space) in enumerate(cases.items()):
        patched = spell(nodes, model, protected=scaled_set(tmp_path / str(number), **space))
        with pytest.raises(ValueError, match=message):
            patched.sample(noise())
    with pytest.raises(ValueError, match="another image size"):
        spell(nodes, model, protected=torch.zeros(1, 4, 9, 8)).sample(noise())
    for number, statistics in enumerate(({"scaling": 0.5, "shift": 0.1}, {"mean": (0.1,) * 4, "std": (2.0,) * 4})):
        fitting = scaled_set(tmp_path / f"fits{number}", shape=SHAPE, **statistics)
        spell(nodes, model, protected=fitting).sample(noise())


def test_settings_that_cannot_work(nodes):
    model = Model(SHAPE)
    with pytest.raises(ValueError, match=r"window_start \(0\.5\) must be larger"):
        spell(nodes, model, batch=True, start=0.5, end=0.5)
    with pytest.raises(ValueError, match="SPELL has no references"):
        spell(nodes, model)
    levels = {"denoised": noise(2), "input": noise(2), "sigma": torch.tensor([1.0, 2.0]), "model": model.inner}
    patched = spell(nodes, model, batch=True)
    with pytest.raises(RuntimeError, match="missed the start of this sampling run"):
        patched.post_cfg[0](levels)
    with pytest.raises(ValueError, match="one noise level"):
        sys.modules["spell_pack.hook"].noise_level(Eps(), levels["sigma"])


def test_errors_name_the_input_and_the_likely_cause(nodes, monkeypatch):
    def broken(self, pixels):
        return torch.full((len(pixels), 4, 8, 8), float("nan"))

    monkeypatch.setattr(Vae, "encode", broken)
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=r"SPELL Protect Images: the VAE on the input 'vae' .* half precision .*fp32-vae"
    ):
        nodes["ShieldedProtectImages"].execute(images, Vae(), latent())
    monkeypatch.setattr(Model, "combine", lambda self, x, sigma: x * float("nan"))
    with pytest.raises(ValueError, match=r"The model on SPELL's input 'model' predicts NaN .* --force-fp32"):
        spell(nodes, Model(SHAPE), protected=noise()).sample(noise())
    with pytest.raises(ValueError, match="SPELL's input 'protected' were encoded for another image size"):
        spell(nodes, Model(SHAPE), protected=torch.zeros(1, 4, 9, 8)).sample(noise())


def test_samplers_that_ask_no_guider_are_noticed(nodes, monkeypatch):
    monkeypatch.setattr(Model, "euler", lambda self, guider, sigmas, *rest: torch.zeros(1, *SHAPE))
    with pytest.raises(RuntimeError, match="does not use ComfyUI's guider"):
        spell(nodes, Model(SHAPE), protected=noise()).sample(noise())


# Memory --------------------------------------------------------------------------------------------------------------


def remembered(nodes, model, memory, image):
    node = nodes["ShieldedRemember"]
    return node.execute({"samples": image}, model, memory).args[0]["samples"]


def test_queued_images_repel_each_other(nodes):
    """The same seed four times, as if ComfyUI had been started anew each time."""
    images = []
    for _ in range(4):
        model = Model(SHAPE)
        memory = nodes["ShieldedMemory"].execute("apples", 10).args[0]
        image = spell(nodes, model, memory=memory).sample(noise())
        assert remembered(nodes, model, memory, image) is image
        images.append(image)
    assert torch.equal(images[0], Model(SHAPE).sample(noise()))
    assert min(distance(a, b) for n, a in enumerate(images) for b in images[:n]) > 1 - 1e-4
    other = nodes["ShieldedMemory"].execute("pears", 10).args[0]
    assert torch.equal(spell(nodes, Model(SHAPE), memory=other).sample(noise()), images[0])
    assert nodes["ShieldedForget"].execute(memory).args[0] is memory
    assert torch.equal(spell(nodes, Model(SHAPE), memory=memory).sample(noise()), images[0])


def test_a_set_of_seeds_gives_the_same_image_again(nodes):
    model = Model(SHAPE)

    def queued(seed, memory):
        image = spell(nodes, model, memory=memory).sample(noise(seed=seed))
        nodes["ShieldedRemember"].execute({"samples": image}, model, memory, seed=seed)
        return image

    memory = nodes["ShieldedMemory"].execute("seeds", 10).args[0]
    images = {seed: queued(seed, memory) for seed in (3, 2, 7)}
    chosen, held = nodes["ShieldedSeeds"].execute(memory, "2-3").args
    assert held == "3, 2"
    assert torch.equal(spell(nodes, model, memory=chosen).sample(noise(seed=7)), images[7])
    assert not torch.equal(spell(nodes, model, memory=memory).sample(noise(seed=7)), images[7])
    assert nodes["ShieldedSeeds"].execute(memory, "").args[1] == "3, 2, 7"
    remembered(nodes, model, memory, noise(seed=9))  # without a seed
    assert nodes["ShieldedSeeds"].execute(memory, "2,9").args[1] == "2"
    for wrong in ("a", "5-3", "1.5", "0-9999999"):
        with pytest.raises(ValueError, match="SPELL Seeds: the input 'seeds' takes numbers and ranges"):
            nodes["ShieldedSeeds"].execute(memory, wrong)


def test_memory_and_protected_images_together(nodes):
    model, memory = Model(SHAPE), nodes["ShieldedMemory"].execute("both", 10).args[0]
    first = model.sample(noise())
    remembered(nodes, model, memory, first)
    second = spell(nodes, model, memory=memory).sample(noise())
    third = spell(nodes, model, memory=memory, protected=second).sample(noise())
    assert min(distance(third, first), distance(third, second)) > 1 - 1e-4


def test_cache_rules(nodes):
    """A new image makes ComfyUI run everything after the memory again; the same image does not."""
    fingerprint = nodes["ShieldedMemory"].fingerprint_inputs
    schemas = {name: node.define_schema() for name, node in nodes.items()}
    for name in ("ShieldedRemember", "ShieldedForget"):
        assert schemas[name].not_idempotent
        assert schemas[name].is_output_node
    model, memory = Model(SHAPE), nodes["ShieldedMemory"].execute("cache", 10).args[0]
    states = [fingerprint("cache", 10)]
    for seed in (0, 1):
        remembered(nodes, model, memory, noise(seed=seed))
        states.append(fingerprint("cache", 10))
    assert len(set(states)) == 3
    remembered(nodes, model, memory, noise(seed=1))
    assert fingerprint("cache", 10) == states[-1]
    assert fingerprint("other", 10) == states[0]


def test_memory_is_bounded_and_sorted_by_model_and_size(nodes, tmp_path):
    module = sys.modules["spell_pack.memory"]
    model, memory = Model(SHAPE), nodes["ShieldedMemory"].execute("full", 20).args[0]
    for seed in range(23):
        remembered(nodes, model, memory, noise(seed=seed))
    kept = module.recall(memory, Scaled(), SHAPE)
    assert len(kept) == 20  # 21 became 18, and two more came
    expected = torch.cat([Scaled().process_in(noise(seed=seed)) for seed in range(3, 23)])
    torch.testing.assert_close(kept, expected)
    assert len(list((tmp_path / "user" / "shielded" / "full").rglob("*.safetensors"))) < 20
    assert len(module.recall(memory, Scaled(), (4, 9, 9))) == 0
    assert len(module.recall(memory, SimpleNamespace(), SHAPE)) == 0
    spell(nodes, model, memory=memory).sample(torch.zeros(1, 4, 8, 8))
    batch = noise(3)
    remembered(nodes, model, memory, torch.cat([batch, batch]))
    assert len(module.recall(memory, Scaled(), SHAPE)) < 21
    with pytest.raises(ValueError, match="not finite"):
        remembered(nodes, model, memory, noise() * float("nan"))


def test_names_stay_in_their_folder(nodes):
    for name in ("", "..", "a/b", "a\\b", "a b"):
        with pytest.raises(ValueError, match="consists of letters, digits"):
            nodes["ShieldedMemory"].execute(name, 10)


REMEMBER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import importlib.util
spec = importlib.util.spec_from_file_location("memory", sys.argv[1] + "/memory.py")
memory = sys.modules["memory"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
for n in range(5):
    memory.remember(memory.Memory(Path(sys.argv[2]), 100), None, torch.full((1, 2, 2), float(sys.argv[3]) + n))
"""


def test_two_hosts_write_at_once(pack, tmp_path):
    hosts = [subprocess.Popen([sys.executable, "-c", REMEMBER, PACK, tmp_path / "m", str(10 * n)]) for n in (1, 2)]
    assert [host.wait() for host in hosts] == [0, 0]
    module = sys.modules["spell_pack.memory"]
    kept = module.recall(module.Memory(tmp_path / "m", 100), None, (2, 2))
    assert sorted(kept[:, 0, 0].tolist()) == [10, 11, 12, 13, 14, 20, 21, 22, 23, 24]


# What is shipped -----------------------------------------------------------------------------------------------------


def test_example_workflows_fit_the_nodes(nodes):
    workflows = example_workflows()
    assert set(workflows) == {"protect", "variety"}
    for workflow, prompt in workflows.values():
        places = {node["id"]: node for node in workflow["nodes"]}
        for number, source, output, target, port, kind in workflow["links"]:
            assert places[source]["outputs"][output]["type"] == kind == places[target]["inputs"][port]["type"]
            assert places[target]["inputs"][port]["link"] == number
            assert number in places[source]["outputs"][output]["links"]
        for node in prompt.values():
            if node["class_type"].startswith("Shielded"):
                inputs = nodes[node["class_type"]].define_schema().inputs
                required = {port.id for port in inputs if not getattr(port, "optional", False)}
                assert required <= set(node["inputs"]) <= {port.id for port in inputs}
                for port in inputs:
                    value = node["inputs"].get(port.id)
                    if hasattr(port, "min") and value is not None:
                        assert port.min <= value <= port.max


def test_registry_metadata():
    import tomllib

    metadata = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert "comfyui" not in metadata["project"]["name"].lower()
    packages = [line for line in (PACK / "requirements.txt").read_text().split("\n") if line and line[0] not in "#-"]
    assert metadata["project"]["dependencies"] == packages == ["shielded"]


def test_requirements_take_the_package_that_lies_beside_them(tmp_path):
    """From any folder, and with what ComfyUI has pinned: nothing else would be installed."""
    pack = tmp_path / "custom_nodes" / "pack"
    pack.mkdir(parents=True)
    (pack / "requirements.txt").write_bytes((PACK / "requirements.txt").read_bytes())
    with zipfile.ZipFile(pack / "shielded-9.9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("shielded-9.9.dist-info/METADATA", "Metadata-Version: 2.1\nName: shielded\nVersion: 9.9\n")
        wheel.writestr("shielded-9.9.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("shielded-9.9.dist-info/RECORD", "")
    options = ["--dry-run", "--no-index", "--ignore-installed", "--no-deps", "--report", tmp_path / "report.json"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *options, "-r", pack / "requirements.txt"]
    subprocess.run(pip, check=True, cwd=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(item["metadata"]["name"], item["metadata"]["version"]) for item in report["install"]] == [
        ("shielded", "9.9")
    ]


# Inside ComfyUI ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH does not name a checkout of ComfyUI")
def test_inside_comfyui():
    script = Path(__file__).parents[1] / "helpers/comfyui_host.py"
    done = subprocess.run([sys.executable, script, "--json"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert len(figures["samplers"]) == 3
    for kind, samplers in figures["samplers"].items():
        for name, row in samplers.items():
            short = 2e-3 if name == "uni_pc" else 1e-5  # it ends at a sigma of 0.001, not on x0
            assert row["before"] == 0, (kind, name)
            assert row["after"] > 1 - short, (kind, name, row)
            assert row["overcompensated"] > 1, (kind, name, row)
            assert row["pair"] > 1 - short, (kind, name, row)
            assert row["idle_is_identical"], (kind, name)
            assert row["unpatched_is_identical"], (kind, name)
    for kind, after in figures["after"].items():
        assert after.pop("outside the masks") == 0, kind
        for name, distance in after.items():
            for kept in distance if isinstance(distance, list) else [distance]:
                assert kept > 1 - 1e-5, (kind, name, kept)
                assert "two SPELL" in name or kept < 1.001, (kind, name, kept)
    examples = figures["examples"]
    assert examples["sampled"] == [1, 2, 3, 4]  # the same prompt and seed again: not skipped
    assert examples["closest"] > 1 - 1e-5
    assert examples["remembered_without_spell"] == 1
    assert examples["first_again_after_forgetting"]
