from __future__ import annotations

import math
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from rnn_longctx.config import format_length
from rnn_longctx.eval.show import plots
from rnn_longctx.eval.show.plots import plot_all
from rnn_longctx.eval.tables.sheets import sheets

NAMES = ["loss_over_length.png", "context_gain.png", "passkey.png"]


def test_three_figures_of_readable_size(story, tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    paths = plot_all(story, tmp_path / "new" / "plots")
    assert [p.name for p in paths] == NAMES
    for path in paths:
        image = imread(path)
        assert image.shape[1] == 1350 and 500 < image.shape[0] < 1500  # 9 inches at 150 dpi
        assert image[..., :3].std() > 0.05  # not blank
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_loss_figure_holds_every_number(story):
    sheet = sheets(story)[0]
    (axes,) = plots._loss(sheet).axes
    lines = {line.get_label(): line for line in axes.lines}
    for name in sheet.cells:
        assert lines[name].get_ydata() == pytest.approx(sheet.values(name)[1])
    dashed = {name for name in sheet.cells if lines[name].get_linestyle() != "-"}
    assert dashed == {name for name in sheet.cells if sheet.is_control(name)}
    assert len({(lines[n].get_color(), lines[n].get_linestyle()) for n in sheet.cells}) == len(sheet.cells)
    assert set(lines["training length"].get_xdata()) == {256}
    (threshold,) = (line for label, line in lines.items() if label.startswith("collapse"))
    assert threshold.get_ydata()[0] == pytest.approx(2 * sheet.peaks["none"])
    assert [t.get_text() for t in axes.get_xticklabels()] == [format_length(k) for k in sheet.lengths]


def test_gain_figure_shows_remedies_though_the_bare_model_collapsed(story):
    sheet = sheets(story)[0]
    figure = plots._gain(sheet)
    assert figure is not None
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert low > -0.2 and low < 0 < high
    assert any("none (off the plot, to -4." in str(line.get_label()) for line in axes.lines)
    for name in sheet.remedies():
        (line,) = (line for line in axes.lines if line.get_label() == name)
        assert (low < np.asarray(line.get_ydata())).all() and (np.asarray(line.get_ydata()) < high).all()


def test_passkey_figure_has_a_panel_per_mitigation(story):
    sheet = sheets(story)[1]
    missing = (sheet.lengths[-1], 0.95)
    del sheet.depths["state-norm"][missing]
    panels = [axes for axes in plots._recall(sheet).axes if axes.images]
    assert [p.get_title(loc="left") for p in panels] == list(sheet.cells)
    for name, panel in zip(sheet.cells, panels):
        grid = panel.images[0].get_array()
        assert grid.shape == (10, 9) and panel.images[0].get_clim() == (0, 1)
        for (length, depth), cell in sheet.depths[name].items():
            at = grid[round(depth * 10 - 0.5), sheet.lengths.index(length)]
            assert at == pytest.approx(cell.value)
        assert panel.lines[0].get_xdata()[0] == 0.5  # after 256, the first column
    assert np.isnan(np.ma.filled(panels[3].images[0].get_array(), np.nan)[9, 8])


@pytest.mark.filterwarnings("error")
def test_odd_tables_still_draw(story, make, tmp_path):
    assert plot_all(story.iloc[:0], tmp_path) == []
    few = story[(story["length"] == 1024) & (story["mitigation"] == "none") & story["depth"].isna()]
    assert [p.name for p in plot_all(few, tmp_path)] == ["loss_over_length.png", "passkey.png"]
    blown = story[story["task"] == "lm"].copy()
    for length, value in ((32768, math.inf), (65536, math.nan)):
        for i in blown.index[(blown["mitigation"] == "none") & (blown["length"] == length)]:
            blown.at[i, "value"], blown.at[i, "samples"] = value, [value] * 16
    blown["train_length"] = pd.NA
    assert [p.name for p in plot_all(blown, tmp_path)] == NAMES[:2]


def test_two_models_get_their_own_files(make, tmp_path):
    a, b = (make(lengths=[256, 512], slices=3, per_depth=1, model=m) for m in ("org/a", "org/b"))
    paths = plot_all(pd.concat([a, b], ignore_index=True), tmp_path)
    assert len(set(paths)) == 6 and (tmp_path / "passkey-org-b.png").exists()
