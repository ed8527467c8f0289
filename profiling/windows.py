"""What a run is cut into: pieces that phases name, and the windows that sensors average over."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

WINDOWS_TO_INTEGRATE = 3.0
"""A phase that lasts as many windows holds at least two whole ones."""


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
    ages_s: float = 0.0
    """Each of them lies anywhere within so long a time."""

    def shifted(self, by_s: float) -> "Windows":
        return replace(self, begin=self.begin + by_s, end=self.end + by_s)

    def within(self, first: float, last: float) -> "Windows":
        usable = (self.begin >= first) & (self.end <= last)
        return replace(self, begin=self.begin[usable], end=self.end[usable], busy=self.busy[usable])


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
    if poll_s > window_s / 2 or not len(changed):  # no offset to be seen
        return Windows(t - 1.5 * window_s, t - 0.5 * window_s, busy, window_s / 2, window_s)
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
