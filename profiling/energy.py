"""Joules of a run and of its steps, from the GPUs' energy counters."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from profiling.estimators import TICK_S

MOST_OUTSIDE, MOST_OUTSIDE_S = 0.1, 10.0
"""Share of the time before a counter's first reading, or after its last; and seconds that are always allowed: a
sampler starts while the run does."""


def is_counting(t: np.ndarray, joules: np.ndarray) -> bool:
    """Whether differences of a counter's readings are joules: there are two or more, it never ran backwards (its
    driver was loaded again), and it did not stand still all the time: an idle GPU draws tens of watts."""
    return len(t) >= 2 and bool(t[-1] > t[0] and joules[-1] > joules[0] and (np.diff(joules) >= 0).all())


def joules_by_piece(devices: pd.DataFrame, pieces: pd.DataFrame) -> np.ndarray | None:
    """Joules that all GPUs together drew in each of the pieces (t_start, t_end), in their order.

    A counter shows its last tick: a reading is half a tick old on average, so the error of a piece is some half a tick
    at each end. Before the first reading and after the last one the counter goes on at its mean power, for
    MOST_OUTSIDE of the time at most. None without counters, or where one of them does not count, or was read for less:
    a GPU that the run came to in its middle, or whose sampler gave up.
    """
    total = np.zeros(len(pieces))
    counters = devices[devices.energy_joules.notna()]
    if counters.empty:
        return None
    begin, end = float(pieces.t_start.min()), float(pieces.t_end.max())
    most_s = max(MOST_OUTSIDE_S, MOST_OUTSIDE * (end - begin))
    for _, own in counters.groupby("device", sort=False):
        t, joules = own.t.to_numpy(float) - TICK_S / 2, own.energy_joules.to_numpy(float)
        if not is_counting(t, joules) or max(t[0] - begin, end - t[-1]) > most_s:
            return None
        total += _drawn_until(pieces.t_end.to_numpy(float), t, joules)
        total -= _drawn_until(pieces.t_start.to_numpy(float), t, joules)
    return total


def _drawn_until(moment: np.ndarray, t: np.ndarray, joules: np.ndarray) -> np.ndarray:
    power = (joules[-1] - joules[0]) / (t[-1] - t[0])
    outside = np.minimum(0.0, moment - t[0]) + np.maximum(0.0, moment - t[-1])
    return np.interp(moment, t, joules) + power * outside


def energy_totals(
    devices: pd.DataFrame | None, pieces: pd.DataFrame, late: pd.Series, counts: Mapping[str, int]
) -> dict[str, float | None]:
    """`energy_joules` of the whole run and, for each of `counts`, joules of the pieces chosen by `late` per one."""
    joules = None if devices is None else joules_by_piece(devices, pieces)
    if joules is None:
        return {"energy_joules": None, **{f"joules_per_{name}": None for name in counts}}
    chosen = float(joules[late.to_numpy(bool)].sum())
    return {
        "energy_joules": float(joules.sum()),
        **{f"joules_per_{name}": chosen / count if count > 0 else None for name, count in counts.items()},
    }
