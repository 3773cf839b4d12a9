"""What a forger may change of a certified file, its certificates and its log: it is noticed or listed as not checked.

`benchmarks/forge.py` tries some 270 forgeries on a whole run.
"""

import json
import math
import os
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from shielded import Certificate, LatentSpace, ProtectedSet
from shielded.certificates import file_sha256, verify_images
from shielded.certificates.audit import LOG, AuditLog, read_log
from shielded.certificates.certificate import attach_certificate, beside, certificate_sha256, certify
from shielded.certificates.reading import strict_json
from shielded.models import load

RADIUS = 5.0


@pytest.fixture(scope="module")
def space():
    return LatentSpace.of(load("emoji", "cpu"))


@pytest.fixture
def folder(space, tmp_path):
    """A set of three pictures with radii, and a certified picture outside its shields; no log."""
    images = tmp_path / "with"
    images.mkdir()
    colours = [Image.new("RGB", (128, 128), colour) for colour in ("red", "blue", "green", "white")]
    latents = space.encode(colours)
    protected = ProtectedSet.create(tmp_path / "set", space)
    protected.add(latents[:3], ["red", "blue", 7], RADIUS)
    colours[3].save(images / "white.png")
    details = [{"prompt": "white", "seed": 3, "attempts": 2, "repair": "restart", "settings": {"attempts": 3}}]
    (certificate,) = certify(latents[3:], [images / "white.png"], protected, decoded=latents[3:], details=details)
    attach_certificate(images / "white.png", certificate)
    return tmp_path


def add_log(folder, **content):
    file = folder / "with" / "white.png"
    certificate = Certificate.read(beside(file))
    log = AuditLog(folder / "with" / LOG)
    log.append("start", settings={"radius": RADIUS})
    entry = {"image": file.name, "sha256": file_sha256(file), "certificate_sha256": certificate_sha256(certificate)}
    log.append("certified", **{**entry, **content})
    log.close()
    return log


def verified(folder, space, **options):
    files = sorted((folder / "with").glob("*.png"))
    loaded = [(file, Image.open(file).convert("RGB")) for file in files]
    results, logs = verify_images(loaded, space, ProtectedSet.open(folder / "set"), **options)
    return results[-1], [problem for problems in logs.values() for problem in problems]


def write(file, content, rewrite=lambda text: text):
    """Write a forged certificate into the picture and beside it, with fitting digests."""
    with Image.open(file) as image:
        picture = image.convert("RGB")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("shielded", rewrite(json.dumps({**content, "sha256": None})))
    picture.save(file, pnginfo=info)
    beside(file).write_text(rewrite(json.dumps({**content, "sha256": file_sha256(file)})))


def refit(file):
    replace(Certificate.read(beside(file)), sha256=file_sha256(file)).write(beside(file))


def test_nothing_forged_nothing_found(folder, space):
    file = folder / "with" / "white.png"
    write(file, json.loads(beside(file).read_text()))
    image, _ = verified(folder, space)
    assert image.problems == []
    assert {entry.split()[0] for entry in image.not_checked} >= {"nearest_distance", "attempts", "prompt", "seed"}
    add_log(folder)
    image, log = verified(folder, space)
    assert (image.problems, image.not_checked, log) == ([], [], [])  # with a log, nothing is left open


# Fields ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image", "white2.png"),
        ("image", "../with/white.png"),
        ("nearest_id", "yellow"),
        ("nearest_id", "8"),
        ("nearest_distance", -0.5),
        ("nearest_distance", True),
        ("nearest_distance", RADIUS - 0.1),
        ("radius", 4.9),
        ("radius", 1e-9),
        ("radius", math.inf),
        ("radius", 10**100),
        ("inside", True),
        ("inside", 0),
        ("copy", False),
        ("copy", True),
        ("copy_similarity", 0.1),
        ("attempts", 4),
        ("attempts", 1),
        ("attempts", math.nan),
        ("repair", "pushed"),
        ("protected_version", 0),
        ("protected_version", True),
        ("protected_version", 10**30),
        ("protected_history", None),
        ("pixels_sha256", "F" * 64),
        ("decoded_id", "yellow"),
        ("decoded_distance", 1e4),
        ("decoded_distance", 10**500),
        ("settings", {"attempts": 1}),
        ("settings", {"model": "another"}),
        ("model", 3),
        ("seed", -3),
    ],
)
def test_a_forged_field_is_noticed_without_a_log(folder, space, name, value):
    file = folder / "with" / "white.png"
    write(file, {**json.loads(beside(file).read_text()), name: value})
    assert verified(folder, space)[0].problems


