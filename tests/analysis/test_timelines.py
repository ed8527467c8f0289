import numpy as np
import pandas as pd
import pytest

from analysis import figures
from analysis.chosen import some_steps, typical_step
from analysis.figures import FIGURES
from analysis.figures._batch_occupancy import occupancy
from analysis.lanes import coarse, lanes, with_slots
from profiling.errors import DataError
from profiling.ledger import ledger_totals
from profiling.reader import Run
from profiling.schema import LEDGER
from profiling.writer import write_parquet
from tests.analysis.images import assert_looks_like
from tests.analysis.made_runs import RISING, SCHEDULES, make_run


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("shortest_s", [0.0, 0.05])
def test_the_pieces_of_all_lanes_sum_to_the_ledger(simulated, schedule, shortest_s):
    run = simulated[schedule]
    wall_s, engines = run.summary["wall_seconds"], range(run.header["engines"])
    pieces = lanes(run, with_slots(run.engine), 0.0, wall_s, list(engines))
    if shortest_s:
        pieces = coarse(pieces, shortest_s)
    seconds = pieces.t_end - pieces.t_start
    found = (seconds * pieces.fill).groupby(pieces.cause).sum()
    rest = (seconds * (1 - pieces.fill))[pieces.rest.notna()].groupby(pieces.rest.dropna()).sum()
    for cause, expected in ledger_totals(run.ledger).items():
        assert found.get(cause, 0.0) + rest.get(cause, 0.0) == pytest.approx(expected, abs=1e-6), cause


def test_the_pieces_of_a_made_run_by_hand(tmp_path):
    table = FIGURES["engine_timeline"].data([make_run(tmp_path / "ppo-s0", accuracies=RISING)])
    first = table[table.t_start < 1.9].round(9)
    # prefill 0.2 s, decode 1 s with 2 of 4 slots, update 0.6 s, 0.2 s of nothing
    assert list(zip(first.cause, first.t_start, first.t_end, first.fill, strict=True)) == [
        ("prefill", 0.0, 0.2, 1.0), ("decode_useful", 0.2, 1.2, 0.5), ("update_policy", 1.2, 1.8, 1.0),
        ("wait_other", 1.8, 2.0, 1.0),
    ]  # fmt: skip


def test_the_bars_of_the_timeline_are_the_table_s(simulated):
    pair = [simulated["synchronous"], simulated["asynchronous"]]
    table = FIGURES["engine_timeline"].data(pair)
    axes = figures.engine_timeline(pair).axes[0]
    area = sum(bar.get_width() * bar.get_height() for bar in axes.patches)
    seconds = table.t_end - table.t_start
    assert area == pytest.approx(0.8 * ((seconds * table.fill).sum() + seconds[table.rest.notna()].sum()))
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["engine 0", "engine 1", "engine 0", "engine 1", "trainer"]


def test_short_pieces_are_joined_cause_by_cause():
    rows = [
        ("0", "decode_useful", "kv_stall", 0.0, 0.5, 1.0),
        ("0", "prefill", None, 0.5, 0.75, 1.0),
        ("0", "decode_useful", "kv_stall", 0.75, 1.0, 0.25),
        ("0", "update_policy", None, 1.0, 3.0, 1.0),
    ]
    pieces = pd.DataFrame(rows, columns=["lane", "cause", "rest", "t_start", "t_end", "fill"])
    got = coarse(pieces, 1.0)
    # decode: 0.5 s full and 0.25 s a quarter full: 0.5625 / 0.75
    assert list(zip(got.cause, got.t_start, got.t_end, got.fill, strict=True)) == [
        ("decode_useful", 0.0, 0.75, 0.75), ("prefill", 0.75, 1.0, 1.0), ("update_policy", 1.0, 3.0, 1.0),
    ]  # fmt: skip


def test_occupancy_is_of_the_decode_under_way_or_the_next_one():
    spans = pd.DataFrame(
        [("decode", 0.0, 1.0, 4, 4), ("prefill", 1.0, 2.0, 1, 4), ("decode", 2.0, 3.0, 2, 4)],
        columns=["kind", "t_start", "t_end", "batch", "slots"],
    )
    assert occupancy(spans, np.array([0.5, 1.0, 1.5, 2.5, 3.5])).tolist() == [1.0, 1.0, 0.5, 0.5, 0.0]


def test_the_occupancy_lines_are_the_table_s_and_nine_tenths_are_marked(simulated):
    run = simulated["synchronous"]
    table = FIGURES["batch_occupancy"].data([run])
    line, dot = figures.batch_occupancy([run]).axes[0].lines
    assert line.get_ydata().tolist() == table["mean"].to_list()
    rows = run.rollouts[run.rollouts.step == typical_step(run)]
    # 64 rows: the 58th end, from the start of the first span
    ended = np.sort(rows.t_end)[57] - run.engine[run.engine.step == typical_step(run)].t_start.min()
    assert dot.get_xdata()[0] == pytest.approx(ended)
    assert table.cut_off.unique().tolist() == [0]


