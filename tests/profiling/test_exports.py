import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from profiling.errors import DataError
from profiling.exports import chrome_trace, slots_of
from profiling.phases import plain_header
from profiling.reader import Run
from profiling.schema import DEVICES
from profiling.writer import RunWriter, write_parquet
from simulator import load_experiment, simulate
from tppo.cli import main


@pytest.fixture
def run(tmp_path):
    experiment = load_experiment(
        {
            "workload": {
                "steps": 3, "prompts_per_step": 7, "max_response_tokens": 30, "prompt_tokens": 5,
                "response_tokens": {"kind": "lognormal", "mean": 12.0, "sigma": 0.8},
            },
            "schedule": {"kind": "truncated", "window": 10},
            "cluster": {"engines": 2, "max_rows_per_engine": 2},
            "cost": {"decode_base_s": 0.5, "prefill_base_s": 0.25, "policy_update_base_s": 2.0},
        }
    )  # fmt: skip
    simulate(experiment).write(tmp_path / "run")
    return Run(tmp_path / "run")


def test_rows_take_the_lowest_free_slot():
    # a 0-4, b 0-2, c 1-3 need three slots; d starts when b leaves slot 1; e at 4: slots 0 and 2 are free
    assert slots_of([0, 0, 1, 2, 4], [4, 2, 3, 6, 5]) == [0, 1, 2, 1, 0]
    assert slots_of([], []) == []


def test_every_phase_span_and_row_is_an_event_of_its_length(run):
    trace = chrome_trace(run)
    timed = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(timed) == len(run.phases) + len(run.engine) + len(run.rollouts)
    engines = [event for event in timed if event["pid"] >= 1 and event["tid"] == 0]
    assert sum(e["dur"] for e in engines) == pytest.approx(1e6 * (run.engine.t_end - run.engine.t_start).sum())
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert names == {"run: phases (simulated)", "engine", "engine 0", "engine 1", "slot 0", "slot 1"}
    json.dumps(trace, allow_nan=False)


def test_rows_of_one_slot_never_overlap(run):
    by_slot = {}
    for event in chrome_trace(run)["traceEvents"]:
        if event["ph"] == "X" and event["tid"] >= 1:
            by_slot.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(by_slot) == 4
    for times in by_slot.values():
        times.sort()
        assert all(end <= start + 1e-3 for (_, end), (start, _) in pairwise(times))


def test_a_range_of_steps_can_be_chosen(run, tmp_path, capsys):
    assert main(["export", str(run.path), "--steps", "2:3", "--output", str(tmp_path / "t.json")]) == 0
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {event["args"]["step"] for event in events if event["pid"] == 0 and event["ph"] == "X"} == {2, 3}
    assert capsys.readouterr().out.strip() == str(tmp_path / "t.json")
    with pytest.raises(DataError, match="has no phases in steps 9 to the last"):
        chrome_trace(run, first_step=9)


@pytest.mark.parametrize("steps", ["x", "3:1", "1:2:3", "-1"])
def test_a_range_that_is_none_is_one_line(run, tmp_path, capsys, steps):
    assert main(["export", str(run.path), f"--steps={steps}", "--output", str(tmp_path / "t.json")]) == 2
    assert "--steps" in capsys.readouterr().err


def test_tables_and_scalars_hold_what_the_run_holds(tmp_path, run, capsys):
    for form in ("csv", "parquet"):
        assert main(["export", str(run.path), "--format", form, "--output", str(tmp_path / form)]) == 0
    rows = pd.read_csv(tmp_path / "csv" / "rollouts.csv")
    assert len(rows) == len(run.rollouts)
    assert rows.tokens.sum() == run.rollouts.tokens.sum()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "parquet" / "ledger.parquet"), run.ledger)
    assert not (tmp_path / "csv" / "devices.csv").exists()  # a simulation has no samples
    with (run.path / "metrics.jsonl").open("w") as file:
        for step in (1, 2):
            file.write(
                json.dumps({"step": step, "time_s": 3.0 * step, "critic/score/mean": step / 4, "x": None}) + "\n"
            )
    target = tmp_path / "board"
    assert main(["export", str(run.path), "--format", "tensorboard", "--output", str(target)]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(target))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("critic/score/mean")] == [(1, 0.25), (2, 0.5)]
    assert main(["export", str(run.path), "--format", "tensorboard", "--output", str(target)]) == 2
    assert "already holds events" in capsys.readouterr().err
    (tmp_path / "a file").touch()
    assert main(["export", str(run.path), "--format", "tensorboard", "--output", str(tmp_path / "a file")]) == 2
    assert "cannot be created: File exists" in capsys.readouterr().err
    assert main(["export", str(run.path), "--format", "xml"]) == 2
    assert "--format xml: not one of chrome, csv, huggingface, parquet, tensorboard, wandb" in capsys.readouterr().err


