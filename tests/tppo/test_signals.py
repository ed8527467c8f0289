"""Ctrl-C and SIGTERM save first; a second signal stops at once."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from profiling.reader import Run
from tests.tppo.killing import assert_same_run, train_seeded
from tppo.checkpoints.manifest import verified
from tppo.checkpoints.store import checkpoints_of, newest_usable
from tppo.signals import SAME_S


@pytest.mark.parametrize("schedule", ["recipe", "asynchronous"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_the_run_goes_on_as_if_undisturbed(make_config, schedule, number, withstood):
    """Also while the next step's rollout runs ahead."""
    own = {"algorithm": {"name": "tppo" if schedule == "recipe" else "ppo"}, "rollout": {"schedule": schedule}}
    config = make_config("run", train={"steps": 10_000}, **own)
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
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


@pytest.mark.parametrize(
    ("signals", "apart_s", "code"),
    [([signal.SIGTERM], 0, 143), ([signal.SIGTERM] * 2, SAME_S + 0.5, -15), ([signal.SIGINT, signal.SIGTERM], 0, 130)],
)
def test_a_signal_ends_the_command_with_its_code_and_a_later_one_at_once(
    tmp_path, tiny_model, signals, apart_s, code, withstood
):
    """Two that come together are one: a launcher passes on what its ranks have got themselves."""
    output = tmp_path / "run"
    command = [
        sys.executable, "-m", "tppo", "train", "--output", str(output), str(tmp_path / "run.toml"),
        "--train.steps", "100000", "--rollout.max_response_tokens", "24", "--data.max_steps", "6",
        "--profile.sampler", "false", "--evaluation.every", "0", "--value.pretrain_rows", "0",
    ]  # fmt: skip
    if apart_s:  # a step so long that the second signal comes in it
        command += ["--rollout.prompts_per_step", "4096", "--train.mini_batches", "64"]
    (tmp_path / "run.toml").write_text(f'[model]\npath = "{tiny_model}"\n')
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(output / "model.json" if apart_s else output / "rollouts" / "step-000001.parquet", process)
    lines = []
    for number in signals:
        time.sleep(apart_s if lines else 0.5)
        process.send_signal(number)
        if not lines:
            lines.append(process.stderr.readline())
    assert process.wait(timeout=60) == code
    assert "saving after the step under way; a second one stops at once" in lines[0]
    assert bool(checkpoints_of(output)) == (code > 0)
    if code > 0:
        assert verified(newest_usable(output).path).step >= 1
    withstood(
        "signals to the command: " + ", ".join(signal.Signals(number).name for number in signals),
        lost="nothing; after a second signal, the step under way",
    )


def wait_for(path, process):
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")
