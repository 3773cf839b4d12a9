"""Forge certificates, picture files and audit logs of a run, and count what `shielded verify` notices.

    python benchmarks/forge.py --run demo

A forger knows the package: the certificates beside and inside a file are changed alike, and digests are made to fit
again. Each forgery counts as noticed (an image or the log has a problem), as listed (what was forged is listed as not
checked), or as missed. Exit code 1 if any is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from shielded.certificates import file_sha256, verify_images
from shielded.certificates.audit import LOG
from shielded.files import chained
from shielded.latent_space import LatentSpace
from shielded.models import load
from shielded.protected import ProtectedSet

Forgery = tuple[str, Callable[[Path], None], str | None]  # name, change, what may be listed as not checked instead

FIELDS: dict[str, list[Any]] = {
    "image": ["other.png", "", "../owl-0.png", 7, None],
    "sha256": ["0" * 64, "x", 3, ["a"]],
    "nearest_id": ["nobody", "", None, 5, ["owl, seed 0"]],
    "nearest_distance": [1e9, -1.0, math.nan, math.inf, None, "8", 10**400, 3.0, 1000.0],
    "radius": [1.0, 1e6, 0.0, -8.0, math.nan, "8", 10**400, True, 8.5],
    "inside": [True, None, 0, "no"],
    "attempts": [99, 0, -1, 1.5, "2", True],
    "protected_set": ["0" * 16, "", None, 3],
    "protected_version": [0, 99, -1, [], 1.5, 10**30, "2", None],
    "protected_history": ["0" * 64, None, "x", 5],
    "pixels_sha256": ["0" * 64, None, "", 5],
    "decoded_id": ["nobody", None, "", 3],
    "decoded_distance": [1000.0, None, math.nan, -1, 0.0, "9", 10**400],
    "repair": ["push", "magic", 3, ["restart"]],
    "prompt": ["another prompt", 3, ["owl"]],
    "seed": [77, -1, 1.5, "0"],
    "model": ["sdxl", "", 5],
    "settings": [{"radius": 1}, [], None, {"attempts": 0}, {"model": "sdxl"}, json.loads("[" * 40 + "]" * 40)],
    "package_version": ["9.9.9", "", None],
    "unheard_of": ["field", 3],
}


def content_of(file: Path) -> dict[str, Any]:
    return json.loads(file.with_suffix(".json").read_text())


def write(file: Path, text: str, outer: str | None = None) -> None:
    """Write a certificate's text into the picture, and beside it, with the digest of the file."""
    with Image.open(file) as image:
        pixels = image.convert("RGB")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("shielded", text)
    pixels.save(file, pnginfo=info)
    if outer is None:
        content = json.loads(text)
        outer = json.dumps({**content, "sha256": file_sha256(file)}) if isinstance(content, dict) else text
    file.with_suffix(".json").write_text(outer)


def refit(file: Path) -> None:
    """Let the certificate beside a changed file hold its digest."""
    file.with_suffix(".json").write_text(json.dumps({**content_of(file), "sha256": file_sha256(file)}))


def set_field(name: str, value: Any) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        content = {**content_of(file), "sha256": None, name: value}
        text = json.dumps(content)
        write(file, text, text if name == "sha256" else None)

    return change


