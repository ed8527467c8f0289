"""What a phase drew and how busy it kept a GPU, from sensors that are slower than phases: each with an interval, or
`unresolved`.

Utilisation is the mean over a window (a second, or a sixth of one) that ended some time before it was read. Averaging
the readings that fall into a phase smears its neighbours into it: a phase that was 0 % busy reads 69 %. Here a phase
that holds whole windows is integrated over those. One that does not is told from its neighbours by the phases' shares
of each window, over many steps: reading = sum over phases of share x busy, busy in [0, 1].

Energy is a counter that is brought up to date every tick (a tenth of a second): over a phase that holds several of its
readings the difference counts, extended at its own mean power to the phase's ends; a shorter one is told from its
neighbours by the same regression, over the counter's increments.
"""

from dataclasses import dataclass

import numpy as np

from profiling.regression import Fit, fitted
from profiling.windows import WINDOWS_TO_INTEGRATE, Pieces, Windows

TICK_S = 0.1
"""Of the energy counter, as recent GPUs keep it."""
READINGS_TO_INTEGRATE = 3
"""Of the energy counter, inside one phase."""
END_READINGS = 4
"""That say how much a phase draws at an end."""
RESOLVED_BUSY = 0.02
"""Half-width of a 95 % interval from regression up to which a busy fraction counts as resolved."""
RESOLVED_ENERGY = 0.1
"""The same of energy, relative."""
MOST_UNSEEN = 0.1
"""Of the time of a phase's occurrences, that samples are missing from, up to which it counts as resolved."""
QUANTUM = 0.01
"""Utilisation is read in whole per cent."""
SHORTER_THAN_A_WINDOW = 2.0
"""Factor on the interval of a phase that no window shows alone: its neighbours are not as even as the model has it."""


@dataclass(frozen=True)
class Estimate:
    """Of one phase over all its occurrences. Null value: unresolved, and the interval is all that can be said."""

    value: float | None
    low: float | None
    high: float | None
    """95 %."""
    method: str
    """integration, regression, or unresolved."""
    seconds: float
    """That the phase lasted in all."""


def busy_by_phase(pieces: Pieces, windows: Windows) -> dict[str, Estimate]:
    """Share of each phase's time with a kernel running, as the sensor counts it."""
    windows = windows.within(pieces.start[0], pieces.end[-1])
    length = windows.end - windows.begin
    fit = fitted(
        pieces, windows.begin, windows.end, windows.busy * length, windows.slack_s, upper=1.0, ages_s=windows.ages_s
    )  # fmt: skip
    windows = windows.shifted(fit.shift_s)
    occurrences = np.bincount(pieces.name, minlength=len(pieces.names))
    found = {}
    for place, name in enumerate(pieces.names):
        seconds = float(pieces.seconds()[place])
        half = fit.half[place] + QUANTUM / 2
        if len(length) and seconds / max(1, occurrences[place]) < np.median(length):  # no window shows it alone
            half *= SHORTER_THAN_A_WINDOW
        found[name] = _integrated_busy(pieces, windows, place) or _bounded(
            fit.value[place], half, seconds, resolved=half <= RESOLVED_BUSY, upper=1.0
        )
    return found


def _bounded(value: float, half: float, seconds: float, *, resolved: bool, upper: float) -> Estimate:
    """From a regression, within what is possible; no interval where it knows nothing."""
    if not np.isfinite(value) or not np.isfinite(half):
        return Estimate(None, None, None, "unresolved", seconds)
    low, high = float(max(0.0, value - half)), float(min(upper, value + half))
    if not resolved:
        return Estimate(None, low, high, "unresolved", seconds)
    return Estimate(float(value), low, high, "regression", seconds)


def _integrated_busy(pieces: Pieces, windows: Windows, place: int) -> Estimate | None:
    """Over the windows that lie inside occurrences of the phase; None when these are too short to hold enough."""
    mine = np.flatnonzero(pieces.name == place)
    start, end = pieces.start[mine], pieces.end[mine]
    if not len(windows.end):
        return None
    window_s = float(np.median(windows.end - windows.begin))
    apart_s = max(window_s, float(np.median(np.diff(windows.end)))) if len(windows.end) > 1 else window_s
    long = end - start >= WINDOWS_TO_INTEGRATE * window_s
    if (end - start)[long].sum() < 0.5 * (end - start).sum():
        return None
    means, weights, spreads, left, lost = [], [], [], [], []
    first = np.searchsorted(windows.begin, start - 1e-9, "left")
    last = np.searchsorted(windows.end, end + 1e-9, "right")
    for one in np.flatnonzero(long & (last > first)):
        a, b, inside = start[one], end[one], windows.busy[first[one] : last[one]]
        # The ends, which no whole window saw, go on as the windows next to them.
        before, after = max(0.0, windows.begin[first[one]] - a), max(0.0, b - windows.end[last[one] - 1])
        seen_s = (b - a) - before - after
        means.append((before * inside[0] + inside.mean() * seen_s + after * inside[-1]) / (b - a))
        weights.append(b - a)
        spreads.append(inside.std(ddof=1) if len(inside) > 1 else 0.05)
        left.append(1 - len(inside) * window_s / (b - a))
        lost.append(max(0.0, 1 - (len(inside) + 2) * apart_s / (b - a)))
    if not means:
        return None
    values, weight = np.array(means), np.array(weights) / sum(weights)
    value = float((values * weight).sum())
    # What no whole window saw may differ as windows do from each other; the mean of those that were seen is uncertain
    # by their spread; occurrences that were left out, by that between occurrences. Where samples are missing, for more
    # than a window at each end, anything may have happened.
    own = np.sqrt(np.square(spreads) * (np.square(np.clip(left, 0.0, 1.0)) + 0.15) + QUANTUM**2 / 12)
    error = float(np.sqrt((weight**2 * own**2).sum()))
    unseen = 1 - float((end - start)[long].sum() / (end - start).sum())
    between = float(values.std(ddof=1)) if len(values) > 1 else 0.05
    half = 1.96 * np.hypot(error, unseen * between) + QUANTUM / 2
    missing = float((np.array(lost) * weight).sum())
    low = float(max(0.0, value * (1 - missing) - half))
    high = float(min(1.0, value * (1 - missing) + missing + half))
    total_s = float((end - start).sum())
    if missing > MOST_UNSEEN or high - low >= 1.0:
        return Estimate(None, low, high, "unresolved", total_s)
    return Estimate(value, low, high, "integration", total_s)


