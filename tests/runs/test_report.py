"""The page is parsed with the standard library's HTML parser, the grids are checked pixel by pixel."""

import base64
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image, ImageFont

from helpers.reports import (
    BLUE,
    DIVERSITY,
    GREEN,
    RED,
    SETTINGS,
    certificate,
    make_report,
    make_rows,
    make_trace,
    picture,
)
from shielded.runs.report import (
    Diversity,
    Row,
    distance_plot,
    diversity_grid,
    embedding,
    protection_grid,
    stack,
    trace_plot,
    write_report,
)
from shielded.runs.report.grid import _wrap

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags balance, and keeps the text, the attributes by tag, and the text of each tag."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.inside = [], [], "", {}
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.text += data
        for tag in set(self.open):
            self.inside[tag] = self.inside.get(tag, "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(tmp_path, report=None, rows=(), diversity=None, trace=(), settings=None, **kwargs):
    path = tmp_path / "report.html"
    write_report(path, make_report() if report is None else report, rows, diversity, trace, settings or {}, **kwargs)
    return Page(path.read_text(encoding="utf-8"))


def full_page(tmp_path, rows):
    return page_of(tmp_path, None, rows, DIVERSITY, make_trace(), SETTINGS)


@pytest.mark.parametrize("n", [1, 32])
def test_page_is_well_formed_and_names_every_picture(tmp_path, n):
    page = full_page(tmp_path, make_rows(n, protected=picture(GREEN)))
    images = page.all("img")
    assert len(images) == 3 * n + 4
    alts = [image["alt"] for image in images]
    assert alts.count(f"a red apple, seed {n - 1}, without SPELL") == 1
    assert alts.count("cat face, seed 7, with SPELL") == 1
    assert all(image["width"] == "64" for image in images)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in page.all("a")] + [a["aria-labelledby"] for a in page.all("section")]
    assert set(targets) <= set(ids)


def test_page_asks_nothing_of_the_network(tmp_path):
    page = full_page(tmp_path, make_rows(2))
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", html)
    assert page.all("html")[0]["lang"] == "en"


def test_embedded_pictures_hold_their_pixels(tmp_path):
    page = page_of(tmp_path, rows=make_rows(1))
    decoded = [Image.open(io.BytesIO(base64.b64decode(i["src"].split(",")[1]))) for i in page.all("img")]
    assert [image.convert("RGB").getpixel((32, 32)) for image in decoded] == [RED, BLUE]
    assert decoded[0].convert("RGB").tobytes() == picture(RED).tobytes()


def test_large_pictures_are_embedded_smaller(tmp_path):
    page = page_of(tmp_path, rows=make_rows(1, without=picture(RED, (2048, 1024))))
    assert (page.all("img")[0]["width"], page.all("img")[0]["height"]) == ("512", "256")


def test_many_pictures_are_embedded_smaller(monkeypatch):
    noise = [Image.effect_noise((140, 90), 80).convert("RGB") for _ in range(3)]
    whole = embedding.choose_level(noise)
    assert embedding.embedded(noise[0], whole)["reduced"] is False
    monkeypatch.setattr(embedding, "MAX_BYTES", 300_000)
    level = embedding.choose_level(noise * 10)
    assert level.quality < 90
    assert sum(len(embedding.embedded(image, level)["source"]) for image in noise) * 10 <= 1.05 * 300_000
    monkeypatch.setattr(embedding, "MAX_BYTES", 1)
    assert embedding.choose_level(noise) == embedding.LEVELS[-1]
    assert embedding.choose_level([]) == embedding.LEVELS[0]


def test_cards_say_why_an_image_is_another_one(tmp_path):
    trace = make_trace(steps=4, images=3)  # the first image is never pushed
    trace = [{**entry, "nearest_id": f"heart_{entry['step']}", "released": entry["image"] == 2} for entry in trace]
    rows = make_rows(3)
    rows[1] = replace(rows[1], attempts=3, repair="restart", cause="its picture was 9.00 from heart_7")
    rows[2] = replace(rows[2], with_=None, refused="a reason")
    page_of(tmp_path, rows=rows, trace=trace)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<span class="badge">(.*?)</span></h4>', html) == ["unchanged", "sampled again", "refused"]
    assert re.findall(r'<p class="reasons">(.+?)</p>', html) == [
        "Not moved: it came close to nothing.",
        "Moved in 4 of 4 steps, the first at noise level 1.00: it came too close to heart_0 and 3 others. Sampled 3 "
        "times, because at first its picture was 9.00 from heart_7.",
        "Moved in 4 of 4 steps, the first at noise level 1.00: it came too close to heart_0 and 3 others. Guidance "
        "was let go in 4 steps, so that it becomes another picture. Refused: a reason.",
    ]


