"""Tells phases that are shorter than a sensor's windows from their neighbours: by the phases' shares of each window,
over many steps."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from profiling.windows import Pieces

LEAST_STEPS = 3
"""That a phase is part of, for a regression to tell it from its neighbours."""
MOST_READINGS = 100_000
"""That a regression solves for, of steps spread over the run: more tell it nothing new."""
RESAMPLES = 60
OLDER = 8
"""Times that a regression is solved with times that are more uncertain."""
SHIFTS = 11
"""Of the windows' common offset that are tried within their slack."""


@dataclass(frozen=True)
class Fit:
    """What a regression says of every phase: per second of it."""

    value: np.ndarray
    """NaN for a phase that no reading holds."""
    half: np.ndarray
    """Half-width of the 95 % interval; infinite where too few steps hold the phase."""
    shift_s: float
    """Of the readings' windows, which explains them best."""


def fitted(
    pieces: Pieces, begin: np.ndarray, end: np.ndarray, seen: np.ndarray, slack_s: float, *, upper: float,
    ages_s: float = 0.0,
) -> Fit:  # fmt: skip
    """All phases at once from `seen`, the amount that each window saw, with a bootstrap over steps. The windows may
    lie up to `slack_s` earlier or later, all of them by the same time: the offset is taken that explains the readings
    best, and where others do almost as well, the interval holds what they would say. ages_s: each window's ends lie
    anywhere within such a time."""
    names = len(pieces.names)
    nothing = Fit(np.full(names, np.nan), np.full(names, np.inf), 0.0)
    if len(begin) < 2 * names:
        return nothing
    parts = pieces.with_ends_apart(float(np.median(end - begin)))
    block = pieces.step[np.clip(np.searchsorted(pieces.start, begin, "right") - 1, 0, None)]
    chosen = _of_some_steps(block)
    begin, end, seen, block = begin[chosen], end[chosen], seen[chosen], block[chosen]

    def work(shift_s: float) -> np.ndarray:
        return parts.shares(begin + shift_s, end + shift_s)

    tried = np.linspace(-slack_s, slack_s, SHIFTS) if slack_s else np.zeros(1)
    solutions = [_solved(work(shift), seen, upper) for shift in tried]
    misfit = np.array([np.square(seen - work(s) @ np.nan_to_num(x)).sum()
                       for x, s in zip(solutions, tried, strict=True)])  # fmt: skip
    best = int(misfit.argmin())
    as_good = [x for x, own in zip(solutions, misfit, strict=True) if own <= misfit[best] * (1 + 4 / len(end))]
    value, spread = _bootstrapped(work(tried[best]), seen, block, upper=upper)
    near = [solutions[place] for place in (best - 1, best + 1) if 0 <= place < len(solutions)]
    # The offset is known to half a step of the search.
    apart = np.max([np.abs(x - value) for x in as_good] + [np.abs(x - value) / 2 for x in near], axis=0)
    if ages_s:
        shrunk = _with_older_readings(parts, begin, end, seen, ages_s, upper) - value
        value, apart = np.clip(value - shrunk, 0.0, upper), apart + 2 * np.abs(shrunk)
    return Fit(value[:names], (spread + apart)[:names], float(tried[best]))


def _of_some_steps(block: np.ndarray) -> np.ndarray:
    """Places of at most MOST_READINGS, those of every n-th step."""
    every = -(-len(block) // MOST_READINGS)
    _, number = np.unique(block, return_inverse=True)
    return np.flatnonzero(number % every == 0)[:MOST_READINGS]


def _with_older_readings(
    parts: Pieces, begin: np.ndarray, end: np.ndarray, seen: np.ndarray, ages_s: float, upper: float
) -> np.ndarray:
    """What the regression would say if its times were twice as uncertain. Uncertain times draw phases towards their
    neighbours; as much again as they did already (simulation and extrapolation: Cook and Stefanski 1994)."""
    random = np.random.default_rng(0)
    edges = np.unique(np.concatenate([begin, end]))
    found = []
    for _ in range(OLDER):
        moved = np.sort(edges + random.uniform(-ages_s / 2, ages_s / 2, len(edges)))
        shares = parts.shares(moved[np.searchsorted(edges, begin)], moved[np.searchsorted(edges, end)])
        found.append(_solved(shares, seen, upper))
    return np.mean(found, axis=0)


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
) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of seen = work @ x with 0 <= x <= upper, and the half-width of its 95 % interval over blocks drawn
    with replacement (a t-like widening for few blocks): infinite for columns that few blocks hold. NaN for columns
    without work."""
    order = np.argsort(block, kind="stable")
    work, seen, block = work[order], seen[order], block[order]
    edges = np.flatnonzero(np.diff(block)) + 1
    each = list(zip([0, *edges], [*edges, len(block)], strict=True))
    grams = np.array([work[a:b].T @ work[a:b] for a, b in each])
    rights = np.array([work[a:b].T @ seen[a:b] for a, b in each])
    value = _from_products(grams.sum(axis=0), rights.sum(axis=0), upper)
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        chosen = random.integers(0, len(each), len(each))
        drawn.append(_from_products(grams[chosen].sum(axis=0), rights[chosen].sum(axis=0), upper))
    known = (np.diagonal(grams, axis1=1, axis2=2) > 0).sum(axis=0) >= LEAST_STEPS
    spread = np.full(len(value), np.inf)
    spread[known] = 1.96 * (1 + 4 / len(each)) * np.nanstd(np.array(drawn)[:, known], axis=0)
    return value, spread