def energy_by_phase(
    pieces: Pieces, t: np.ndarray, joules: np.ndarray, *, tick_s: float = TICK_S
) -> dict[str, Estimate]:
    """Joules that each phase drew. t, joules: readings of the counter, which shows its last tick. A counter that stood
    still all the time tells nothing; one that ran backwards was started anew there."""
    known = np.isfinite(joules)
    t, joules = t[known], joules[known]
    seconds = pieces.seconds()
    fit: Fit | None = None
    found = {}
    for place, name in enumerate(pieces.names):
        own = _integrated_energy(pieces, t, joules, place, tick_s)
        if own is None:
            fit = fit or _powers(pieces, t, joules, tick_s)
            value, half = (float(seconds[place]) * of[place] for of in (fit.value, fit.half))
            resolved = half <= RESOLVED_ENERGY * value
            own = _bounded(value, half, float(seconds[place]), resolved=resolved, upper=np.inf)
        found[name] = own
    return found


def _integrated_energy(
    pieces: Pieces, t: np.ndarray, joules: np.ndarray, place: int, tick_s: float
) -> Estimate | None:
    """Counter differences inside each occurrence, extended to its ends at its own mean power."""
    if len(t) < READINGS_TO_INTEGRATE or joules.max() == joules.min():
        return None
    mine = np.flatnonzero(pieces.name == place)
    start, end = pieces.start[mine], pieces.end[mine]
    first = np.searchsorted(t, start + tick_s, "left")  # this reading's tick is inside
    last = np.searchsorted(t, end, "right") - 1
    started_anew = np.concatenate([[0], np.cumsum(np.diff(joules) < 0)])
    alike = started_anew[np.minimum(first, len(t) - 1)] == started_anew[np.maximum(last, 0)]
    enough = (last - first + 1 >= READINGS_TO_INTEGRATE) & alike
    if (end - start)[enough].sum() < 0.5 * (end - start).sum() or not enough.any():
        return None
    a, b, begin, length = first[enough], last[enough], start[enough], (end - start)[enough]
    covered = t[b] - t[a]
    power = (joules[b] - joules[a]) / covered
    # A reading is up to a tick old, half of one on average. What lies outside of the readings' ticks goes on as its
    # neighbours do: at the power of four readings where a phase has twice as many, else at its mean.
    near = np.where(b - a >= 2 * END_READINGS, END_READINGS, b - a)
    before = (t[a] - tick_s / 2 - begin) * (joules[a + near] - joules[a]) / (t[a + near] - t[a])
    after = (begin + length - t[b] + tick_s / 2) * (joules[b] - joules[b - near]) / (t[b] - t[b - near])
    drawn = joules[b] - joules[a] + before + after
    # The ages of two readings differ by a triangular error; the ends differ from their neighbours alike every time.
    # Where readings are missing, at more than a reading's distance from an end, it may have drawn all or nothing.
    of_ticks = tick_s / np.sqrt(6) * power
    of_ends = 0.1 * power * np.clip(length - covered, 0, None)
    poll_s = float(np.median(np.diff(t)))
    lost_s = np.clip(length - covered - 2 * (poll_s + tick_s), 0, None)
    most = float((np.diff(joules) / np.diff(t)).max())
    total_s = float((end - start).sum())
    rest_s = total_s - float(length.sum())
    mean = float(drawn.sum() / length.sum())
    between = float((power.std(ddof=1) if len(power) > 1 else 0.1 * mean) * rest_s)
    value = float(drawn.sum()) + mean * rest_s
    half = 1.96 * float(np.sqrt((of_ticks**2).sum() + between**2)) + float(of_ends.sum())
    low = max(0.0, value - half - float((lost_s * power).sum()))
    high = value + half + float((lost_s * np.clip(most - power, 0, None)).sum())
    if lost_s.sum() > MOST_UNSEEN * length.sum():
        return Estimate(None, low, high, "unresolved", total_s)
    return Estimate(value, low, high, "integration", total_s)


def _powers(pieces: Pieces, t: np.ndarray, joules: np.ndarray, tick_s: float) -> Fit:
    """Watts of each phase, from the counter's increments between readings."""
    stamped = t - tick_s / 2  # on average a reading is half a tick old; where ticks are shorter, all are younger
    drawn = np.diff(joules)
    usable = (stamped[:-1] >= pieces.start[0]) & (stamped[1:] <= pieces.end[-1]) & (drawn >= 0)
    if not drawn[usable].any():  # a counter that stands still
        usable[:] = False
    return fitted(
        pieces, stamped[:-1][usable], stamped[1:][usable], drawn[usable], tick_s / 2, upper=np.inf, ages_s=tick_s
    )  # fmt: skip
