"""`tppo profile` on hosts with several GPUs, of the stand-in NVML library."""

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from profiling.gpu_users import GpuUsers, marked_for, of_tree
from profiling.markers import VARIABLE
from profiling.overlaps import overlap_note
from profiling.reader import Run
from tests.profiling.test_nvml_source import environment, library  # noqa: F401  (a fixture)
from tests.waiting import until

ROOT = Path(__file__).parents[2]


def profile(library, tmp_path, *words, **extra):  # noqa: F811
    """What it prints, one space between words and columns, and its run."""
    command = [sys.executable, "-m", "tppo", "profile", "--output", str(tmp_path / "run"), "--interval", "0.1"]
    own = environment(library, **extra)
    done = subprocess.run([*command, *words], env=own, cwd=ROOT, capture_output=True, text=True, check=True)
    return " ".join(done.stdout.replace("│", " ").split()), Run(tmp_path / "run")


def test_gpu_seconds_and_joules_are_of_the_same_gpus(library, tmp_path):  # noqa: F811
    work = tmp_path / "work"
    work.write_text("0 0 1000 0.9 400\n1 0 1000 0.5 200\n")
    _, run = profile(library, tmp_path, "--", "sleep", "3", FAKE_NVML_WORK=str(work), FAKE_NVML_MIG="2")
    assert [device["uuid"] for device in run.header["devices"]] == [
        "GPU-0000-0", "MIG-0000-0", "MIG-0000-1", "GPU-0000-1",
    ]  # fmt: skip
    assert run.header["capabilities"]["GPU-0000-0"]["power_watts"] == "ok"
    summary = run.summary
    assert summary["gpu_seconds"] == 2 * summary["wall_seconds"]
    assert run.ledger.groupby("gpu").seconds.sum().to_list() == pytest.approx([summary["wall_seconds"]] * 2)
    assert summary["energy_joules"] == pytest.approx(600 * summary["wall_seconds"], rel=0.2)


def test_a_gpu_is_as_busy_as_its_drivers_windows_say(library, tmp_path):  # noqa: F811
    """Busy in every other second. The sensor that is polled lags by up to a second."""
    work = tmp_path / "work"
    work.write_text("".join(f"0 {second} {second + 1} 1.0 300\n" for second in range(0, 60, 2)))
    shown, run = profile(library, tmp_path, "--", "sleep", "4", FAKE_NVML_WORK=str(work))
    own = run.windows[(run.windows.device == "GPU-0000-0") & (run.windows.metric == "utilisation")]
    busy = np.average(own.value, weights=own.t_end - own.t_begin)
    assert len(own) >= 20
    assert busy == pytest.approx(0.5, abs=4 / len(own))  # of six a second: half a second too many or too few, and one
    samples = (run.devices.device == "GPU-0000-0").sum()
    assert f"GPU-0000-0 (simulated sensor) {samples} {busy:.0%} " in shown


def test_a_counter_that_stands_still_has_no_joules(library, tmp_path):  # noqa: F811
    shown, run = profile(library, tmp_path, "--", "sleep", "3.5")  # fixed readings
    samples = (run.devices.device == "GPU-0000-0").sum()
    assert f"GPU-0000-0 (simulated sensor) {samples} 40% 250 - 0.0" in shown
    assert run.summary["energy_joules"] is None


@pytest.mark.slow
def test_a_process_that_runs_is_seen_on_the_gpus_that_it_was_started_with(library, tmp_path):  # noqa: F811
    theirs = {**os.environ, "CUDA_VISIBLE_DEVICES": "1"}
    with sampled_for_a_second(tmp_path / "one", theirs) as pid:
        _, run = profile(library, tmp_path / "one", "--pid", str(pid))
    assert set(run.devices.device) == {"GPU-0000-1", "host"}
    with sampled_for_a_second(tmp_path / "all", environment(library)) as pid:
        _, run = profile(library, tmp_path / "all", "--pid", str(pid), CUDA_VISIBLE_DEVICES="0")
    assert set(run.devices.device) == {"GPU-0000-0", "GPU-0000-1", "host"}


@contextmanager
def sampled_for_a_second(tmp_path, env):
    """The pid of a process that waits for the sampler, and is reaped as soon as it has ended."""
    words = f"until [ -e {tmp_path}/run/sampler.json ]; do sleep 0.1; done; sleep 1"
    with subprocess.Popen(["sh", "-c", words], env=env) as process:
        threading.Thread(target=process.wait, daemon=True).start()
        yield process.pid


