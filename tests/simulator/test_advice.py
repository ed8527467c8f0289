import json
import os
import shutil

import pandas as pd
import pytest

from profiling.advice import Advice, Option, read_advice, write_advice
from profiling.errors import DataError
from profiling.reader import Run
from profiling.schema import ROLLOUTS
from profiling.writer import write_parquet
from simulator import load_experiment, simulate
from simulator.advice import advise, tail_of
from simulator.calibrate import calibrate, resampled_costs
from tests.analysis.made_runs import make_run, simulated_run
from tppo.commands import report
from tppo.commands.report import advice_of

COST = {
    "kind": "affine", "decode_base_s": 0.01, "decode_per_row_s": 1e-4, "decode_per_context_token_s": 1e-7,
    "prefill_per_token_s": 1e-6, "policy_update_per_token_s": 2e-6, "value_update_per_token_s": 1e-6,
}  # fmt: skip
WORKLOAD = {"steps": 24, "prompts_per_step": 16, "samples_per_prompt": 2}


def per_response(schedule, **workload):
    values = {
        "workload": {"steps": 24, "prompts_per_step": 16, "samples_per_prompt": 2, "prompt_tokens": 128,
                     "max_response_tokens": 2048, "seed": 7,
                     "response_tokens": {"kind": "lognormal", "mean_capped": 500.0, "sigma": 0.9}} | workload,
        "schedule": schedule, "cluster": {"engines": 2, "max_rows_per_engine": 24}, "cost": COST,
    }  # fmt: skip
    return simulate(load_experiment(values)).summary()["seconds_per_finished_row"]


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory):
    return simulated_run(tmp_path_factory.mktemp("advice") / "ppo-s0", {"workload": WORKLOAD, "cost": COST})


def as_measured(run, path):
    """The simulated run as if it had been measured: a trainer's configuration, and a header that says so."""
    shutil.copytree(run.path, path)
    (path / "config.toml").write_text("[rollout]\nmax_response_tokens = 2048\n")
    lines = (path / "trace.jsonl").read_text().splitlines()
    header = json.loads(lines[0]) | {"simulated": False, "simulated_only": False, "unix_time_s": 0.0, "host": "here"}
    (path / "trace.jsonl").write_text("\n".join([json.dumps(header, separators=(",", ":")), *lines[1:]]) + "\n")
    return Run(path)


def test_the_saving_of_the_advised_window_is_what_running_it_saves(synchronous):
    advice = advise(synchronous)
    own_s = synchronous.summary["seconds_per_finished_row"]
    assert advice.own.seconds_per_finished_row == pytest.approx(own_s, rel=1e-12)  # all its rows: the same run
    best = advice.best
    longer = {"steps": 120, "seed": 8}  # other rows of the same kind
    truth = 1 - per_response({"kind": "truncated", "window": best.window}, **longer) / per_response(
        {"kind": "synchronous"}, **longer
    )
    assert best.saving > best.margin  # the case has something to save
    assert best.margin < 0.2
    assert abs(best.saving - truth) <= best.margin
    assert advice.sentence().endswith("per finished response.")
    assert "would save" in advice.sentence()


@pytest.mark.slow
def test_a_measured_run_is_calibrated_on_itself_and_gets_the_same_advice(synchronous, tmp_path):
    measured, simulated = advise(as_measured(synchronous, tmp_path / "ppo-s0")), advise(synchronous)
    assert measured.basis == "costs fitted to the run itself"
    assert abs(measured.replay_error) < 0.03
    assert measured.best.window == simulated.best.window
    assert measured.best.saving == pytest.approx(simulated.best.saving, abs=0.02)


def test_a_truncated_run_is_told_when_no_other_window_helps(tmp_path):
    schedule = {"kind": "truncated", "window": 256}
    advice = advise(simulated_run(tmp_path / "tppo", {"workload": WORKLOAD, "cost": COST, "schedule": schedule}))
    assert advice.own.window == 256
    assert "synchronous" in [option.kind for option in advice.others]
    assert 256 not in [option.window for option in advice.others]
    assert next(option for option in advice.others if option.kind == "synchronous").saving < 0
    assert advice.best.saving <= advice.best.margin
    assert "nother window would not help, beside its own of 256" in advice.sentence()


def test_where_a_step_takes_no_longer_for_long_rows_truncation_is_not_advised(tmp_path):
    # Decoding is free, and every row is processed again in each window: windows only cost.
    cost = {"kind": "affine", "policy_update_per_token_s": 1e-5, "decode_base_s": 1e-9}
    advice = advise(simulated_run(tmp_path / "ppo", {"workload": WORKLOAD, "cost": cost}))
    assert advice.best.saving < 0
    assert "nother window would not help: the best of" in advice.sentence()
    assert "costs" in advice.sentence()


def test_the_tail_is_the_time_after_all_but_the_slowest_rows(tmp_path):
    run = make_run(tmp_path / "ppo-s0", accuracies=[0.5] * 2, batch=40)
    for step in (1, 2):
        # 40 rows: ceil(0.03 x 40) = 2 slowest; the others end at 6 s of 10 s
        part = run.path / "rollouts" / f"step-{step:06d}.parquet"
        rows = pd.read_parquet(part).assign(t_start=0.0, t_end=[6.0] * 38 + [7.0, 10.0])
        write_parquet(part, {name: rows[name] for name in ROLLOUTS.names}, ROLLOUTS)
    tail = tail_of(Run(run.path))
    assert (tail.time_share, tail.row_share) == pytest.approx((0.4, 0.05))


