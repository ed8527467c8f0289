import json

import pandas as pd
import pytest

from analysis import figures
from analysis.figures import FIGURES
from analysis.model_costs import roofline_points
from analysis.plot import plot
from analysis.tables import (
    accuracy_curve,
    arm_named,
    arm_of,
    comparison_tables,
    device_table,
    paired_speedup,
    score_table,
    speed_table,
    steps_to_score,
    time_to_score,
)
from profiling import schema
from profiling.errors import DataError, InputError
from profiling.model_flops import decode_bytes, decode_flops
from profiling.phases import plain_header
from profiling.reader import Run
from profiling.writer import RunWriter
from tests.analysis.made_runs import MODEL, RISING, make_run


def test_the_time_to_a_score_is_where_three_evaluations_in_a_row_reach_it(runs):
    assert steps_to_score(runs[0]) == 5
    assert time_to_score(runs[0]) == 20.0
    assert time_to_score(runs[0], target=0.95) is None
    assert time_to_score(runs[0], target=0.9, consecutive=1) == 24.0
    assert accuracy_curve(runs[0]).accuracy.to_list() == RISING


def test_the_speed_of_an_arm_is_the_median_of_its_runs(runs):
    table = speed_table(runs).set_index("arm")
    assert table.loc["ppo", "s per step"] == pytest.approx(5.0)  # 4, 5, 6
    assert table.loc["ppo", "s per finished response"] == pytest.approx(2.5)
    assert table.loc["tppo", "ms per trained token"] == pytest.approx(1e3 * 2.0 / 40)
    assert table.loc["tppo", "decode, GPU-s"] == pytest.approx(1.0)
    assert table.loc["tppo", "prefill, GPU-s"] == pytest.approx(0.2)
    # of 5 s: half of the decode second is unfilled, 5 - 1.8 s are in no phase
    assert table.loc["ppo", "waiting or unfilled"] == pytest.approx((0.5 + 3.2) / 5)


def test_a_run_in_which_no_response_finished_has_no_rate_and_is_no_fault(tmp_path):
    run = make_run(tmp_path / "ppo-s0", accuracies=[0.5])
    summary = json.loads((run.path / "summary.json").read_text())
    none = {"seconds_per_finished_row": None, "seconds_per_trained_token": None}
    (run.path / "summary.json").write_text(json.dumps(summary | none))
    (row,) = speed_table([Run(run.path)]).to_dict("records")
    assert pd.isna(row["ms per trained token"]) and pd.isna(row["s per finished response"])
    assert row["rollout, s"] == pytest.approx(1.2)


def test_the_score_table_counts_what_was_trained_on_by_then(runs):
    row = score_table(runs).set_index("run").loc["tppo-s0"]
    assert (row["s to target"], row.steps, row["finished responses"], row["trained tokens"]) == (10, 5, 20, 200)


def test_the_paired_speedup_is_the_median_of_the_ratios_with_an_interval(runs):
    got = paired_speedup(runs, "ppo", "tppo")
    assert got["median"] == pytest.approx(2.5)  # 20/10, 25/10, 30/10
    assert (got["low"], got["high"]) == pytest.approx((2.0, 3.0))
    assert (got["pairs"], got["unreached"], got["wins"]) == (3, 0, 3)
    assert paired_speedup(runs[:2], "ppo", "tppo")["low"] is None


def test_a_seed_that_never_arrives_is_counted_not_hidden(runs, tmp_path):
    slow = make_run(tmp_path / "ppo-s7", accuracies=[0.1] * 4)
    fast = make_run(tmp_path / "tppo-s7", accuracies=RISING)
    assert paired_speedup([*runs, slow, fast], "ppo", "tppo")["unreached"] == 1


def test_predictions_are_compared_by_medians_and_ranges(runs, tmp_path):
    (pair,) = comparison_tables(pd.read_csv(tmp_path / "predictions.csv")).items()
    assert pair[0] == ("ppo", "tppo")
    row = pair[1].iloc[0]
    assert (row.quantity, row.measured, row.forecast, row["forecast error"]) == ("training time, s", 10.0, 11.0, 0.1)
    assert row["forecast error, range"] == "+0.0% to +20.0%"
    assert row["replay error, drift-corrected"] == 0.1


def test_decode_flops_and_bytes_by_hand():
    # P = 900 in products. 10 steps of 2 rows, contexts summing to 10 before: pairs 10 x 10 + 2 x 45 = 190
    # FLOPs: 2 x 900 x 20 + 4 x 2 x 3 x 4 x 190 = 36,000 + 18,240.  Bytes: 3,600 x 10 + 64 x (190 + 20)
    assert decode_flops(MODEL, 20, 190) == 54_240
    assert decode_bytes(MODEL, 10, 20, 190) == 49_440


def test_the_intensity_ratio_of_tppo_to_ppo_equals_hand_arithmetic(runs):
    # batch 4: 40 tokens, pairs 100 + 4 x 45 = 280: FLOPs 72,000 + 26,880, bytes 36,000 + 64 x 320
    points = roofline_points(runs).set_index(["run", "work"])
    ratio = points.intensity["tppo-s0", "decode"] / points.intensity["ppo-s0", "decode"]
    assert ratio == pytest.approx((98_880 / 56_480) / (54_240 / 49_440))
    assert points.flops_per_s["ppo-s0", "decode"] == pytest.approx(54_240 * 6 / 6)


