"""The rows of a run. Row i is the same under every schedule: its random stream is its own."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtr, ndtri

from profiling.errors import DataError
from profiling.reader import Run
from simulator.experiment import Workload
from simulator.lengths import EmpiricalLengths, Lengths, RunLengths, quantile, read_lengths

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
GROUP_STREAM, PROMPT_STREAM = 1, 2
"""Streams beside the rows' own: what one prompt's responses share, and how long the prompt is."""


@dataclass(frozen=True)
class Rows:
    """Rows 0..n-1: prompt and response tokens, the response capped at the maximum."""

    prompt_tokens: np.ndarray
    response_tokens: np.ndarray


class RowSource:
    """Draws rows by id: `rows(first, count)`; any range of ids gives the same rows, whatever was drawn before."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._of_run: tuple[np.ndarray, np.ndarray] | None = None
        if isinstance(workload.response_tokens, RunLengths):
            self._of_run = lengths_of_run(workload.response_tokens.path)
        self._tables = {
            (lengths.file, lengths.column): read_lengths(lengths.file, lengths.column)
            for lengths in (workload.response_tokens, workload.prompt_lengths)
            if isinstance(lengths, EmpiricalLengths)
        }

    def rows(self, first: int, count: int) -> Rows:
        workload = self.workload
        ids = np.arange(first, first + count)
        groups = ids // workload.samples_per_prompt
        drawn = self._lengths(workload.response_tokens, ids, self._scores(ids, groups))
        with np.errstate(over="ignore"):
            drawn = drawn * (1 + workload.length_growth_per_step) ** (ids // workload.rows_per_step)
        return Rows(self._prompts(ids, groups), _whole(drawn, workload.max_response_tokens))

    def _scores(self, ids: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """A uniform number per row; those of one prompt correlate through a Gaussian copula."""
        own = uniforms(self.workload.seed, ids)
        correlation = self.workload.group_correlation
        if correlation == 0:
            return own
        shared = ndtri(uniforms(self.workload.seed, groups, GROUP_STREAM))
        mixed = ndtr(np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * ndtri(own))
        return np.clip(mixed, np.finfo(float).tiny, 1 - 2.0**-53)

    def _prompts(self, ids: np.ndarray, groups: np.ndarray) -> np.ndarray:
        lengths = self.workload.prompt_lengths
        if lengths is not None:
            u = uniforms(self.workload.seed, groups, PROMPT_STREAM)
            return _whole(self._lengths(lengths, groups, u), 2**31)
        if self._of_run is not None:
            prompts = self._of_run[1]
            return prompts[ids % len(prompts)].astype(np.int64)
        return np.full(len(ids), self.workload.prompt_tokens, dtype=np.int64)

    def _lengths(self, lengths: Lengths, ids: np.ndarray, u: np.ndarray) -> np.ndarray:
        if isinstance(lengths, RunLengths):
            assert self._of_run is not None
            return self._of_run[0][ids % len(self._of_run[0])]
        if isinstance(lengths, EmpiricalLengths):
            values = self._tables[lengths.file, lengths.column]
            return values[(u * len(values)).astype(np.int64) if lengths.order == "sampled" else ids % len(values)]
        return quantile(lengths, u, self.workload.max_response_tokens)


def _whole(lengths: np.ndarray, most: int) -> np.ndarray:
    """Rounded up, at least 1, at most `most`: before the cast, which may overflow."""
    return np.clip(np.ceil(lengths), 1, most).astype(np.int64)


def uniforms(seed: int, ids: np.ndarray, stream: int = 0) -> np.ndarray:
    """A uniform number in (0, 1) for each (seed, id) of a stream: the SplitMix64 mix (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        ids = ids.astype(np.uint64) ^ (np.uint64(stream) << np.uint64(62))
        z = ids.astype(np.uint64) * _GOLDEN + np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def lengths_of_run(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Response and prompt tokens of a run's training rows (steps 1 and later), in the order of their ids.

    A row that was still unfinished when the run ended is given the mean length of the run's finished rows that were
    longer than what it had, or one token more than it had where there are none: an assumption, for few rows.
    Raises DataError.
    """
    rollouts = Run(path).rollouts
    if rollouts[rollouts.step >= 1].empty:
        raise DataError(f"{path}: has no rollout records; lengths cannot be taken from it")
    rows = whole_rows(rollouts)
    return rows.length.to_numpy(float), rows.prompt_tokens.to_numpy()


def whole_rows(rollouts: pd.DataFrame) -> pd.DataFrame:
    """By row id, of steps 1 and later: prompt_tokens, group and length, as in `lengths_of_run`."""
    rollouts = rollouts[rollouts.step >= 1]
    rollouts = rollouts.assign(length=rollouts.context_before + rollouts.tokens - rollouts.prompt_tokens)
    rows = rollouts.sort_values(["row", "step"]).groupby("row").last()
    lengths = rows.length.to_numpy(float)
    done = rows.finished.to_numpy(bool)
    for place in np.flatnonzero(~done):
        longer = lengths[done & (lengths > lengths[place])]
        lengths[place] = longer.mean() if len(longer) else lengths[place] + 1
    return rows.assign(length=lengths)[["group", "prompt_tokens", "length"]]
