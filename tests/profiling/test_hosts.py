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
from profiling.writer import RunWriter, write_parquet
from tests.profiling.test_energy_alarms_watch import samples_of


def test_every_host_has_a_name_that_a_folder_can_have():
    hosts = [Host("a", "node.1"), Host("b", "node.1"), Host("a", "node.1"), Host("a", "../x y"), Host("c", "."),
             Host("d", ""), Host("e", "host")]  # fmt: skip
    names = HostNames(hosts)
    assert [names.of(host) for host in hosts] == ["node.1", "node.1-2", "node.1", "_._x_y", "_", "host", "host-2"]
    assert names.first == hosts[0]


def run_of_two(path, *, note=True):
    """GPU-a on the first host at 100 W; GPU-b on far at 200 W, which also sees GPU-a; for four seconds."""
    writer = RunWriter(path, header=plain_header(), config_toml="")
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
        writer.trace({"type": "note", "text": "rank 1 is on another host", "rank": 1, "host": "far"})
    return writer


def test_samples_of_all_hosts_are_one_table_and_a_gpu_that_two_see_counts_once(tmp_path):
    run_of_two(tmp_path / "run")
    run = Run(tmp_path / "run")
    assert list(run.devices.device.unique()) == ["GPU-a", "GPU-b"]
    assert run.devices.energy_joules.max() == pytest.approx(200 * 4.05)
    assert list(run.windows.device.unique()) == ["GPU-a", "GPU-b"]
    assert {device["uuid"] for device in run.header["devices"]} == {"GPU-a", "GPU-b"}
    assert run.header["capabilities"] == {"GPU-a": {"energy_joules": "ok"}, "GPU-b": {"energy_joules": "ok"}}
    assert run.unsampled_hosts == []


def test_a_host_without_samples_is_named(tmp_path):
    writer = run_of_two(tmp_path / "run")
    writer.trace({"type": "note", "text": "engine 3 is on another host", "engine": 3, "host": "lost"})
    writer.close(t=4.0, status="finished")
    run = Run(tmp_path / "run")
    assert run.unsampled_hosts == ["lost"]
    ledger = run.devices.iloc[:0].assign(gpu=0, step=0, cause="", seconds=0.0)
    assert alarms(ledger, run) == ["no samples of lost: joules of the run are null"]


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
    assert own.t.between(0, run.trailer["t"] + 0.5).all()
    assert len(own) >= 2
    assert len(ended) == 1
    assert run.header["devices"] == []  # "host far" is no GPU
