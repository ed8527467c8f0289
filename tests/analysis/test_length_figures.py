import time

import numpy as np
import pandas as pd
import pytest

from analysis import figures
from analysis.figures import FIGURES
from analysis.lengths import lengths_by_step, limits, responses, survival
from analysis.plot import plot
from profiling.errors import DataError
from profiling.phases import plain_header
from profiling.reader import Run
from profiling.schema import ROLLOUTS
from profiling.writer import RunWriter
from tests.analysis.images import assert_looks_like
from tests.analysis.made_runs import run_of_rows, simulated_run
from tests.analysis.test_accuracy_figures import lines, note_of

TWO_STEPS = [
    {"step": 1, "row": 1, "tokens": 10},
    {"step": 1, "row": 2, "tokens": 30},
    {"step": 1, "row": 3, "tokens": 20, "finished": False},
    {"step": 1, "row": 4, "tokens": 20, "finished": False, "discarded": True},
    {"step": 2, "row": 3, "tokens": 25, "context_before": 25},  # 45 in all: 5 of the context are the prompt
]


@pytest.mark.parametrize("name", ["response_length", "length_distribution", "staleness"])
def test_it_looks_as_it_did(simulated, name):
    assert_looks_like(getattr(figures, name)(list(simulated.values())), name)


def test_lengths_of_a_step_are_those_of_whole_responses_that_finished_in_it(tmp_path):
    table = lengths_by_step(run_of_rows(tmp_path / "x", TWO_STEPS)).set_index("step")
    assert table.mean_tokens.tolist() == [20.0, 45.0]  # (10 + 30) / 2
    assert table.max_tokens.tolist() == [30.0, 45.0]
    assert table.p50_tokens.tolist() == [20.0, 45.0]
    assert table.p90_tokens.tolist() == [28.0, 45.0]  # 10 + 0.9 x 20
    assert table.truncated_share.tolist() == [0.25, 0.0]  # row 3 of four carries over; row 4 was dropped


def test_what_the_lines_show_is_the_table(simulated):
    runs = list(simulated.values())
    table = FIGURES["response_length"].data(runs)
    figure = FIGURES["response_length"].draw(table, runs)
    for axes, name in ((0, "mean_tokens"), (0, "p50_tokens"), (1, "p90_tokens"), (1, "p99_tokens"),
                       (2, "truncated_share")):  # fmt: skip
        drawn = lines(figure.axes[axes], name)
        assert len(drawn) == 4
        for line, arm in zip(drawn, simulated, strict=True):
            np.testing.assert_array_equal(line.get_ydata(), table[table.arm == arm][name])
            np.testing.assert_array_equal(line.get_xdata(), table[table.arm == arm].step)


def test_an_arm_is_the_mean_of_its_runs_as_far_as_all_go(tmp_path):
    first = run_of_rows(tmp_path / "a-s0", [{"step": n, "row": n, "tokens": 10} for n in (1, 2, 3)])
    second = run_of_rows(tmp_path / "a-s1", [{"step": n, "row": n, "tokens": 30} for n in (1, 2)])
    table = FIGURES["response_length"].data([first, second])
    assert table.mean_tokens.tolist() == [20.0, 20.0]
    assert table.runs.tolist() == [2, 2]


def test_a_step_in_which_nothing_finished_has_no_lengths(tmp_path):
    rows = [
        {"step": 1, "row": 1, "tokens": 8, "finished": False},
        {"step": 2, "row": 1, "tokens": 2, "context_before": 13},
    ]
    table = lengths_by_step(run_of_rows(tmp_path / "x", rows))
    assert table.mean_tokens.isna().tolist() == [True, False]
    assert table.truncated_share.tolist() == [1.0, 0.0]


def test_a_run_without_records_is_drawn_from_its_metrics_and_the_figure_says_so(tmp_path):
    metrics = [{"step": n, "response_length/mean": 10.0 * n, "response_length/max": None} for n in (1, 2)]
    run = run_of_rows(tmp_path / "ppo-s0", [], metrics=metrics)
    table = FIGURES["response_length"].data([run])
    assert table.mean_tokens.tolist() == [10.0, 20.0]
    assert table.max_tokens.isna().all()
    figure = figures.response_length([run])
    assert note_of(figure) == "No quantiles of PPO: no rollout records."


def test_where_nothing_finished_the_panels_say_so(tmp_path):
    run = run_of_rows(tmp_path / "x", [{"step": 1, "row": 1, "tokens": 8, "finished": False}])
    figure = figures.response_length([run])
    for axes in figure.axes[:2]:
        assert [text.get_text() for text in axes.texts] == ["no response finished"]
        assert not axes.get_yticks().size
    assert note_of(figure) == "No response of x finished."


