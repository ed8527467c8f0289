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

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import lsq_linear

TICK_S = 0.1
"""Of the energy counter, as recent GPUs keep it."""
WINDOWS_TO_INTEGRATE = 3.0
"""A phase that lasts as many windows holds at least two whole ones."""
READINGS_TO_INTEGRATE = 3
"""Of the energy counter, inside one phase."""
END_READINGS = 4
"""That say how much a phase draws at an end."""
RESOLVED_BUSY = 0.02
"""Half-width of a 95 % interval from regression up to which a busy fraction counts as resolved."""
RESOLVED_ENERGY = 0.1
"""The same of energy, relative."""
RESAMPLES = 60
QUANTUM = 0.01
"""Utilisation is read in whole per cent."""


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


@dataclass(frozen=True)
class Pieces:
    """Adjoining pieces of a run, each with the phase that names it (profiling.ledger.innermost_phases)."""

    names: tuple[str, ...]
    name: np.ndarray
    """Place in `names`."""
    step: np.ndarray
    start: np.ndarray
    end: np.ndarray

    @classmethod
    def of(cls, pieces: pd.DataFrame) -> "Pieces":
        names = tuple(dict.fromkeys(pieces.name))
        place = {name: number for number, name in enumerate(names)}
        return cls(
            names, pieces.name.map(place).to_numpy(int), pieces.step.to_numpy(int), pieces.t_start.to_numpy(float),
            pieces.t_end.to_numpy(float),
        )  # fmt: skip

    def seconds(self) -> np.ndarray:
        return np.bincount(self.name, self.end - self.start, len(self.names))

    def with_ends_apart(self, window_s: float) -> "Pieces":
        """Pieces longer than three windows in three, under names of their own behind all others: what the ends do, and
        their neighbours are told from, may differ from the middle."""
        long = np.flatnonzero(self.end - self.start > WINDOWS_TO_INTEGRATE * window_s)
        many = len(self.names)
        part = np.arange(len(self.name))
        place = np.concatenate([part, long, long])
        start = np.concatenate([self.start, self.start[long] + window_s, self.end[long] - window_s])
        end = np.concatenate([self.end, self.end[long] - window_s, self.end[long]])
        end[long] = self.start[long] + window_s
        name = np.concatenate([self.name, self.name[long] + many, self.name[long] + 2 * many])
        order = np.argsort(start, kind="stable")
        names = (*self.names, *(f"{n}, middle" for n in self.names), *(f"{n}, end" for n in self.names))
        return Pieces(names, name[order], self.step[place][order], start[order], end[order])

    def shares(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """(windows, phases): seconds of each phase within each window."""
        edges = np.concatenate([self.start, self.end[-1:]])
        lengths = np.zeros((len(edges), len(self.names)))
        np.add.at(lengths, (np.arange(1, len(edges)), self.name), self.end - self.start)
        spent = np.cumsum(lengths, axis=0)  # at each edge

        def at(t: np.ndarray) -> np.ndarray:
            return np.column_stack([np.interp(t, edges, spent[:, phase]) for phase in range(len(self.names))])

        return at(end) - at(begin)


@dataclass(frozen=True)
class Windows:
    """Utilisation readings with the time that each is the mean of."""

    begin: np.ndarray
    end: np.ndarray
    busy: np.ndarray
    slack_s: float = 0.0
    """All of them may lie so much earlier or later, together."""

    def shifted(self, by_s: float) -> "Windows":
        return Windows(self.begin + by_s, self.end + by_s, self.busy)

    def within(self, first: float, last: float) -> "Windows":
        usable = (self.begin >= first) & (self.end <= last)
        return Windows(self.begin[usable], self.end[usable], self.busy[usable], self.slack_s)


def windows_of_polls(t: np.ndarray, busy: np.ndarray, window_s: float) -> Windows:
    """Windows behind polled readings. A new reading appears some time after its window's end, at most one poll later;
    windows follow each other without a gap, so their common offset is the circular mean over all changes, half a poll
    back."""
    known = np.isfinite(busy)
    t, busy = t[known], busy[known]
    if len(t) < 2:
        return Windows(np.zeros(0), np.zeros(0), np.zeros(0))
    changed = np.flatnonzero(np.diff(busy) != 0) + 1
    poll_s = float(np.median(np.diff(t)))
    if poll_s >= window_s or not len(changed):  # no offset to be seen
        return Windows(t - 1.5 * window_s, t - 0.5 * window_s, busy, window_s / 2)
    seen = t[changed] - (t[changed] - t[changed - 1]) / 2
    angles = np.exp(2j * np.pi * seen / window_s)
    offset = float(np.angle(angles.mean()) / (2 * np.pi) * window_s) % window_s
    ends = offset + window_s * np.arange(
        np.ceil((t[0] - offset) / window_s), np.floor((t[-1] - offset) / window_s) + 1
    )
    # The reading that shows window e is the last one before e + W.
    shown = np.searchsorted(t, ends + window_s - poll_s / 4, side="left") - 1
    inside = (shown >= 0) & (t[np.maximum(shown, 0)] >= ends)
    return Windows(ends[inside] - window_s, ends[inside], busy[shown[inside]], poll_s / 2)


def busy_by_phase(pieces: Pieces, windows: Windows) -> dict[str, Estimate]:
    """Share of each phase's time with a kernel running, as the sensor counts it."""
    seconds = pieces.seconds()
    windows = windows.within(pieces.start[0], pieces.end[-1])
    solved, shift_s = _regression(pieces, windows)
    windows = windows.shifted(shift_s)
    found = {}
    for place, name in enumerate(pieces.names):
        own = _integrated_busy(pieces, windows, place)
        found[name] = own or solved(place, float(seconds[place]))
    return found


def _integrated_busy(pieces: Pieces, windows: Windows, place: int) -> Estimate | None:
    """Over the windows that lie inside occurrences of the phase; None when these are too short to hold enough."""
    mine = np.flatnonzero(pieces.name == place)
    start, end = pieces.start[mine], pieces.end[mine]
    if not len(windows.end):
        return None
    window_s = float(np.median(windows.end - windows.begin))
    long = end - start >= WINDOWS_TO_INTEGRATE * window_s
    if (end - start)[long].sum() < 0.5 * (end - start).sum():
        return None
    means, weights, spreads, left = [], [], [], []
    for a, b in zip(start[long], end[long], strict=True):
        which = np.flatnonzero((windows.begin >= a - 1e-9) & (windows.end <= b + 1e-9))
        if not len(which):
            continue
        inside = windows.busy[which]
        # The ends, which no whole window saw, go on as the windows next to them.
        before, after = max(0.0, windows.begin[which[0]] - a), max(0.0, b - windows.end[which[-1]])
        seen_s = (b - a) - before - after
        means.append((before * inside[0] + inside.mean() * seen_s + after * inside[-1]) / (b - a))
        weights.append(b - a)
        spreads.append(inside.std(ddof=1) if len(inside) > 1 else 0.05)
        left.append(1 - len(inside) * window_s / (b - a))
    if not means:
        return None
    values, weight = np.array(means), np.array(weights) / sum(weights)
    value = float((values * weight).sum())
    # What no whole window saw may differ as windows do from each other; the mean of those that were seen is uncertain
    # by their spread; occurrences that were left out, by that between occurrences.
    own = np.sqrt(np.square(spreads) * (np.square(np.clip(left, 0.0, 1.0)) + 0.15) + QUANTUM**2 / 12)
    error = float(np.sqrt((weight**2 * own**2).sum()))
    unseen = 1 - float((end - start)[long].sum() / (end - start).sum())
    between = float(values.std(ddof=1)) if len(values) > 1 else 0.05
    half = 1.96 * np.hypot(error, unseen * between) + QUANTUM / 2
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), "integration", float((end - start).sum()))