def drop_field(name: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        write(file, json.dumps({k: v for k, v in content_of(file).items() if k not in (name, "sha256")}))

    return change


def raw(text: Callable[[str], str]) -> Callable[[Path], None]:
    """Change the text of both certificates."""

    def change(file: Path) -> None:
        inner = text(json.dumps({**content_of(file), "sha256": None}))
        with Image.open(file) as image:
            pixels = image.convert("RGB")
        info = PngImagePlugin.PngInfo()
        info.add_itxt("shielded", inner)
        pixels.save(file, pnginfo=info)
        file.with_suffix(".json").write_text(text(json.dumps({**content_of(file), "sha256": file_sha256(file)})))

    return change


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def insert(name: bytes, content: bytes, before: bytes = b"IDAT") -> Callable[[Path], None]:
    """Put a chunk into the PNG file."""

    def change(file: Path) -> None:
        data = file.read_bytes()
        at = data.index(before) - 4
        file.write_bytes(data[:at] + chunk(name, content) + data[at:])
        refit(file)

    return change


def append(data: bytes) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.write_bytes(file.read_bytes() + data)
        refit(file)

    return change


def saved(make: Callable[[Image.Image], Image.Image], **options: Any) -> Callable[[Path], None]:
    """Write the picture anew, with its certificate."""

    def change(file: Path) -> None:
        with Image.open(file) as image:
            image.load()
            text, picture = image.text["shielded"], image.convert("RGB")
        info = PngImagePlugin.PngInfo()
        info.add_itxt("shielded", text)
        make(picture).save(file, pnginfo=info, **options)
        refit(file)

    return change


def hide_behind_white(picture: Image.Image) -> Image.Image:
    """Put other colours under full transparency wherever the picture is white."""
    rgba = np.array(picture.convert("RGBA"))
    white = (rgba[..., :3] == 255).all(axis=-1)
    white[:2] |= not white.any()
    rgba[white] = (10, 20, 30, 0)
    return Image.fromarray(rgba)


def more_pixels(file: Path) -> None:
    """Compress a second picture behind the first one, in the same data."""
    data = file.read_bytes()
    start = data.index(b"IDAT") - 4
    pixels, position = b"", start
    while data[position + 4 : position + 8] == b"IDAT":
        length = struct.unpack(">I", data[position : position + 4])[0]
        pixels += data[position + 8 : position + 8 + length]
        position += length + 12
    hidden = zlib.compress(zlib.decompress(pixels) + b"hidden" * 100)
    file.write_bytes(data[:start] + chunk(b"IDAT", hidden) + data[position:])
    refit(file)


def behind_the_stream(file: Path) -> None:
    data = file.read_bytes()
    at = data.index(b"IEND") - 4
    file.write_bytes(data[:at] + chunk(b"IDAT", b"payload" * 9) + data[at:])
    refit(file)


# The audit log ------------------------------------------------------------------------------------------------------


def log_lines(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Callable[[Path], None]:
    """Write another log, whose chain holds."""

    def changed(file: Path) -> None:
        path, previous, lines = file.parent / LOG, "", []
        records = change([json.loads(line) for line in path.read_bytes().splitlines()])
        for number, record in enumerate(records):
            line = json.dumps({**record, "line": number, "previous": previous}).encode()
            previous = chained(line)
            lines.append(line + b"\n")
        path.write_bytes(b"".join(lines))

    return changed


def log_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def changed(file: Path) -> None:
        path = file.parent / LOG
        path.write_bytes(change(path.read_bytes()))

    return changed


def replaced(name: str, value: Any, event: str = "certified") -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda records: [{**r, name: value} if r["event"] == event else r for r in records]


def forgeries() -> tuple[list[Forgery], list[Forgery]]:
    """List what is forged without a log beside the file, and what is forged of the log."""
    alone: list[Forgery] = [
        (f"{name}: {str(value)[:20]!r}", set_field(name, value), name)
        for name, values in FIELDS.items()
        for value in values
    ]
    alone += [(f"without {name}", drop_field(name), name) for name in ("inside", "radius", "pixels_sha256", "attempts")]
    alone += [
        ("key twice", raw(lambda text: text.replace("{", '{"inside": true, ', 1)), None),
        ("key twice, deep", raw(lambda text: text.replace('"settings": {', '"settings": {"a": 1, "a": 2, ')), None),
        ("nested", raw(lambda text: text.replace("{", '{"x": ' + "[" * 5000 + "]" * 5000 + ", ", 1)), None),
        ("a list", raw(lambda text: f"[{text}]"), None),
        ("cut", raw(lambda text: text[:-5]), None),
        ("two objects", raw(lambda text: text + text), None),
        ("NaN", raw(lambda text: text.replace("{", '{"x": NaN, ', 1)), None),
        ("1e999", raw(lambda text: text.replace("{", '{"x": 1e999, ', 1)), None),
        ("empty", raw(lambda text: ""), None),
        ("two megabytes", raw(lambda text: text.replace("{", '{"x": "' + "y" * 2**21 + '", ', 1)), None),
        ("bytes behind the file", append(b"PK\3\4" + b"x" * 99), None),
        ("one byte behind the file", append(b"\0"), None),
        ("a picture behind the file", append(b"\x89PNG\r\n\x1a\n" + b"x" * 50), None),
        ("second certificate, before", insert(b"tEXt", b"shielded\0{}"), None),
        ("second certificate, behind", insert(b"tEXt", b"shielded\0{}", b"IEND"), None),
        ("second certificate, zTXt", insert(b"zTXt", b"shielded\0\0" + zlib.compress(b"{}"), b"IEND"), None),
        ("second certificate, iTXt", insert(b"iTXt", b"shielded\0\0\0\0\0{}", b"IEND"), None),
        ("comment", insert(b"tEXt", b"Comment\0payload"), None),
        ("EXIF", insert(b"eXIf", b"MM\0*\0\0\0\x08\0\0\0\0\0\0", b"IEND"), None),
        ("private chunk", insert(b"prVt", b"payload" * 50), None),
        ("gamma", insert(b"gAMA", struct.pack(">I", 1000)), None),
        ("second frame", saved(lambda p: p, save_all=True, append_images=[Image.new("RGB", (128, 128), "red")]), None),
        ("hidden colours", saved(hide_behind_white), None),
        ("16 bits", saved(lambda p: Image.fromarray(np.array(p.convert("L")).astype(np.uint16) * 257)), None),
        ("more pixels", more_pixels, None),
        ("behind the pixels", behind_the_stream, None),
    ]
    of_log: list[Forgery] = [
        ("deleted", lambda file: (file.parent / LOG).unlink(), None),
        ("emptied", log_bytes(lambda data: b""), None),
        ("cut in a line", log_bytes(lambda data: data[: len(data) // 2]), None),
        ("last line removed", log_bytes(lambda data: b"\n".join(data.split(b"\n")[:-2]) + b"\n"), None),
        ("middle removed", log_bytes(lambda d: b"\n".join(d.split(b"\n")[:2] + d.split(b"\n")[5:])), None),
        ("nested", log_bytes(lambda data: data + b"[" * 100000 + b"]" * 100000 + b"\n"), None),
        ("line behind the end", log_bytes(lambda data: data + b'{"event": "certified"}\n'), None),
        ("key twice", log_bytes(lambda data: data.replace(b'"event"', b'"event": "x", "event"', 1)), None),
        ("no line end", log_bytes(lambda data: data[:-1]), None),
        ("rewritten without its images", log_lines(lambda rs: [r for r in rs if r["event"] != "certified"]), None),
        ("rewritten without trials", log_lines(lambda rs: [r for r in rs if r["event"] != "sampled"]), None),
        ("rewritten with another radius", log_lines(replaced("settings", {"radius": 1.0}, "start")), None),
        ("rewritten with another digest", log_lines(replaced("sha256", "0" * 64)), None),
        ("rewritten with another certificate", log_lines(replaced("certificate_sha256", "0" * 64)), None),
        ("rewritten with images twice", log_lines(lambda rs: [*rs[:-1], *rs[-3:]]), None),
    ]
    return alone, of_log


def judge(run: Path, forged: Forgery, space: LatentSpace, protected: ProtectedSet, log: bool) -> str:
    """Make one forgery of a copy of the run; return noticed, listed, or missed."""
    _, change, field = forged
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "with"
        images.mkdir()
        names = [path.name for path in sorted((run / "with").glob("*.png"))[:1]]
        for name in (names[0], Path(names[0]).with_suffix(".json").name, *([LOG] if log else [])):
            shutil.copy(run / "with" / name, images)
        if log:
            shutil.copy(run / "report.json", folder)
        file = images / names[0]
        change(file)
        with Image.open(file) as image:
            picture = image.convert("RGB")
        (found,), logs = verify_images([(file, picture)], space, protected)
    if found.problems or any(logs.values()):
        return "noticed"
    return "listed" if field and any(entry.split()[0] == field for entry in found.not_checked) else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("demo"), help="folder that `shielded demo` has written")
    run = parser.parse_args().run
    protected = ProtectedSet.open(run / "protected")
    space = LatentSpace.of(load("emoji", "cpu"), *(protected.space.image_size or ()))
    alone, of_log = forgeries()
    results: dict[str, list[str]] = {"noticed": [], "listed": [], "missed": []}
    assert judge(run, ("nothing", lambda file: None, None), space, protected, True) == "missed"  # nothing to notice
    for log, some in ((False, alone), (True, [(n, c, None) for n, c, _ in alone]), (True, of_log)):
        for forged in some:
            where = "with log: " if log else "no log: "
            results[judge(run, forged, space, protected, log)].append(where + forged[0])
    total = sum(map(len, results.values()))
    for name in results["missed"]:
        print("missed:", name)
    counts = ", ".join(f"{len(names)} {what}" for what, names in results.items())
    print(f"{total} forgeries: {counts}")
    sys.exit(bool(results["missed"]))


if __name__ == "__main__":
    main()
