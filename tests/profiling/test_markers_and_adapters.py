import json
import os
import platform
import subprocess
import sys
import textwrap
import time
import types
from contextlib import contextmanager
from pathlib import Path

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
    assert read_markers(tmp_path / "no" / "such", 0.0, 1.0, 0.0) == []


def test_broken_lines_are_left_out(tmp_path):
    (tmp_path / "markers").mkdir()
    good = {"name": "a", "step": 1, "start": 5.0, "end": 7.0, "depth": 1}
    lines = [json.dumps(good), "{", "[]", json.dumps({**good, "start": "x"}), json.dumps({**good, "end": 4.0}), '{"na']
    (tmp_path / "markers" / "1.jsonl").write_text("\n".join(lines))
    assert [record["t_end"] for record in read_markers(tmp_path, 4.0, 2.5, 0.0)] == [2.5]


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
    records = read_markers(tmp_path, 0.0, 1e12, 0.0)
    assert [(r["name"], r["step"]) for r in records] == [
        (name, step) for step in (1, 2) for name in ("rollout", "own", "update_policy")
    ]
    assert os.listdir(tmp_path / "markers") == [f"{platform.node()}-{os.getpid()}.jsonl"]


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


def test_another_hosts_phases_are_placed_by_the_wall_clocks_and_the_trace_says_so(tmp_path):
    (tmp_path / "markers").mkdir()
    first = {"host": "other", "boot": "not ours", "clock": 700.0, "unix": 1_000_010.0}
    line = {"name": "rollout", "step": 1, "start": 701.0, "end": 703.0, "depth": 1}
    (tmp_path / "markers" / "other-1.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(line)}\n")
    note, record = read_markers(tmp_path, zero_s=50.0, end_s=100.0, unix_zero_s=1_000_000.0)
    assert (record["t_start"], record["t_end"]) == (11.0, 13.0)
    assert "host other: its monotonic clock is +640.000 s against ours" in note["text"]


def adapted(tmp_path, adapter, program, packages=()):
    """`program` under `tppo profile --adapter`, with stand-ins of packages that do not install here."""
    for name, source in packages:
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in [p for p in path.parents if (tmp_path / "site") in p.parents]:
            (folder / "__init__.py").touch()
        path.write_text(textwrap.dedent(source))
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "tppo", "profile", "--output", str(tmp_path / "run"), "--adapter", adapter, "--"]
    subprocess.run([*command, sys.executable, str(tmp_path / "program.py")], env=environment, check=True)
    phases = Run(tmp_path / "run").phases
    return phases[phases.name != "command"].sort_values("t_start")


def test_torchs_nvtx_ranges_become_phases_without_a_change_to_the_program(tmp_path):
    found = adapted(
        tmp_path, "nvtx",
        """
        import sitecustomize, time
        assert sitecustomize.own == 7  # the program's own still runs
        import torch
        for step in range(2):
            with torch.cuda.nvtx.range("step"):
                torch.cuda.nvtx.range_push("rollout")
                with torch.cuda.nvtx.range("reward"):
                    time.sleep(0.05)
                torch.cuda.nvtx.range_pop()
        torch.cuda.nvtx.range_pop()
        import nvtx
        with nvtx.annotate("step 9"), nvtx.annotate(message="evaluation"):
            time.sleep(0.05)
        @nvtx.annotate()
        def mine():
            time.sleep(0.05)
        mine()
        """,
        packages=[("sitecustomize.py", "own = 7")],
    )  # fmt: skip
    assert list(zip(found.name, found.step, strict=True)) == [
        ("rollout", 1), ("reward", 1), ("rollout", 2), ("reward", 2), ("evaluation", 9), ("mine", 9),
    ]  # fmt: skip
    assert found.depth.to_list() == [1, 2, 1, 2, 1, 1]
    assert (found.t_end - found.t_start > 0.045).all()


