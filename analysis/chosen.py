"""Which runs and which of their steps a figure draws, and the words about those that it does not."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import pandas as pd

from profiling.errors import DataError
from profiling.reader import Run
from profiling.summary import NOT_TRAINING

Answer = TypeVar("Answer")
Reasons = list[tuple[str, str]]
"""Names of runs, each with why it is not drawn."""


def asked(runs: Sequence[Run], ask: Callable[[Run], Answer]) -> tuple[list[tuple[Run, Answer]], Reasons]:
    """Each run with its answer, and those that raise DataError instead: it says what the run lacks. Raises the first
    one's when all do."""
    answers, reasons, first = [], [], None
    for run in runs:
        try:
            answers.append((run, ask(run)))
        except DataError as error:
            first = first or error
            reasons.append((run.name, str(error).removeprefix(f"{run.path}: ").removeprefix(f"{run.path}/")))
    if not answers:
        raise first or DataError("no runs to draw; name at least one run directory")
    return answers, reasons


def usable(runs: Sequence[Run], need: Callable[[Run], object]) -> tuple[list[Run], Reasons]:
    """The runs of which `need` raises no DataError, and the others. Raises the first one's when it always does."""
    answers, reasons = asked(runs, need)
    return [run for run, _ in answers], reasons


def left_out(reasons: Reasons) -> list[str]:
    """For the foot of a figure: nothing, or a line. Runs with one reason stand together, at most four of them by
    name."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons:
        names.setdefault(reason, []).append(name)
    parts = [f"{listed(own, 4)} ({reason})" for reason, own in names.items()]
    return [f"Left out: {'; '.join(parts)}."] if parts else []


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def beyond(names: Sequence[str], most: int, what: str) -> Reasons:
    """Of those that there is no room for."""
    return [(name, f"{most} {what} at most") for name in names[most:]]


def simulated_only(runs: Iterable[Run]) -> list[str]:
    """For the foot of a figure: a line about the runs whose schedule no trainer of ours runs."""
    names = [run.name for run in runs if run.header.get("simulated_only")]
    return [f"Simulated only, the trainer does not run such a schedule: {listed(names)}."] if names else []


def need_engine_records(run: Run) -> None:
    """Of training steps; step 0 trains the value model. Raises DataError."""
    if step_bounds(run).empty:
        raise DataError(f"{run.path}: has no finished training step")
    if not any(_part(path.stem) >= 1 for path in (run.path / "engine").glob("step-*.parquet")):
        raise DataError(f"{run.path}: has no engine records")


def _part(stem: str) -> int:
    number = stem.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def step_bounds(run: Run) -> pd.DataFrame:
    """step -> start, end: seconds of each training step's phases, without evaluation, checkpoint and failures."""
    phases = run.phases[(run.phases.step >= 1) & ~run.phases.name.isin(NOT_TRAINING)]
    ended = phases[phases.name == "rollout"].step.unique()
    return phases[phases.step.isin(ended)].groupby("step").agg(start=("t_start", "min"), end=("t_end", "max"))


def typical_step(run: Run) -> int:
    """The step of median duration, start-up steps left out where the run has others."""
    bounds = step_bounds(run)
    skipped = int((run.summary or {}).get("startup_steps") or 0)
    steady = bounds[bounds.index > skipped] if (bounds.index > skipped).any() else bounds
    durations = (steady.end - steady.start).sort_values(kind="stable")
    return int(durations.index[len(durations) // 2])


def some_steps(run: Run, most: int) -> list[int]:
    """All training steps, or `most` of them, evenly spaced, first and last included."""
    steps = step_bounds(run).index.to_numpy()
    if len(steps) > most:
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, most).round().astype(int))]
    return [int(step) for step in steps]
