"""Every figure in both styles, of several made runs: no text is cut off, lies on another, or hides what is drawn."""

from functools import cache
from itertools import combinations

import pytest
from matplotlib.text import Text

from analysis import style
from analysis.figures import FIGURES
from tests.analysis.images import assert_looks_like
from tests.analysis.made_runs import measured_runs, simulated_run

pytestmark = pytest.mark.slow
LACKING = {
    *((name, "schedules") for name in ("accuracy_time", "accuracy_steps", "accuracy_tokens", "energy")),
    *((name, "one step") for name in ("accuracy_time", "accuracy_steps", "accuracy_tokens", "energy", "speedup")),
    *(("predicted_measured", of) for of in ("schedules", "one step")),
}
"""Figures that these runs have no numbers for."""
TOUCH = 0.5
"""Pixels."""


@pytest.fixture(scope="module")
def sets(simulated, tmp_path_factory):
    """Measured runs; one under each schedule, truncated twice; and a run of a single step."""
    folder = tmp_path_factory.mktemp("sets")
    more = {
        "truncated-256": {"schedule": {"kind": "truncated", "window": 256}},
        "tail-batching": {"schedule": {"kind": "tail_batching", "threshold": 1024}},
        "one": {"workload": {"steps": 1}},
    }
    made = {name: simulated_run(folder / name, changes) for name, changes in more.items()}
    one = made.pop("one")
    return {"measured": measured_runs(folder), "schedules": [*simulated.values(), *made.values()], "one step": [one]}


@pytest.fixture(scope="module")
def drawn(sets):
    @cache
    def draw(name, of, look):
        with style.use(look):
            return FIGURES[name].draw(FIGURES[name].data(sets[of]), sets[of])

    return draw


def richest(name):
    return "measured" if (name, "schedules") in LACKING else "schedules"


def cases():
    """(figure, runs, style): of all runs on paper, which has least room, and of one set on a screen."""
    paper = [(name, of, "paper") for name in FIGURES for of in ("measured", "schedules", "one step")]
    return [case for case in paper if case[:2] not in LACKING] + [(name, richest(name), "screen") for name in FIGURES]


def ticks(axis):
    """Labels within the limits of the axis."""
    low, high = sorted(axis.get_view_interval())
    reach = 1e-6 * (high - low)
    return [tick.label1 for tick in all_ticks(axis)
            if low - reach <= tick.get_loc() <= high + reach and tick.label1.get_text()]  # fmt: skip


def all_ticks(axis):
    return [*axis.get_major_ticks(), *axis.get_minor_ticks()]


def texts(figure):
    """Visible ones; of an axis only those within its limits."""
    axes = [axis for own in figure.axes if own.axison for axis in (own.xaxis, own.yaxis)]
    of_ticks = {id(label) for axis in axes for tick in all_ticks(axis) for label in (tick.label1, tick.label2)}
    others = [text for text in figure.findobj(Text) if id(text) not in of_ticks and text.get_text().strip()]
    return [text for text in (*others, *(label for axis in axes for label in ticks(axis))) if text.get_visible()]


def overlap(first, second):
    wide = min(first.x1, second.x1) - max(first.x0, second.x0)
    high = min(first.y1, second.y1) - max(first.y0, second.y0)
    return wide > TOUCH and high > TOUCH


@pytest.mark.parametrize(("name", "of", "look"), cases())
def test_no_text_is_cut_off_or_lies_on_another_and_no_legend_on_the_axes(drawn, name, of, look):
    figure = drawn(name, of, look)
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    assert boxes
    width, height = figure.bbox.width + TOUCH, figure.bbox.height + TOUCH
    for text, box in boxes:
        assert min(box.x0, box.y0) >= -TOUCH, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    for (first, one), (second, other) in combinations(boxes, 2):
        assert not overlap(one, other), (first, second)
    legends = [legend.get_window_extent() for legend in figure.legends]
    inside = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    if name != "roofline":  # its ceilings are named above them, where nothing can lie
        legends += [legend.get_window_extent() for legend in inside]
    for box in legends:
        assert not any(overlap(box, axes.get_window_extent()) for axes in figure.axes)


@pytest.mark.parametrize("name", list(FIGURES))
def test_on_paper_a_figure_looks_as_when_someone_looked(drawn, name):
    assert_looks_like(drawn(name, richest(name), "paper"), f"{name}_paper")
