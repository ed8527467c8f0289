"""Ctrl-C and SIGTERM save first; a second signal stops at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from profiling.reader import Run
from tests.tppo.killing import assert_same_run, train_seeded
from tests.tppo.ranks import on_ranks, when
from tests.tppo.test_ranks import assert_equal_runs, settings_of
from tests.waiting import until
from tppo.checkpoints.manifest import verified
from tppo.checkpoints.store import checkpoints_of, newest_usable
from tppo.collect import Collector
from tppo.learner import value_update
from tppo.rollout.torch_engine import TorchEngine
from tppo.signals import SAME_S
from tppo.start import train


@pytest.mark.parametrize("schedule", ["recipe", "asynchronous"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_the_run_goes_on_as_if_undisturbed(make_config, schedule, number, withstood):
    """Also while the next step's rollout runs ahead."""
    own = {"algorithm": {"name": "tppo" if schedule == "recipe" else "ppo"}, "rollout": {"schedule": schedule}}
    config = make_config("run", train={"steps": 10_000}, **own)
    when(config.output / "metrics.jsonl", lambda: os.kill(os.getpid(), number))  # a step is done
    before = signal.getsignal(signal.SIGTERM)
    outcome = train_seeded(config)
    assert (outcome.status, outcome.signal) == ("interrupted", number)
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoints_of(config.output)[-1].name == f"step-{outcome.steps:06d}"
    assert Run(config.output).trailer["status"] == "interrupted"
    longer = outcome.steps + 2
    train_seeded(make_config("run", train={"steps": longer}, **own), resume=True)
    whole = make_config("whole", train={"steps": longer}, **own)
    train_seeded(whole)
    assert_same_run(config.output, whole.output)
    withstood(f"{signal.Signals(number).name} ({schedule})")


def stopped_at(monkeypatch, where, times):
    """SIGTERM to this process in the n-th call of `where`; returns the calls, which grow."""
    owner, name = where
    whole, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == times:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("phase", ["evaluation", "rollout", "rewards", "update"])
def test_a_signal_before_the_first_step_does_not_wait_for_it_and_the_run_goes_on_as_if_undisturbed(
    make_config, monkeypatch, capsys, phase, withstood
):
    own = {"train": {"steps": 2}, "value": {"pretrain_rows": 16, "pretrain_epochs": 3}}
    config = make_config("run", **own)
    where, times = {
        "evaluation": ((TorchEngine, "submit"), 1),
        "rollout": ((TorchEngine, "submit"), 2),
        "rewards": ((Collector, "grade"), 1),
        "update": ((value_update, "value_loss"), 5),
    }[phase]
    with monkeypatch.context() as patched:
        calls = stopped_at(patched, where, times)
        ends = stopped_at(patched, (TorchEngine, "run_until_a_row_ends"), times=0)
        outcome = train_seeded(config)
    assert (outcome.status, outcome.steps, outcome.signal) == ("interrupted", 0, signal.SIGTERM)
    assert len(calls) == times
    if phase == "evaluation":
        assert len(ends) == 1
    assert f"begins again with --resume {config.output}" in capsys.readouterr().err
    assert [path.name for path in checkpoints_of(config.output)] == ["step-000000"]
    assert Run(config.output).trailer["status"] == "interrupted"
    train_seeded(config, resume=True)
    whole = make_config("whole", **own)
    train_seeded(whole)
    assert_same_run(config.output, whole.output)
    withstood(f"SIGTERM before the first step ({phase})", lost="what was under way")


@pytest.mark.slow
@pytest.mark.parametrize("where", [(TorchEngine, "submit"), (value_update, "value_loss")])
def test_a_signal_to_one_rank_before_the_first_step_ends_both_and_both_go_on(make_config, where):
    own = {**settings_of("tppo"), "train": {"steps": 2, "micro_batch_tokens": 60}, "value": {"pretrain_rows": 16}}
    config, whole = make_config("run", **own), make_config("whole", **own)

    def work(rank):
        calls = stopped_at(pytest.MonkeyPatch(), where, times=2 if rank else 0)
        outcome = train(config, show_progress=False)
        assert (outcome.status, outcome.steps, outcome.signal) == ("interrupted", 0, signal.SIGTERM)
        assert len(calls) == 2

    on_ranks(2, work)
    on_ranks(2, lambda rank: train(config, resume=True, show_progress=False))
    train(whole, show_progress=False)
    assert_equal_runs(Run(whole.output), Run(config.output))


@pytest.mark.parametrize(
    ("signals", "apart_s", "code"),
    [
        ([signal.SIGTERM], 0, 143),
        pytest.param([signal.SIGTERM] * 2, SAME_S + 0.5, -15, marks=pytest.mark.slow),
        pytest.param([signal.SIGINT, signal.SIGTERM], 0, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_command_with_its_code_and_a_later_one_at_once(
    tmp_path, tiny_model, signals, apart_s, code, withstood
):
    """Two that come together are one: a launcher passes on what its ranks have got themselves."""
    output, grading = tmp_path / "run", tmp_path / "grading"
    command = [
        sys.executable, "-m", "tppo", "train", "--output", str(output), str(tmp_path / "run.toml"),
        "--train.steps", "100000", "--rollout.max_response_tokens", "24", "--data.max_steps", "6",
        "--profile.sampler", "false", "--evaluation.every", "0", "--value.pretrain_rows", "0",
    ]  # fmt: skip
    if apart_s:  # a step that has not ended when the second signal comes
        command += ["--reward.kind", "python", "--reward.function", "tests.tppo.graders:never",
                    "--reward.timeout_s", "3600"]  # fmt: skip
    (tmp_path / "run.toml").write_text(f'[model]\npath = "{tiny_model}"\n')
    environment = os.environ | {"GRADING_BEGAN": str(grading)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for(grading if apart_s else output / "rollouts" / "step-000001.parquet", process)
    if apart_s:
        process.send_signal(signals[0])
        said = process.stderr.readline()
        time.sleep(apart_s)
        process.send_signal(signals[1])
    else:  # it sees them at the same moment, however far apart we are able to send them
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        for number in signals:
            process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        said = process.stderr.readline()
    assert process.wait(timeout=300) == code
    assert "saving after the step under way; a second one stops at once" in said
    assert bool(checkpoints_of(output)) == (code > 0)
    if code > 0:
        assert verified(newest_usable(output).path).step >= 1
    withstood(
        "signals to the command: " + ", ".join(signal.Signals(number).name for number in signals),
        lost="nothing; after a second signal, the step under way",
    )


def wait_for(path, process):
    def there():
        assert process.poll() is None, process.stderr.read()
        return path.exists()

    until(there, f"{path} never came")
