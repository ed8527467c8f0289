import json
import os
import shutil
import time
import urllib.request

import numpy as np
import pandas as pd
import pytest

from profiling.alarms import alarms, ledger_alarms
from profiling.energy import joules_by_piece
from profiling.errors import ConfigError, DataError
from profiling.lives import without_gaps
from profiling.phases import Profiler
from profiling.reader import Run
from profiling.schema import DEVICES
from profiling.watch import serve, snapshot, view, watch
from simulator import load_experiment, simulate
from tppo.cli import main


def samples_of(t, joules, device="GPU-a"):
    columns = {name: [None] * len(t) for name in DEVICES.names} | {"t": t, "device": [device] * len(t)}
    return pd.DataFrame(columns | {"energy_joules": joules})


def pieces_of(*edges):
    return pd.DataFrame({"t_start": edges[:-1], "t_end": edges[1:]})


def test_energy_of_pieces_adds_up_over_gpus_and_goes_on_outside_of_the_readings():
    t = np.arange(1.05, 9.1, 0.5)
    two = pd.concat([samples_of(t, 500 + 300 * (t - 0.05)), samples_of(t, 100 * (t - 0.05), "GPU-b")])
    got = joules_by_piece(two, pieces_of(0.0, 2.0, 5.0, 10.0))
    np.testing.assert_allclose(got, [800, 1200, 2000], rtol=1e-12)


def test_energy_is_null_without_a_counter_or_with_one_that_ran_backwards():
    t = [0.0, 1.0, 2.0]
    assert joules_by_piece(samples_of(t, [None] * 3), pieces_of(0.0, 2.0)) is None
    assert joules_by_piece(samples_of(t, [500.0, 10.0, 20.0]), pieces_of(0.0, 2.0)) is None
    assert joules_by_piece(samples_of(t[:1], [5.0]), pieces_of(0.0, 2.0)) is None


def test_energy_is_null_where_a_counter_never_ticked():
    t = [0.0, 1.0, 2.0, 3.5]
    ticks = samples_of(t, [0.0, 1.0, 2.0, 3.0])
    assert joules_by_piece(pd.concat([ticks, samples_of(t, [500.0] * 4, "GPU-b")]), pieces_of(0.0, 3.0)) is None
    assert joules_by_piece(samples_of(t[:2], [500.0] * 2), pieces_of(0.0, 2.0)) is None  # nor in a second


def ledger_of(*rows):
    return pd.DataFrame(rows, columns=["step", "gpu", "cause", "seconds"])


def test_alarms_name_the_gpus_the_share_and_the_cause_worst_first():
    found = ledger_alarms(
        ledger_of(
            (-1, 0, "wait_other", 500.0),  # outside every step: not part of any share
            (1, 0, "decode_useful", 59.0), (1, 0, "wait_tail", 41.0), (1, 0, "weight_sync", 100.0),
            (1, 1, "decode_useful", 99.0), (1, 1, "wait_tail", 1.0), (1, 1, "update_policy", 100.0),
            (1, 2, "decode_useful", 60.0), (1, 2, "wait_tail", 40.0), (1, 2, "update_policy", 100.0),
            (1, 3, "wait_rollout", 80.0), (1, 3, "update_policy", 20.0),
        )
    )  # fmt: skip
    assert found == [
        "GPU 3 waits 80% of the time for rollouts",
        "GPU 0 spends 50% of the time on synchronising weights",
        "GPUs 0 and 2 wait 40% of each rollout for the tail",
    ]
    assert ledger_alarms(ledger_of((1, 0, "decode_useful", 10.0))) == []
    assert ledger_alarms(ledger_of()) == []


def measured(path, *, samples, sampler=None):
    """A run of three steps as a program without engine records leaves it."""
    profiler = Profiler(path, sampler_interval_s=None)
    for step in (1, 2, 3):
        for name, begin, end in (("rollout", 0.0, 2.0), ("update_policy", 2.0, 2.5), ("weight_sync", 2.5, 3.0)):
            start = 3.0 * (step - 1)
            record = {"type": "phase", "name": name, "step": step, "depth": 0}
            profiler.trace({**record, "t_start": start + begin, "t_end": start + end})
    profiler.writer.table("devices", 0, {name: samples[name].to_list() for name in DEVICES.names})
    profiler.flush()
    if sampler is not None:
        profiler.writer.close(t=9.0, status="finished", sampler=sampler)
    return path


@pytest.fixture
def run_path(tmp_path):
    t = np.arange(0.0, 9.0, 0.5)
    samples = samples_of(t, 200 * t)
    samples["utilisation"], samples["event_reasons"] = 0.75, np.where(t < 2, 0x40, 0x4)
    return measured(tmp_path / "run", samples=samples)


def test_alarms_of_devices_and_of_the_sampler(tmp_path, run_path):
    shutil.move(run_path, tmp_path / "moved")
    samples = samples_of([0.0, 1.0], [0.0, 1.0])
    done = Run(measured(tmp_path / "done", samples=samples, sampler={"ticks": 90, "missed_ticks": 10}))
    assert alarms(ledger_of(), done) == ["the sampler missed 10% of its ticks: the host is overloaded"]
    torn = Run(measured(tmp_path / "torn", samples=samples, sampler={"ticks": 90}))
    assert alarms(ledger_of(), torn) == []
    assert alarms(ledger_of(), Run(tmp_path / "moved")) == ["GPU-a is slowed down by heat in 22% of its samples"]