def test_rows_that_are_cut_off_are_not_called_done(simulated):
    runs = [simulated["synchronous"], simulated["truncated"], simulated["oversample"]]
    table = FIGURES["batch_occupancy"].data(runs)
    run, step = simulated["truncated"], typical_step(simulated["truncated"])
    rows = run.rollouts[run.rollouts.step == step]
    assert set(table[table.run == "truncated"].cut_off) == {int((~rows.finished).sum())}
    labels = [text.get_text() for text in figures.batch_occupancy(runs).legends[0].get_texts()]
    for label, done in zip(labels, ("done", "done or at window", "done or cut off"), strict=True):
        assert f": 90 % {done} after " in label


def test_a_long_run_has_bars_of_neighbouring_steps_that_keep_the_seconds(tmp_path):
    run = make_run(tmp_path / "ppo-s0", accuracies=RISING)
    steps = np.arange(1, 100_001)
    ledger = {"step": steps, "gpu": 0 * steps, "cause": ["decode_useful"] * len(steps), "seconds": steps * 0.5}
    write_parquet(run.path / "ledger.parquet", ledger, LEDGER)
    (run.path / "summary.json").unlink()  # it has the seconds of the ledger before
    table = FIGURES["idle_ledger_steps"].data([Run(run.path)])
    assert (len(table), table.first_step.iloc[0], table.last_step.iloc[-1]) == (60, 1, 100_000)
    sizes = table.last_step - table.first_step + 1
    assert (table.seconds * sizes).sum() == pytest.approx(0.5 * 100_000 * 100_001 / 2)


def test_the_bars_of_a_step_are_as_high_as_the_step_is_long(runs):
    table = FIGURES["idle_ledger_steps"].data(runs[:1])
    # 4 s a step: 0.2 prefill, 0.5 + 0.5 decode, 0.6 update, 2.2 s of nothing
    first = table[table.first_step == 2].set_index("cause").seconds.round(9).to_dict()
    assert first == {"prefill": 0.2, "decode_useful": 0.5, "decode_underfilled": 0.5, "update_policy": 0.6,
                     "wait_other": 2.2}  # fmt: skip
    bars = figures.idle_ledger_steps(runs[:1]).axes[0].patches
    assert sum(bar.get_height() for bar in bars) == pytest.approx(table.seconds.sum())


def test_of_a_long_run_steps_are_chosen_evenly_ends_included(runs):
    assert some_steps(runs[0], 3) == [1, 3, 6]  # places 0, 2.5 and 5: a half rounds to the even place
    assert some_steps(runs[0], 10) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["engine_timeline", "batch_occupancy"])
def test_a_run_without_engine_records_is_left_out_with_a_word_or_refused(name, simulated, tmp_path):
    bare = make_run(tmp_path / "bare", accuracies=RISING)
    for part in (bare.path / "engine").iterdir():
        part.unlink()
    figure = FIGURES[name].draw(FIGURES[name].data([simulated["truncated"], bare]), [simulated["truncated"], bare])
    assert "Left out: bare (has no engine records)." in figure.legends[0].get_title().get_text()
    with pytest.raises(DataError, match="bare: has no engine records"):
        FIGURES[name].data([bare])


def test_a_step_without_engine_records_is_named(tmp_path):
    run = make_run(tmp_path / "ppo-s0", accuracies=RISING[:2])
    (run.path / "engine" / "step-000001.parquet").unlink()
    with pytest.raises(DataError, match=r"ppo-s0: no engine has a record of step 1, the one that would be drawn"):
        FIGURES["engine_timeline"].data([Run(run.path)])


@pytest.mark.parametrize("name", ["idle_ledger", "idle_ledger_steps"])
def test_a_run_that_has_not_ended_is_left_out_with_a_word_or_refused(name, simulated, tmp_path):
    live = make_run(tmp_path / "live", accuracies=RISING, finish=False)
    figure = FIGURES[name].draw(FIGURES[name].data([simulated["truncated"], live]), [simulated["truncated"], live])
    assert "Left out: live (has no ledger yet" in figure.legends[0].get_title().get_text().replace("\n", " ")
    with pytest.raises(DataError, match="live: has no ledger yet; the run has not ended"):
        FIGURES[name].data([live])


@pytest.mark.parametrize("name", ["engine_timeline", "idle_ledger", "idle_ledger_steps", "batch_occupancy"])
def test_timelines_look_as_they_did(name, simulated):
    assert_looks_like(getattr(figures, name)(list(simulated.values())), name)