@pytest.mark.parametrize("tolerant", [1e3, 1e7, 1e300])
def test_a_claim_supplies_no_tolerance_of_its_own(folder, space, tolerant):
    """A set without radii: what a forged radius says neither widens what is accepted nor goes unmentioned."""
    file = folder / "with" / "white.png"
    latents = ProtectedSet.open(folder / "set").vectors([0, 1, 2])
    other = ProtectedSet.create(folder / "set", space, overwrite=True)
    other.add(latents, ["red", "blue", 7])
    picture = Image.open(file).convert("RGB")
    (certificate,) = certify(space.encode([picture]), [file], other, RADIUS, decoded=space.encode([picture]))
    attach_certificate(file, certificate)
    assert not verified(folder, space)[0].problems
    assert any(entry.startswith("radius") for entry in verified(folder, space)[0].not_checked)
    claimed = certificate.decoded_distance * 1.5
    write(file, {**json.loads(beside(file).read_text()), "radius": tolerant, "decoded_distance": claimed})
    assert any("forged" in problem for problem in verified(folder, space)[0].problems)
    assert any(f"not for {RADIUS:g}" in problem for problem in verified(folder, space, radius=RADIUS)[0].problems)


@pytest.mark.parametrize("name", ["nearest_distance", "prompt", "seed", "package_version", "unheard_of"])
def test_what_only_a_log_can_tell_is_listed_without_one(folder, space, name):
    file = folder / "with" / "white.png"
    content = json.loads(beside(file).read_text())
    add_log(folder)
    write(file, {**content, name: {"nearest_distance": 50.0, "seed": 4}.get(name, "other")})
    assert any("not the one in the audit log" in problem for problem in verified(folder, space)[0].problems)
    (folder / "with" / LOG).unlink()
    image, _ = verified(folder, space)
    assert image.problems == []
    assert name in {entry.split()[0] for entry in image.not_checked}


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: text.replace("{", '{"inside": false, ', 1),
        lambda text: text.replace('"settings": {', '"settings": {"a": 1, "a": 1, '),
        lambda text: text.replace("{", '{"x": ' + '{"x":' * 3000 + "1" + "}" * 3000 + ", ", 1),
        lambda text: text.replace("{", '{"x": -Infinity, ', 1),
        lambda text: text.replace("{", '{"x": -1e400, ', 1),
        lambda text: text.replace("{", '{"x": ' + "9" * 5000 + ", ", 1),
        lambda text: text + "{}",
        lambda text: '"text"',
    ],
    ids=["twice", "twice, deep", "nested", "infinity", "too large", "too long", "two", "no object"],
)
def test_one_malformed_certificate_never_ends_the_check_of_the_others(folder, space, rewrite):
    file = folder / "with" / "white.png"
    content = json.loads(beside(file).read_text())
    bad = folder / "with" / "bad.png"  # before the other one
    bad.write_bytes(file.read_bytes())
    write(bad, {**content, "image": "bad.png"}, rewrite)
    loaded = [(path, Image.open(path).convert("RGB")) for path in (bad, file)]
    results, _ = verify_images(loaded, space, ProtectedSet.open(folder / "set"))
    assert any("cannot be read" in problem for problem in results[0].problems)
    assert results[1].problems == []


def test_an_image_without_any_radius_does_not_end_the_check_of_the_others(folder, space):
    other = ProtectedSet.create(folder / "set", space, overwrite=True)
    other.add(torch.zeros(1, *space.shape), ["zero"])
    picture = Image.new("RGB", (128, 128), "white")
    picture.save(folder / "with" / "bare.png")
    (certificate,) = certify(
        space.encode([picture]), [folder / "with" / "white.png"], other, 1.0, decoded=space.encode([picture])
    )
    attach_certificate(folder / "with" / "white.png", certificate)
    loaded = [(path, picture) for path in (folder / "with" / "bare.png", folder / "with" / "white.png")]
    bare, white = verify_images(loaded, space, other)[0]
    assert bare.problems == ["there is no radius to measure it with; pass --radius"]
    assert white.problems == []
    assert bare.distance == pytest.approx(white.distance)


@pytest.mark.parametrize("text", ["[]", "1", '{"a": NaN}', '{"a": 1, "a": 1}', '{"a": 1e400}', "{", "", b"\xff{}"])
def test_strict_json_refuses(text):
    with pytest.raises(ValueError, match=r"it |Expecting"):
        strict_json(text)


# Files ----------------------------------------------------------------------------------------------------------------


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def with_chunk(name, content):
    def change(file):
        data = file.read_bytes()
        at = data.index(b"IEND") - 4
        file.write_bytes(data[:at] + chunk(name, content) + data[at:])

    return change


def see_through(file):
    with Image.open(file) as image:
        image.load()
        info = PngImagePlugin.PngInfo()
        info.add_itxt("shielded", image.text["shielded"])
        pixels = np.array(image.convert("RGBA"))
    pixels[10:20, 10:20] = (200, 0, 0, 0)  # over white it is white
    Image.fromarray(pixels).save(file, pnginfo=info)


