import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from profiling.attribution import device_estimates
from profiling.command import passing_on_sigterm, profile_command
from profiling.markers import VARIABLE, phase, read_markers
from profiling.reader import Run
from profiling.watch import snapshot
from tests.waiting import until
from tppo.cli import main


def profiled(tmp_path, program):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(program))
    assert profile_command([sys.executable, str(path)], interval_s=0.05, output=tmp_path / "run") == 0
    return Run(tmp_path / "run")


def seconds_of(phases, name):
    own = phases[phases.name == name]
    return (own.t_end - own.t_start).sum()


def test_phases_of_a_profiled_program_and_its_children_reach_the_trace(tmp_path):
    run = profiled(
        tmp_path,
        """
        import os, time
        from pathlib import Path
        from profiling.markers import phase
        for step in (1, 2):
            before = time.perf_counter()
            with phase("rollout", step):
                time.sleep(0.3)
                with phase("reward", step):
                    time.sleep(0.1)
            Path(__file__).with_name(f"took {step}").write_text(str(time.perf_counter() - before))
            with phase("my own", step):
                time.sleep(0.2)
        if os.fork() == 0:
            with phase("update_policy", 2):
                time.sleep(0.1)
            os._exit(0)
        os.wait()
        """,
    )
    phases = run.phases[run.phases.name != "command"]
    assert sorted(phases.name) == ["my own", "my own", "reward", "reward", "rollout", "rollout", "update_policy"]
    rollout = phases[phases.name == "rollout"].iloc[0]
    reward = phases[phases.name == "reward"].iloc[0]
    assert 0.4 <= rollout.t_end - rollout.t_start <= float((tmp_path / "took 1").read_text())
    assert rollout.t_start < reward.t_start < reward.t_end <= rollout.t_end
    assert reward.depth == rollout.depth + 1
    command = run.phases[run.phases.name == "command"].iloc[0]
    assert command.t_start <= rollout.t_start
    assert command.t_end >= phases.t_end.max() - 0.01
    assert seconds_of(phases, "reward") >= 0.2
    assert run.summary["ledger"]["reward"] == pytest.approx(seconds_of(phases, "reward"))
    assert run.summary["ledger"]["decode_useful"] is None  # only rollout records could tell
    assert {"rollout", "reward"} <= set(device_estimates(run).phase)