SHORTER_THAN_A_WINDOW = 1.5
"""Factor on the interval of a phase that no window shows alone: its neighbours are not as even as the model has it."""
SHIFTS = 11
"""Of the windows' common offset that are tried within their slack."""


def _regression(pieces: Pieces, windows: Windows) -> tuple[Callable[[int, float], Estimate], float]:
    """Busy fractions of all phases at once, with a bootstrap over steps; and the offset of the windows that explains
    the readings best. Where others explain them almost as well, the interval holds what they would say."""
    none: Callable[[int, float], Estimate] = lambda place, seconds: Estimate(  # noqa: E731
        None, None, None, "unresolved", seconds
    )
    if len(windows.end) < 2 * len(pieces.names):
        return none, 0.0
    length = windows.end - windows.begin
    parts = pieces.with_ends_apart(float(np.median(length)))

    def shares(shift_s: float) -> np.ndarray:
        return parts.shares(windows.begin + shift_s, windows.end + shift_s) / length[:, None]

    tried = np.linspace(-windows.slack_s, windows.slack_s, SHIFTS) if windows.slack_s else np.zeros(1)
    solutions = [_solved(shares(shift), windows.busy, 1.0) for shift in tried]
    misfit = np.array([np.square(windows.busy - np.nan_to_num(x) @ shares(s).T).sum()
                       for x, s in zip(solutions, tried, strict=True)])  # fmt: skip
    best = int(misfit.argmin())
    as_good = [x for x, own in zip(solutions, misfit, strict=True) if own <= misfit[best] * (1 + 4 / len(windows.end))]
    block = pieces.step[np.clip(np.searchsorted(pieces.start, windows.begin, "right") - 1, 0, None)]
    value, low, high = _bootstrapped(shares(tried[best]), windows.busy, block, upper=1.0)
    step_s = tried[1] - tried[0] if len(tried) > 1 else 0.0  # the offset is known to half a step of the search
    near = [solutions[place] for place in (best - 1, best + 1) if 0 <= place < len(solutions)] if step_s else []
    apart = np.max([np.abs(x - value) for x in as_good] + [np.abs(x - value) / 2 for x in near], axis=0)

    def estimate(place: int, seconds: float) -> Estimate:
        if not np.isfinite(value[place]):
            return none(place, seconds)
        half = (high[place] - low[place]) / 2 + apart[place] + QUANTUM / 2
        if seconds / max(1, int((pieces.name == place).sum())) < np.median(length):  # no window shows it alone
            half *= SHORTER_THAN_A_WINDOW
        a, b = float(max(0.0, value[place] - half)), float(min(1.0, value[place] + half))
        if half > RESOLVED_BUSY:
            return Estimate(None, a, b, "unresolved", seconds)
        return Estimate(float(value[place]), a, b, "regression", seconds)

    return estimate, float(tried[best])