def reason(run):
    advice = advise(run)
    assert advice.sentence() == f"No advice on the window: {advice.withheld}."
    return advice.withheld


def test_a_run_that_lacks_what_advice_needs_is_told_so(tmp_path, synchronous):
    assert reason(make_run(tmp_path / "live", accuracies=[0.5] * 9, finish=False)) == "the run has not ended"
    few = simulated_run(tmp_path / "few", {"workload": WORKLOAD | {"steps": 4}, "cost": COST})
    assert reason(few) == "4 steps after start-up are too few; 5 are needed"
    ahead = {"schedule": {"kind": "oversample", "factor": 1.5}, "workload": WORKLOAD, "cost": COST}
    assert reason(simulated_run(tmp_path / "ahead", ahead)) == (
        "schedule 'oversample' is neither synchronous nor truncated"
    )
    whole = simulated_run(tmp_path / "whole", {"schedule": {"kind": "truncated", "window": 256}, "cost": COST,
                                               "workload": WORKLOAD})  # fmt: skip
    for part in (whole.path / "rollouts").iterdir():  # as partial-rollout records: a row trains when it is finished
        rows = pd.read_parquet(part)
        rows["trained_tokens"] = rows.trained_tokens.where(rows.finished, 0)
        write_parquet(part, rows.to_dict("list"), ROLLOUTS)
    assert (
        reason(Run(whole.path)) == "its responses train when they are whole, and a replay trains every step's tokens"
    )
    bare = as_measured(synchronous, tmp_path / "bare")
    for part in (bare.path / "rollouts").iterdir():
        part.unlink()
    assert reason(Run(bare.path)) == "the run has no rollout records"


def test_costs_that_do_not_describe_the_run_give_no_advice(synchronous, tmp_path):
    run = as_measured(synchronous, tmp_path / "ppo-s0")
    summary = json.loads((run.path / "summary.json").read_text())
    summary["seconds_per_finished_row"] *= 2
    (run.path / "summary.json").write_text(json.dumps(summary))
    assert reason(Run(run.path)).startswith("a replay of the run itself misses its time per finished response by -50%")


def test_advice_is_kept_until_the_run_goes_on(synchronous, tmp_path):
    run = as_measured(synchronous, tmp_path / "ppo-s0")
    first = advice_of([run])[run.path]
    assert read_advice(run.path) == first
    (run.path / "advice.json").write_text((run.path / "advice.json").read_text().replace('"rows": ', '"rows": 1'))
    assert advice_of([run])[run.path] != first  # read, not computed
    with (run.path / "trace.jsonl").open("a") as file:
        file.write('{"type":"note","text":"went on"}\n')
    assert read_advice(run.path) is None
    os.utime(run.path / "advice.json", (0, 0))
    assert read_advice(run.path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, r"advice.json: schema = 2: input should be 1; delete it, and tppo report writes it anew"),
        ({"others": []}, r"advice.json: the file: own, others and the best one's margin must be there"),
        ({"rows": 0}, r"advice.json: rows = 0: input should be greater than 0"),
        ({"rowz": 1}, r"advice.json: unknown key 'rowz'; did you mean 'rows'\?"),
    ],
)
def test_damaged_advice_is_one_line_with_file_and_field(synchronous, tmp_path, change, message):
    run = as_measured(synchronous, tmp_path / "ppo-s0")
    own = {"kind": "synchronous", "seconds_per_finished_row": 2.0, "saving": 0.0}
    other = {"kind": "truncated", "window": 512, "seconds_per_finished_row": 1.0, "saving": 0.5, "margin": 0.1}
    write_advice(run.path, Advice(schema=1, trace_bytes=1, rows=8, own=Option(**own), others=(Option(**other),)))
    values = json.loads((run.path / "advice.json").read_text()) | change
    (run.path / "advice.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=message):
        read_advice(run.path)


def test_a_directory_that_cannot_be_written_is_warned_of_and_the_advice_is_there(
    synchronous, tmp_path, capsys, monkeypatch
):
    run = as_measured(synchronous, tmp_path / "ppo-s0")
    (run.path / ".advice.json.tmp").mkdir()  # what the file is written to first
    found = advice_of([run])
    assert found[run.path].withheld is None
    assert "advice.json: cannot be written" in capsys.readouterr().err
    assert not (run.path / "advice.json").exists()


@pytest.mark.slow
def test_another_process_computes_the_same_advice_of_a_large_run(synchronous, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LARGE_BYTES", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    run = as_measured(synchronous, tmp_path / "ppo-s0")
    with report.advice_beside([run]) as advice:
        beside = advice()
    (run.path / "advice.json").unlink()
    assert beside == advice_of([run])


def end_this_process(paths):
    os._exit(1)


def test_a_process_that_is_ended_costs_the_advice_and_not_the_report(synchronous, monkeypatch, capsys):
    monkeypatch.setattr(report, "LARGE_BYTES", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(report, "_advice_at", end_this_process)
    with report.advice_beside([synchronous]) as advice:
        assert advice() == {}
    assert "the process that simulates was ended" in capsys.readouterr().err


def test_costs_are_drawn_anew_around_the_fitted_ones(synchronous):
    calibration = calibrate([synchronous])
    drawn = resampled_costs(synchronous, calibration, 5)
    assert len(drawn) == 5
    assert set(drawn[0]) == set(calibration.costs)
    assert [costs["decode_base_s"] for costs in drawn] == pytest.approx([0.01] * 5, rel=1e-3)