def test_the_mean_and_the_median_of_one_step_can_be_told_apart(tmp_path):
    figure = figures.response_length([run_of_rows(tmp_path / "x", TWO_STEPS[:2])])
    mean, median = (lines(figure.axes[0], name)[0] for name in ("mean_tokens", "p50_tokens"))
    assert mean.get_markerfacecolor() != median.get_markerfacecolor() == "white"
    low, high = figure.axes[2].get_xlim()
    assert [place for place in figure.axes[2].get_xticks() if low <= place <= high] == [1]


def test_lengths_of_zero_are_said_to_be_missing_on_a_logarithmic_axis(tmp_path):
    metrics = [{"step": n, "response_length/mean": length} for n, length in ((1, 0.0), (2, 5.0))]
    figure = figures.response_length([run_of_rows(tmp_path / "x", [], metrics=metrics)])
    assert "Lengths of 0 cannot be shown on a logarithmic axis" in note_of(figure)
    figure.draw_without_rendering()


def test_a_run_that_never_finished_a_step_is_an_error_that_says_so(tmp_path):
    run = run_of_rows(tmp_path / "x", [])
    with pytest.raises(DataError, match=r"has no rollout records, and metrics.jsonl no response_length/mean"):
        figures.response_length([run])
    with pytest.raises(DataError, match="x: has no rollout records; lengths need them"):
        figures.length_distribution([run])
    with pytest.raises(DataError, match="x: has no rollout records; staleness needs them"):
        figures.staleness([run])


def test_a_response_is_as_long_as_all_its_windows(tmp_path):
    got = responses(run_of_rows(tmp_path / "x", TWO_STEPS)).sort_values("tokens")
    assert got.tokens.tolist() == [10, 20, 30, 45]
    assert got.finished.tolist() == [True, False, True, True]


def test_survival_by_hand():
    # 4 at 2, one of 4 ends: 3/4. One is last seen at 3. Two reach 4, one ends: 3/4 x 1/2. The last ends at 5.
    got = survival(np.array([5, 3, 2, 4]), np.array([True, False, True, True]))
    assert got.tokens.tolist() == [2, 4, 5]
    assert got.share.tolist() == [0.75, 0.375, 0.0]


def test_survival_without_unfinished_rows_is_the_share_that_is_longer():
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    got = survival(lengths, np.ones(300, bool))
    assert got.share.to_numpy() == pytest.approx([(lengths > n).mean() for n in got.tokens])


def test_survival_looks_through_the_truncation_of_long_responses():
    """Lengths and cuts exponential with mean 100: of finished rows exp(-1) are longer than 50, of all exp(-1/2)."""
    random = np.random.default_rng(1)
    lengths, cuts = random.exponential(100, 20_000), random.exponential(100, 20_000)
    seen = np.ceil(np.minimum(lengths, cuts)).astype(int)
    curve = survival(seen, lengths <= cuts).set_index("tokens").share
    assert curve[50] == pytest.approx(np.exp(-0.5), abs=0.01)
    assert (seen[lengths <= cuts] > 50).mean() == pytest.approx(np.exp(-1), abs=0.01)


def test_bins_and_curve_of_the_figure_are_those_of_the_table(simulated):
    runs = [simulated["truncated"]]
    table = FIGURES["length_distribution"].data(runs)
    assert table[table.part.isin(["finished", "unfinished"])].rows.sum() == runs[0].summary["rows_in"]
    assert table[table.part == "unfinished"].rows.sum() == runs[0].summary["rows_carried"] > 0
    assert table[table.part.isin(["finished", "unfinished"])].share.sum() == pytest.approx(1.0)
    figure = FIGURES["length_distribution"].draw(table, runs)
    done, open_ended = figure.axes[0].patches
    assert done.get_data().values.tolist() == table[table.part == "finished"].share.tolist()
    assert open_ended.get_data().values.tolist() == table[table.part == "unfinished"].share.tolist()
    (curve,) = lines(figure.axes[1], "longer")
    assert curve.get_ydata().tolist() == table[table.part == "longer"].share.tolist()


def test_window_and_cap_are_marked_with_their_values(simulated):
    figure = figures.length_distribution([simulated["truncated"]])
    assert {"window: 512", "longest allowed: 2,048"} <= {text.get_text() for text in figure.legends[0].get_texts()}
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [512, 2048]
    assert limits(simulated["synchronous"]) == {"cap": 2048}


def test_a_window_as_long_as_the_longest_allowed_is_marked_once(tmp_path):
    config = "[rollout]\nmax_response_tokens = 77\n"
    run = run_of_rows(tmp_path / "x", TWO_STEPS, schedule={"kind": "truncated", "window": 77}, config=config)
    figure = figures.length_distribution([run])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "window = longest allowed: 77" in labels
    assert not [label for label in labels if label.startswith(("window:", "longest"))]
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [77]


