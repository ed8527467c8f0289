"""A run on several hosts: names of hosts, and samples of all of them read as one table."""

import json
import time

import numpy as np
import pytest

from profiling import Profiler
from profiling.alarms import alarms
from profiling.hosts import Host, HostNames
from profiling.phases import plain_header
from profiling.reader import Run
from profiling.schema import DEVICES, WINDOWS
from profiling.summary import write_totals
from profiling.watch import latest
from profiling.writer import RunWriter, write_parquet
from tests.profiling.test_energy_alarms_watch import samples_of


def test_every_host_has_a_name_that_a_folder_can_have():
    hosts = [Host("a", "node.1"), Host("b", "node.1"), Host("a", "node.1"), Host("a", "../x y"), Host("c", "."),
             Host("d", ""), Host("e", "host")]  # fmt: skip
    names = HostNames(hosts)
    assert [names.of(host) for host in hosts] == ["node.1", "node.1-2", "node.1", "_._x_y", "_", "host", "host-2"]
    assert names.first == hosts[0]


HEADER = {**plain_header(), "host": "near"}
NOTE = {"type": "note", "text": "rank 1 is on another host", "rank": 1, "host": "far"}
PHASE = {"type": "phase", "name": "rollout", "step": 1, "t_start": 0.0, "t_end": 4.0, "depth": 0}


def run_of_two(path, *, note=True):
    """GPU-a on the first host at 100 W; GPU-b on far at 200 W, which also sees GPU-a; for four seconds."""
    writer = RunWriter(path, header=HEADER, config_toml="")
    t = np.arange(0.05, 4.1, 0.5)
    places = {path: [("GPU-a", 100)], path / "hosts" / "far": [("GPU-b", 200), ("GPU-a", 900)]}
    for folder, gpus in places.items():
        for part, (device, watts) in enumerate(gpus):
            samples = samples_of(t, watts * t, device)
            columns = {name: samples[name].to_list() for name in DEVICES.names}
            write_parquet(folder / "devices" / f"part-{part:06d}.parquet", columns, DEVICES)
        windows = {"t_begin": [0.0, 1.0], "t_end": [1.0, 2.0], "device": [gpus[0][0]] * 2,
                   "metric": ["utilisation"] * 2, "value": [0.5, 0.6]}  # fmt: skip
        write_parquet(folder / "windows" / "part-000000.parquet", windows, WINDOWS)
        gpus = [{"uuid": device, "name": "H100", "index": 0, "part_of": None} for device, _ in gpus]
        said = {"devices": gpus, "capabilities": {gpus[0]["uuid"]: {"energy_joules": "ok"}}}
        (folder / "sampler.json").write_text(json.dumps(said))
    if note:
        writer.trace(NOTE)
    return writer


def test_samples_of_all_hosts_are_one_table_and_a_gpu_that_two_see_counts_once(tmp_path):
    run_of_two(tmp_path / "run")
    run = Run(tmp_path / "run")
    assert list(run.devices.device.unique()) == ["GPU-a", "GPU-b"]
    assert run.devices.energy_joules.max() == pytest.approx(200 * 4.05)
    assert list(run.windows.device.unique()) == ["GPU-a", "GPU-b"]
    assert [device["uuid"] for device in run.header["devices"]] == ["GPU-a", "GPU-b"]
    assert run.header["capabilities"] == {"GPU-a": {"energy_joules": "ok"}, "GPU-b": {"energy_joules": "ok"}}
    assert run.unsampled_hosts == []


def finished(writer, wall_s=4.0):
    writer.trace(PHASE | {"t_end": wall_s})
    writer.close(t=wall_s, status="finished")
    write_totals(writer, wall_s)
    return Run(writer.path)


def said(run):
    return [text for text in alarms(run.ledger, run) if "joules" in text or "samples" in text]


def test_joules_are_of_all_hosts(tmp_path):
    run = finished(run_of_two(tmp_path / "run"))
    assert run.summary["energy_joules"] == pytest.approx(4.0 * (100 + 200))
    assert said(run) == []


def test_a_host_without_samples_is_named_and_joules_are_null(tmp_path):
    writer = run_of_two(tmp_path / "run")
    writer.trace({"type": "note", "text": "engine 3 is on another host", "engine": 3, "host": "lost"})
    run = finished(writer)
    assert run.unsampled_hosts == ["lost"]
    assert run.summary["energy_joules"] is None
    assert said(run) == ["no samples of lost", "no energy counter on lost: joules of the run are null"]


