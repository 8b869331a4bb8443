"""Every kind of report in a browser: drawn, silent, switched by mouse and keys, and read by those who do not see it."""

from __future__ import annotations

import csv
import io
from urllib.parse import unquote

import pytest
from report_folders import FOLDERS
from report_visits import Visit

PHONE, DESKTOP = 390, 1100
PAPER = "() => document.querySelector('#f0-plot .main-svg').style.backgroundColor"


@pytest.fixture(scope="module", params=sorted(FOLDERS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def opened(kind, chromium, report_of):
    """The report of a kind, opened once for all tests of it: as a browser takes a second to draw it."""
    context = chromium.new_context(color_scheme="light", viewport={"width": DESKTOP, "height": 900})
    seen = Visit(context.new_page())
    seen.open(report_of(kind).as_uri())
    yield seen
    context.close()


def test_a_report_is_drawn_and_asks_for_nothing(kind, opened, report_of):
    tab = opened.tab
    assert opened.requests == [report_of(kind).as_uri()] and not opened.errors
    opened.check_figures()
    names = opened.figures()
    assert tab.locator(".verdict li, .verdict p").count()
    assert tab.locator("a[href*='plotly'], .modebar, .plotlyjsicon").count() == 0
    details = tab.locator(f"#{names[0]} details")
    details.locator("summary").click()
    details.locator("tbody tr").first.wait_for()


def test_switches_and_sliders_change_what_is_shown(opened):
    """By mouse and by keys."""
    seen, tab = opened, opened.tab
    for name in seen.figures():
        boxes = tab.locator(f"#{name} input[type=checkbox]")
        for i in range(boxes.count()):
            before = seen.shown(name)
            boxes.nth(i).click()
            assert sum(seen.settled(name, before)) != sum(before), f"switch {i} of {name}"
        if boxes.count():
            before = seen.shown(name)
            boxes.first.focus()
            tab.keyboard.press("Space")
            assert seen.settled(name, before)[0] != before[0]
        slider = tab.locator(f"#{name} input[type=range]")
        if slider.count():
            before, words = seen.shown(name), tab.locator(f"#{name} output").inner_text()
            slider.focus()
            tab.keyboard.press("Home")
            first = seen.settled(name, before)
            assert sum(first) == sum(before) == 1 and first != before
            assert tab.locator(f"#{name} output").inner_text() != words
            assert slider.get_attribute("aria-valuetext") in tab.locator(f"#{name} output").inner_text()
            tab.keyboard.press("ArrowRight")
            assert seen.settled(name, first) != before
    assert not seen.errors


def test_no_serious_fault_for_those_who_do_not_see_or_point(kind, opened):
    """axe-core, light and dark, at the width of a desktop and of a phone; and nothing is wider than the phone."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tab = opened.tab
    tab.locator("details summary").first.click()
    for scheme, width in (("light", DESKTOP), ("dark", PHONE), ("light", PHONE), ("dark", DESKTOP)):
        first = (scheme, width) in (("light", DESKTOP), ("dark", PHONE))
        if kind != "eval" and not first:
            continue  # what they have of their own was seen at the first two
        # Colours are of one style sheet: both schemes are seen on the page of an evaluation.
        rules = {} if kind == "eval" and first else {"color-contrast": {"enabled": False}}
        how = {"resultTypes": ["violations"], "rules": rules}
        tab.emulate_media(color_scheme=scheme)
        tab.set_viewport_size({"width": width, "height": 900})
        # What is inside a plot is a picture with a text of its own, and hundreds of elements.
        found = axe.run(tab, context={"exclude": [[".plot svg"]]}, options=how)
        faults = [f for f in found.response["violations"] if f["impact"] in ("serious", "critical")]
        grave = [(f["id"], [node["html"][:200] for node in f["nodes"]]) for f in faults]
        assert not grave, (scheme, width, grave)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_and_light_follow_the_reader(report_of, visit):
    seen = visit("dark")
    tab = seen.open(report_of("eval").as_uri())
    dark = tab.evaluate(PAPER)
    tab.locator("#f0 input[type=checkbox]").first.uncheck()
    hidden = seen.shown("f0")
    tab.emulate_media(color_scheme="light")
    tab.wait_for_function(f"dark => ({PAPER})() !== dark", arg=dark)
    assert tab.evaluate(PAPER) == "rgb(255, 255, 255)" and seen.shown("f0") == hidden


def test_figures_and_tables_are_saved(report_of, visit):
    seen = visit()
    tab = seen.open(report_of("eval").as_uri())
    for form, begins in (("png", b"\x89PNG"), ("svg", b"<svg")):
        with tab.expect_download() as waiting:
            tab.locator(f"#f0 button[data-save={form}]").click()
        picture = waiting.value.path().read_bytes()
        assert picture.startswith(begins) and waiting.value.suggested_filename.endswith(f".{form}")
    assert b"state-norm" in picture and b"Loss over positions" in picture, "the picture has its title and legend"
    with tab.expect_download() as waiting:
        tab.locator("#f0 a.csv").click()
    rows = list(csv.DictReader(io.StringIO(waiting.value.path().read_text())))
    assert {row["mitigation"] for row in rows} == {"none", "state-norm", "recompute:last=256"}
    assert {int(row["length"]) for row in rows} == {256, 1024, 4096, 16384} and not seen.errors


def test_paper_is_light_and_has_no_buttons(report_of, visit):
    seen = visit("dark")
    tab = seen.open(report_of("eval").as_uri())
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    tab.emulate_media(media="print", color_scheme="dark")
    assert not tab.locator("#f0 button").first.is_visible() and not tab.locator("#f0 details").is_visible()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    tab.wait_for_function(f"() => ({PAPER})() === 'rgb(255, 255, 255)'")
    wide = tab.locator("#f0-plot svg.main-svg").first.bounding_box()["width"]
    assert wide <= 680, "as wide as a sheet of A4"
    assert tab.pdf(format="A4").startswith(b"%PDF")


def test_the_policy_holds(report_of, visit):
    """A script that was not written with the page does not run, and no request leaves it."""
    seen = visit()
    tab = seen.open(report_of("eval").as_uri())
    run = """() => {
        const script = document.createElement('script');
        script.textContent = 'window.hacked = 1';
        document.body.append(script);
        document.body.insertAdjacentHTML('beforeend', '<img src=x onerror="window.hacked = 1">');
        return fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused');
    }"""
    assert tab.evaluate(run) == "refused"
    assert tab.evaluate("window.hacked") is None
    assert any("Content Security Policy" in text for text in seen.errors)


def test_csv_is_in_the_page_itself(report_of, visit):
    tab = visit().open(report_of("monitor").as_uri())
    for link in tab.locator("a.csv").all():
        href = link.get_attribute("href")
        assert href.startswith("data:text/csv") and "\r\n" in unquote(href)
