"""What a person reads off the pictures: legends, axes and what bars mean."""

import numpy as np
import pytest

from analysis.figures import log_ticks
from analysis.plots import draw_against, draw_over_epochs
from analysis.run_table import RHO, read_runs
from analysis.surface_plots import draw_contours, draw_lines, draw_surfaces

SAM = {"optmzr": "sgd-sam", "sam_v2": True}


def legend_of(figure):
    """The texts of the one legend, which is outside of the axes."""
    (legend,) = figure.legends
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    return [text.get_text() for text in legend.get_texts()]


def test_a_run_of_one_epoch_is_a_visible_point(study):
    study(54.0, epochs_done=1)
    figure = draw_over_epochs(read_runs([study.root]), ["optimizer"])
    assert legend_of(figure) == ["sgd"]
    (axes,) = figure.axes
    (line,) = axes.lines
    assert line.get_marker() == "o"
    assert line.get_xydata().tolist() == [[1, 54]]
    assert axes.get_xlim() == (0.5, 1.5)
    assert [tick for tick in axes.get_xticks() if 0.5 <= tick <= 1.5] == [1]
    assert axes.get_title() == "one seed each"


def test_a_few_lines_have_their_own_entries_and_bars(study):
    for seed in (0, 1):
        study(80.0 + seed, seed=seed)
        for rho in (0.05, 0.1):
            study(81.0 + seed, seed=seed, sam_rho=rho, **SAM)
    study(84.0, seed=2, sam_rho=0.1, **SAM)
    runs = read_runs([study.root])
    figure = draw_over_epochs(runs, ["optimizer", RHO])
    assert legend_of(figure) == ["sgd", "sgd SAM.v2, \u03c1 0.05", "sgd SAM.v2, \u03c1 0.1"]
    figure = draw_against(runs, RHO, ["optimizer"])
    assert legend_of(figure) == ["sgd", "sgd SAM.v2"]
    (axes,) = figure.axes
    assert axes.get_xlabel() == "\u03c1"
    assert axes.get_title() == "mean ± standard deviation over 2 to 3 seeds"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.05", "0.1"]
    dashed, means = (line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linestyle() != "None")
    assert (dashed.get_linestyle(), dashed.get_ydata()[0]) == ("--", 80.5)
    assert means.get_ydata().tolist() == pytest.approx([81.5, (81 + 82 + 84) / 3])
    (bars,) = (c for c in axes.collections if len(c.get_segments() if hasattr(c, "get_segments") else ()) == 2)
    assert np.ptp(bars.get_segments()[0][:, 1]) == pytest.approx(2 * 0.5**0.5)


def test_a_label_begins_with_what_tells_most(study):
    study(80.0, prune_method="none", sparsity=None, lr=0.2)
    study(81.0, momentum=0.8, sam_rho=0.05, **SAM)
    columns = ["optimizer", "--lr", "--momentum", "--prune_method", RHO, "--sparsity"]
    assert legend_of(draw_over_epochs(read_runs([study.root]), columns)) == [
        "sgd, dense, lr 0.2", "sgd SAM.v2, \u03c1 0.05, random, sparsity 0.9, lr 0.1, momentum 0.8",
    ]  # fmt: skip


def test_many_lines_are_coloured_by_optimizer(study):
    for lr in range(1, 8):
        study(80.0 + lr, lr=0.1 * lr)
        study(81.0 + lr, lr=0.1 * lr, sam_rho=0.05, **SAM)
    figure = draw_over_epochs(read_runs([study.root]), ["optimizer", "--lr"])
    assert legend_of(figure) == ["sgd", "sgd SAM.v2"]
    assert len(figure.axes[0].lines) == 14
    assert {line.get_color() for line in figure.axes[0].lines} == {"C0", "C1"}
    assert figure.axes[0].get_title() == "14 settings, one seed each; colours: optimizers"


def test_a_legend_has_at_most_ten_entries_that_fit_the_picture():
    axis = np.linspace(-0.5, 0.5, 5)
    labels = [f"network {number} with a long name, that goes on {'and on ' * 20}" for number in range(30)]
    lines = np.outer(np.arange(1.0, 31), axis**2 + 0.1)
    entries = legend_of(draw_lines(axis, lines, labels))
    assert len(entries) == 10
    assert entries[-1] == "and 21 more"


def test_surfaces_name_their_axes_and_units_and_survive_losses_that_are_not_finite():
    axis = np.array([-0.5, -0.25, 0, 0.25, 0.5])
    planes = np.stack([np.add.outer(axis**2, axis**2) + 0.01] * 4)
    planes[0, 0, 0], planes[1, 2, 2] = np.inf, 0.0
    names = ["a", "b", "c", "d"]
    contours, surfaces = draw_contours(axis, planes, names), draw_surfaces(axis, planes, names)
    assert (contours.get_supxlabel(), contours.get_supylabel()) == (
        "direction 1 (filter norms)", "direction 2 (filter norms)"
    )  # fmt: skip
    first = surfaces.axes[0]
    assert (first.get_xlabel(), first.get_zlabel()) == ("direction 1 (filter norms)", "loss (nats)")
    for figure in (contours, surfaces):
        figure.draw_without_rendering()
        assert [axes.get_title() for axes in figure.axes][:4] == names
        assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["-0.5", "0", "0.5"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.04, 3, [0.05, 0.1, 0.2, 0.5, 1, 2]), (1e-6, 20, [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1, 10]), (3, 4, [3, 4])],
)
def test_ticks_of_a_logarithmic_axis_are_round_numbers(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)