@pytest.mark.parametrize("gone", [".", "hosts/far"])
def test_joules_are_null_where_one_host_has_no_counter_the_first_or_another(tmp_path, gone):
    writer = run_of_two(tmp_path / "run")
    for part in (tmp_path / "run" / gone / "devices").glob("*"):
        part.unlink()
    t = np.arange(0.05, 4.1, 0.5)
    samples = samples_of(t, [None] * len(t), "host")
    columns = {name: samples[name].to_list() for name in DEVICES.names}
    write_parquet(tmp_path / "run" / gone / "devices" / "part-000000.parquet", columns, DEVICES)
    run = finished(writer)
    assert run.unsampled_hosts == []
    assert run.summary["energy_joules"] is None
    assert said(run) == [f"no energy counter on {'far' if 'far' in gone else 'near'}: joules of the run are null"]


def test_without_samplers_there_is_nothing_to_say(tmp_path):
    writer = RunWriter(tmp_path / "run", header=HEADER, config_toml="")
    writer.trace(NOTE)
    assert said(finished(writer)) == []


def test_a_run_that_was_resumed_with_its_hosts_in_another_order_keeps_all_samples(tmp_path):
    """near was first, then far."""
    lives = {"near": (".", "hosts/near"), "far": ("hosts/far", ".")}
    writer = RunWriter(tmp_path / "run", header=HEADER, config_toml="")
    writer.trace(NOTE, NOTE | {"host": "near"})
    for (_, folders), watts in zip(lives.items(), (100, 200), strict=True):
        for life, folder in enumerate(folders):
            t = np.arange(0.05, 2.0, 0.5) + 2 * life
            samples = samples_of(t, watts * t, f"GPU-{watts}")
            columns = {name: samples[name].to_list() for name in DEVICES.names}
            part = 2 * life + (folder == ".")
            write_parquet(tmp_path / "run" / folder / "devices" / f"part-{part:06d}.parquet", columns, DEVICES)
    run = finished(writer)
    assert run.devices.t.is_monotonic_increasing
    assert run.devices.groupby("device").t.agg(["size", "max"]).to_dict("list") == {
        "size": [8, 8],
        "max": [3.55, 3.55],
    }
    assert run.summary["energy_joules"] == pytest.approx(4.0 * 300, rel=0.02)


def test_a_counter_that_was_read_for_a_part_of_the_run_gives_no_joules(tmp_path):
    assert finished(run_of_two(tmp_path / "short"), wall_s=12.0).summary["energy_joules"] is not None
    assert finished(run_of_two(tmp_path / "long"), wall_s=60.0).summary["energy_joules"] is None


def test_a_live_view_shows_hosts_whose_samplers_wrote_at_other_times(tmp_path):
    run_of_two(tmp_path / "run")
    late = samples_of(np.array([50.0, 51.0]), [5000.0, 5100.0], "GPU-a")
    columns = {name: late[name].to_list() for name in DEVICES.names}
    write_parquet(tmp_path / "run" / "devices" / "part-000001.parquet", columns, DEVICES)
    assert set(latest(Run(tmp_path / "run")).index) == {"GPU-a", "GPU-b"}
    write_parquet(tmp_path / "run" / "devices" / "part-000002.parquet", columns | {"t": [500.0, 501.0]}, DEVICES)
    assert set(latest(Run(tmp_path / "run")).index) == {"GPU-a"}


def test_resuming_cuts_samples_of_all_hosts(tmp_path):
    writer = run_of_two(tmp_path / "run")
    RunWriter.resume(tmp_path / "run", offsets=writer.offsets(), last_step=0, last_t_s=2.0)
    run = Run(tmp_path / "run")
    assert run.devices.groupby("device").t.max().to_dict() == {"GPU-a": 1.55, "GPU-b": 1.55}
    assert run.windows.t_end.max() == 2.0


def test_another_hosts_sampler_writes_into_its_folder_under_its_name(tmp_path):
    ended = []
    writer = RunWriter(tmp_path / "run", header=plain_header(), config_toml="")
    with Profiler(writer=writer, sampler_interval_s=0.1, host="far") as profiler:
        profiler.before_end(lambda: ended.append(profiler.now()))
        time.sleep(0.3)
    run = Run(tmp_path / "run")
    assert not (tmp_path / "run" / "devices").exists()
    own = run.devices[run.devices.device == "host far"]
    assert own.t.between(0, run.trailer["t"] + 10.0).all()
    assert len(own) >= 2
    assert len(ended) == 1
    assert run.header["devices"] == []  # "host far" is no GPU
