"""The report in a real browser: on a phone and a desktop, in light and dark, with a keyboard."""

import pytest

from helpers.browser import chromium
from helpers.reports import make_report, make_rows, make_trace
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
    rows = [*make_rows(5, protected=make_rows(1)[0].without), *make_rows(9, prompt=WIDE)]
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
    for _ in range(30):
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


def test_settings_can_be_copied(browser, report):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(report)
    page.get_by_role("button", name="Copy settings").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#code").text_content()
    context.close()