def test_the_cap_of_a_trained_run_is_its_rollouts(tmp_path):
    config = "[rollout]\nmax_response_tokens = 77\n"
    run = run_of_rows(tmp_path / "x", TWO_STEPS, schedule={"kind": "truncated", "window": 9}, config=config)
    assert limits(run) == {"window": 9, "cap": 77}


def test_responses_that_are_all_of_one_length_are_one_bar(tmp_path):
    run = run_of_rows(tmp_path / "x", [{"step": 1, "row": n, "tokens": 10} for n in range(4)])
    table = FIGURES["length_distribution"].data([run])
    bars = table[(table.part == "finished") & (table.rows > 0)]
    assert bars[["tokens", "tokens_end", "rows", "share"]].to_numpy().tolist() == [[10, 11, 4, 1.0]]
    figures.length_distribution([run]).draw_without_rendering()


def test_ages_of_tokens_by_hand(tmp_path):
    rows = [
        {"step": 1, "row": 1, "tokens": 10, "policy_version": 0},  # trains version 0: 0 behind
        {"step": 2, "row": 2, "tokens": 30, "policy_version": 0},  # trains version 1: 1 behind
        {"step": 20, "row": 3, "tokens": 60, "policy_version": 0},  # 19 behind
    ]
    table = FIGURES["staleness"].data([run_of_rows(tmp_path / "x", rows)])
    ages = table[table.part == "age"]
    assert (ages.versions.tolist(), ages.value.tolist()) == ([0, 1, 8], [0.1, 0.3, 0.6])
    assert table[table.part == "mean"].value.tolist() == [(30 * 1 + 60 * 19) / 100]
    axes = figures.staleness([run_of_rows(tmp_path / "x2", rows)]).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.1, 0.3, 0.6]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3", "4", "5", "6", "7", "8+"]


def test_mean_staleness_and_length_bias_are_those_of_the_summaries(simulated):
    table = FIGURES["staleness"].data(list(simulated.values())).set_index(["arm", "part"]).value
    for name, run in simulated.items():
        assert table[name, "mean"].item() == pytest.approx(run.summary["staleness_mean"], abs=1e-12)
        assert table[name, "length_bias"].item() == run.summary["length_bias"]
    axes = figures.staleness(list(simulated.values())).axes[1]
    markers = [line.get_xdata().tolist() for line in axes.lines if line.get_gid()]
    assert markers == [[run.summary["length_bias"]] for run in simulated.values()]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(simulated)


def test_rows_in_flight_have_a_mean_and_no_distribution(tmp_path):
    changes = {"schedule": {"kind": "asynchronous", "max_staleness": 2, "in_flight_update": True},
               "cluster": {"trainer": "separate", "trainer_gpus": 1}}  # fmt: skip
    run = simulated_run(tmp_path / "flight", changes)
    table = FIGURES["staleness"].data([run])
    assert set(table.part) == {"mean", "length_bias"}
    assert table[table.part == "mean"].value.item() == run.summary["staleness_mean"]
    assert "Mean only, from the summary: flight." in note_of(figures.staleness([run]))


def test_an_unknown_length_bias_is_said_to_be_unknown(tmp_path):
    axes = figures.staleness([run_of_rows(tmp_path / "x", TWO_STEPS)]).axes[1]
    assert [text.get_text() for text in axes.texts] == ["not known"]


def test_a_hundred_thousand_steps_are_drawn_in_seconds_and_small(tmp_path):
    writer = RunWriter(tmp_path / "long", header=plain_header(), config_toml="")
    steps = np.arange(1, 100_001)
    zero = np.zeros(len(steps), int)
    columns = dict.fromkeys(ROLLOUTS.names, zero) | {
        "step": steps, "row": steps, "prompt_tokens": zero + 5, "context_before": zero + 5, "tokens": 10 + steps % 7,
        "trained_tokens": 10 + steps % 7, "policy_version": steps - 1, "finished": zero == 0, "discarded": zero == 1,
        "reward": np.ones(len(steps)), "t_start": zero + 0.0, "t_end": zero + 1.0,
    }  # fmt: skip
    writer.table("rollouts", 1, columns)
    run = Run(tmp_path / "long")
    began = time.process_time()
    for name in ("response_length", "length_distribution", "staleness"):
        picture, numbers = plot([run], name, ["svg"], tmp_path / "out")
        assert picture.stat().st_size < 1_000_000
        assert len(pd.read_csv(numbers)) < 2_000
    assert time.process_time() - began < 15  # of the processor: three figures, each within five seconds
