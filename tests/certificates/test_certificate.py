"""Certificates of a small run, and what becomes of them when images, certificates, the set or the log are changed."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from shielded import Certificate, LatentSpace, ProtectedSet
from shielded.certificates import verify_images
from shielded.certificates.audit import LOG, AuditLog, read_log
from shielded.certificates.certificate import attach_certificate, beside, certify, leaks, measure
from shielded.models import load
from shielded.runs.job import run
from shielded.runs.model_call import ModelCall

RADIUS = 7.0


@pytest.fixture(scope="module")
def space():
    return LatentSpace.of(load("emoji", "cpu"))


@pytest.fixture(scope="module")
def made(space, tmp_path_factory):
    """Two plain owls, protected, and the folder of a run that kept away from them."""
    folder = tmp_path_factory.mktemp("run")
    run(folder / "plain", ["owl"], [0, 1], ModelCall(steps=4), device="cpu", progress=False, radius=1e-6)
    pictures = [Image.open(path) for path in sorted((folder / "plain" / "without").glob("*.png"))]
    protected = ProtectedSet.create(folder / "set", space)
    protected.add(space.encode(pictures), ["first", "second"])
    report = run(
        folder / "out",
        ["owl"],
        [0, 1],
        ModelCall(steps=4),
        protect=[folder / "set"],
        radius=RADIUS,
        device="cpu",
        progress=False,
    )
    return folder, report


@pytest.fixture
def copy(made, tmp_path):
    """The images of the run, with certificates and log, and the set: to be changed."""
    shutil.copytree(made[0] / "out" / "with", tmp_path / "images")
    shutil.copytree(made[0] / "set", tmp_path / "set")
    return tmp_path


def verified(folder, space, name="owl-0.png", **options):
    file = folder / "images" / name
    with Image.open(file) as image:
        loaded = [(file, image.convert("RGB"))]
    results, logs = verify_images(loaded, space, ProtectedSet.open(folder / "set"), **options)
    return results[0], next(iter(logs.values()), [])


def forge(folder, name="owl-0.png", **changes):
    """Write other certificates, beside the image and inside it."""
    file = folder / "images" / name
    attach_certificate(file, replace(Certificate.read(beside(file)), **changes))


# What a run writes ---------------------------------------------------------------------------------------------------


def test_a_run_certifies_each_image(made, space):
    folder, report = made
    z = ProtectedSet.open(folder / "set").vectors([0, 1]).double().flatten(1)
    assert report["refused"] == []
    assert len(report["certificates"]) == report["n"] == 2
    for content in report["certificates"]:
        file = folder / "out" / "with" / content["image"]
        certificate = Certificate.read(beside(file))
        assert json.loads(json.dumps(content)) == json.loads(beside(file).read_text())
        with Image.open(file) as image:
            picture = image.convert("RGB")
            inside = json.loads(image.text["shielded"])
        assert {**inside, "sha256": certificate.sha256} == json.loads(beside(file).read_text())
        distances = (space.encode([picture]).double().flatten(1) - z).norm(dim=1)
        assert certificate.decoded_distance == pytest.approx(distances.min().item(), rel=1e-4)
        assert certificate.decoded_id == ["first", "second"][distances.argmin()]
        assert min(certificate.nearest_distance, certificate.decoded_distance) >= RADIUS == certificate.radius
        assert not certificate.inside
        assert (certificate.prompt, certificate.model, certificate.protected_version) == ("owl", "emoji", 2)
        assert certificate.settings["steps"] == 4
    assert report["leaks_without"] == 2
    assert report["min_decoded_distance_with"] >= RADIUS
    assert "Encoded again" in (folder / "out" / "report.html").read_text()


def test_the_log_tells_what_happened(made):
    folder, report = made
    records, problems = read_log(folder / "out" / "with" / LOG)
    assert problems == []
    events = [record["event"] for record in records]
    assert (events[0], events[-1], events.count("certified"), events.count("sampled")) == ("start", "end", 2, 2)
    assert events.count("restarted") == report["samplings"] - 2
    assert records[0]["settings"]["radius"] == RADIUS


def test_a_second_run_replaces_the_first(made, tmp_path):
    folder, _ = made
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    run(out, ["pizza"], [0], ModelCall(steps=4), protect=[folder / "set"], radius=RADIUS, device="cpu", progress=False)
    assert [path.name for path in (out / "with").glob("*.png")] == ["pizza-0.png"]
    assert [path.name for path in (out / "with").glob("*.json")] == ["pizza-0.json"]


# What verify finds ---------------------------------------------------------------------------------------------------


def test_an_untouched_image_holds(copy, space):
    image, log = verified(copy, space)
    assert (image.problems, log, image.inside, image.certified) == ([], [], False, True)
    assert image.radius == RADIUS  # the set has no radii of its own


def test_a_flipped_pixel_shows(copy, space):
    file = copy / "images" / "owl-0.png"
    with Image.open(file) as image:
        pixels, text = np.array(image), image.text["shielded"]
    pixels[60, 60, 0] ^= 1
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("shielded", text)
    Image.fromarray(pixels).save(file, pnginfo=info)
    assert verified(copy, space)[0].problems == [
        "the file is not the one in the audit log: it has another digest",
        "the picture was edited after it was certified: its pixels are others",
    ]


def test_a_stripped_certificate_shows(copy, space):
    file = copy / "images" / "owl-0.png"
    with Image.open(file) as image:
        image.load()
    image.save(file, pnginfo=None)
    assert "stripped from its metadata" in verified(copy, space)[0].problems[0]
    beside(file).unlink()
    problems = verified(copy, space)[0].problems
    assert problems[0] == "its certificate was stripped: the audit log lists one"
    (copy / "images" / LOG).unlink()
    image, _ = verified(copy, space, radius=RADIUS)
    assert (image.certified, image.problems) == (False, [])


def test_one_of_two_certificates_is_enough_where_no_log_lists_both(copy, space):
    beside(copy / "images" / "owl-0.png").unlink()
    assert verified(copy, space)[0].problems == ["the certificate beside it was removed"]
    (copy / "images" / LOG).unlink()
    assert verified(copy, space, radius=RADIUS)[0].problems == []


def test_a_rewritten_file_is_told_from_an_edited_one(copy, space):
    file = copy / "images" / "owl-0.png"
    with file.open("ab") as end:
        end.write(b"something")
    assert "written anew; the pixels are those" in verified(copy, space)[0].problems[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoded_distance": 30.0}, "forged: it says that the picture lies 30.00"),
        ({"nearest_distance": 30.0}, "not the one in the audit log"),
        ({"nearest_distance": 3.0}, "contradicts itself"),
        ({"radius": 0.5}, "not the one in the audit log"),
        ({"protected_set": "0" * 16}, "another latent space"),
        ({"protected_history": "0" * 64}, "another protected set"),
        ({"protected_version": 99}, "no version 99"),
        ({"protected_version": "x"}, "protected_version has to be an integer"),
    ],
)
def test_forged_certificates_show(copy, space, changes, message):
    forge(copy, **changes)
    assert message in "; ".join(verified(copy, space)[0].problems)


def test_certificates_that_differ_show(copy, space):
    file = copy / "images" / "owl-0.png"
    replace(Certificate.read(beside(file)), attempts=7).write(beside(file))
    assert "differ (attempts)" in "; ".join(verified(copy, space)[0].problems)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"image": 3}', "\x00"])
def test_what_is_no_certificate_shows(copy, space, text):
    beside(copy / "images" / "owl-0.png").write_text(text)
    assert "cannot be read" in verified(copy, space)[0].problems[0]


def test_the_certificate_of_another_image_shows(copy, space):
    images = copy / "images"
    shutil.copy(images / "owl-1.json", images / "owl-0.json")
    assert any("edited" in problem or "differ" in problem for problem in verified(copy, space)[0].problems)


def test_a_set_version_that_is_gone_shows(copy, space):
    protected = ProtectedSet.open(copy / "set")
    protected.add(torch.full((1, *space.shape), 9.0), ["far"])
    assert verified(copy, space)[0].problems == []  # of an earlier version, which can still be opened
    protected.remove(["far"])
    protected.compact()
    assert "no longer exists" in verified(copy, space)[0].problems[0]


def test_another_set_shows(copy, space, made):
    vectors = ProtectedSet.open(copy / "set").vectors([0, 1])
    shutil.rmtree(copy / "set")
    other = ProtectedSet.create(copy / "set", space)
    other.add(vectors[:1], ["first"])
    assert "another protected set" in verified(copy, space)[0].problems[0]


def test_an_image_inside_is_found_without_certificate(made, space, tmp_path):
    (tmp_path / "images").mkdir()
    shutil.copy(made[0] / "plain" / "without" / "owl-0.png", tmp_path / "images")
    shutil.copytree(made[0] / "set", tmp_path / "set")
    with pytest.raises(ValueError, match="pass --radius"):
        verified(tmp_path, space)
    image, _ = verified(tmp_path, space, radius=1.0)
    assert (image.inside, image.certified, image.nearest_id) == (True, False, "first")
    assert image.distance == pytest.approx(0, abs=1e-3)


# The audit log -------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path):
    log = AuditLog(tmp_path / LOG)
    for i in range(4):
        log.append("event", number=i)
    log.close()
    return log


def test_a_log_holds(log):
    records, problems = read_log(log.path)
    assert problems == []
    assert [record.get("number") for record in records] == [0, 1, 2, 3, None]
    with pytest.raises(FileExistsError):
        AuditLog(log.path)


@pytest.mark.parametrize("line", range(5))
@pytest.mark.parametrize("change", ["remove", "edit", "repeat", "garbage"])
def test_a_changed_log_shows(log, line, change):
    lines = log.path.read_bytes().splitlines(keepends=True)
    if change == "remove":
        del lines[line]
    elif change == "repeat":
        lines.insert(line, lines[line])
    elif change == "edit" and line == 4:
        lines[line] = lines[line].replace(b"end", b"more")  # of the last line only the report has the digest
    else:
        lines[line] = lines[line].replace(b'"event"', b'"events"') if change == "edit" else b"\xff{\n"
    log.path.write_bytes(b"".join(lines))
    assert read_log(log.path)[1]


def test_an_empty_log_shows(tmp_path):
    (tmp_path / LOG).touch()
    assert read_log(tmp_path / LOG) == ([], ["its end is missing: the run was stopped, or lines were removed"])


# Measuring -----------------------------------------------------------------------------------------------------------


def test_measure_with_radii_of_their_own(tmp_path):
    """The nearest protected image need not be the one whose shield an image is in."""
    protected = ProtectedSet.create(tmp_path, LatentSpace((2,)))
    protected.add(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), ["small", "large"], [0.5, 4.0])
    found = measure(torch.tensor([[1.0, 0.0], [9.0, 0.0], [0.25, 0.0]]), protected)
    assert [(m.id, m.distance, m.radius) for m in found] == [
        ("small", 1.0, 0.5),
        ("large", 6.0, 4.0),
        ("small", 0.25, 0.5),
    ]
    assert [m.leak for m in found] == [("large", 2.0, 4.0), None, ("small", 0.25, 0.5)]
    assert [m.leak is None for m in measure(torch.tensor([[1.0, 0.0]]), protected, 1.0)] == [True]  # on the shell


def test_certify_counts_either_leak(tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace((2,)))
    protected.add(torch.zeros(1, 2), ["z"])
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file in files:
        Image.new("RGB", (4, 4)).save(file)
    latents, decoded = torch.tensor([[2.0, 0], [0, 0.5], [2, 0]]), torch.tensor([[2.0, 0], [2, 0], [0.5, 0]])
    certificates = certify(latents, files, protected, 1.0, decoded=decoded)
    assert [c.inside for c in certificates] == [False, True, True]
    assert leaks(certificates) == 2
    assert certify(latents, files, protected, 1.0)[2].decoded_distance is None
    with pytest.raises(ValueError, match="2 files but 3"):
        certify(latents, files[:2], protected, 1.0)
