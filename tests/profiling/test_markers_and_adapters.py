import json
import os
import subprocess
import sys
import textwrap
import time
import types
from contextlib import contextmanager

import pytest

from profiling.attribution import device_estimates
from profiling.command import profile_command
from profiling.markers import VARIABLE, phase, read_markers
from profiling.reader import Run
from tppo.adapters import verl
from tppo.cli import main


def profiled(tmp_path, program):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(program))
    assert profile_command([sys.executable, str(path)], interval_s=0.05, output=tmp_path / "run") == 0
    return Run(tmp_path / "run")


def test_phases_of_a_profiled_program_and_its_children_reach_the_trace(tmp_path):
    run = profiled(
        tmp_path,
        """
        import os, time
        from profiling.markers import phase
        for step in (1, 2):
            with phase("rollout", step):
                time.sleep(0.3)
                with phase("reward", step):
                    time.sleep(0.1)
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
    assert rollout.t_end - rollout.t_start == pytest.approx(0.4, abs=0.05)
    assert rollout.t_start < reward.t_start < reward.t_end <= rollout.t_end
    assert reward.depth == rollout.depth + 1
    command = run.phases[run.phases.name == "command"].iloc[0]
    assert command.t_start <= rollout.t_start
    assert command.t_end >= phases.t_end.max() - 0.01
    assert run.summary["ledger"]["reward"] == pytest.approx(0.2, abs=0.05)
    assert run.summary["ledger"]["decode_useful"] is None  # only rollout records could tell
    assert {"rollout", "reward"} <= set(device_estimates(run).phase)


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
    assert read_markers(tmp_path / "no" / "such", 0.0, 1.0) == []


def test_broken_lines_are_left_out(tmp_path):
    (tmp_path / "markers").mkdir()
    good = {"name": "a", "step": 1, "start": 5.0, "end": 7.0, "depth": 1}
    lines = [json.dumps(good), "{", "[]", json.dumps({**good, "start": "x"}), json.dumps({**good, "end": 4.0}), '{"na']
    (tmp_path / "markers" / "1.jsonl").write_text("\n".join(lines))
    assert [record["t_end"] for record in read_markers(tmp_path, 4.0, 2.5)] == [2.5]


def test_transformers_trainer_marks_steps_evaluations_and_saves(tmp_path):
    run = profiled(
        tmp_path,
        f"""
        import torch
        from transformers import Trainer, TrainingArguments
        from tppo.adapters.transformers import PhaseCallback

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.w = torch.nn.Parameter(torch.zeros(1))
            def forward(self, x=None, labels=None):
                return {{"loss": ((x * self.w - 1) ** 2).mean()}}

        data = [{{"x": torch.ones(1), "labels": torch.ones(1)}}] * 8
        arguments = TrainingArguments(output_dir={str(tmp_path / "out")!r}, max_steps=4, per_device_train_batch_size=2,
            eval_strategy="steps", eval_steps=2, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True)
        Trainer(Model(), arguments, train_dataset=data, eval_dataset=data, callbacks=[PhaseCallback()]).train()
        """,
    )
    names = run.phases.name.value_counts()
    assert names["step"] == 4
    assert names["evaluation"] == 2
    assert names["checkpoint"] >= 2
    assert run.summary["ledger"]["evaluation"] > 0


def test_verls_timers_become_phases(tmp_path, monkeypatch):
    """A module with verl's own signature: marked_timer(name, timing_raw, color=None)."""

    @contextmanager
    def marked_timer(name, timing_raw, color=None):
        start = time.perf_counter()
        yield
        timing_raw[name] = timing_raw.get(name, 0) + time.perf_counter() - start

    utils, trainer = types.ModuleType("verl.utils.debug"), types.ModuleType("verl.trainer.ppo.ray_trainer")
    utils.marked_timer = trainer.marked_timer = marked_timer
    for module in (utils, trainer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert verl.install() == 2
    assert verl.install() == 0
    timing = {}
    for _ in range(2):
        with trainer.marked_timer("step", timing):
            with trainer.marked_timer("gen", timing, color="red"):
                time.sleep(0.01)
            with trainer.marked_timer("update_actor", timing), trainer.marked_timer("own", timing):
                time.sleep(0.01)
    assert set(timing) == {"step", "gen", "update_actor", "own"}
    records = read_markers(tmp_path, 0.0, 1e12)
    assert [(r["name"], r["step"]) for r in records] == [
        (name, step) for step in (1, 2) for name in ("rollout", "own", "update_policy")
    ]
    assert os.listdir(tmp_path / "markers") == [f"{os.getpid()}.jsonl"]


def test_a_process_that_runs_already_can_be_sampled(tmp_path, capsys):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"]) as process:
        assert (
            main(["profile", "--pid", str(process.pid), "--output", str(tmp_path / "run"), "--interval", "0.1"]) == 0
        )
        assert process.wait(5) == 0
    run = Run(tmp_path / "run")
    assert 0.3 < run.summary["wall_seconds"] < 5
    assert f"({process.pid}) ended" in " ".join(capsys.readouterr().out.split())
    assert main(["profile", "--pid", str(process.pid), "--output", str(tmp_path / "no")]) == 2
    assert f"--pid {process.pid}: no such process" in capsys.readouterr().err
    assert main(["profile", "--pid", "1", "--output", str(tmp_path / "no"), "--", "true"]) == 2
    assert "either --pid or a command" in capsys.readouterr().err