def test_openrlhfs_methods_become_phases_in_any_process(tmp_path):
    """Stand-ins with the names and signatures of OpenRLHF's own classes; it does not install without a GPU."""
    found = adapted(
        tmp_path, "openrlhf",
        """
        import os, time
        from openrlhf.trainer.ppo_trainer import PPOTrainer
        trainer = PPOTrainer()
        if os.fork() == 0:
            trainer.fit()
            os._exit(0)
        os.wait()
        """,
        packages=[
            ("openrlhf/trainer/ppo_utils/samples_generator.py",
             """
             import time
             class SamplesGenerator:
                 def generate_samples(self, **kwargs):
                     time.sleep(0.05)
                     return [kwargs["x"]], None, 1, False
             """),
            ("openrlhf/trainer/ppo_utils/experience_maker.py",
             """
             class RemoteExperienceMaker:
                 def make_experience_batch(self, rollout_samples):
                     return rollout_samples
             """),
            ("openrlhf/trainer/ppo_trainer.py",
             """
             from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
             from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
             class BasePPOTrainer:
                 def ppo_train(self, global_steps): return {"kl": 0}
                 def broadcast_to_vllm(self): pass
             class PPOTrainer(BasePPOTrainer):
                 def fit(self):
                     for step in (1, 2):
                         samples = SamplesGenerator().generate_samples(x=3)[0]
                         assert RemoteExperienceMaker().make_experience_batch(samples) == [3]
                         assert self.ppo_train(step) == {"kl": 0}
                         self.broadcast_to_vllm()
             """),
        ],
    )  # fmt: skip
    names = ["rollout", "logprob_forward", "update_policy", "weight_sync"]
    assert list(zip(found.name, found.step, strict=True)) == [(name, step) for step in (1, 2) for name in names]


def test_verls_timers_become_phases_without_a_change_to_the_program(tmp_path):
    found = adapted(
        tmp_path, "verl",
        """
        from verl.trainer.ppo.ray_trainer import fit
        fit()
        """,
        packages=[
            ("verl/utils/debug.py",
             """
             from contextlib import contextmanager
             @contextmanager
             def marked_timer(name, timing_raw, color=None):
                 yield
             """),
            ("verl/trainer/ppo/ray_trainer.py",
             """
             from verl.utils.debug import marked_timer
             def fit():
                 for _ in range(2):
                     with marked_timer("step", {}):
                         with marked_timer("gen", {}):
                             pass
                         with marked_timer("update_actor", {}):
                             pass
             """),
        ],
    )  # fmt: skip
    assert found.name.to_list() == ["rollout", "update_policy"] * 2
    assert found.step.to_list() == [1, 1, 2, 2]


def test_a_wrong_adapter_is_refused(tmp_path, capsys):
    assert main(["profile", "--adapter", "deepspeed", "--output", str(tmp_path / "run"), "--", "true"]) == 2
    assert "--adapter deepspeed: not one of verl, openrlhf, nvtx" in capsys.readouterr().err


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
        def handler(*_):
            with phase("handler", 1):
                pass
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
    assert found["data[bf16] [/eos]"] == pytest.approx(0.45, abs=0.1)
    assert found["rollout"] == pytest.approx(0.45, abs=0.1)
    assert run.summary["steps"] == 3
    assert run.summary["seconds_per_step"] == pytest.approx(0.3, abs=0.1)
    assert main(["watch", str(run.path), "--once"]) == 0
    assert "data[bf16]" in capsys.readouterr().out
    assert main(["report", str(run.path), "--output", str(tmp_path / "report.html")]) == 0
    assert "not a training run" in (tmp_path / "report.html").read_text()


def test_a_module_that_only_shares_a_name_is_left_alone(tmp_path):
    found = adapted(
        tmp_path, "nvtx", "import nvtx\nassert nvtx.annotate == 3\n", packages=[("nvtx.py", "annotate = 3")]
    )
    assert found.empty


def test_the_exit_code_outlives_the_reader_of_our_output_and_the_sampler_ignores_local_modules(tmp_path):
    (tmp_path / "psutil.py").write_text("raise SystemExit('not the real one')")
    profile = f"{sys.executable} -P -m tppo profile --output run -- sh -c 'sleep 0.3; exit 7'"
    command = f"{profile} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "7"
    assert len(Run(tmp_path / "run").devices) > 1


def test_sigterm_reaches_the_command_and_the_trace_is_whole(tmp_path):
    command = [sys.executable, "-m", "tppo", "profile", "--output", str(tmp_path / "run"), "--", "sleep", "60"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 20
        while not (tmp_path / "run" / "sampler.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.terminate()
        assert process.wait(20) == 143
    assert Run(tmp_path / "run").trailer["status"] == "failed"