@pytest.mark.slow
def test_a_profiled_command_is_watched_while_it_runs(tmp_path):
    (tmp_path / "program.py").write_text(
        "import os, time\nfrom profiling.markers import phase\n"
        "before = time.monotonic()\nwith phase('rollout', 1):\n  time.sleep(0.2)\n"
        "with open('taken', 'w') as file:\n  file.write(str(time.monotonic() - before))\n"
        "os.rename('taken', 'took')\ntime.sleep(600)\n"
    )
    command = [sys.executable, "-m", "tppo", "profile", "--output", str(tmp_path / "run"), "--"]
    process = subprocess.Popen([*command, sys.executable, "program.py"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        until((tmp_path / "took").exists)
        now = snapshot(tmp_path / "run")
    finally:
        process.terminate()
        process.wait()
    rollout = now.run.phases.query("name == 'rollout'").iloc[0]
    assert 0.2 <= rollout.t_end - rollout.t_start <= float((tmp_path / "took").read_text())
    assert now.step == 1
    assert now.wall_s == rollout.t_end
    after = Run(tmp_path / "run").phases.query("name == 'rollout'").iloc[0]
    assert after.t_start == pytest.approx(rollout.t_start, abs=1e-6)


def test_nothing_is_written_where_nobody_profiles(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    with phase("rollout", 1):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_cannot_write_its_phases_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "no" / "such"))
    with phase("rollout", 1):
        pass
    assert read_markers(tmp_path / "no" / "such", 0.0, 1.0, 0.0) == []


def test_broken_lines_are_left_out(tmp_path):
    (tmp_path / "markers").mkdir()
    good = {"name": "a", "step": 1, "start": 5.0, "end": 7.0, "depth": 1}
    lines = [json.dumps(good), "{", "[]", json.dumps({**good, "start": "x"}), json.dumps({**good, "end": 4.0}), '{"na']
    (tmp_path / "markers" / "1.jsonl").write_text("\n".join(lines))
    assert [record["t_end"] for record in read_markers(tmp_path, 4.0, 2.5, 0.0)] == [2.5]


def test_a_process_that_runs_already_can_be_sampled(tmp_path, capsys):
    program = f"until [ -e {tmp_path}/run/sampler.json ]; do sleep 0.1; done; sleep 0.5"
    with subprocess.Popen(["sh", "-c", program]) as process:
        before = time.perf_counter()
        assert (
            main(["profile", "--pid", str(process.pid), "--output", str(tmp_path / "run"), "--interval", "0.1"]) == 0
        )
        took_s = time.perf_counter() - before
        assert process.wait(60) == 0
    run = Run(tmp_path / "run")
    assert 0.5 <= run.summary["wall_seconds"] <= took_s
    assert f"({process.pid}) ended" in " ".join(capsys.readouterr().out.split())
    assert main(["profile", "--pid", str(process.pid), "--output", str(tmp_path / "no")]) == 2
    assert f"--pid {process.pid}: no such process" in capsys.readouterr().err
    assert main(["profile", "--pid", "1", "--output", str(tmp_path / "no"), "--", "true"]) == 2
    assert "either --pid or a command" in capsys.readouterr().err


def test_another_hosts_phases_are_placed_by_the_wall_clocks_and_the_trace_says_so(tmp_path):
    (tmp_path / "markers").mkdir()
    first = {"host": "other", "boot": "not ours", "clock": 700.0, "unix": 1_000_010.0}
    line = {"name": "rollout", "step": 1, "start": 701.0, "end": 703.0, "depth": 1}
    (tmp_path / "markers" / "other-1.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(line)}\n")
    note, record = read_markers(tmp_path, zero_s=50.0, end_s=100.0, unix_zero_s=1_000_000.0)
    assert (record["t_start"], record["t_end"]) == (11.0, 13.0)
    assert "host other: its monotonic clock is +640.000 s against ours" in note["text"]


@pytest.mark.slow
def test_the_plain_pytorch_example_trains_with_and_without_the_profiler(tmp_path):
    example = Path(__file__).parents[2] / "docs" / "examples" / "plain_pytorch.py"
    plain = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert plain.stdout.count("loss") == 5
    assert not list(tmp_path.iterdir())
    assert main(["profile", "--output", str(tmp_path / "run"), "--", sys.executable, str(example)]) == 0
    phases = Run(tmp_path / "run").phases
    assert phases.name.value_counts().to_dict() == {"rollout": 5, "reward": 5, "update_policy": 5, "command": 1}


def test_marking_survives_signals_forks_and_odd_steps(tmp_path):
    run = profiled(
        tmp_path,
        """
        import os, signal, threading, time
        import numpy as np
        from profiling.markers import phase
        handled = 0
        def handler(*_):
            global handled
            with phase("handler", 1):
                handled += 1
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        def work():
            for _ in range(2000):
                with phase("thread", 1):
                    pass
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            if os.fork() == 0:
                signal.setitimer(signal.ITIMER_REAL, 0)
                with phase("child", np.int64(3)):
                    pass
                os._exit(0)
            os.wait()
        for thread in threads:
            thread.join()
        while handled < 4:
            time.sleep(0.01)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for step in (float("inf"), None, "x"):
            with phase("no step", step):
                pass
        """,
    )
    names = run.phases.name.value_counts()
    assert (names["thread"], names["child"]) == (4000, 5)
    assert names["handler"] > 3
    assert "no step" not in names
    assert run.phases[run.phases.name == "child"].step.unique().tolist() == [3]


def test_own_names_stand_beside_the_ledgers_and_steps_end_with_their_last_phase(tmp_path, capsys):
    run = profiled(
        tmp_path,
        """
        import time
        from profiling.markers import phase
        for step in (1, 2, 3):
            with phase("rollout", step):
                time.sleep(0.15)
                with phase("data[bf16] [/eos]", step):
                    time.sleep(0.15)
        with phase("evaluation", 9):
            time.sleep(0.15)
        time.sleep(0.6)
        """,
    )
    found = device_estimates(run).drop_duplicates("phase").set_index("phase").seconds
    assert set(found.index) == {"rollout", "data[bf16] [/eos]", "evaluation", "command"}
    rollout_s, data_s = (seconds_of(run.phases, name) for name in ("rollout", "data[bf16] [/eos]"))
    assert 0.45 <= data_s <= rollout_s - 0.45
    assert found["data[bf16] [/eos]"] == pytest.approx(data_s)
    assert found["rollout"] == pytest.approx(rollout_s - data_s)
    assert run.summary["steps"] == 3
    steps = run.phases[run.phases.name == "rollout"]
    assert run.summary["seconds_per_step"] == pytest.approx((steps.t_end.max() - steps.t_start.min()) / 3)
    assert main(["watch", str(run.path), "--once"]) == 0
    assert "data[bf16]" in capsys.readouterr().out
    assert main(["report", str(run.path), "--output", str(tmp_path / "report.html")]) == 0
    assert "not a training run" in (tmp_path / "report.html").read_text()


def test_the_exit_code_outlives_the_reader_of_our_output_and_the_sampler_ignores_local_modules(tmp_path):
    (tmp_path / "psutil.py").write_text("raise SystemExit('not the real one')")
    profile = f"{sys.executable} -P -m tppo profile --output run -- sh -c 'sleep 0.3; exit 7'"
    command = f"{profile} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "7"
    assert len(Run(tmp_path / "run").devices) > 1


def passes_on_sigterm(pid):
    """It has a handler."""
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def test_a_sigterm_before_the_command_has_started_is_passed_on_to_it():
    with passing_on_sigterm() as pass_on_to:
        os.kill(os.getpid(), signal.SIGTERM)
        with subprocess.Popen(["sleep", "600"]) as process:
            pass_on_to(process)
            assert process.wait(60) == -signal.SIGTERM


def test_sigterm_reaches_the_command_and_the_trace_is_whole(tmp_path):
    command = [sys.executable, "-m", "tppo", "profile", "--output", str(tmp_path / "run"), "--", "sleep", "600"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        until(lambda: passes_on_sigterm(process.pid))
        process.terminate()
        assert process.wait(60) == 143
    assert Run(tmp_path / "run").trailer["status"] == "failed"