@pytest.fixture
def sleepers(tmp_path):
    """Pids of two processes: one of the program that is profiled into tmp_path, one of somebody else."""
    ours = {**os.environ, VARIABLE: str(tmp_path.resolve())}
    processes = [subprocess.Popen(["sleep", "600"], env=env) for env in (ours, None)]
    yield [process.pid for process in processes]
    for process in processes:
        process.kill()
        process.wait()


def report(tmp_path, **pids_of):
    """sampler.json: GPU-a and a MIG instance of it, GPU-b, GPU-c."""
    devices = [{"uuid": f"GPU-{name}", "part_of": None} for name in "abc"]
    devices += [{"uuid": "MIG-a", "part_of": "GPU-a"}, {"uuid": "host", "part_of": None}]
    processes = {name.replace("_", "-"): [{"pid": pid} for pid in pids] for name, pids in pids_of.items()}
    (tmp_path / "sampler.json").write_text(json.dumps({"devices": devices, "processes": processes}))


def test_gpus_that_the_program_leaves_alone_are_named_where_it_uses_others(tmp_path, sleepers, monkeypatch):
    monkeypatch.setattr("profiling.gpu_users.LOOK_EVERY_S", 0.02)
    mine, foreign = sleepers
    for is_ours in (marked_for(tmp_path), of_tree(psutil.Process(mine))):
        report(tmp_path, MIG_a=[mine], GPU_b=[foreign, 2**22 + 1])
        with GpuUsers(tmp_path, is_ours) as users:
            until(lambda users=users: users._known.get(mine) and foreign in users._known)
        assert users.note().startswith("no process of the program was seen on GPU-b, GPU-c; energy")
        report(tmp_path, GPU_a=[mine], GPU_b=[mine], GPU_c=[mine, foreign])
        assert users.note() is None
        report(tmp_path, GPU_b=[foreign])  # nothing is known of the program's own: it may be in a container
        assert users.note() is None
    (tmp_path / "sampler.json").unlink()
    assert users.note() is None


def test_phases_of_processes_that_differ_for_long_are_noted():
    def phase(process, name, start, end, depth=1):
        times = {"t_start": start, "t_end": end, "depth": depth}
        return {"type": "phase", "process": process, "name": name, "step": 1, **times}

    apart = [phase("a", "rollout", 0.0, 5.0), phase("b", "update_policy", 2.0, 4.0), {"type": "note", "text": "x"}]
    assert "are in different phases at once for 2.0 s of 10.0 s" in overlap_note(apart, 10.0)
    assert overlap_note([phase("a", "rollout", 0.0, 5.0), phase("a", "reward", 2.0, 4.0, 2)], 10.0) is None
    ranks = [phase(rank, name, t, t + 4.9) for rank in "abc" for name, t in (("rollout", 0.0), ("update_policy", 5.0))]
    ranks[0] = phase("a", "rollout", 0.0, 5.2)  # one that is late by 0.2 s
    assert overlap_note(ranks, 10.0) is None
    assert overlap_note([], 10.0) is None


def test_processes_in_different_phases_are_noted_on_the_console_and_in_the_trace(library, tmp_path):  # noqa: F811
    program = tmp_path / "two.py"
    program.write_text(  # a pipe to the child and one back: its phases lie within the parent's on any machine
        "import os, time\nfrom profiling.markers import phase\n(go, give), (done, end) = os.pipe(), os.pipe()\n"
        "if child := os.fork():\n"
        "    for step in (1, 2):\n"
        "        with phase('update_policy', step):\n"
        "            os.write(give, b'.') and os.read(done, 1) and time.sleep(0.3)\n"
        "    os.waitpid(child, 0)\n"
        "else:\n"
        "    for step in (1, 2):\n"
        "        os.read(go, 1)\n"
        "        with phase('rollout', step):\n"
        "            time.sleep(1.0)\n"  # more than a twentieth of the run, however long its start takes
        "        os.write(end, b'.')\n"
        "    os._exit(0)\n"
    )
    shown, run = profile(library, tmp_path, "--", sys.executable, str(program))
    (note,) = [record["text"] for record in run.trace if record["type"] == "note"]
    assert "processes are in different phases at once" in note
    assert note in shown
    phases = [record for record in run.trace if record["type"] == "phase"]
    seconds = sum(each["t_end"] - each["t_start"] for each in phases if each["name"] == "update_policy")
    assert f"host update_policy {seconds:.1f} " in shown  # the moments of both are its own
    assert "host rollout" not in shown