def _solved(work: np.ndarray, seen: np.ndarray, upper: float) -> np.ndarray:
    """x of seen = work @ x, 0 <= x <= upper; NaN for columns without work."""
    return _from_products(work.T @ work, work.T @ seen, upper)


def _from_products(gram: np.ndarray, right: np.ndarray, upper: float) -> np.ndarray:
    """The same from work' work and work' seen, which are small and add up over steps."""
    used = np.diag(gram) > 1e-12
    x = np.full(len(right), np.nan)
    if used.any():
        own = gram[np.ix_(used, used)]
        root = np.linalg.cholesky(own + 1e-10 * np.trace(own) * np.eye(len(own)))
        x[used] = lsq_linear(root.T, np.linalg.solve(root, right[used]), (0, upper)).x
    return x


def _bootstrapped(
    work: np.ndarray, seen: np.ndarray, block: np.ndarray, *, upper: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares of seen = work @ x with 0 <= x <= upper, and its 95 % interval over blocks drawn with replacement
    (a t-like widening for few blocks). NaN for columns without work."""
    value = _solved(work, seen, upper)
    blocks = np.unique(block)
    random = np.random.default_rng(0)
    if len(blocks) < 3:
        return value, np.full_like(value, -np.inf), np.full_like(value, np.inf)
    grams = np.array([work[block == name].T @ work[block == name] for name in blocks])
    rights = np.array([work[block == name].T @ seen[block == name] for name in blocks])
    drawn = []
    for _ in range(RESAMPLES):
        chosen = random.integers(0, len(blocks), len(blocks))
        drawn.append(_from_products(grams[chosen].sum(axis=0), rights[chosen].sum(axis=0), upper))
    wider = 1 + 4 / len(blocks)
    spread = 1.96 * wider * np.std(drawn, axis=0)
    return value, value - spread, value + spread


def energy_by_phase(
    pieces: Pieces, t: np.ndarray, joules: np.ndarray, *, tick_s: float = TICK_S
) -> dict[str, Estimate]:
    """Joules that each phase drew. t, joules: readings of the counter, which shows its last tick."""
    known = np.isfinite(joules)
    t, joules = t[known], joules[known]
    seconds = pieces.seconds()
    solved: dict[int, tuple[float, float, float]] | None = None
    found = {}
    for place, name in enumerate(pieces.names):
        own = _integrated_energy(pieces, t, joules, place, tick_s)
        if own is None:
            solved = _powers(pieces, t, joules, tick_s) if solved is None else solved
            own = _from_power(solved.get(place), float(seconds[place]))
        found[name] = own
    return found


def _integrated_energy(
    pieces: Pieces, t: np.ndarray, joules: np.ndarray, place: int, tick_s: float
) -> Estimate | None:
    """Counter differences inside each occurrence, extended to its ends at its own mean power."""
    mine = np.flatnonzero(pieces.name == place)
    start, end = pieces.start[mine], pieces.end[mine]
    first = np.searchsorted(t, start + tick_s, "left")  # this reading's tick is inside
    last = np.searchsorted(t, end, "right") - 1
    enough = last - first + 1 >= READINGS_TO_INTEGRATE
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
    of_ticks = tick_s / np.sqrt(6) * power
    of_ends = 0.1 * power * np.clip(length - covered, 0, None)
    total_s = float((end - start).sum())
    rest_s = total_s - float(length.sum())
    mean = float(drawn.sum() / length.sum())
    between = float((power.std(ddof=1) if len(power) > 1 else 0.1 * mean) * rest_s)
    value = float(drawn.sum()) + mean * rest_s
    half = 1.96 * float(np.sqrt((of_ticks**2).sum() + between**2)) + float(of_ends.sum())
    return Estimate(value, max(0.0, value - half), value + half, "integration", total_s)


def _powers(pieces: Pieces, t: np.ndarray, joules: np.ndarray, tick_s: float) -> dict[int, tuple[float, float, float]]:
    """Watts of each phase and their interval, from the counter's increments between readings."""
    if len(t) < 2 * len(pieces.names) + 2:
        return {}
    stamped = t - tick_s / 2  # on average a reading is half a tick old
    inside = (stamped >= pieces.start[0]) & (stamped <= pieces.end[-1])
    stamped, joules = stamped[inside], joules[inside]
    parts = pieces.with_ends_apart(4 * tick_s)
    shares = parts.shares(stamped[:-1], stamped[1:])
    block = pieces.step[np.clip(np.searchsorted(pieces.start, stamped[:-1], "right") - 1, 0, None)]
    value, low, high = _bootstrapped(shares, np.diff(joules), block, upper=np.inf)
    return {
        place: (float(value[place]), float(low[place]), float(high[place]))
        for place in range(len(pieces.names))
        if np.isfinite(value[place])
    }


def _from_power(power: tuple[float, float, float] | None, seconds: float) -> Estimate:
    if power is None or not np.isfinite(power[1]):
        return Estimate(None, None, None, "unresolved", seconds)
    value, low, high = (seconds * watts for watts in power)
    low = max(0.0, low)
    if (high - low) / 2 > RESOLVED_ENERGY * max(value, 1e-9):
        return Estimate(None, low, high, "unresolved", seconds)
    return Estimate(value, low, high, "regression", seconds)
