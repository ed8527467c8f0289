"""How long the responses are. Row i has the same length under every schedule: its random stream is its own."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from profiling.errors import ConfigError, DataError
from profiling.reader import Run
from simulator.experiment import EmpiricalLengths, FixedLengths, LognormalLengths, RunLengths, Workload

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Rows:
    """Rows 0..n-1: prompt and response tokens, the response capped at the maximum."""

    prompt_tokens: np.ndarray
    response_tokens: np.ndarray


class RowSource:
    """Draws rows by id: `rows(first, count)`; any range of ids gives the same rows, whatever was drawn before."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        lengths = workload.response_tokens
        self._table: tuple[np.ndarray, np.ndarray] | None = None
        if isinstance(lengths, EmpiricalLengths):
            self._table = (read_lengths(lengths.file, lengths.column), np.array([workload.prompt_tokens]))
        elif isinstance(lengths, RunLengths):
            self._table = lengths_of_run(lengths.path)
        elif isinstance(lengths, LognormalLengths):
            self._mu = lognormal_mu(lengths, workload.max_response_tokens)

    def rows(self, first: int, count: int) -> Rows:
        lengths = self.workload.response_tokens
        ids = np.arange(first, first + count)
        prompts = np.full(count, self.workload.prompt_tokens)
        if isinstance(lengths, FixedLengths):
            drawn = np.full(count, lengths.value)
        elif isinstance(lengths, LognormalLengths):
            drawn = np.exp(self._mu + lengths.sigma * ndtri(uniforms(self.workload.seed, ids)))
        else:
            assert self._table is not None
            values, known_prompts = self._table
            sampled = isinstance(lengths, EmpiricalLengths) and lengths.order == "sampled"
            u = uniforms(self.workload.seed, ids) if sampled else None
            place = ids % len(values) if u is None else (u * len(values)).astype(np.int64)
            drawn = values[place]
            prompts = known_prompts[place % len(known_prompts)]
        whole = np.clip(np.ceil(drawn), 1, self.workload.max_response_tokens)  # before the cast: it may overflow
        return Rows(prompts.astype(np.int64), whole.astype(np.int64))


def uniforms(seed: int, ids: np.ndarray) -> np.ndarray:
    """A uniform number in (0, 1) for each (seed, id): the SplitMix64 mix (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) * _GOLDEN + np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def lognormal_mu(lengths: LognormalLengths, cap: int) -> float:
    """Mean of the logarithm. With `mean_capped`, solved so that E[min(X, cap)] is that mean."""
    sigma = lengths.sigma
    if lengths.mean is not None:
        return float(np.log(lengths.mean) - sigma**2 / 2)
    target = lengths.mean_capped
    assert target is not None
    if target >= cap:
        raise ConfigError(
            f"workload.response_tokens.mean_capped = {target:g} is not below max_response_tokens = {cap}"
        )
    if sigma == 0:
        return float(np.log(target))
    return float(brentq(lambda mu: capped_mean(mu, sigma, cap) - target, np.log(target) - 1, np.log(cap) + 60))


def capped_mean(mu: float, sigma: float, cap: float) -> float:
    """E[min(X, cap)] of a lognormal X: e^(mu + s^2/2) Phi((ln c - mu)/s - s) + c (1 - Phi((ln c - mu)/s))."""
    z = (np.log(cap) - mu) / sigma
    below = np.exp(min(mu + sigma**2 / 2, 700.0)) * ndtr(z - sigma)
    return float(below + cap * (1 - ndtr(z)))


def read_lengths(path: Path, column: str) -> np.ndarray:
    """The positive numbers of a column. Raises DataError naming the file, and the row of a bad value."""
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # each reader has its own exceptions
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if column not in table:
        raise DataError(f"{path}: no column '{column}'; it has {', '.join(map(str, table.columns))}")
    values = pd.to_numeric(table[column], errors="coerce").to_numpy(float)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(values) == 0:
        raise DataError(f"{path}: column '{column}' is empty")
    if len(bad):
        raise DataError(f"{path}: column '{column}', row {bad[0] + 1}: not a positive number")
    return values


def lengths_of_run(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Response and prompt tokens of a run's training rows (steps 1 and later), in the order of their ids.

    A row that was still unfinished when the run ended is given the mean length of the run's finished rows that were
    longer than what it had, or one token more than it had where there are none: an assumption, for few rows.
    """
    rollouts = Run(path).rollouts
    rollouts = rollouts[rollouts.step >= 1]
    if rollouts.empty:
        raise DataError(f"{path}: has no rollout records; lengths cannot be taken from it")
    rollouts = rollouts.assign(length=rollouts.context_before + rollouts.tokens - rollouts.prompt_tokens)
    rows = rollouts.sort_values(["row", "step"]).groupby("row").last()
    lengths = rows.length.to_numpy(float)
    done = rows.finished.to_numpy(bool)
    for place in np.flatnonzero(~done):
        longer = lengths[done & (lengths > lengths[place])]
        lengths[place] = longer.mean() if len(longer) else lengths[place] + 1
    return lengths, rows.prompt_tokens.to_numpy()