def test_a_copy_is_marked_and_stands_beside_what_it_copies(tmp_path):
    copy = certificate(20.0, copy_id="heart_9", copy_similarity=0.934, copy_threshold=0.9, copy=True)
    rows = make_rows(1, certificate_without=copy, protected=picture(GREEN), copied=True, distance_without=None)
    assert figures(tmp_path, rows) == {"20.00 · outside · copy, 0.93": True, "16.25 · outside": False, "heart_9": False}
    report = make_report(copies_without=1, copies_with=0)
    page = page_of(tmp_path, report, rows)
    assert "Copies of a protected image by the set's descriptor: 1 without SPELL, 0 with it." in page.text
    assert "protected, copied" in page.inside["figcaption"]
    assert mask(protection_grid(rows, radius=16.0), GREEN).any()
    assert "There are copies. 2 images with SPELL are copies" in page_of(tmp_path, make_report(copies_with=2)).text


def test_many_certificates_are_folded_and_many_distances_counted(tmp_path):
    report = make_report(certificates=make_report()["certificates"] * 101)
    page = page_of(tmp_path, report, make_rows(65))
    assert "All 101 certificates" in page.inside["summary"]
    assert not page.all("circle")
    bars = [rect for rect in page.all("rect") if rect.get("class", "").startswith("bar")]
    assert [bar["class"] for bar in bars] == ["bar-before", "bar-after"]  # all 65 have the same two distances
    assert "65 with SPELL" in page.inside["svg"]


def test_user_text_is_escaped(tmp_path):
    attack = '<script>alert("x")</script>&$body'
    report = make_report(prompt=attack)
    report["certificates"][0].update(image=attack, nearest_id=attack, protected_set=attack, protected_version=attack)
    diversity = Diversity(attack, [1], [picture()], [picture()], 1.0, 1.0, 2.0)
    settings = {"protected": attack}
    page = page_of(tmp_path, report, make_rows(1, attack), diversity, make_trace(), settings, title=attack)
    assert len(page.all("script")) == 1  # the page's own
    assert page.inside["h1"] == attack
    assert page.inside["h3"] == 2 * attack
    assert attack in page.all("img")[0]["alt"]
    assert attack in page.inside["table"]


def test_numbers_of_the_report_appear(tmp_path):
    page = full_page(tmp_path, make_rows(2))
    facts = " ".join(page.inside["dl"].split())
    for number in (
        "6",
        "0",
        "4.11",
        "16.05",
        "2.31",
        "5.87",
        "12.3 s",
        "13.4 s",
        "radius 16.00",
        "of 8",
    ):
        assert number in facts
    table = page.inside["tbody"]
    for cell in (
        "with_000.png",
        "outside",
        "16.25",
        "16.05",
        "restart",
        "16.00",
        "1.016",
        "3",
        "heart_7",
        "0123456789ab…",
    ):
        assert cell in table
    assert "hearts, version 5" in page.text
    assert "4.50 · inside" in page.text
    assert "16.25 · outside" in page.text
    assert "not a promise of no resemblance" in page.text
    assert "was not kept" not in page.text


def test_a_leak_is_said_in_words(tmp_path):
    report = make_report(leaks_with=2)
    report["certificates"][0]["inside"] = True
    page = page_of(tmp_path, report)
    assert "distance was not kept everywhere. 2 images" in page.text
    assert "inside" in page.inside["tbody"]


def test_refused_images_are_listed_and_not_shown(tmp_path):
    refused = [{"prompt": "a <b>", "seed": 4, "attempts": 3, "reason": "inside"}]
    rows = [*make_rows(1), *make_rows(1, with_=None, distance_with=None)]
    page = page_of(tmp_path, make_report(refused=refused), rows)
    assert "1 image was refused and not written" in page.text
    assert "a <b>, seed 4: inside" in page.inside["li"]
    assert "1 image left a shield by sampling again, 2 images by a push" in page.text
    assert len(page.all("img")) == 3
    assert "refused" in page.inside["figcaption"]
    assert "Refused" not in page_of(tmp_path).inside["h2"]
    grid = protection_grid(rows, radius=16.0)
    assert (runs(grid, RED), runs(grid, BLUE)) == ([2, 1], [1, 1])


def test_missing_values(tmp_path):
    page = page_of(tmp_path, dict.fromkeys(make_report()), make_rows(1, distance_without=None, distance_with=None))
    assert "svg" not in page.inside
    assert "None" not in page.text
    assert "nan" not in page.text
    assert not page_of(tmp_path, {}).all("dl")
    page = page_of(
        tmp_path, make_report(seconds_with=None, certificates=[dict.fromkeys(make_report()["certificates"][0])])
    )
    assert "not measured" in page.inside["dl"]
    assert "not measured" in page.inside["tbody"]
    assert "None" not in page.text


