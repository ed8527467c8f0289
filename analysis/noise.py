"""Whether a difference exceeds the noise: ratios of two runs' rates with 95 % intervals.

The steps of one run resemble their neighbours, so single steps must not be resampled: blocks of them are (circular
moving-block bootstrap, Politis and Romano 1992). Block length for an AR(1) of correlation r and n steps, after
Kuensch (1989) and Carlstein (1986):

    b = (sqrt(6) |r| / (1 - r^2))^(2/3) n^(1/3)

with r corrected for its bias, (1 + 3 r) / n. The bootstrap's variance is too small by two factors, and divided by
them: 1 - b / n, since blocks are drawn from a run with its own mean, and 1 - 2 r / ((1 - r^2) b), the correlation
between a block and the next. Of n / b blocks, that few degrees of freedom are left: the interval is log ratio +- t se,
with t as Welch and Satterthwaite combine two runs. Where an arm has several seeds, these are the units: whole runs
differ by more than their steps do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

RESAMPLES = 1000
LEAST_STEPS = 8
"""Fewer give no interval."""


@dataclass(frozen=True)
class Steps:
    """Of one run, step by step: seconds, and what they were spent for (finished rows, tokens, or 1 a step)."""

    seconds: np.ndarray
    amount: np.ndarray

    @property
    def rate(self) -> float | None:
        """Seconds per unit; None without a unit."""
        whole = float(self.amount.sum())
        return float(self.seconds.sum()) / whole if whole > 0 and self.seconds.sum() > 0 else None


@dataclass(frozen=True)
class Comparison:
    """b / a."""

    a: float
    b: float
    ratio: float
    low: float | None
    high: float | None
    """95 %; null: the runs are too short to tell."""
    blocks: tuple[int, int] | None
    """Steps that were resampled together; null where seeds are the units."""
    pairs: int | None = None
    """Seeds that both arms have, where these are the units."""

    @property
    def exceeds_noise(self) -> bool | None:
        return None if self.low is None or self.high is None else not self.low <= 1 <= self.high

    def words(self) -> str:
        """`slower by 12 % (8 to 16 %), more than the noise`: of b beside a."""
        change = abs(self.ratio - 1)
        direction = "slower" if self.ratio > 1 else "faster"
        if self.low is None or self.high is None:
            same = "the same" if self.ratio == 1 else f"{direction} by {change:.1%}"
            return f"{same}; too few steps to say whether that is noise"
        if not self.exceeds_noise:
            return f"no difference beyond the noise ({self.low - 1:+.1%} to {self.high - 1:+.1%})"
        ends = sorted((abs(self.low - 1), abs(self.high - 1)))
        return f"{direction} by {change:.1%} ({ends[0]:.1%} to {ends[1]:.1%}), more than the noise"


def compare_steps(a: Steps, b: Steps, *, block: int | None = None, seed: int = 0) -> Comparison | None:
    """Of two runs. block: steps; default: each run's own by its autocorrelation. None where a rate has no meaning."""
    if a.rate is None or b.rate is None:
        return None
    ratio = b.rate / a.rate
    if min(len(a.seconds), len(b.seconds)) < LEAST_STEPS:
        return Comparison(a.rate, b.rate, ratio, None, None, None)
    lengths = tuple(block_length(own) if block is None else min(block, len(own.seconds) // 2) for own in (a, b))
    errors = [_standard_error(own, length, seed + place)
              for place, (own, length) in enumerate(zip((a, b), lengths, strict=True))]  # fmt: skip
    freedom = [len(own.seconds) / length - 1 for own, length in zip((a, b), lengths, strict=True)]
    low, high = _interval(math.log(ratio), errors, freedom)
    return Comparison(a.rate, b.rate, ratio, low, high, (lengths[0], lengths[1]))


def compare_seeds(a: Mapping[object, float], b: Mapping[object, float]) -> Comparison:
    """Of two arms, by the rates of their runs, by seed: paired where both have the same seeds. Means of logarithms,
    and t intervals: a bootstrap of three values would be too narrow."""
    logs_a, logs_b = np.log(list(a.values())), np.log(list(b.values()))
    centre = float(logs_b.mean() - logs_a.mean())
    rates = math.exp(logs_a.mean()), math.exp(logs_b.mean())
    low = high = pairs = None
    if set(a) == set(b) and len(a) >= 2:
        differences = np.log([b[seed] / a[seed] for seed in a])
        pairs = len(differences)
        low, high = _interval(centre, [_error_of_mean(differences)], [pairs - 1])
    elif min(len(a), len(b)) >= 2:
        low, high = _interval(centre, [_error_of_mean(logs_a), _error_of_mean(logs_b)], [len(a) - 1, len(b) - 1])
    return Comparison(*rates, math.exp(centre), low, high, None, pairs)


def _error_of_mean(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _interval(centre: float, errors: Sequence[float], freedom: Sequence[float]) -> tuple[float, float]:
    """exp(centre -+ t error), with the degrees of freedom of Welch and Satterthwaite."""
    variance = sum(error**2 for error in errors)
    if variance == 0:
        return math.exp(centre), math.exp(centre)
    together = variance**2 / sum(error**4 / max(df, 0.5) for error, df in zip(errors, freedom, strict=True))
    reach = float(student.ppf(0.975, max(together, 1.0))) * math.sqrt(variance)
    return math.exp(centre - reach), math.exp(centre + reach)


def block_length(own: Steps) -> int:
    """Steps of a block; at most a quarter of them, at least one."""
    r, n = correlation(own), len(own.seconds)
    return int(min(max(1, math.ceil((math.sqrt(6) * r / (1 - r**2)) ** (2 / 3) * n ** (1 / 3))), max(1, n // 4)))


def correlation(own: Steps) -> float:
    """Of a step's time beyond what its amount takes with the next step's: at least 0."""
    rate = own.rate
    assert rate is not None
    deviation = own.seconds - rate * own.amount
    deviation = deviation - deviation.mean()
    power = float((deviation**2).sum())
    r = float((deviation[1:] * deviation[:-1]).sum()) / power if power > 0 else 0.0
    return min(max(r + (1 + 3 * r) / len(deviation), 0.0), 0.97)


def _standard_error(own: Steps, block: int, seed: int) -> float:
    """Of the logarithm of the rate."""
    rng = np.random.default_rng(seed)
    n = len(own.seconds)
    starts = rng.integers(0, n, (RESAMPLES, math.ceil(n / block)))
    places = ((starts[:, :, None] + np.arange(block)) % n).reshape(RESAMPLES, -1)[:, :n]
    seconds, amount = own.seconds[places].sum(axis=1), own.amount[places].sum(axis=1)
    known = amount > 0
    r = correlation(own)
    lacking = max(1 - block / n, 0.5) * max(1 - 2 * r / ((1 - r**2) * block), 0.4)
    return float(np.std(np.log(seconds[known] / amount[known]))) / math.sqrt(lacking)
