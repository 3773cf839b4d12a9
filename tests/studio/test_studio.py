"""The studio: what a visitor can do, and the page in a real browser."""

import zipfile
from dataclasses import replace

import pytest
from PIL import Image

from helpers.browser import chromium
from helpers.leaking import inside_at_first
from shielded import ProtectedSet
from shielded.generation.sampling import generate
from shielded.latent_space import LatentSpace
from shielded.models import PRESETS, PROTECTION, load
from shielded.models.presets import EMOJI
from shielded.studio.choices import Choices
from shielded.studio.request import MOST_PROMPTS, job_of
from shielded.studio.session import MOST_UPLOADS, Session, Settings

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
    assert seen == [(i + 1, 12, "without SPELL" if i < 6 else "with SPELL") for i in range(12)]  # one bar, all the way
    assert session.protect_result() == "2 added."
    assert session.protect_result() == "they are protected already."
    again = []
    inside_at_first(monkeypatch, lambda: session.protected.vectors([0, 1]))  # so that there are restarts to show
    made = session.generate(SETTINGS, lambda *step: again.append(step))
    assert any("once more" in what for *_, what in again)  # restarts show, too
    assert all(1 <= done <= steps for done, steps, _ in again)
    assert [image.tobytes() for image in made.plain] == [image.tobytes() for image in first.plain]
    for row in made.rows:
        result = dict(zip(made.columns, row, strict=True))
        assert float(result["distance without"]) == 0
        assert result["result"] == "refused" or float(result["with"]) >= float(result["radius"]) - 0.005
        assert float(result["radius"]) == pytest.approx(0.45 * session.space.dim**0.5, abs=0.005)
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


def test_other_files_are_no_uploads(page):
    with pytest.raises(ValueError, match="only uploaded files"):
        page._uploaded("/etc/hostname")


def test_the_library_s_presets_are_taken_unless_others_are_asked_for(session):
    quick = replace(SETTINGS, radius=None, steps=2)
    first = session.generate(replace(quick, apart=True), nothing)
    assert session.desk.last.radius == pytest.approx(session.l2(job_of(False)["radius"]))
    assert [row[0] for row in first.rows] == [3, 4]
    assert "nearest protected" not in first.columns  # an empty column is left out
    session.protect_result()
    session.generate(replace(quick, n=1), nothing)
    spell = session.desk.last.spell
    assert {name: getattr(spell, name) for name in PROTECTION} == PROTECTION
    session.generate(replace(quick, n=1, overcompensation=1.5, release=0.6), nothing)
    spell = session.desk.last.spell
    assert (spell.overcompensation, spell.release) == (1.5, 0.6)


def test_what_the_copy_tier_and_the_release_did_is_said(session):
    one = replace(SETTINGS, n=1, radius=0.25)
    session.generate(replace(one, remember=True), nothing)
    session.protect_result()
    made = session.generate(one, nothing)
    assert "Changed copies, by the descriptor: **1 of 1 without SPELL, 0 with**" in made.summary
    assert "Guidance let go for 1 image" in made.summary
    result = dict(zip(made.columns, made.rows[0], strict=True))
    assert (result["similarity without"], result["result"]) == ("1.00", "outside")
    assert "it came too close to red heart, seed 3" in result["what happened"]
    session.find_copies_from(None)
    made = session.generate(replace(one, release=1), nothing)
    assert "copies" not in made.summary
    assert "Guidance let go" not in made.summary
    session.clear()
    with pytest.raises(ValueError, match="several images of a prompt"):
        session.generate(replace(one, apart=True), nothing)


def test_several_prompts_and_the_pictures_of_the_session(session):
    made = session.generate(replace(SETTINGS, prompt=" owl \n\npizza\nowl", n=1, steps=2, remember=True), nothing)
    assert made.names == ["owl, seed 3", "pizza, seed 3"]
    assert made.columns[:2] == ["prompt", "seed"]
    assert made.table.count("<tr") == 1 + 2 * 2
    assert "<td>&lt;b&gt;</td>" in replace(made, rows=[["<b>", "why"]]).table
    session.generate(replace(SETTINGS, n=1, steps=2, remember=True), nothing)
    assert [name for _, name in session.made][:3] == [
        "red heart, seed 3, without SPELL",
        "red heart, seed 3, with SPELL",
        "owl, seed 3, without SPELL",
    ]
    with pytest.raises(ValueError, match="there is no prompt"):
        session.generate(replace(SETTINGS, prompt=" \n"), nothing)
    with pytest.raises(ValueError, match=f"{MOST_PROMPTS} are the most"):
        session.generate(replace(SETTINGS, prompt="\n".join(map(str, range(9)))), nothing)


@pytest.fixture(scope="module")
def hearts(pipe, tmp_path_factory):
    """A protected set of one picture that the model makes."""
    space, folder = LatentSpace.of(pipe), tmp_path_factory.mktemp("sets") / "hearts"
    latents = generate(pipe, ["red heart"], [0], steps=4, guidance_scale=3.0, progress=False).latents
    ProtectedSet.create(folder, space).add(latents, ["heart"], 11.0)
    return folder


