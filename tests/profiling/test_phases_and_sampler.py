import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from profiling import Profiler
from profiling.command import profile_command
from profiling.errors import ConfigError
from profiling.reader import Run
from profiling.sampler import Sampler
from profiling.sources.host import HostSource
from tests.profiling.test_nvml_source import environment, library  # noqa: F401  (a fixture)
from tests.waiting import until, until_gone


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
    """Where that is too much to ask of a slow machine: less than twice what its record's JSON alone costs."""
    record = {"type": "phase", "name": "x", "step": 1, "t_start": 1.23456789, "t_end": 2.3456789, "depth": 0}
    with Profiler(tmp_path / "run", sampler_interval_s=None) as profiler:

        def phase():
            with profiler.phase("x", step=1):
                pass

        turns = [(_microseconds(phase, profiler.flush), _microseconds(lambda: json.dumps(record))) for _ in range(50)]
    best, plain = (min(own) for own in zip(*turns, strict=True))
    with capsys.disabled():
        print(f"\n  one phase costs {best:.2f} us, JSON {plain:.2f} us (load {os.getloadavg()[0]:.1f})")
    assert best < max(5, 2 * plain)
    assert len(Run(tmp_path / "run").phases) == 50 * 2_000


def _microseconds(work, end=lambda: None, n=2_000):
    """Of this process: another that runs meanwhile does not count."""
    start = time.process_time()
    for _ in range(n):
        work()
    end()
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
    assert host.memory_bytes.min() > 0
    assert host.power_watts.isna().all()  # null, never 0


def test_ticks_that_come_late_are_missed_and_not_made_up(tmp_path, monkeypatch):
    """A tick each second of a clock of the test's own; the wait for the third ends 2.5 s late, after the fourth and
    the fifth."""
    clock, late_s = SimpleNamespace(s=0.0), iter([0.0, 0.0, 2.5, 0.0, 0.0])

    def told_to_end(until, timeout_s):
        late = next(late_s, None)
        clock.s += 0.0 if late is None else timeout_s + late
        return late is None

    fake = SimpleNamespace(perf_counter=lambda: clock.s, process_time=time.process_time)
    monkeypatch.setattr("profiling.sampler.time", fake)
    monkeypatch.setattr("profiling.sampler._told_to_end", told_to_end)
    sampler, ticked = Sampler(tmp_path, 1.0, 0.0), []
    monkeypatch.setattr(
        sampler, "tick", lambda last=False, tick=sampler.tick: ticked.append(clock.s) or tick(last=last)
    )
    sampler.run([])
    assert ticked == [0.0, 1.0, 2.0, 5.5, 6.0, 7.0, 7.0]  # the last one at the end
    said = json.loads((tmp_path / "sampler.json").read_text())
    assert (said["ticks"], said["missed_ticks"]) == (7, 2)


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


def killed_with_its_parent(tmp_path, wait, env=None):
    """A sampler whose parent is killed after `wait()`, and which ends; when that was."""
    code = (
        "import os, sys, time\nfrom profiling import Profiler\n"
        f"p = Profiler({str(tmp_path / 'run')!r}, sampler_interval_s=0.1)\np.__enter__()\n"
        "print(p._sampler._process.pid, flush=True)\ntime.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    child = int(parent.stdout.readline())
    wait()
    killed = time.perf_counter()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until_gone(child)
    return killed


def test_the_sampler_ends_with_its_parent_and_writes_what_it_has(tmp_path, withstood):
    first_part = tmp_path / "run" / "devices" / "part-000000.parquet"
    killed = killed_with_its_parent(tmp_path, lambda: until(first_part.exists))
    run = Run(tmp_path / "run")
    host = run.devices
    assert run.header["zero_s"] + host.t.max() > killed - 0.1
    report = json.loads((tmp_path / "run" / "sampler.json").read_text())
    assert report["last_sample_s"] == pytest.approx(host.t.max(), abs=0.1)
    withstood("SIGKILL of the profiled program, under the sampler")


def test_a_sampler_whose_driver_never_returns_ends_with_its_parent(tmp_path, library):  # noqa: F811
    work = tmp_path / "work"
    work.write_text("0 0 1000 0.5 300\n")
    own = environment(library, "nvmlDeviceGetSamples=-1", FAKE_NVML_WORK=str(work))
    killed_with_its_parent(tmp_path, lambda: time.sleep(0.5), own)


def test_the_sampler_ends_by_itself_also_where_a_forked_child_keeps_its_pipe(tmp_path):
    with Profiler(tmp_path / "run", sampler_interval_s=0.1) as profiler:
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
        profiler.finish("finished")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert profiler._sampler._process.returncode == 0  # it was not killed


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
