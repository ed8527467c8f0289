"""A long run with a fault every twenty steps is the run without one; its memory stays flat."""

import itertools
import json
import os
import random
import resource
import signal
import statistics
import time

import pytest

from profiling.reader import Run
from tests.tppo.killing import KILLED, assert_same_run, leftovers
from tests.tppo.trainer_process import TrainerProcess
from tppo.checkpoints.store import checkpoints_of, newest_usable

STEPS, EVERY = 2000, 20
SAVED_EVERY = 5
FLAT = 0.05
"""Of a run's resident memory, between its first and its last fifth."""


def soak_config(make_config, name, steps):
    return make_config(
        name,
        algorithm={"name": "tppo", "trailing_tokens": 2},
        rollout={"prompts_per_step": 2, "max_response_tokens": 16, "window": 6},
        train={"steps": steps, "checkpoint_every": SAVED_EVERY, "keep_last": 3, "mini_batches": 1},
        value={"pretrain_rows": 2, "pretrain_epochs": 1},
        evaluation={"every": 0},
        reward={"kind": "python", "function": "tests.tppo.graders:by_length", "workers": 1},
        profile={"sampler": True, "interval_s": 0.5},
    )


def kill(child):
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == KILLED


def terminate(child):
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM


def damage_the_newest_checkpoint(child):
    kill(child)
    newest = checkpoints_of(child.config.output)[-1]
    with (newest / "policy" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def fill_the_disk(child):
    """A limit on the size of files stands for it; metrics.jsonl has reached it."""
    limit = (child.config.output / "metrics.jsonl").stat().st_size
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert child.wait() == 1


def kill_the_sampler(child):
    if sampler := child.child_named("profiling.sampler"):
        sampler.kill()


def kill_the_reward(child):
    if worker := child.child_named("tppo.rewards"):
        worker.kill()


def freeze(child):
    """As a suspended host: the wall clock goes on without it."""
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(1.0)
    os.kill(child.pid, signal.SIGCONT)


FAULTS = {
    "SIGKILL": kill,
    "SIGTERM": terminate,
    "newest checkpoint damaged": damage_the_newest_checkpoint,
    "full disk": fill_the_disk,
    "sampler killed": kill_the_sampler,
    "reward process killed": kill_the_reward,
    "suspended for a second": freeze,
}


def run_with_faults(config, steps, seed):
    """Name -> how often it happened."""
    happened = dict.fromkeys(FAULTS, 0)
    kinds = itertools.cycle(random.Random(seed).sample(list(FAULTS), len(FAULTS)))
    child = TrainerProcess(config).start()
    for at in range(EVERY, steps, EVERY):
        while not child.run_until(at):
            child = TrainerProcess(config, resume=True).start()
        kind = next(kinds)
        FAULTS[kind](child)
        happened[kind] += 1
        if kind in ("SIGKILL", "SIGTERM", "newest checkpoint damaged", "full disk"):
            child = TrainerProcess(config, resume=True).start()
    while child.wait() != 0:
        child = TrainerProcess(config, resume=True).start()
    return happened


def assert_nothing_is_lost(config, steps):
    """Rows in = finished + carried, token by token, and every GPU-second has a name."""
    run = Run(config.output)
    assert run.metrics.step.to_list() == list(range(1, steps + 1))
    assert run.trailer["status"] == "finished"
    rows = run.rollouts[run.rollouts.step >= 1].sort_values(["row", "step"])
    for _, windows in rows.groupby("row"):
        ends = windows.context_before + windows.tokens
        assert windows.step.diff().dropna().eq(1).all()  # a row that carries over goes on in the next step
        assert windows.context_before.iloc[1:].to_list() == ends.iloc[:-1].to_list()
        assert not windows.finished.iloc[:-1].any()
        assert windows.finished.iloc[-1] or windows.step.iloc[-1] == steps
    progress = json.loads((newest_usable(config.output).path / "progress.json").read_text())
    carried = rows[~rows.finished & (rows.step == steps)]
    assert sorted(progress["rows"][place]["row"] for place in progress["carried"]) == sorted(carried.row)
    assert not leftovers(config.output)
    wall_s = run.trailer["t"]
    assert abs(run.ledger.seconds.sum() - run.header["gpus"] * wall_s) < 1e-9 * wall_s


def soak(make_config, steps, seed):
    whole = soak_config(make_config, "whole", steps)
    undisturbed = TrainerProcess(whole).start()
    assert undisturbed.run_until(steps)
    assert undisturbed.wait() == 0
    config = soak_config(make_config, "disturbed", steps)
    happened = run_with_faults(config, steps, seed)
    assert_same_run(config.output, whole.output)
    assert_nothing_is_lost(config, steps)
    return undisturbed.memory, happened


@pytest.mark.soak
@pytest.mark.parametrize("seed", [time.time_ns()], ids=["a new seed each time"])
def test_two_thousand_steps_with_a_fault_every_twenty_are_the_run_without(make_config, withstood, seed):
    memory, happened = soak(make_config, STEPS, seed)
    for name, times in happened.items():
        assert times >= (STEPS // EVERY - 1) // len(FAULTS)
        withstood(f"{name}, every {EVERY * len(FAULTS)} steps of {STEPS}", times=times)
    early = [held for step, held in memory if STEPS * 0.2 <= step < STEPS * 0.4]
    late = [held for step, held in memory if step >= STEPS * 0.8]
    assert statistics.median(late) <= (1 + FLAT) * statistics.median(early)
