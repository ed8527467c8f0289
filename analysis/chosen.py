"""Which runs and which of their steps a figure draws, and the words about those that it does not."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd

from profiling.errors import DataError
from profiling.reader import Run

Lacks = Callable[[Run], str | None]
"""What a run lacks for a figure, or None."""


def usable(runs: Sequence[Run], lacks: Lacks, what: str) -> list[Run]:
    """The runs that lack nothing. Raises DataError with the first one's reason when there are none."""
    if not runs:
        raise DataError(f"{what}: no runs")
    found = [run for run in runs if lacks(run) is None]
    if not found:
        raise DataError(f"{runs[0].path}: {lacks(runs[0])}: nothing to draw as {what}")
    return found


def left_out(runs: Sequence[Run], lacks: Lacks, most: int = 3) -> list[str]:
    """For the foot of a figure: a line per reason, naming up to `most` runs that are not drawn because of it."""
    reasons = ((run.name, reason) for run in runs if (reason := lacks(run)) is not None)
    return [f"Not drawn: {part}." for part in by_reason(reasons, most)]


def by_reason(reasons: Iterable[tuple[str, str]], most: int) -> list[str]:
    """(name, reason) pairs -> `NAMES (reason)`: those with one reason together, at most so many by name."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons:
        names.setdefault(reason, []).append(name)
    return [f"{listed(own, most)} ({reason})" for reason, own in names.items()]


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def beyond(names: Sequence[str], most: int, what: str) -> list[str]:
    """For the foot of a figure: a line about those that there is no room for."""
    return [f"Not drawn: {listed(names[most:])} ({most} {what} at most)."] if len(names) > most else []


def simulated_only(runs: Iterable[Run]) -> list[str]:
    """For the foot of a figure: a line about the runs whose schedule no trainer of ours runs."""
    names = [run.name for run in runs if run.header.get("simulated_only")]
    return [f"Simulated only, the trainer does not run such a schedule: {listed(names)}."] if names else []


def lacks_engine_records(run: Run) -> str | None:
    """Of training steps; step 0 trains the value model."""
    if step_bounds(run).empty:
        return "has no finished training step"
    return None if any(_part(path.stem) >= 1 for path in (run.path / "engine").glob("step-*.parquet")) else (
        "has no engine records"
    )  # fmt: skip


def _part(stem: str) -> int:
    number = stem.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def step_bounds(run: Run) -> pd.DataFrame:
    """step -> start, end: seconds of each training step's phases, evaluation and checkpoint left out."""
    phases = run.phases[(run.phases.step >= 1) & ~run.phases.name.isin(("evaluation", "checkpoint", "down"))]
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
