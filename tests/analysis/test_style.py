"""The two styles, and whether what they draw can be told apart by the colour-blind and in grey."""

import io
import re
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from analysis import figures, style

# Machado, Oliveira and Fernandes, IEEE TVCG 15(6), 2009, severity 1.0; on linear RGB.
PROTANOPIA = np.array([
    [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998],
])  # fmt: skip
DEUTERANOPIA = np.array([
    [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881],
])  # fmt: skip
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # sRGB, D65
WHITE = TO_XYZ.sum(axis=1)


def linear(colour):
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    part = np.clip(TO_XYZ @ rgb, 0, None) / WHITE
    x, y, z = np.where(part > (6 / 29) ** 3, np.cbrt(part), part * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def lightness(colour):
    return lab(linear(colour))[0]


def distance(first, second, seen_as=None):
    matrix = np.eye(3) if seen_as is None else seen_as
    first, second = (lab(np.clip(matrix @ linear(c), 0, 1)) for c in (first, second))
    return float(np.linalg.norm(first - second))  # CIE 1976: 2.3 is just noticeable


def test_lightness_is_that_of_the_definition():
    assert lightness("#ffffff") == pytest.approx(100, abs=0.01)
    assert lightness("#000000") == pytest.approx(0, abs=0.01)
    assert lightness("#777777") == pytest.approx(50.0, abs=0.2)  # the sRGB grey of 18.4 % luminance


@pytest.mark.parametrize("seen_as", [None, PROTANOPIA, DEUTERANOPIA], ids=["all", "protanopia", "deuteranopia"])
def test_the_colours_of_arms_stay_apart_for_the_colour_blind(seen_as):
    arms = [*style.ARMS.values(), *style.OTHERS]
    closest = min(combinations(arms, 2), key=lambda pair: distance(*pair, seen_as))
    assert distance(*closest, seen_as) > 15, closest


@pytest.mark.parametrize("seen_as", [PROTANOPIA, DEUTERANOPIA], ids=["protanopia", "deuteranopia"])
def test_the_causes_that_a_rollout_is_made_of_stay_apart_for_the_colour_blind(seen_as):
    causes = ("decode_useful", "decode_underfilled", "prefill", "update_policy", "wait_tail", "reward")
    for first, second in combinations(causes, 2):
        assert distance(style.CAUSES[first][0], style.CAUSES[second][0], seen_as) > 12, (first, second)


def test_causes_differ_in_grey_by_lightness_or_by_hatch():
    for first, second in combinations(style.CAUSES, 2):
        if style.CAUSE_HATCHES.get(first) == style.CAUSE_HATCHES.get(second):
            apart = abs(lightness(style.CAUSES[first][0]) - lightness(style.CAUSES[second][0]))
            assert apart >= 8, (first, second, apart)


def test_arms_differ_in_grey_by_line_marker_and_hatch():
    with style.use("paper"):
        looks = style.arm_looks(["ppo", "tppo", "tppo-full", "a", "b", "c", "d"])
    for first, second in combinations(looks.values(), 2):
        alike = (first.line, first.marker, first.hatch) == (second.line, second.marker, second.hatch)
        assert not alike or abs(lightness(first.colour) - lightness(second.colour)) >= 20


def test_no_two_of_28_arms_look_the_same():
    looks = style.arm_looks([f"arm {n}" for n in range(28)])
    assert len({(look.colour, look.line) for look in looks.values()}) == 28


def test_hatched_means_unresolved_and_nothing_else():
    assert "//" not in style.HATCHES
    assert [cause for cause, hatch in style.CAUSE_HATCHES.items() if hatch == "//"] == ["unresolved"]


def test_a_figure_on_paper_is_a_column_or_two_wide():
    with style.use("paper"):
        assert style.subplots(width=7.0, height=4.0)[0].get_figwidth() == 3.3
        assert style.subplots(1, 2, width=8.4)[0].get_figwidth() == 6.9
        assert style.line_width(2.0) == pytest.approx(1.3)
    assert style.subplots(width=8.4, height=3.0)[0].get_size_inches().tolist() == [8.4, 3.0]
    assert not style.is_paper()


def test_the_fonts_of_a_paper_are_embedded_as_truetype(runs):
    buffer = io.BytesIO()
    with style.use("paper"):
        figures.accuracy_time(runs).savefig(buffer, format="pdf")
    pdf = buffer.getvalue()
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    width, height = (float(n) for n in re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", pdf).groups())
    assert width == pytest.approx(3.3 * 72)
    assert height < width


def test_every_text_of_a_paper_is_of_the_style(runs):
    with style.use("paper"):
        figure = figures.accuracy_time(runs)
        figure.draw_without_rendering()
    sizes = {text.get_fontsize() for text in figure.findobj(lambda a: hasattr(a, "get_fontsize")) if text.get_text()}
    assert max(sizes) == 8
    assert min(sizes) > 5.5


def test_long_names_keep_their_ends():
    assert style.short("a" * 30) == "a" * 30
    name = style.short("first-" + "x" * 100 + "-last")
    assert len(name) == 36
    assert name.startswith("first-")
    assert name.endswith("-last")


def test_a_legend_of_many_arms_makes_the_figure_higher_and_hides_nothing():
    figure, (axes,) = style.subplots(height=4.0)
    for n in range(40):
        axes.plot([0, 1], [n, n], label=f"an arm with a name as long as that {n}")
    style.legend(axes, columns=3)
    figure.draw_without_rendering()
    assert len(figure.legends[0].get_texts()) == 40
    assert figure.get_figheight() > 5
    assert axes.get_position().height * figure.get_figheight() > 2.5
    assert figure.legends[0].get_window_extent().y1 <= axes.get_window_extent().y0