def test_a_live_run_is_shown_with_its_complete_steps(run_path, capsys):
    now = snapshot(run_path)
    assert (now.step, now.wall_s) == (3, 9.0)
    assert now.ledger.seconds.sum() == pytest.approx(9.0)
    assert len(view(now).renderables) >= 4
    watch(run_path, once=True)
    shown = capsys.readouterr().out
    assert "running, step 3, 9.0 s" in shown
    assert "75 %" in shown
    assert "GPU 0 spends 17% of the time on synchronising weights" in shown


def test_a_command_without_phases_is_watched_by_the_samplers_word(tmp_path, capsys):
    Profiler(tmp_path / "run", sampler_interval_s=None)
    (tmp_path / "run" / "sampler.json").write_text(json.dumps({"last_sample_s": 12.3}))
    watch(tmp_path / "run", once=True)
    assert "running, step 0, 12.3 s, in its first phase" in capsys.readouterr().out
    (tmp_path / "run" / "sampler.json").write_text("[")
    assert snapshot(tmp_path / "run").elapsed_s == 0.0


def test_a_run_that_was_killed_shows_no_sign_of_life(run_path, capsys):
    (run_path / "sampler.json").write_text("{}")
    then = time.time() - 600
    for name in ("trace.jsonl", "sampler.json"):
        os.utime(run_path / name, (then, then))
    watch(run_path, once=True)
    assert "no sign of life for 60" in capsys.readouterr().out
    os.utime(run_path / "sampler.json")
    watch(run_path, once=True)
    assert "running, step 3" in capsys.readouterr().out


def test_prometheus_sees_the_run_anew_at_every_scrape_from_this_machine_only(run_path):
    port = _free_port()
    serve(run_path, port, "127.0.0.1")
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert "tppo_up 1.0" in text
    assert 'tppo_phase_seconds_total{phase="rollout"} 6.0' in text
    assert 'tppo_gpu_seconds_total{cause="update_policy",gpu="0"} 1.5' in text
    assert 'tppo_device_utilisation_ratio{device="GPU-a"} 0.75' in text
    assert 'tppo_device_energy_joules_total{device="GPU-a"} 1700.0' in text
    with (run_path / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"step": 3, "critic/score/mean": 0.5, "val/accuracy": None}) + "\n")
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert 'tppo_training_metric{name="critic/score/mean"} 0.5' in text
    assert "val/accuracy" not in text
    shutil.rmtree(run_path)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert "tppo_up 0.0" in text
    with pytest.raises(ConfigError, match="cannot listen"):
        serve(run_path, port, "127.0.0.1")


def _free_port():
    import socket

    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def test_watch_ends_with_the_run_and_refuses_what_is_no_run(tmp_path, capsys):
    samples = samples_of([0.0, 1.0], [0.0, 1.0])
    path = measured(tmp_path / "done", samples=samples, sampler={"ticks": 10, "missed_ticks": 0})
    assert main(["watch", str(path)]) == 0
    assert "finished, step 3" in capsys.readouterr().out
    assert main(["watch", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err
    assert main(["watch", str(path), "--once", "--prometheus", "99999999"]) == 2
    with pytest.raises(DataError):
        snapshot(tmp_path / "nothing")


def test_a_run_is_watched_at_any_moment_of_its_life(tmp_path):
    """A real run of the simulator, cut after every record of its trace, with all tables of its later steps: as a live
    run looks whose phases reach the disk later than its tables."""
    experiment = load_experiment(
        {
            "workload": {"steps": 3, "prompts_per_step": 6, "max_response_tokens": 30,
                         "response_tokens": {"kind": "lognormal", "mean": 12.0, "sigma": 0.8}},
            "schedule": {"kind": "truncated", "window": 10},
            "cluster": {"engines": 2},
            "cost": {"decode_base_s": 0.5, "policy_update_base_s": 2.0, "weight_sync_s": 0.5},
        }
    )  # fmt: skip
    simulate(experiment).write(tmp_path / "run")
    trace = tmp_path / "run" / "trace.jsonl"
    lines = trace.read_text().splitlines(keepends=True)
    seen = []
    for count in range(1, len(lines) + 1):
        trace.write_text("".join(lines[:count]))
        now = snapshot(tmp_path / "run")
        assert now.ledger.seconds.sum() == pytest.approx(2 * now.wall_s)
        view(now)
        seen.append(now.step)
    assert seen == sorted(seen)
    assert set(seen) == {0, 1, 2, 3}


@pytest.mark.parametrize("after", [90_000.0, 3.0], ids=["other jobs ran meanwhile", "the driver was loaded again"])
def test_what_a_counter_counted_while_the_run_was_stopped_is_left_out(after):
    """100 W for two seconds, then, after a stop, for two more."""
    first, second = np.arange(0.05, 2.0, 0.1), np.arange(2.15, 4.0, 0.1)
    joules = np.concatenate([100 * (first - 0.05), after + 100 * (second - 2.05)])
    devices = samples_of(np.concatenate([first, second]), joules)
    joined = without_gaps(devices, [2.0])
    np.testing.assert_allclose(joules_by_piece(joined, pieces_of(0.0, 2.0, 4.0)), [200, 200], rtol=1e-9)
    pd.testing.assert_frame_equal(without_gaps(joined, [0.0, 7.0]), joined)
