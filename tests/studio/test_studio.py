"""The studio: what a visitor can do, and the page in a real browser."""

import os
import zipfile
from dataclasses import replace

import pytest
from PIL import Image

from helpers.browser import chromium
from helpers.leaking import inside_at_first
from shielded.models import PRESETS, load

gradio = pytest.importorskip("gradio")

from shielded.studio.page import LAUNCH, _uploaded, build  # noqa: E402
from shielded.studio.session import MOST_UPLOADS, Session, Settings  # noqa: E402

SCREENSHOT = os.environ.get("STUDIO_SCREENSHOT")  # where the documentation's picture is to be written
SETTINGS = Settings("red heart", n=2, seed=3, steps=6, radius=0.45, apart=False, remember=False)


@pytest.fixture(scope="module")
def pipe():
    return load("emoji", "cpu")


@pytest.fixture
def session(pipe):
    session = Session(pipe, "emoji", {"guidance_scale": PRESETS["emoji"].guidance})
    yield session
    session.close()


def nothing(*_):
    pass


def test_what_is_protected_is_kept_away_from(session, monkeypatch):
    with pytest.raises(ValueError, match="nothing to keep away from"):
        session.generate(SETTINGS, nothing)
    seen = []  # steps done, steps in all, what
    first = session.generate(replace(SETTINGS, apart=True), lambda *step: seen.append(step))
    assert [what for _, _, what in seen] == ["without SPELL"] * 6 + ["with SPELL"] * 6
    assert session.protect_result() == "2 added."
    assert session.protect_result() == "they are protected already."
    again = []
    inside_at_first(monkeypatch, lambda: session.protected.vectors([0, 1]))  # so that there are restarts to show
    made = session.generate(SETTINGS, lambda *step: again.append(step))
    assert any("once more" in what for *_, what in again)  # restarts show, too
    assert all(1 <= done <= steps for done, steps, _ in again)
    assert [image.tobytes() for image in made.plain] == [image.tobytes() for image in first.plain]
    for row in made.rows:
        result = dict(zip(("seed", "id", "without", "with", "decoded", "radius", "result"), row, strict=True))
        assert float(result["without"]) == 0
        assert result["result"] == "refused" or float(result["with"]) >= float(result["radius"]) - 0.005
    assert float(made.rows[0][5]) == pytest.approx(0.45 * session.space.dim**0.5, abs=0.005)
    assert "2 of 2 without" in made.summary
    names = zipfile.ZipFile(made.archive).namelist()
    assert {"report.html", "report.json", "with/audit.jsonl"} <= set(names)
    session.clear()
    assert len(session.protected) == len(session.pictures) == 0


def test_earlier_runs_are_remembered_until_they_are_forgotten(session):
    one = replace(SETTINGS, n=1, remember=True, radius=0.7)
    first, second = session.generate(one, nothing), session.generate(one, nothing)
    assert first.shielded[0].tobytes() != second.shielded[0].tobytes()  # the same seed
    assert len(session.history) == 2
    session.forget()
    assert session.generate(one, nothing).shielded[0].tobytes() == first.shielded[0].tobytes()


def test_uploads(session, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    red, broken = str(tmp_path / "red.png"), str(tmp_path / "broken.png")
    with pytest.raises(ValueError, match=r"broken\.png is not a picture"):
        session.protect_files([broken])
    assert session.protect_files([red, broken]).startswith("1 added. broken.png is not a picture")
    assert session.protect_files([red]) == "0 added, 1 already there."
    assert list(session.protected.ids) == ["red"]
    with pytest.raises(ValueError, match=str(MOST_UPLOADS)):
        session.protect_files([red] * (MOST_UPLOADS + 1))
    with pytest.raises(ValueError, match="only uploaded files"):
        _uploaded("/etc/hostname")


@pytest.fixture
def page(pipe, monkeypatch, tmp_path):
    with chromium() as browser:
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
        monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        app = build("emoji", "cpu").queue()
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        page.set_default_timeout(120_000)
        page.goto(url)
        yield page
        app.close()


def test_generate_protect_generate_again_in_a_browser(page, tmp_path):
    expect = pytest.importorskip("playwright.sync_api").expect
    expect.set_options(timeout=120_000)
    page.get_by_label("number input for Steps").fill("6")
    page.get_by_label("number input for Images").fill("2")
    page.get_by_label("number input for Overcompensation λ").fill("2")
    expect(page.locator("#effect")).to_contain_text("2 times the way")
    page.get_by_label("number input for Overcompensation λ").fill("1.6")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("#summary")).to_contain_text("apart without")
    page.get_by_role("button", name="Protect the images made without SPELL").click()
    expect(page.locator("#status")).to_contain_text("2 protected.")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("#summary")).to_contain_text("2 of 2 without SPELL, 0 with")
    expect(page.locator("#table")).to_contain_text("outside")
    if SCREENSHOT:
        page.screenshot(path=SCREENSHOT, full_page=True)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
    expect(page.locator("#status")).to_contain_text("broken.png is not a picture that can be read")
    page.get_by_role("button", name="Forget earlier runs").click()
    expect(page.locator("#memory")).to_contain_text("No earlier images")
