import json

import numpy as np
import pytest

from analysis import figures
from analysis.figures import FIGURES
from analysis.figures._cost_time import front
from analysis.twins import twin_of
from profiling.errors import DataError
from tests.analysis.images import assert_looks_like
from tests.analysis.made_runs import RISING, make_run, simulated_run


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """A pair, another window, another number of engines, another tail: the twins of each among them."""
    folder = tmp_path_factory.mktemp("varied")
    synchronous, truncated = {"kind": "synchronous"}, {"kind": "truncated", "window": 512}
    heavy = {"response_tokens": {"kind": "lognormal", "mean_capped": 500.0, "sigma": 1.2}}
    changes = {
        "synchronous": {"schedule": synchronous},
        "truncated": {"schedule": truncated},
        "window-1024": {"schedule": truncated | {"window": 1024}},
        "engines-4-synchronous": {"schedule": synchronous, "cluster": {"engines": 4}},
        "engines-4-truncated": {"schedule": truncated, "cluster": {"engines": 4}},
        "heavy-synchronous": {"schedule": synchronous, "workload": heavy},
        "heavy-truncated": {"schedule": truncated, "workload": heavy},
    }
    return {name: simulated_run(folder / name, own) for name, own in changes.items()}


def test_a_twin_differs_by_the_schedule_alone(varied, simulated):
    runs = list(varied.values())
    assert twin_of(varied["window-1024"], runs).name == "synchronous"
    assert twin_of(varied["engines-4-truncated"], runs).name == "engines-4-synchronous"
    assert twin_of(varied["heavy-truncated"], runs).name == "heavy-synchronous"
    assert twin_of(varied["synchronous"], runs) is None
    assert twin_of(simulated["asynchronous"], runs) is None  # it has a GPU more


def test_the_speed_up_is_the_median_over_seeds_per_response_and_per_step(runs):
    # A step: 4, 5, 6 s of PPO for 2 responses, 2 s of T-PPO for 4. Ratios 2, 2.5, 3 a step, 4, 5, 6 a response.
    (row,) = FIGURES["speedup"].data(runs).itertuples()
    assert (row.per_step, row.per_response) == pytest.approx((2.5, 5.0))
    assert (row.runs, row.window) == (3, 10)


def test_each_thing_that_varies_has_its_panel_and_the_lines_are_the_table_s(varied):
    runs = list(varied.values())
    table = FIGURES["speedup"].data(runs)
    panels = figures.speedup(runs).axes
    assert [axes.get_xlabel() for axes in panels] == ["window, tokens", "GPUs", "tail weight (sigma of log length)"]
    per_response, per_step, _ = panels[0].lines
    own = table[(table.gpus == 2) & (table.sigma == 0.9)].sort_values("window")
    assert per_response.get_xdata().tolist() == [512, 1024]
    assert per_response.get_ydata().tolist() == own.per_response.to_list()
    assert per_step.get_ydata().tolist() == own.per_step.to_list()
    assert panels[1].lines[0].get_xdata().tolist() == [2, 4]
    assert panels[2].lines[0].get_xdata().tolist() == [0.9, 1.2]


def test_every_row_of_the_table_is_drawn_with_or_without_a_window(simulated, varied, tmp_path):
    tail = simulated_run(tmp_path / "tail", {"schedule": {"kind": "tail_batching", "threshold": 1024}})
    runs = [simulated["synchronous"], simulated["truncated"], varied["window-1024"], simulated["oversample"], tail]
    table = FIGURES["speedup"].data(runs)
    (axes,) = (figure := figures.speedup(runs)).axes
    for row in table[table.window.isna()].itertuples():
        for rate in ("per_response", "per_step"):
            (level,) = [line for line in axes.lines if line.get_gid() == f"{row.schedule}, {rate}"]
            assert set(level.get_ydata()) == {getattr(row, rate)}
    drawn = {value for line in axes.lines for value in line.get_ydata()}
    assert set(table.per_response) | set(table.per_step) <= drawn
    assert {text.get_text() for text in axes.texts} == {"oversample", "tail_batching"}
    title = figure.legends[0].get_title().get_text()
    assert "Simulated only, the trainer does not run such a schedule: tail." in title


