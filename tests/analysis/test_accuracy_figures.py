import numpy as np
import pandas as pd
import pytest

from analysis import figures, style
from analysis.figures import FIGURES, _curves
from analysis.gather import decimated, left_out_note
from analysis.plot import plot
from analysis.tables import accuracy_curve, at_score, paired_speedup
from profiling.errors import DataError
from tests.analysis.images import assert_looks_like
from tests.analysis.made_runs import RISING, make_run, run_of_rows

ACCURACY = ("accuracy_time", "accuracy_steps", "accuracy_tokens")


def lines(axes, gid):
    return [line for line in axes.lines if line.get_gid() == gid]


def note_of(figure):
    return figure.legends[0].get_title().get_text().replace("\n", " ")


def evaluations(path, accuracies, **columns):
    """A run with an evaluation a step, of 2 s and 10 trained tokens."""
    rows = [{"step": n, "clock_s": 2.0 * n, "training/trained_tokens": 10, "val/accuracy": accuracy}
            for n, accuracy in enumerate(accuracies, start=1)]  # fmt: skip
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name.replace("__", "/")] = value
    return run_of_rows(path, [], metrics=rows)


@pytest.mark.parametrize("name", ACCURACY)
def test_it_looks_as_it_did(runs, name):
    assert_looks_like(getattr(figures, name)(runs), name)


