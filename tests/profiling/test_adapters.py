import os
import platform
import subprocess
import sys
import textwrap
import time
import types
from contextlib import contextmanager

import pytest

from profiling.markers import VARIABLE, read_markers
from profiling.reader import Run
from tests.profiling.test_markers import profiled
from tppo.adapters import verl
from tppo.cli import main


@pytest.mark.slow
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
    steps = run.phases[run.phases.name == "step"]
    assert run.summary["steps"] == 4
    assert run.summary["seconds_per_step"] >= (steps.t_end - steps.t_start).sum() / 4 - 1e-9


def test_trls_trainer_marks_steps(tmp_path, tiny_model):
    pytest.importorskip("trl")
    run = profiled(
        tmp_path,
        f"""
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer
        from tppo.adapters.transformers import PhaseCallback

        path = {str(tiny_model)!r}
        arguments = GRPOConfig(output_dir={str(tmp_path / "out")!r}, max_steps=2, per_device_train_batch_size=2,
            num_generations=2, max_completion_length=4, report_to=[], disable_tqdm=True, use_cpu=True,
            bf16=False, save_strategy="no")
        GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(path), args=arguments,
            reward_funcs=lambda completions, **others: [float(len(text)) for text in completions],
            train_dataset=Dataset.from_dict({{"prompt": ["1+1="] * 8}}),
            processing_class=AutoTokenizer.from_pretrained(path), callbacks=[PhaseCallback()],
        ).train()
        """,
    )
    assert run.phases.name.value_counts()["step"] == 2
    assert run.summary["steps"] == 2
    assert run.summary["seconds_per_step"] > 0


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


def adapted(tmp_path, adapter, program, packages=()):
    """`program` under `tppo profile --adapter`, with stand-ins of packages that do not install here."""
    for name, source in packages:
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in [p for p in path.parents if (tmp_path / "site") in p.parents]:
            (folder / "__init__.py").touch()
        path.write_text(textwrap.dedent(source))
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
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


@pytest.mark.slow
def test_nvtx_ranges_that_are_started_and_ended_by_handle_become_phases(tmp_path):
    """They do not nest: one may outlive the other that was started before it."""
    found = adapted(
        tmp_path, "nvtx",
        """
        import time, threading
        import torch
        nvtx = torch.cuda.nvtx
        step = nvtx.range_start("step 4")
        first = nvtx.range_start("rollout")
        time.sleep(0.05)
        second = nvtx.range_start("update_policy")
        nvtx.range_end(first)
        thread = threading.Thread(target=lambda: (time.sleep(0.05), nvtx.range_end(second)))
        thread.start()
        thread.join()
        nvtx.range_end(step)
        nvtx.range_end(12345)
        import nvtx as package
        package.end_range(package.start_range(message="reward"))
        """,
    )  # fmt: skip
    assert list(zip(found.name, found.step, strict=True)) == [("rollout", 4), ("update_policy", 4), ("reward", 4)]
    assert (found.t_end - found.t_start).iloc[:2].gt(0.045).all()
    assert found.depth.to_list() == [1, 1, 1]


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
                 def generate_eval_samples(self, **kwargs):
                     return []
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
                     SamplesGenerator().generate_eval_samples()
                     SamplesGenerator().generate_samples(x=0)  # nothing is left to roll out
             """),
        ],
    )  # fmt: skip
    names = ["rollout", "logprob_forward", "update_policy", "weight_sync"]
    steps = [(name, step) for step in (1, 2) for name in names]
    assert list(zip(found.name, found.step, strict=True)) == [*steps, ("evaluation", 2), ("rollout", 3)]


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


def test_a_module_that_only_shares_a_name_is_left_alone(tmp_path):
    found = adapted(
        tmp_path, "nvtx", "import nvtx\nassert nvtx.annotate == 3\n", packages=[("nvtx.py", "annotate = 3")]
    )
    assert found.empty
