"""The report in a real browser: on a phone and a desktop, in light and dark, with a keyboard."""

import pytest

from helpers.browser import chromium
from helpers.reports import GREEN, make_report, make_rows, make_trace, picture
from shielded.runs.report import write_report

WIDE = "a prompt of many words without any end and_one_word_that_is_longer_than_a_phone_is_wide_by_far"
OUTSIDE = """() => [...document.querySelectorAll('body *')].filter(e =>
    !e.closest('.scroll, pre, .hidden, svg svg') && e.getBoundingClientRect().right > innerWidth + 1
).map(e => e.tagName + ' ' + e.textContent.slice(0, 30))"""
SMALL = """() => [...document.querySelectorAll('body *')].filter(e =>
    [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) &&
    parseFloat(getComputedStyle(e).fontSize) < 12
).map(e => e.tagName + ' ' + e.textContent.slice(0, 30))"""
COLORS = "() => [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    large = picture(GREEN, (700, 700))
    rows = [
        *make_rows(5, protected=picture(GREEN), attempts=2, cause="its picture was near"),
        *make_rows(9, prompt=WIDE),
        *make_rows(1, prompt="large", without=large, file="one of.png"),
        *make_rows(1, prompt="refused", with_=None, refused="too near"),
    ]
    (path.parent / "without").mkdir()
    large.save(path.parent / "without" / "one of.png")
    settings = {"protected": "a/path/" * 20, "radius": 16.0}
    certificates = make_report()["certificates"] * 20
    write_report(path, make_report(prompt=WIDE, certificates=certificates), rows, None, make_trace(), settings)
    return path.as_uri()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_runs_over_and_nothing_is_tiny(browser, report, width):
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.goto(report)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(SMALL) == []
    heights = [box["height"] for link in page.locator("nav a, button").all() if (box := link.bounding_box())]
    assert min(heights) >= 24  # to be hit with a finger
    page.close()


def test_dark_and_light(browser, report):
    seen = set()
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(report)
        seen.add(tuple(page.evaluate(COLORS)))
        page.close()
    assert len(seen) == 2


def test_a_keyboard_reaches_everything_and_shows_where_it_is(browser, report):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(report)
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        tag, label, outline = page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e);"
            " return [e.tagName, e.getAttribute('aria-label') || e.textContent, s.outlineStyle + s.outlineWidth] }"
        )
        if tag == "BODY":
            break
        assert outline == "solid2px", label
        reached.append(label)
    assert {"Pictures", "Distances", "Certificates", "Settings", "Settings as Python code"} <= set(reached)
    assert any("0123456789ab" in label for label in reached)  # the table scrolls, so it takes the focus
    assert reached[-1] == "Copy settings"
    page.close()


def test_pictures_are_compared_with_keys(browser, report):
    """A card opens, its edge moves, its pictures swap, the next one follows, and the focus comes back."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(report)
    viewer, title, above = page.locator("#viewer"), page.locator("#viewer h2"), page.locator("#viewer .above")
    assert not viewer.is_visible()
    page.get_by_role("button", name="Compare a red apple, seed 1").focus()
    page.keyboard.press("Enter")
    assert title.text_content() == "a red apple, seed 1"
    assert page.locator("#viewer .beside").text_content() == "nearest protected heart_7"
    assert "because at first its picture was near" in viewer.text_content()
    assert "4.50 · inside" in viewer.text_content()
    before = above.evaluate("e => e.style.clipPath")
    page.keyboard.press("ArrowRight")
    assert above.evaluate("e => e.style.clipPath") != before
    page.keyboard.press("Space")
    assert above.evaluate("e => e.style.clipPath") == "inset(0px 0px 0px 0%)"  # all of it
    page.keyboard.press("n")
    assert title.text_content() == "a red apple, seed 2"
    page.keyboard.press("p")
    page.keyboard.press("p")
    page.keyboard.press("p")
    assert title.text_content() == "refused, seed 0"  # the last one
    assert not above.is_visible()
    assert not page.locator("#viewer .slider").is_visible()
    assert page.evaluate("document.querySelector('#viewer').getBoundingClientRect().width") <= 390
    page.keyboard.press("Escape")
    assert not viewer.is_visible()
    page.locator(":focus[aria-label='Compare refused, seed 0']").wait_for()
    page.close()


def test_pictures_are_compared_with_a_pointer_and_shown_whole(browser, report):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(report)
    page.get_by_alt_text("large, seed 0, without SPELL").click()
    box = page.locator("#viewer .stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 50)
    page.mouse.up()
    assert page.locator("#viewer input").input_value() == "25"
    expect = pytest.importorskip("playwright.sync_api").expect
    expect(page.locator("#viewer .below")).to_have_js_property("naturalWidth", 700)  # the file, not the page's
    page.get_by_role("button", name="Close").click()
    assert not page.locator("#viewer").is_visible()
    page.close()


def test_it_prints_without_what_is_for_the_screen(browser, report):
    page = browser.new_page(color_scheme="dark")
    page.goto(report)
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert page.locator("button:visible").count() == 0
    assert page.evaluate(COLORS) == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    assert page.evaluate("getComputedStyle(document.querySelector('.cards > li')).contentVisibility") == "visible"
    page.close()


def test_settings_can_be_copied(browser, report):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(report)
    page.get_by_role("button", name="Copy settings").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#code").text_content()
    context.close()