def test_counters_of_the_gpu_stand_beside_the_counted_flops(tmp_path):
    run = make_run(tmp_path / "ppo-s0", accuracies=RISING)
    t = [0.1 * tick for tick in range(int(2.0 * len(RISING) / 0.1))]
    gpu, other = ["GPU-1"] * (len(t) - 1), RunWriter(tmp_path / "other", header=plain_header(), config_toml="")
    samples = dict.fromkeys(schema.DEVICES.names, [None] * len(t)) | {"t": t, "device": ["GPU-1"] * len(t)}
    other.table("devices", 0, samples)
    windows = {
        "t_begin": t[:-1] * 2, "t_end": t[1:] * 2, "device": gpu * 2,
        "metric": ["tensor_activity"] * len(gpu) + ["dram_activity"] * len(gpu),
        "value": [value if now % 2 < 1.19 else 1 - value for value in (0.3, 0.7) for now in t[:-1]],
    }  # fmt: skip
    other.table("windows", 0, windows)
    for part in ("devices", "windows"):
        (tmp_path / "other" / part).rename(run.path / part)
    point = roofline_points([Run(run.path)]).iloc[0]
    assert point.tensor_activity == pytest.approx(0.3, abs=0.03)
    assert point.dram_activity == pytest.approx(0.7, abs=0.03)
    assert pd.isna(roofline_points([make_run(tmp_path / "tppo-s0", accuracies=RISING)]).iloc[0].tensor_activity)


def test_a_point_above_the_roof_is_an_error(runs, tmp_path):
    hardware = {"name": "x", "peak_flops": 10.0, "memory_bytes_per_s": 1e9, "measured": True}
    (tmp_path / "hardware.json").write_text(json.dumps(hardware))
    with pytest.raises(DataError, match=r"decode reaches .* FLOP/s, above the roof of 10"):
        figures.roofline(runs)


@pytest.mark.parametrize("name", list(FIGURES))
def test_every_figure_draws_and_saves_its_numbers_beside_it(runs, tmp_path, name):
    paths = plot(runs, name, ["png", "pdf", "svg"], tmp_path / "out")
    assert [path.suffix for path in paths] == [".png", ".pdf", ".svg", ".csv"]
    assert all(path.stat().st_size > 100 for path in paths)
    assert len(pd.read_csv(paths[-1])) > 0


def test_the_ledger_bars_are_as_long_as_the_shares(runs):
    figure = figures.idle_ledger(runs[:1])
    widths = sum(bar.get_width() for bar in figure.axes[0].patches)
    assert widths == pytest.approx(1.0)
    colours = {bar.get_facecolor() for bar in figure.axes[0].patches}
    assert len(colours) == 5  # prefill, decode filled, unfilled, update, other


def test_the_accuracy_lines_have_the_runs_points(runs):
    axes = figures.accuracy_time(runs).axes[0]
    thin = [line for line in axes.lines if line.get_linewidth() == 0.8]
    assert len(thin) == 6
    assert thin[0].get_xdata().tolist() == [4, 8, 12, 16, 20, 24]
    assert "same score in 40 % of the time" in " ".join(text.get_text() for text in axes.texts)


def test_unknown_figures_and_formats_name_the_nearest(runs, tmp_path):
    with pytest.raises(InputError, match="did you mean 'roofline'"):
        plot(runs, "rofline", ["png"], tmp_path)
    with pytest.raises(InputError, match="format 'jpeg' is not one of png, pdf, svg"):
        plot(runs, "roofline", ["jpeg"], tmp_path)


def test_an_arm_is_a_name_without_its_seed(tmp_path):
    assert arm_of(make_run(tmp_path / "tppo-full-s12", accuracies=[0.1])) == "tppo-full"


def test_devices_by_phase_have_intervals(tmp_path):
    """A GPU that draws 300 W in every rollout and 100 W else, sampled every 50 ms; busy in rollouts only."""
    run = make_run(tmp_path / "ppo-s0", accuracies=RISING)
    t = [0.05 * tick for tick in range(int(2.0 * len(RISING) / 0.05))]
    rollout = [now % 2.0 < 1.2 for now in t]
    energy = [sum(0.05 * (300 if on else 100) for on in rollout[:tick]) for tick in range(len(t))]
    unknown = [None] * len(t)
    device = ["GPU-1"] * len(t)
    run_writer = RunWriter(tmp_path / "other", header=plain_header(), config_toml="")
    columns = dict.fromkeys(schema.DEVICES.names, unknown) | {"t": t, "device": device, "energy_joules": energy}
    run_writer.table("devices", 0, columns)
    run_writer.table("windows", 0, {"t_begin": t[:-1], "t_end": t[1:], "device": device[1:],
                                    "metric": ["utilisation"] * (len(t) - 1),
                                    "value": [float(on) for on in rollout[:-1]]})  # fmt: skip
    for part in ("devices", "windows"):
        (tmp_path / "other" / part).rename(run.path / part)
    table = device_table([Run(run.path)]).set_index("phase")
    assert table.loc["rollout", "busy"].startswith("100 %")
    assert table.loc["update_policy", "busy"].startswith("0 %")
    joules = float(table.loc["rollout", "energy, J"].split()[0].replace(",", ""))
    assert joules == pytest.approx(300 * 1.2 * len(RISING), rel=0.05)
    with pytest.raises(DataError, match="no device samples"):
        device_table([make_run(tmp_path / "tppo-s0", accuracies=RISING)])


@pytest.mark.parametrize(
    ("name", "arm"),
    [("tppo-s3", "tppo"), ("my-server", "my-server"), ("tppo-small", "tppo-small"), ("a-s1-s2", "a-s1")],
)
def test_the_arm_is_the_name_without_its_seed(name, arm):
    assert arm_named(name) == arm
