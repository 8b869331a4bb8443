"""Names that would be code in a page, in Plotly or in a spreadsheet are text, and nothing else."""

from __future__ import annotations

import csv
import io
import json
from urllib.parse import unquote

import pandas as pd
import plotly.graph_objects as go
import pytest
from report_folders import compare_folder, eval_folder, monitor_log, probe_folder, train_folder

from rnn_longctx.eval.show.page.page import rendered, write_page
from rnn_longctx.eval.show.page.parts import Code, Figure, Page, Section, Slider, Step, Switch, Table, page_of
from rnn_longctx.eval.show.page.text import clean, escaped, for_plotly, for_script

FLAG = "window.hacked=1"
HOSTILE = (
    f"</script><script>{FLAG}</script>",
    f'<img src=x onerror="{FLAG}">',
    f"\"' onmouseover='{FLAG}' x=\"",
    f'<a href="javascript:{FLAG}">click</a>',
    f"<!--<script>{FLAG}//",
    f"${{{FLAG}}} `{FLAG}`",
)
FORMULAS = ("=cmd()", "+cmd()", "-cmd()", "@cmd()", "\t=cmd()", "\r=cmd()", "=1+1,2", "-2+3+x", "+1+x", "-inf+x")
NUMBERS = ("-2.5", "+.5e-3", "-inf")
TERMINAL = "\x1b]0;owned\x07\x1b[31m\u202egnp.exe\x9b"
EVERYTHING = " ".join((*HOSTILE, *FORMULAS, TERMINAL))


def folders(root):
    yield eval_folder(root / "eval", model=EVERYTHING, remedy=f"rri+{EVERYTHING}", text=EVERYTHING)
    yield probe_folder(root / "probe", model=EVERYTHING, verdict=f"{EVERYTHING}; {EVERYTHING}")
    yield compare_folder(root / "compare", entry=EVERYTHING)
    yield train_folder(root / "train", decision=EVERYTHING)
    yield monitor_log(root / "<img src=x onerror=window.hacked=1>=cmd().jsonl", action=EVERYTHING, time=EVERYTHING)


def own(name: str, text: str) -> Page:
    """A page that says a text wherever one can be said."""
    frame = pd.DataFrame({text: [text, None], "n": [1, 2]})
    plot = go.Figure(go.Scatter(x=[1, 2], y=[1, 2], name=text, text=[text] * 2, hovertemplate=f"{text}%{{y}}"))
    plot.add_scatter(x=[1, 2], y=[2, 1], name=text, customdata=[text] * 2, hovertemplate="%{customdata}<extra></extra>")
    plot.update_layout(xaxis={"title": {"text": text}}, annotations=[{"text": text, "x": 1, "y": 1}])
    figure = Figure(text, plot, text, frame, [Switch(text, [0]), Switch(text, [1])])
    bars = go.Figure(go.Heatmap(z=[[1, 2]], x=[text, "b"], y=[text]))
    slider = Figure(text, bars, text, frame, slider=Slider(text, [Step(text, [0], text)]))
    return Page(
        text, [text, text], {text: text}, [Section(text, [text, Code(text), Table(text, frame, text), figure, slider])]
    )


@pytest.mark.parametrize("name", ["own", "folders"])
def test_hostile_names_do_nothing(name, tmp_path, visit):
    """Every page is opened, hovered, clicked and unfolded: no flag is set, nothing is asked for, no link appears."""
    pages = [own(name, EVERYTHING)] if name == "own" else [page_of(path) for path in folders(tmp_path)]
    seen = visit()
    for i, page in enumerate(pages):
        path = write_page(page, tmp_path / f"{i}.html")
        seen.requests.clear()
        tab = seen.open(path.as_uri())
        tab.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
        for figure in tab.evaluate("Object.keys(page.figures)")[:2]:
            plot = tab.locator(f"#{figure}-plot")
            plot.scroll_into_view_if_needed()
            box = plot.bounding_box()
            for share in (0.2, 0.5, 0.9):
                tab.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
                tab.mouse.click(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        assert tab.locator(".plot a, img, main a:not([href^='#']):not([href^='data:text/csv'])").count() == 0
        assert tab.evaluate("window.hacked") is None
        assert seen.requests == [path.as_uri()] and not seen.errors
        assert "<script>" in tab.locator("body").inner_text(), "it is shown as it is"


def test_a_spreadsheet_takes_no_cell_for_a_formula(tmp_path, visit):
    more = [*NUMBERS, *["1"] * (len(FORMULAS) - len(NUMBERS))]
    frame = pd.DataFrame({"=head()": FORMULAS, "n": [-1.5, *range(1, len(FORMULAS))], "m": more})
    path = write_page(Page("formulas", ["x"], {}, [Section("s", [Table("t", frame)])]), tmp_path / "page.html")
    tab = visit().open(path.as_uri())
    href = tab.locator("a.csv").get_attribute("href")
    rows = list(csv.reader(io.StringIO(unquote(href.partition(",")[2]), newline="")))
    assert rows[0][0] == "'=head()" and [row[1] for row in rows[1:3]] == ["-1.5", "1"]
    assert [row[2] for row in rows[1:]] == more, "what is a number from end to end is none"
    assert not any(row[0].startswith(tuple("=+-@\t\r")) for row in rows[1:])


def test_text_is_cleaned_and_escaped_once():
    shown = clean(TERMINAL + "\ud800")
    assert not set(shown) & set("\x1b\x07\x9b\u202e\ud800") and "gnp.exe" in shown
    shown.encode()
    assert escaped("<&'\">\n") == "&lt;&amp;&#x27;&quot;&gt;\n"
    assert "<" not in for_script({"a": "</script><!--"}) and json.loads(for_script({"a": "</x>"})) == {"a": "</x>"}
    assert for_plotly({"name": "<b>\n&"}) == {"name": "&lt;b&gt;<br>&amp;"}
    template = for_plotly({"hovertemplate": "<a>%{y}<extra></extra>", "name": "<extra></extra>"})
    assert template == {"hovertemplate": "&lt;a&gt;%{y}<extra></extra>", "name": "&lt;extra&gt;&lt;/extra&gt;"}
    assert len(clean("x" * 10**6)) == 10_000


def test_no_tag_of_data_is_in_the_source():
    """Also without a browser: between Plotly's script and the styles there is no tag that was in the data."""
    text = rendered(own("own", EVERYTHING))
    body, _, after = text.partition('<script type="application/json" id="data">')
    assert "<script" not in body and "<img" not in body and '<a href="java' not in body
    data = after.partition("</script>")[0]
    assert FLAG in data and "<" not in data and EVERYTHING[:40] in json.loads(data)["tables"]["t0"]["columns"][0]