def test_a_published_number_is_drawn_and_named_as_such(runs, tmp_path):
    (tmp_path / "published.csv").write_text("figure,label,value,source\nspeedup,theirs,2.5,a paper\nother,no,9,b\n")
    figure = figures.speedup(runs)
    assert "published 2.5: theirs" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert "measured, published" in figure.get_suptitle()
    (tmp_path / "published.csv").write_text("figure,label\n")
    with pytest.raises(DataError, match=r"published\.csv: column 'source' is missing"):
        figures.speedup(runs)


def test_runs_without_a_synchronous_partner_are_refused_or_left_out_with_a_word(runs, simulated, tmp_path):
    with pytest.raises(DataError, match=r"none of 1 runs is synchronous; a speed-up needs one to compare with"):
        figures.speedup([simulated["truncated"]])
    with pytest.raises(DataError, match=r"asynchronous: has no synchronous partner with all else equal"):
        figures.speedup([simulated["synchronous"], simulated["asynchronous"]])
    figure = figures.speedup([simulated["synchronous"], simulated["truncated"], simulated["asynchronous"]])
    words = figure.legends[0].get_title().get_text().replace("\n", " ")
    assert "Left out: asynchronous (has no synchronous partner with all else equal)." in words
    assert "Neither window nor GPUs nor tail weight vary" in words


def test_the_front_is_what_nothing_beats_in_both():
    hours, cost = np.array([1.0, 2.0, 3.0, 2.0]), np.array([9.0, 4.0, 5.0, 4.0])
    assert front(hours, cost).tolist() == [True, True, False, True]


def test_hours_and_dollars_of_a_million_responses(runs, tmp_path):
    hardware = json.loads((tmp_path / "hardware.json").read_text())
    table = FIGURES["cost_time"].data(runs[:2])
    # 4 s for 2 responses; 2 s for 4. One host, no price.
    assert table.hours.to_list() == pytest.approx([2e6 / 3600, 0.5e6 / 3600])
    assert table.dollars.isna().all()
    assert table.on_front.to_list() == [False, True]
    (tmp_path / "hardware.json").write_text(json.dumps(hardware | {"price_per_hour": 3.6}))
    assert FIGURES["cost_time"].data(runs[:2]).dollars.to_list() == pytest.approx([2000.0, 500.0])


def test_the_drawn_costs_are_the_table_s(simulated):
    runs = list(simulated.values())
    table = FIGURES["cost_time"].data(runs)
    spots = figures.cost_time(runs).axes[0].collections
    drawn = [tuple(spot.get_offsets()[0]) for spot in spots[: len(runs)]]
    assert drawn == list(zip(table.hours, table.dollars, strict=True))


def test_without_a_price_the_figure_says_that_it_counts_gpu_hours(runs):
    figure = figures.cost_time(runs)
    assert "In GPU-hours: no price_per_hour is known" in figure.legends[0].get_title().get_text().replace("\n", " ")


def test_a_machine_without_a_gpu_is_called_a_host(tmp_path):
    runs = [make_run(tmp_path / name, accuracies=RISING) for name in ("ppo-s0", "tppo-s0")]
    figure = figures.cost_time(runs)
    assert "In host-hours: no price" in figure.legends[0].get_title().get_text()
    assert figure.axes[0].get_ylabel() == "host-hours per million\nfinished responses"
    assert {text.get_text() for text in figure.axes[0].texts} == {"ppo-s0, 1 host", "tppo-s0, 1 host"}
    assert figures.idle_ledger(runs).axes[0].get_xlabel() == "share of host time"


def test_a_run_without_finished_responses_is_refused_by_name(tmp_path):
    live = make_run(tmp_path / "live", accuracies=RISING, finish=False)
    with pytest.raises(DataError, match=r"live: has no summary\.json: it has not ended"):
        figures.cost_time([live])


def test_speed_up_and_cost_look_as_they_did(varied, simulated):
    assert_looks_like(figures.speedup(list(varied.values())), "speedup")
    assert_looks_like(figures.cost_time(list(simulated.values())), "cost_time")
