import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from profiling import Profiler
from profiling.command import profile_command
from profiling.errors import ConfigError
from profiling.reader import Run


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
        time.sleep(0.8)
        end = profiler.now()
    run = Run(tmp_path / "run")
    host = run.devices[run.devices.device == "host"]
    assert host.t.min() <= start + 0.05
    assert host.t.max() >= end - 0.05
    assert 3 <= len(host) <= 14  # ticks that come late on a busy machine are missed, not made up
    assert host.memory_bytes.min() > 0
    assert host.power_watts.isna().all()  # null, never 0
    assert run.trailer["sampler"]["ticks"] == len(host)


def test_without_a_gpu_the_run_says_that_it_has_host_samples_only(tmp_path):
    with Profiler(tmp_path / "run", sampler_interval_s=0.2) as profiler:
        devices = json.loads((profiler.writer.path / "sampler.json").read_text())["devices"]
    notes = [record["text"] for record in Run(tmp_path / "run").trace if record["type"] == "note"]
    if len(devices) == 1:
        assert notes[0].startswith("no GPU: host samples only")
    else:
        pytest.skip("this host has a GPU")


def test_the_sampler_ends_with_its_parent(tmp_path):
    code = (
        "import os, sys, time\nfrom profiling import Profiler\n"
        f"p = Profiler({str(tmp_path / 'run')!r}, sampler_interval_s=0.1)\np.__enter__()\n"
        "print(p._sampler._process.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.time() + 10
    while time.time() < deadline and _alive(child):
        time.sleep(0.05)
    assert not _alive(child)


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
