"""What a session and the studio's server may hold, and whom it answers."""

import asyncio
import gc
import stat
import warnings
from contextlib import closing

import pytest
import torch
from PIL import Image

from shielded.models import load
from shielded.studio import limits, session
from shielded.studio.limits import OwnHostOnly, Server
from shielded.studio.session import Session


@pytest.fixture(scope="module")
def pipe():
    return load("emoji", "cpu")


def pictures(folder, sizes):
    paths = []
    for i, size in enumerate(sizes):
        paths.append(str(folder / f"{i}.png"))
        Image.new("RGB", size, (i, 99, 7)).save(paths[-1])
    return paths


@pytest.mark.parametrize("what", ["pixels", "pictures", "files", "disk"])
@pytest.mark.parametrize("whose", ["session", "server"])
def test_what_is_held_is_bounded_in_total(pipe, tmp_path, what, whose):
    limit = {what: {"pixels": 5000, "pictures": 2, "files": 2, "disk": 24_000}[what]}
    server = Server(limit, {}) if whose == "session" else Server({}, limit)
    paths = pictures(tmp_path, [(40, 30)] * 6)
    with closing(Session(pipe, "emoji", {}, server)) as mine, closing(Session(pipe, "emoji", {}, server)) as second:
        other = mine if whose == "session" else second
        mine.protect_files(paths[:2])
        with pytest.raises(ValueError, match=f"this {whose} takes"):
            any(other.protect_files([path]) is None for path in paths[2:])  # one call after the other
        assert 2 <= len(mine.protected) + len(second.protected) < 6
        if whose == "server":
            mine.close()
            other.protect_files(paths[:1])  # there is room again


def test_pictures_are_kept_reduced_and_encoded_as_they_are(pipe, tmp_path):
    with_limits = Session(pipe, "emoji", {}, Server())
    picture = Image.effect_noise((900, 700), 60).convert("RGB")
    picture.save(tmp_path / "noise.png")
    with_limits.protect_files([str(tmp_path / "noise.png")])
    preview, name = with_limits.pictures[0]
    assert (max(preview.size), name) == (session.PREVIEW, "noise")
    expected = with_limits.space.encode([picture])
    torch.testing.assert_close(with_limits.protected.vectors([0]), expected, rtol=0, atol=1e-5)
    folder = with_limits.protected.path.parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with_limits.close()
    with_limits.close()
    assert not folder.exists()


def test_the_server_has_room_for_so_many_sessions(pipe, monkeypatch):
    monkeypatch.setattr(limits, "MOST_SESSIONS", 2)
    server = Server()
    usages = [server.open(), server.open()]
    with pytest.raises(ValueError, match="2 visitors are here already"):
        server.open()
    usages[0].close()
    server.open()


@pytest.mark.parametrize(
    ("listens", "host", "origin", "status"),
    [
        ("127.0.0.1", "127.0.0.1:7860", None, None),
        ("127.0.0.1", "localhost:7860", "http://localhost:7860", None),
        ("::1", "[::1]:7860", None, None),
        ("0.0.0.0", "192.168.1.5:7860", "http://192.168.1.5:7860", None),
        ("127.0.0.1", "evil.example:7860", None, 421),
        ("0.0.0.0", "rebound.evil.example:7860", None, 421),
        ("127.0.0.1", "localhost:7861", None, 421),
        ("127.0.0.1", "localhost:7860@evil.example", None, 421),
        ("127.0.0.1", "localhost:notaport", None, 421),
        ("192.168.1.5", "localhost:7860", None, 421),
        ("127.0.0.1", "localhost:7860", "http://evil.example", 403),
        ("127.0.0.1", "localhost:7860", "http://localhost:3000", 403),
        ("127.0.0.1", "localhost:7860", "null", 403),
        ("127.0.0.1", "localhost:7860", "http://[", 403),
        ("127.0.0.1", "localhost:7860", "https://localhost:7860/page", 403),
        ("127.0.0.1", "localhost:7860/evil.example", None, 421),
        ("127.0.0.1", "localhost:7860#evil.example", None, 421),
    ],
)
def test_host_and_origin(listens, host, origin, status):
    guard = OwnHostOnly(None, listens, 7860)
    headers = [("host", host), *([("origin", origin)] if origin else [])]
    found = guard.refused(headers)
    assert (found and found[0]) == status
    assert guard.refused(headers[1:])[0] == 421  # no Host at all
    assert guard.refused([*headers, ("host", host)])[0] == 421  # two of them


@pytest.mark.parametrize(("length", "status"), [(b"10", 200), (None, 411), (b"-5", 411), (b"10000000000", 413)])
def test_uploads_are_bounded(tmp_path, length, status):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"127.0.0.1:7860"), *([(b"content-length", length)] if length else [])]
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}
    asyncio.run(OwnHostOnly(app, "127.0.0.1", 7860, tmp_path)(scope, None, send))
    assert sent[0]["status"] == status


@pytest.fixture(scope="module")
def run(page):
    """What the page calls with all that a visitor has set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # building leaves an event loop behind
        app = page.build("emoji", "cpu")
        gc.collect()
    return next(function.fn for function in app.fns.values() if function.name == "started")


@pytest.mark.parametrize("error", [RuntimeError, KeyError, MemoryError, UnicodeError])
def test_prompts_do_not_reach_the_log(run, error, monkeypatch, caplog, capfd):
    gradio = pytest.importorskip("gradio")
    secret = "a walrus that nobody is to know of"

    def fails(self, settings, *arguments):
        raise error(f"cannot draw {settings.prompt}")

    monkeypatch.setattr(Session, "generate", fails)
    monkeypatch.setattr(limits, "MOST_SESSIONS", 1)
    for _ in range(2):  # the session of the first try, of which the page never heard, takes nobody's place
        with pytest.raises(gradio.Error, match=r"the run failed|[Cc]annot draw") as raised:
            run(None, [], 1.0, secret, 1, 0, 2, 0.25, 2.5, 0.2, 0.0, True, False, progress=lambda *_, **__: None)
    refused = issubclass(error, ValueError)  # which the visitor alone is told
    assert (secret in str(raised.value)) == refused
    assert not raised.value.print_exception
    assert secret not in caplog.text + "".join(capfd.readouterr())
