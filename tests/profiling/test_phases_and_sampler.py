import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pandas as pd
import pytest

from profiling import Profiler
from profiling.command import profile_command
from profiling.errors import ConfigError
from profiling.reader import Run
from profiling.sampler import Sampler
from profiling.sources.host import HostSource
from tests.profiling.test_nvml_source import environment, library  # noqa: F401  (a fixture)


def test_phases_nest_and_are_written(tmp_path):
    with (
        Profiler(tmp_path / "run", sampler_interval_s=None) as profiler,
        profiler.phase("rollout", step=3),
        profiler.phase("reward", step=3),
    ):
        pass
    phases = Run(tmp_path / "run").phases
    assert phases.name.to_list() == ["reward", "rollout"]
    assert phases.depth.to_list() == [1, 0]
    assert (phases.t_end >= phases.t_start).all()


def test_threads_and_tasks_nest_each_for_itself(tmp_path):
    with Profiler(tmp_path / "run", sampler_interval_s=None) as profiler:

        def work():
            with profiler.phase("thread", step=1):
                time.sleep(0.01)

        async def task():
            with profiler.phase("task", step=1):
                await asyncio.sleep(0.01)

        async def tasks():
            await asyncio.gather(*(task() for _ in range(5)))

        with profiler.phase("outer", step=1):
            threads = [threading.Thread(target=work) for _ in range(5)]
            for thread in threads:
                thread.start()
            asyncio.run(tasks())
            for thread in threads:
                thread.join()
    phases = Run(tmp_path / "run").phases
    assert phases[phases.name == "thread"].depth.to_list() == [0] * 5
    assert phases[phases.name == "task"].depth.to_list() == [1] * 5


def test_a_phase_costs_less_than_five_microseconds_writing_included(tmp_path, capsys):
    with Profiler(tmp_path / "run", sampler_interval_s=None) as profiler:
        best = min(_microseconds_per_phase(profiler) for _ in range(5))
    with capsys.disabled():
        print(f"\n  one phase costs {best:.2f} us (load {os.getloadavg()[0]:.1f})")
    assert best < 5
    assert len(Run(tmp_path / "run").phases) == 5 * 20_000


def _microseconds_per_phase(profiler, n=20_000):
    """Of this process: another that runs meanwhile does not count."""
    start = time.process_time()
    for _ in range(n):
        with profiler.phase("x", step=1):
            pass
    profiler.flush()
    return (time.process_time() - start) / n * 1e6


def test_a_failed_run_says_so(tmp_path):
    with pytest.raises(ZeroDivisionError), Profiler(tmp_path / "run", sampler_interval_s=None):
        _ = 1 / 0
    assert Run(tmp_path / "run").trailer["status"] == "failed"


def test_the_sampler_samples_the_host_from_first_to_last(tmp_path):
    with Profiler(tmp_path / "run", sampler_interval_s=0.1) as profiler:
        start = profiler.now()
        time.sleep(1.5)
        end = profiler.now()
    run = Run(tmp_path / "run")
    host = run.devices[run.devices.device == "host"]
    assert host.t.min() <= start + 0.05
    assert host.t.max() >= end - 0.1  # a reading within 50 ms of the one before is left out
    said = run.trailer["sampler"]
    assert 2 <= len(host) <= said["ticks"]  # two ticks within 50 ms share a reading
    assert said["ticks"] + said["missed_ticks"] >= 4  # those that come late on a busy machine are missed, not made up
    assert host.memory_bytes.min() > 0
    assert host.power_watts.isna().all()  # null, never 0


def test_cpu_time_of_no_interval_is_null_and_never_0(monkeypatch):
    clock = SimpleNamespace(s=0.0)
    monkeypatch.setattr("profiling.sources.host.time", SimpleNamespace(perf_counter=lambda: clock.s))
    monkeypatch.setattr("profiling.sources.host.psutil.cpu_percent", lambda: 25.0)
    source = HostSource()

    def at(t):
        clock.s = t
        return [sample.utilisation for sample in source.read(t)]

    assert [at(t) for t in (0.01, 0.02, 0.11, 0.12, 0.21)] == [[None], [], [0.25], [], [0.25]]