def test_a_set_of_the_server_counts_beside_the_visitor_s_own(session, hearts, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    session.protect_files([str(tmp_path / "red.png")])
    settings = Settings("red heart", n=1, steps=4, radius=0.243, apart=False, remember=False)
    made = session.generate(settings, nothing, [hearts])
    assert "1 of 1 without SPELL, 0 with" in made.summary
    assert session.desk.last.rows[0].protected is None  # its pictures are not the visitor's
    assert len(session.desk.last.certificates[0].others) == 1


def test_only_what_is_offered_can_be_chosen(pipe, session, hearts, tmp_path):
    choices = Choices(["emoji"], [hearts], "cpu")
    with pytest.raises(ValueError, match="does not offer that model"):
        choices.open("sdxl")
    with pytest.raises(ValueError, match="does not offer that protected set"):
        choices.paths(["../hearts"])
    assert choices.describe(["hearts"]).startswith("**hearts**: 1 images, no descriptor")
    assert choices.radius(["hearts"]) == 11.0
    ProtectedSet.create(tmp_path / "hearts", LatentSpace.of(pipe))
    with pytest.raises(ValueError, match="same name"):
        Choices(["emoji"], [hearts, tmp_path / "hearts"], "cpu")
    with pytest.raises(ValueError, match="is empty"):
        Choices(["emoji"], [tmp_path / "hearts"], "cpu")


def test_each_model_has_its_own_pictures(pipe, session, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    session.protect_files([str(tmp_path / "red.png")])
    session.use(pipe, "another", {})
    assert (len(session.protected), session.pictures) == (0, [])
    session.use(pipe, "emoji", {})
    assert [name for _, name in session.pictures] == ["red"]


# In a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studio(page, pipe, hearts, tmp_path_factory):
    """A browser, and the address of a studio with two models and a set."""
    with chromium() as browser, pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        app = page.build(["emoji", str(EMOJI)], "cpu", [hearts]).queue()
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **page.LAUNCH)
        yield browser, url
        app.close()


@pytest.fixture
def visit(studio):
    """Open the page as a new visitor: visit(width) -> page and playwright's expect."""
    expect = pytest.importorskip("playwright.sync_api").expect
    expect.set_options(timeout=60_000)
    browser, url = studio
    pages = []

    def opened(width=1280, **options):
        page = browser.new_page(viewport={"width": width, "height": 1000}, **options)
        page.set_default_timeout(60_000)
        page.goto(url)
        page.get_by_label("number input for Steps").fill("4")
        page.get_by_label("number input for Images of each prompt").fill("2")
        pages.append(page)
        return page, expect

    yield opened
    for page in pages:
        page.close()


def generated(page):
    page.get_by_role("button", name="Generate", exact=True).click()


def value(page, label):
    return page.get_by_label(f"number input for {label}")


def test_generate_protect_generate_again_in_a_browser(visit, tmp_path):
    page, expect = visit()
    for hidden in ("#table", "#shelf", "#compare", "#made"):
        expect(page.locator(hidden)).not_to_be_visible()  # nothing empty is shown
    value(page, "Overcompensation λ").fill("2")
    expect(page.locator("#effect")).to_contain_text("2 times the way")
    generated(page)
    page.locator(".progress-text").first.wait_for()
    assert page.locator(".progress-text").count() == 1
    expect(page.locator("#summary")).to_contain_text("apart without")
    page.get_by_role("button", name="Protect the images made without SPELL").click()
    expect(page.locator("#status")).to_contain_text("2 of your pictures protected.")
    expect(value(page, "Overcompensation λ")).to_have_value(f"{PROTECTION['overcompensation']:g}")
    for image in page.locator("#shelf .grid-wrap img").all():
        box, frame = image.bounding_box(), page.locator("#shelf").bounding_box()
        assert box["y"] + box["height"] <= frame["y"] + frame["height"] + 1  # whole
    generated(page)
    expect(page.locator("#summary")).to_contain_text("2 of 2 without SPELL, 0 with")
    expect(page.locator("#summary")).to_contain_text("Changed copies, by the descriptor: 2 of 2 without SPELL, 0 with")
    expect(page.locator("#summary")).to_contain_text("Guidance let go for 2 images")
    expect(page.locator("#table")).to_contain_text("outside")
    (tmp_path / "broken.HEIC").write_bytes(b"no picture")  # a kind that browsers do not know
    page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.HEIC")
    expect(page.locator("#status")).to_contain_text("broken.HEIC is not a picture that can be read")
    page.get_by_role("button", name="Forget earlier runs").click()
    expect(page.locator("#memory")).to_contain_text("No earlier images")


def test_a_model_and_a_set_are_chosen_in_a_browser(visit):
    page, expect = visit()
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name=str(EMOJI)).click()
    page.locator("#sets input").click()
    page.get_by_role("option", name="hearts").click()
    expect(page.locator("#about")).to_contain_text("hearts: 1 images, no descriptor")
    expect(value(page, "Radius, per √dim")).to_have_value("0.243")
    value(page, "Steps").fill("4")
    generated(page)
    expect(page.locator("#summary")).to_contain_text("without SPELL, 0 with")
    expect(page.locator("#table")).to_contain_text("heart")


def test_several_prompts_on_a_phone(visit):
    page, expect = visit(390, color_scheme="dark", has_touch=True)
    value(page, "Images of each prompt").fill("1")
    page.get_by_label("Prompts, one a line").fill("owl\npizza")
    generated(page)
    expect(page.locator("#table")).to_contain_text("pizza")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    tops = [page.locator(name).bounding_box()["y"] for name in ("#ask", "#results", "#settings")]
    assert tops == sorted(tops)  # what was made follows the button
    page.get_by_role("button", name="All pictures of this session").click()
    expect(page.locator("#made .grid-wrap img")).to_have_count(4)
    page.get_by_label("Prompts, one a line").fill("")
    generated(page)
    expect(page.get_by_text("There is no prompt; write what the images shall show.")).to_be_visible()
