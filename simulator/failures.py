"""What failures cost a run that restarts from its last checkpoint.

A failure stops every GPU. The run restarts from the last checkpoint, or from its beginning, and what was done since
is done again, just as before: rows have random streams of their own. So a run with failures is the one without them,
with the tries that failed put in front of the stretch between two checkpoints that they failed in, named `down`.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

from profiling.errors import ConfigError
from simulator.log import Columns, Log

STREAM = 4
"""Of the workload's seed; the rows' own are in simulator.workload."""

MOST_TRIES = 10_000
"""Expected, of one stretch; a run that needs more will not end."""


class Outage(NamedTuple):
    """`failures` tries that failed, one after the other, at the run time `t` (without outages) of their checkpoint."""

    t: float
    step: int
    seconds: float
    failures: int


def draw_outages(log: Log, wall_s: float, *, mtbf_hours: float, restart_s: float, seed: int) -> list[Outage]:
    """Failures come `mtbf_hours` of running time apart, exponentially; each costs what was done since the checkpoint
    and `restart_s`. Raises ConfigError when a stretch is so long that it hardly ever ends."""
    mtbf_s = 3600 * mtbf_hours
    saved = [(end, step + 1) for name, step, _, end in log.phases if name == "checkpoint"]
    stretches = [(0.0, 1), *saved]
    random = np.random.default_rng([seed, STREAM])
    outages = []
    for (start, step), end in zip(stretches, [*(t for t, _ in saved), wall_s], strict=True):
        needed_s = end - start
        if needed_s / mtbf_s > math.log(MOST_TRIES):
            raise ConfigError(
                f"cost.mtbf_hours = {mtbf_hours:g}: steps {step} and later take {needed_s / 3600:.3g} h without a "
                f"checkpoint, which fails more than {MOST_TRIES} times on average; lower cost.checkpoint_every"
            )
        seconds, failures = 0.0, 0
        while (until_failure_s := random.exponential(mtbf_s)) < needed_s:
            seconds += until_failure_s + restart_s
            failures += 1
        if failures:
            outages.append(Outage(start, step, seconds, failures))
    return outages


def insert_outages(log: Log, outages: list[Outage]) -> float:
    """Everything that begins at or after an outage comes later by its length. Returns their seconds.

    What met before meets after: both ends are moved, and no rounding lies between two phases."""
    at = np.array([outage.t for outage in outages])
    added = np.concatenate([[0.0], np.cumsum([outage.seconds for outage in outages])])

    def later(t: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
        return t + added[np.searchsorted(at, t, side)]

    def shift(columns: Columns) -> None:
        columns["t_start"] = later(columns["t_start"], "right")
        for name in ("t_end", "t_decided"):
            if name in columns:  # what takes no time may begin and end at the outage: after it
                columns[name] = np.maximum(later(columns[name], "left"), columns["t_start"])

    names, steps, starts, ends = zip(*log.phases, strict=True) if log.phases else ((), (), (), ())
    times = {"t_start": np.array(starts), "t_end": np.array(ends)}
    shift(times)
    moved = zip(names, steps, times["t_start"].tolist(), times["t_end"].tolist(), strict=True)
    down = (
        ("down", outage.step, start, end)
        for outage, start, end in zip(outages, (at + added[:-1]).tolist(), (at + added[1:]).tolist(), strict=True)
    )
    log.phases = sorted([*moved, *down], key=lambda phase: phase[2])
    for step in log.steps.values():
        step.t_planned = float(later(np.array([step.t_planned]), "right")[0])
        shift(step.rows)
        shift(step.spans)
    return float(added[-1])