@pytest.mark.slow
def test_an_offline_wandb_run_holds_metrics_by_step_and_devices_by_second(tmp_path, run, capsys):
    with (run.path / "metrics.jsonl").open("w") as file:
        for step in (1, 2):
            file.write(json.dumps({"step": step, "time_s": 3.0 * step, "critic/score/mean": step / 4}) + "\n")
    samples = {name: [None] * 3 for name in DEVICES.names} | {"t": [0.1, 0.6, 1.2], "device": ["GPU-a"] * 3}
    write_parquet(
        run.path / "devices" / "part-000000.parquet", samples | {"power_watts": [100.0, 300.0, 50.0]}, DEVICES
    )
    assert main(["export", str(run.path), "--format", "wandb", "--output", str(tmp_path / "w")]) == 0
    from tests.tppo.wandb_file import history_of

    rows = history_of(next((tmp_path / "w").rglob("*.wandb")))
    assert rows == [
        {"step": 1, "time_s": 3.0, "critic/score/mean": 0.25}, {"step": 2, "time_s": 6.0, "critic/score/mean": 0.5},
        {"second": 0, "device/GPU-a/power_watts": 200.0}, {"second": 1, "device/GPU-a/power_watts": 50.0},
    ]  # fmt: skip
    assert main(["export", str(run.path), "--format", "wandb", "--output", str(tmp_path / "w")]) == 2


def test_processes_of_a_profiled_command_have_tracks_of_their_own(tmp_path):
    writer = RunWriter(tmp_path / "run", header=plain_header(), config_toml="")
    for process in ("host-1", "host-2", None):
        phase = {"type": "phase", "name": "rollout", "step": 1, "t_start": 0.0, "t_end": 1.0, "depth": 0}
        writer.trace(phase if process is None else {**phase, "process": process})
    events = chrome_trace(Run(tmp_path / "run"))["traceEvents"]
    names = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert set(names) == {"run: phases (measured)", "run: host-1", "run: host-2"}
    assert sorted(e["pid"] for e in events if e["ph"] == "X") == sorted(names.values())


def test_what_the_sensors_said_stands_beside_the_phases(tmp_path):
    writer = RunWriter(tmp_path / "run", header=plain_header(), config_toml="")
    phase = {"type": "phase", "name": "rollout", "step": 1, "t_start": 1.0, "t_end": 10.0, "depth": 0}
    writer.trace(phase)
    t = [0.0, 2.0, 4.0, 6.0]
    samples = {name: [None] * 4 for name in DEVICES.names} | {"t": t, "device": ["GPU-a"] * 4}
    writer.table("devices", 0, samples | {"power_watts": [100.0, 300.0, None, 50.0], "utilisation": [0.5] * 4})
    many = 10_000
    begins = np.linspace(1.0, 9.0, many)
    windows = {"t_begin": begins, "t_end": begins + 1e-3, "device": ["GPU-a"] * many}
    writer.table("windows", 0, windows | {"metric": ["sm_activity"] * many, "value": np.arange(many) % 2})
    events = chrome_trace(Run(tmp_path / "run"))["traceEvents"]
    points = {}
    for event in events:
        if event["ph"] == "C":
            points.setdefault(event["name"], []).append((event["ts"] / 1e6, event["args"]["value"]))
    assert points["power_watts"] == [(2.0, 300.0), (6.0, 50.0)]
    assert points["utilisation"] == [(2.0, 0.5), (4.0, 0.5), (6.0, 0.5)]
    assert len(points["sm_activity"]) == 2000  # five neighbours each: two or three of them are 1
    assert {round(value, 12) for _, value in points["sm_activity"]} == {0.4, 0.6}
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"run: phases (measured)", "GPU-a: sensors"}
    json.dumps(events, allow_nan=False)