def interleaved_frame(file):
    with Image.open(file) as image:
        image.load()
        info = PngImagePlugin.PngInfo()
        info.add_itxt("shielded", image.text["shielded"])
        picture = image.convert("RGB")
    more = [Image.new("RGB", picture.size, colour) for colour in ("black", "yellow")]
    picture.save(file, save_all=True, append_images=more, pnginfo=info)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda file: file.write_bytes(file.read_bytes() + b"<?php ?>"), "8 bytes follow"),
        (lambda file: file.write_bytes(file.read_bytes() * 2), "bytes follow the end of the picture"),
        (with_chunk(b"zTXt", b"shielded\0\0" + zlib.compress(b'{"inside": false}')), "holds 2 certificates"),
        (with_chunk(b"iTXt", b"shielded\0\0\0en\0\0{}"), "holds 2 certificates"),
        (with_chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"x" * 99)), "data besides the picture: iCCP"),
        (with_chunk(b"stEg", b"payload"), "data besides the picture: stEg"),
        (with_chunk(b"IDAT", b"payload"), "bytes follow the end of its compressed pixels"),
        (see_through, "hides colours under full transparency"),
        (interleaved_frame, "it has 3 frames"),
    ],
)
def test_what_a_file_hides_is_named(folder, space, change, named):
    file = folder / "with" / "white.png"
    before = file.read_bytes()
    change(file)
    refit(file)
    assert any(named in problem for problem in verified(folder, space)[0].problems)
    changed = file.read_bytes()
    file.write_bytes(before)
    refit(file)
    add_log(folder)
    assert verified(folder, space)[0].problems == []
    file.write_bytes(changed)
    refit(file)
    assert any("another digest" in problem for problem in verified(folder, space)[0].problems)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_what_a_file_of_others_holds_is_listed_and_no_problem(folder, space, kind):
    file = folder / "with" / f"other.{kind}"
    Image.new("RGB", (128, 128), "white").save(file)
    protected = ProtectedSet.open(folder / "set")
    picture = Image.open(file).convert("RGB")
    plain = verify_images([(file, picture)], space, protected)[0][0]
    assert (plain.problems, plain.not_checked, plain.certified) == ([], [], False)
    file.write_bytes(file.read_bytes() + b"\xff\xd8more")
    image = verify_images([(file, picture)], space, protected)[0][0]
    assert image.problems == []
    assert image.not_checked == ["6 bytes follow the end of the picture"]


# Logs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [{"sha256": "0" * 64}, {"certificate_sha256": "1" * 64}, {"image": "other.png"}])
def test_the_log_is_compared(folder, space, content):
    add_log(folder, **content)
    assert verified(folder, space)[0].problems


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:-40],
        lambda data: b"\n".join(data.split(b"\n")[1:]),
        lambda data: b"\n".join(data.split(b"\n")[:2]) + b"\n",
        lambda data: data + b"[" * 50000 + b"\n",
        lambda data: data + b'{"event": "end"}\n',
        lambda data: data.replace(b'"event"', b'"event": "start", "event"', 1),
        lambda data: data.replace(b'"radius": 5.0', b'"radius": NaN'),
        lambda data: b"\xff\xfe" + data,
        lambda data: data.replace(b"\n", b"\n\n"),
    ],
)
def test_a_damaged_log_is_named_and_confirms_nothing(folder, space, change):
    log = add_log(folder)
    log.path.write_bytes(change(log.path.read_bytes()))
    assert read_log(log.path)[1]
    image, problems = verified(folder, space)
    assert problems
    assert any(entry.startswith("prompt") for entry in image.not_checked)


@pytest.mark.parametrize("change", ["deleted", "rewritten", "shortened"])
def test_a_log_that_the_report_does_not_name_shows(folder, space, change):
    log = add_log(folder)
    report = {"audit_log": {"file": f"with/{LOG}", "sha256": log.sha256}}
    (folder / "report.json").write_text(json.dumps(report))
    assert verified(folder, space)[1] == []
    log.path.unlink()
    if change == "rewritten":  # a chain that holds
        add_log(folder, inside=False)
    elif change == "shortened":
        AuditLog(log.path).close()
    problems = verified(folder, space)[1]
    assert any("is missing" in p if change == "deleted" else "its end differs" in p for p in problems)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nowhere"])
@pytest.mark.parametrize("what", ["log", "certificate"])
def test_a_log_or_certificate_that_is_no_file_is_no_missing_one(folder, space, what, kind):
    path = folder / "with" / (LOG if what == "log" else "white.json")
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    image, log = verified(folder, space)
    (problem,) = log if what == "log" else image.problems
    assert "cannot be read" in problem
    assert "no file" in problem


@pytest.mark.parametrize("name", [-1, 10**30, -(10**18), 0])
def test_whole_numbers_are_found_as_ids(space, tmp_path, name):
    latents = space.encode([Image.new("RGB", (128, 128), colour) for colour in ("red", "white")])
    protected = ProtectedSet.create(tmp_path / "set", space)
    protected.add(latents[:1], [name], RADIUS)
    (tmp_path / "with").mkdir()
    file = tmp_path / "with" / "white.png"
    Image.new("RGB", (128, 128), "white").save(file)
    (certificate,) = certify(latents[1:], [file], protected, decoded=latents[1:])
    attach_certificate(file, certificate)
    assert verified(tmp_path, space)[0].problems == []
