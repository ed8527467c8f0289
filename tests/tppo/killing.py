"""Runs that are killed: a child process trains, SIGKILL ends it at a moment of the test's choice."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from profiling.errors import DataError
from profiling.reader import Run
from tests.tppo import forked
from tppo.checkpoints.store import checkpoints_of, newest_usable
from tppo.start import train

KILLED, WHOLE = -signal.SIGKILL, 0
TIMES = ("time", "clock", "perf/throughput")


def train_in_child(config, *, resume=False, kill_after_s=None, kill_at=None):
    """Train in a process of its own. Returns its exit status: WHOLE, KILLED, or 3 where there is nothing to resume.

    kill_at(event, path): SIGKILL just before the first file operation for which it is true. Events are those of
    sys.addaudithook: open, os.rename, os.remove, os.rmdir, os.mkdir, shutil.rmtree.
    """

    def work():
        if kill_at is not None:
            sys.addaudithook(lambda event, arguments: _kill_if(kill_at, event, arguments))
        try:
            train_seeded(config, resume=resume)
        except DataError as error:
            raise SystemExit(3 if "has no checkpoint" in str(error) else 4) from error

    crash = config.output.with_suffix(".crash")
    child = forked.start(work, crash_file=crash)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        child.kill()
    child.join()
    assert child.exitcode >= 0 or child.exitcode == KILLED, crash.read_text()
    return child.exitcode


def train_seeded(config, *, resume=False):
    """A fresh run's global random states are the process's: the same for all here. A resumed run must not depend on
    them."""
    seed = random.SystemRandom().randrange(2**31) if resume else 0
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    return train(config, resume=resume, show_progress=False)


def _kill_if(kill_at, event, arguments):
    if event.startswith(("os.", "shutil.")) or event == "open":
        path = arguments[0] if arguments else ""
        if isinstance(path, str | os.PathLike) and kill_at(event, str(path)):
            os.kill(os.getpid(), signal.SIGKILL)


def resume_to_the_end(config):
    """As a user would: --resume; a run that was killed before its first checkpoint starts again."""
    if config.output.exists() and not checkpoints_of(config.output):
        shutil.rmtree(config.output)
    train_seeded(config, resume=config.output.exists())


def assert_same_run(killed: Path, whole: Path):
    """Metrics without times, rows without times, every weight and every optimiser moment, byte for byte."""
    assert metrics_of(killed) == metrics_of(whole)
    rows, expected = (Run(path).rollouts.drop(columns=["t_start", "t_end"]) for path in (killed, whole))
    assert rows.equals(expected)
    ours, theirs = newest_usable(killed), newest_usable(whole)
    assert ours.path.name == theirs.path.name
    assert not ours.passed_over
    for name in theirs.manifest.files:
        if name.endswith(".safetensors"):
            assert (ours.path / name).read_bytes() == (theirs.path / name).read_bytes(), name
    assert {"policy/model.safetensors", "rows.safetensors"} <= set(theirs.manifest.files)
    for name in ("optimizers.pt", "random.pt"):  # by value: pickles also record which objects are one and the same
        assert equal(*(torch.load(found.path / name, weights_only=True) for found in (ours, theirs))), name


def equal(ours, theirs):
    """Nested dicts and lists of tensors and numbers, bit for bit."""
    if torch.is_tensor(ours):
        return torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return ours == theirs


def metrics_of(path: Path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES) and "timing" not in k} for row in rows]


def leftovers(run: Path):
    return sorted(path.name for path in (run / "checkpoints").glob(".*"))