def test_the_host_beside_gpus_is_read_once_a_second_and_at_the_last_reading(monkeypatch):
    clock = SimpleNamespace(s=0.0)
    monkeypatch.setattr("profiling.sources.host.time", SimpleNamespace(perf_counter=lambda: clock.s))
    source, read_at = HostSource(beside_gpus=True), []
    for tick in range(26):
        clock.s = tick / 10
        read_at += [clock.s for sample in source.read(clock.s, last=tick == 25) if sample.memory_bytes]
    assert read_at == [0.0, 1.0, 2.0, 2.5]


def test_parts_are_numbered_after_those_of_samples_and_of_windows(tmp_path):
    (tmp_path / "windows").mkdir()
    (tmp_path / "windows" / "part-000003.parquet").touch()  # the sampler was killed before it wrote the samples
    assert Sampler(tmp_path, 1.0, 0.0).part == 4


def test_without_a_gpu_the_run_says_that_it_has_host_samples_only(tmp_path):
    with Profiler(tmp_path / "run", sampler_interval_s=0.2) as profiler:
        devices = json.loads((profiler.writer.path / "sampler.json").read_text())["devices"]
    notes = [record["text"] for record in Run(tmp_path / "run").trace if record["type"] == "note"]
    if len(devices) == 1:
        assert notes[0].startswith("no GPU: host samples only")
    else:
        pytest.skip("this host has a GPU")


def killed_with_its_parent(tmp_path, env=None):
    """A sampler whose parent is killed after half a second; whether it has ended ten seconds later."""
    code = (
        "import os, sys, time\nfrom profiling import Profiler\n"
        f"p = Profiler({str(tmp_path / 'run')!r}, sampler_interval_s=0.1)\np.__enter__()\n"
        "print(p._sampler._process.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.send_signal(signal.SIGKILL)
    killed = time.perf_counter()
    parent.wait()
    deadline = time.time() + 10
    while time.time() < deadline and _alive(child):
        time.sleep(0.05)
    return not _alive(child), killed


def test_the_sampler_ends_with_its_parent_and_writes_what_it_has(tmp_path, withstood):
    ended, killed = killed_with_its_parent(tmp_path)
    assert ended
    host = pd.read_parquet(tmp_path / "run" / "devices" / "part-000000.parquet")
    zero_s = Run(tmp_path / "run").header["zero_s"]
    assert zero_s + host.t.max() > killed - 0.1
    report = json.loads((tmp_path / "run" / "sampler.json").read_text())
    assert report["last_sample_s"] == pytest.approx(host.t.max(), abs=0.1)
    withstood("SIGKILL of the profiled program, under the sampler")


def test_a_sampler_whose_driver_never_returns_ends_with_its_parent(tmp_path, library):  # noqa: F811
    work = tmp_path / "work"
    work.write_text("0 0 1000 0.5 300\n")
    ended, _ = killed_with_its_parent(
        tmp_path, environment(library, "nvmlDeviceGetSamples=-1", FAKE_NVML_WORK=str(work))
    )
    assert ended


def test_the_sampler_ends_at_once_also_where_a_forked_child_keeps_its_pipe(tmp_path):
    with Profiler(tmp_path / "run", sampler_interval_s=0.1) as profiler:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.2)
        start = time.perf_counter()
        profiler.finish("finished")
        took_s = time.perf_counter() - start
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert took_s < 5


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_any_command_can_be_profiled_and_keeps_its_exit_code(tmp_path, capsys):
    command = [sys.executable, "-c", "import sys, time; time.sleep(0.3); sys.exit(7)"]
    assert profile_command(command, interval_s=0.1, output=tmp_path / "run") == 7
    run = Run(tmp_path / "run")
    assert run.phases.name.to_list() == ["command"]
    assert run.summary["wall_seconds"] >= 0.3
    assert run.summary["rows_in"] is None
    assert "exit code 7" in capsys.readouterr().out


def test_a_command_that_does_not_exist_is_bad_input(tmp_path):
    with pytest.raises(ConfigError, match="no-such-program: no such command"):
        profile_command(["no-such-program"], interval_s=0.1, output=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"must be from 0\.001 to 3600 seconds"):
        profile_command(["true"], interval_s=0, output=tmp_path / "other")