@pytest.mark.parametrize(("name", "x", "ppo", "tppo"), [
    ("accuracy_time", "clock_s", [4, 8, 12, 16, 20, 24], [2, 4, 6, 8, 10, 12]),
    ("accuracy_steps", "step", [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
    ("accuracy_tokens", "trained_tokens", [20, 40, 60, 80, 100, 120], [40, 80, 120, 160, 200, 240]),
])  # fmt: skip
def test_the_thin_lines_are_the_evaluations_of_the_table(runs, name, x, ppo, tppo):
    table = FIGURES[name].data(runs)
    thin = lines(FIGURES[name].draw(table, runs).axes[0], "evaluations")
    assert [thin[0].get_xdata().tolist(), thin[1].get_xdata().tolist()] == [ppo, tppo]
    assert thin[0].get_ydata().tolist() == RISING
    for line, run in zip(thin, runs, strict=True):
        rows = table[(table.run == run.name) & (table.part == "evaluations")]
        assert line.get_xdata().tolist() == rows[x].tolist()


def test_the_thick_lines_and_markers_are_those_of_the_table(runs):
    table = FIGURES["accuracy_time"].data(runs)
    axes = FIGURES["accuracy_time"].draw(table, runs).axes[0]
    for place, arm in enumerate(("ppo", "tppo")):
        median = table[(table.part == "median") & (table.arm == arm)]
        assert lines(axes, "median")[place].get_xdata().tolist() == median.clock_s.tolist()
        assert lines(axes, "median")[place].get_ydata().tolist() == median.accuracy.tolist()
    # seeds reach it at the fifth evaluation: 4, 5 and 6 s a step
    assert lines(axes, "reached")[0].get_xdata().tolist() == [20.0, 25.0, 30.0]
    bracket = table[table.part == "bracket"]
    assert bracket.clock_s.tolist() == [25.0, 10.0]  # 25 s / 2.5


def test_the_median_goes_as_far_as_all_runs_do(runs):
    median = FIGURES["accuracy_time"].data(runs).query("part == 'median' and arm == 'ppo'")
    assert (median.clock_s.min(), median.clock_s.max()) == (
        6.0,
        24.0,
    )  # the slowest starts at 6, the fastest ends at 24
    # at 24 s: 0.9, and between 0.86 (20) and 0.88 (25), and 0.86 (24)
    assert median.accuracy.iloc[-1] == pytest.approx(0.876)


def test_the_bracket_says_what_is_compared(runs):
    texts = [text.get_text() for text in figures.accuracy_tokens(runs).axes[0].texts]
    assert "T-PPO: same score in 200 % of the tokens of PPO (median of 3 paired seeds)" in texts  # 200 against 100


def test_arms_of_other_names_are_compared_slowest_to_fastest(tmp_path):
    slow = make_run(tmp_path / "vapo-s0", accuracies=RISING, seconds_per_step=4.0)
    fast = make_run(tmp_path / "dapo-s0", accuracies=RISING, seconds_per_step=3.0)
    never = make_run(tmp_path / "geppo-s0", accuracies=[0.1] * 6)
    texts = [text.get_text() for text in figures.accuracy_time([fast, slow, never]).axes[0].texts]
    assert "DAPO: same score in 75 % of the time of VAPO (1 seed)" in texts


def test_the_bracket_names_the_arms_on_paper_too(runs):
    with style.use("paper"):
        texts = [text.get_text().replace("\n", " ") for text in figures.accuracy_time(runs).axes[0].texts]
    assert "T-PPO: same score in 40 % of the time of PPO (median of 3 paired seeds)" in texts


def test_there_is_no_bracket_without_a_pair(tmp_path):
    first = make_run(tmp_path / "ppo-s0", accuracies=RISING)
    second = make_run(tmp_path / "tppo-s1", accuracies=RISING)
    assert not figures.accuracy_time([first, second]).axes[0].texts


def test_a_paired_ratio_of_tokens_is_one_of_tokens(runs):
    got = paired_speedup(runs, "ppo", "tppo", quantity="trained_tokens")
    assert (got["median"], got["pairs"], got["wins"]) == (0.5, 3, 0)
    assert at_score(runs[1], "trained_tokens") == 200


def test_evaluations_without_a_number_are_no_points(tmp_path):
    run = evaluations(tmp_path / "ppo-s0", [0.5, None, None, 0.8])
    assert accuracy_curve(run).step.tolist() == [1, 4]
    assert lines(figures.accuracy_steps([run]).axes[0], "evaluations")[0].get_xdata().tolist() == [1, 4]


def test_tokens_are_unknown_from_the_first_step_that_does_not_say(tmp_path):
    run = evaluations(tmp_path / "ppo-s0", [0.5, 0.6, 0.7, 0.8], training__trained_tokens=[10, 10, None, 10])
    tokens = accuracy_curve(run).trained_tokens
    assert tokens[:2].tolist() == [10, 20]
    assert tokens[2:].isna().all()
    assert lines(figures.accuracy_tokens([run]).axes[0], "evaluations")[0].get_xdata().tolist() == [10, 20]


def test_tokens_of_the_value_warm_up_train_no_policy(tmp_path):
    rows = [{"step": 0, "clock_s": 0.0, "val/accuracy": 0.4},
            {"step": 1, "clock_s": 1.0, "val/accuracy": 0.5, "training/trained_tokens": 7}]  # fmt: skip
    assert accuracy_curve(run_of_rows(tmp_path / "ppo-s0", [], metrics=rows)).trained_tokens.tolist() == [0, 7]


def test_a_run_without_tokens_is_left_out_and_named(runs, tmp_path):
    silent = evaluations(tmp_path / "vapo-s0", RISING, training__trained_tokens=[None] * 6)
    note = note_of(figures.accuracy_tokens([*runs, silent]))
    assert note == "Left out: vapo-s0 (metrics.jsonl has no training/trained_tokens of its evaluations)."


def test_runs_that_evaluated_nothing_are_named_with_the_reason(runs, simulated):
    figure = figures.accuracy_time([*runs, *simulated.values()])
    assert "Left out: synchronous, truncated, oversample, asynchronous (has no evaluations" in note_of(figure)
    assert "(measured)" in figure.axes[0].get_title(loc="left")
    with pytest.raises(DataError, match=r"synchronous: has no evaluations \(val/accuracy in metrics.jsonl\)"):
        figures.accuracy_time(list(simulated.values()))


def test_no_runs_are_an_error_and_not_an_empty_figure():
    with pytest.raises(DataError, match="no runs to draw; name at least one run directory"):
        figures.accuracy_time([])


def test_metrics_without_a_clock_are_named(tmp_path):
    run = run_of_rows(tmp_path / "x", [], metrics=[{"step": 1, "val/accuracy": 0.5}])
    with pytest.raises(DataError, match=r"metrics\.jsonl has no clock_s; an evaluation needs it"):
        figures.accuracy_time([run])


def test_one_evaluation_is_one_visible_point(tmp_path):
    axes = figures.accuracy_time([evaluations(tmp_path / "ppo-s0", [0.5])]).axes[0]
    (line,) = lines(axes, "median")
    assert (line.get_xdata().tolist(), line.get_marker()) == ([2.0], "s")


def test_forty_runs_with_long_names_are_all_drawn(tmp_path):
    many = [evaluations(tmp_path / f"{'long-' * 20}{n}", RISING) for n in range(40)]
    figure = figures.accuracy_time(many)
    figure.draw_without_rendering()
    assert len(lines(figure.axes[0], "median")) == 40
    assert len({text.get_text() for text in figure.legends[0].get_texts()}) == 40
    assert figure.legends[0].get_window_extent().x0 >= 0


def test_neighbours_become_their_mean_least_and_greatest():
    table = pd.DataFrame({"step": [1, 2, 3, 4, 5], "a": [1.0, 3.0, 2.0, np.nan, 10.0]})
    got = decimated(table, "step", ["a"], most=2)
    # the first three (0, 0.4 and 0.8 of a bin), then two, of which one is null
    assert got.step.tolist() == [2.0, 4.5]
    assert got.a.tolist() == [2.0, 10.0]
    assert (got.a_min.tolist(), got.a_max.tolist(), got.points.tolist()) == ([1, 10], [3, 10], [3, 2])
    assert decimated(table, "step", ["a"], most=5).points.tolist() == [1] * 5


def test_a_note_counts_the_names_that_it_does_not_give():
    table = pd.DataFrame()
    table.attrs["left_out"] = [(f"r{n}", "is empty") for n in range(6)] + [("x", "has no clock")]
    assert left_out_note(table) == "Left out: r0, r1, r2, r3 and 2 more (is empty); x (has no clock)."


def test_a_hundred_thousand_evaluations_are_a_small_figure_that_keeps_the_extremes(tmp_path):
    accuracies = np.full(100_000, 0.5)
    accuracies[[12_345, 67_890]] = 0.0, 1.0
    run = evaluations(tmp_path / "ppo-s0", accuracies.tolist())
    *pictures, numbers = plot([run], "accuracy_steps", ["svg", "png"], tmp_path / "out")
    assert pictures[0].stat().st_size < 1_000_000
    table = pd.read_csv(numbers).query("part == 'evaluations'")
    assert len(table) == _curves.MOST
    assert table.points.sum() == 100_000
    assert (table.accuracy_min.min(), table.accuracy_max.max()) == (0.0, 1.0)