def test_settings_are_python(tmp_path):
    page = page_of(tmp_path, settings=SETTINGS)
    code = page.inside["pre"]
    calls = {}

    class ProtectedSet:
        open = staticmethod(lambda path: ("opened", path))

    def spell(**kwargs):
        calls.update(kwargs)

    statement = code[code.index("spell =") : code.index("with spell")]
    exec(statement, {"Spell": spell, "ProtectedSet": ProtectedSet})
    assert calls == {**SETTINGS, "protected": ("opened", "demo/protected")}
    compile(code, "settings", "exec")
    assert "pipe('a red apple', num_images_per_prompt=8)" in code
    with pytest.raises(TypeError, match="setting radius is a object"):
        page_of(tmp_path, settings={"radius": object()})


def test_the_file_is_complete_or_untouched(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_report(path, make_report(), [], None, [], {"radius": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]

    def fail(draft, target):
        assert draft.read_text(encoding="utf-8").endswith("</html>\n")
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, make_report(), [], None, [], {})
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_colours_meet_wcag_aa():
    css = files("shielded.runs.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    themes = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(themes) == 3  # the last is for paper

    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in themes:
        colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})\b", theme))
        for front in ("ink", "muted", "without", "with"):
            for back in ("paper", "raised"):
                light, dark = sorted((luminance(colors[front]), luminance(colors[back])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5


# ----------------------------------------------------------------------------------------------------------------
# A caption and a mark say what the certificate says, whatever the distance of the latents and the run's radius are.


def figures(tmp_path, rows, **report):
    """Caption -> whether its picture is marked, for all pictures of the page."""
    page_of(tmp_path, make_report(**report), rows)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = re.findall(r"<figure>\s*(<img[^>]*>)?\s*<figcaption>\s*<b>[^<]*</b>([^<]*)</figcaption>", html)
    return {caption.strip(): "is-inside" in image for image, caption in found}


def test_a_leak_after_decoding_is_marked(tmp_path):
    leak = certificate(16.25, decoded_id="heart_7", decoded_distance=15.5, inside=True)
    rows = make_rows(1, distance_without=None, certificate_with=leak)
    assert figures(tmp_path, rows) == {"": False, "15.50 · inside once decoded": True}
    assert mask(protection_grid(rows, radius=16.0), MARKED).any()


def test_images_are_marked_by_radii_of_their_own(tmp_path):
    """Three shields of different radii: the run has no radius, and the nearer image is the one that is outside."""
    inside, outside, edge = certificate(9.0, radius=12.0), certificate(5.0, radius=4.0), certificate(6.0, radius=6.0)
    rows = [
        Row("p", 0, picture(RED), picture(BLUE), inside, outside),
        Row("p", 1, picture(RED), picture(BLUE), inside, edge),
    ]
    assert figures(tmp_path, rows, radius=None) == {
        "9.00 · inside": True,
        "5.00 · outside": False,
        "6.00 · outside": False,
    }
    assert mask(protection_grid(rows), MARKED).any()
    assert not mask(protection_grid([Row("p", 0, picture(RED), picture(BLUE), outside, edge)]), MARKED).any()


def test_a_refused_image_has_neither_distance_nor_mark(tmp_path):
    rows = make_rows(1, with_=None, distance_with=None, distance_without=20.0)
    assert figures(tmp_path, rows) == {"20.00 · outside": False, "refused": False}
    assert not mask(protection_grid(rows, radius=16.0), MARKED).any()


# ----------------------------------------------------------------------------------------------------------------
# Plots.


def test_distance_plot_places_points_on_the_axis():
    row = Row("p", 3, picture(), picture(), certificate(5.0), certificate(20.0))
    svg = Page(distance_plot([row], radius=15.0))
    circles = svg.all("circle")
    assert [c["cx"] for c in circles] == ["25.00%", "100.00%"]  # the axis ends at 20
    assert svg.all("rect")[0]["width"] == "75.00%"
    for text in ("radius 15.00", "seed 3", "5.00 → 20.00"):
        assert text in svg.text


def test_distance_plot_marks_what_its_certificate_calls_inside():
    leak = certificate(16.25, decoded_id="heart_7", decoded_distance=15.5, inside=True)
    row = make_rows(1, distance_without=20.0, distance_with=None, certificate_with=leak)[0]
    before, after = Page(distance_plot([row], radius=16.0)).all("circle")
    assert (before["class"], after["class"]) == ("before", "after is-inside")


def test_distance_plot_without_values():
    assert distance_plot([], 3.0) == ""
    assert distance_plot(make_rows(2, distance_without=None, distance_with=math.inf), 3.0) == ""
    svg = Page(distance_plot(make_rows(1, distance_without=None), None))
    assert len(svg.all("circle")) == 1
    assert not svg.all("rect")
    assert "not measured → 16.25" in svg.text
    assert len(Page(distance_plot(make_rows(1, distance_without=0.0, distance_with=0.0), 0.0)).all("circle")) == 2


def test_trace_plot_draws_means_and_ranges():
    rows = [
        {"noise_level": level, "active": active, "push": math.nan, "score_ratio": None}
        for level, values in ((1.0, (1, 3)), (0.5, (0, 0)))
        for active in values
    ]
    svg = Page(trace_plot(rows))
    assert svg.all("polyline")[0]["points"] == "0.00,50.00 50.00,100.00"  # mean 2 of an axis that ends at 4, then 0
    assert svg.all("polygon")[0]["points"] == "0.00,25.00 50.00,100.00 50.00,100.00 0.00,75.00"
    assert len(svg.all("polyline")) == 1  # nothing is known of push and score_ratio
    assert trace_plot([]) == ""
    assert len(Page(trace_plot(make_trace())).all("polyline")) == 3


def test_page_tells_how_often_a_shield_was_active(tmp_path):
    assert "active in 67% of all predictions" in page_of(tmp_path, trace=make_trace(images=3)).text
    assert "no shield was ever active" in page_of(tmp_path, trace=make_trace(images=1)).text


# ----------------------------------------------------------------------------------------------------------------
# Grids.


def mask(image, color):
    return (np.asarray(image) == color).all(-1)


def runs(image, color):
    """How many separate columns and rows of pictures hold the colour."""
    hits = mask(image, color)
    return [np.diff(hits.any(axis).astype(int), prepend=0).clip(0).sum() for axis in (0, 1)]


@pytest.mark.parametrize(("n", "columns", "bands"), [(1, 1, 1), (8, 8, 1), (9, 5, 2), (20, 7, 3)])
def test_protection_grid_lays_out_seeds(n, columns, bands):
    grid = protection_grid(make_rows(n))
    assert grid.mode == "RGB"
    assert grid.getpixel((0, 0)) == grid.getpixel((grid.width - 1, grid.height - 1)) == (255, 255, 255)
    assert runs(grid, RED) == runs(grid, BLUE) == [columns, bands]


def test_protection_grid_stays_narrow_with_many_prompts():
    rows = [row for i in range(64) for row in make_rows(1, prompt=f"prompt {i}", protected=picture(GREEN))]
    grid = protection_grid(rows, radius=16.0)
    assert grid.width <= protection_grid(make_rows(8)).width
    assert runs(grid, GREEN) == [4, 16]


MARKED = (168, 67, 15)


def test_grid_marks_what_lies_inside():
    assert mask(protection_grid(make_rows(1), radius=16.0), MARKED).any()
    assert not mask(protection_grid(make_rows(1, distance_without=20.0), radius=16.0), MARKED).any()
    assert not mask(protection_grid(make_rows(1, distance_without=None, distance_with=None)), MARKED).any()


def test_grid_keeps_proportions_and_flattens_transparency():
    clear = Image.new("RGBA", (512, 256), (0, 0, 0, 0))
    grid = protection_grid(make_rows(1, without=clear, with_=Image.new("RGB", (512, 256), BLUE)))
    assert mask(grid, BLUE).sum() == 256 * 128
    assert not mask(grid, (0, 0, 0)).any()


def test_diversity_grid():
    grid = diversity_grid(DIVERSITY)
    assert runs(grid, RED) == runs(grid, BLUE) == [2, 1]
    with pytest.raises(ValueError, match="same number"):
        Diversity("p", [1, 2], [picture()], [picture()], 1.0, 1.0, 1.0)


def test_stack():
    sheet = stack([Image.new("RGB", (4, 2), RED), Image.new("RGB", (2, 3), BLUE)])
    assert sheet.size == (4, 5)
    assert [sheet.getpixel(p) for p in ((3, 1), (1, 2), (3, 2))] == [RED, BLUE, (255, 255, 255)]
    with pytest.raises(ValueError, match="nothing to stack"):
        stack([])
    with pytest.raises(ValueError, match="at least one row"):
        protection_grid([])


@pytest.mark.parametrize("text", ["short", "a few words that need more lines " * 9, "x" * 400, "café 猫 ☕"])
def test_captions_fit_and_cuts_are_visible(text):
    lines = _wrap(text, 13, 120, lines=3)
    font = ImageFont.load_default(size=13)
    assert 1 <= len(lines) <= 3
    assert all(font.getlength(line) <= 120 for line in lines)
    if len(text) > 100:
        assert lines[-1].endswith("…")
    elif text == "short":
        assert lines == ["short"]
    else:
        assert lines == ["cafe ? ?"]
