"""Distributions of lengths: their settings, and the quantile function of each.

A length is `quantile(u)` of a uniform number u that belongs to the row alone, so that a row has the same length under
every schedule, and a distribution can be swapped without touching the random streams.
"""

import os
from io import BytesIO
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, PositiveFloat, model_validator
from scipy.optimize import brentq
from scipy.special import gammaincinv, ndtr, ndtri

from profiling.errors import ConfigError, DataError, first_line
from profiling.files import opened, read_whole
from profiling.settings import Settings

MOST_LENGTHS = 100_000_000
LARGEST_CSV_BYTES = 2**28


class FixedLengths(Settings):
    kind: Literal["fixed"]
    value: PositiveFloat
    """Tokens of every response."""


class LognormalLengths(Settings):
    kind: Literal["lognormal"]
    mean: PositiveFloat | None = None
    """Mean before the cap, in tokens."""
    mean_capped: float | None = Field(None, ge=1)
    """Mean after the cap, as papers report it."""
    sigma: float = Field(ge=0, le=20)
    """Standard deviation of the logarithm."""

    @model_validator(mode="after")
    def check_there_is_one_mean(self) -> "LognormalLengths":
        if (self.mean is None) == (self.mean_capped is None):
            raise ValueError("give either mean (before the cap) or mean_capped (after it)")
        return self


class GammaLengths(Settings):
    kind: Literal["gamma"]
    mean: PositiveFloat
    """Mean before the cap, in tokens."""
    shape: float = Field(gt=0.01, le=1e6)
    """1: exponential; the coefficient of variation is shape ** -0.5."""


class ParetoLengths(Settings):
    kind: Literal["pareto"]
    minimum: PositiveFloat
    """Shortest length, in tokens."""
    alpha: float = Field(gt=0, le=1000)
    """Tail exponent: P(X > x) = (minimum / x) ** alpha; the mean before the cap is finite above 1."""


class EmpiricalLengths(Settings):
    kind: Literal["empirical"]
    file: Path
    """CSV or Parquet, relative to the experiment file."""
    column: str
    """Column with the response lengths, in tokens."""
    order: Literal["given", "sampled"] = "given"
    """given: the values in their order, repeating. sampled: drawn with replacement."""


class RunLengths(Settings):
    kind: Literal["run"]
    path: Path
    """Run directory whose rows give response lengths and prompts, in the order of their ids, repeating."""


Drawn = Annotated[FixedLengths | LognormalLengths | GammaLengths | ParetoLengths, Field(discriminator="kind")]


class MixturePart(Settings):
    weight: PositiveFloat
    """Relative to the other parts'."""
    lengths: Drawn


class MixtureLengths(Settings):
    kind: Literal["mixture"]
    parts: list[MixturePart] = Field(min_length=1, max_length=100)
    """E.g. easy and hard prompts."""


Lengths = Annotated[
    FixedLengths | LognormalLengths | GammaLengths | ParetoLengths | MixtureLengths | EmpiricalLengths | RunLengths,
    Field(discriminator="kind"),
]
PromptLengths = Annotated[
    FixedLengths | LognormalLengths | GammaLengths | ParetoLengths | MixtureLengths | EmpiricalLengths,
    Field(discriminator="kind"),
]


def quantile(lengths: Drawn | MixtureLengths, u: np.ndarray, cap: float) -> np.ndarray:
    """The lengths before the cap at probabilities `u`, each in (0, 1). `cap`: for `mean_capped`."""
    if isinstance(lengths, FixedLengths):
        return np.full(len(u), lengths.value)
    if isinstance(lengths, LognormalLengths):
        return np.exp(lognormal_mu(lengths, cap) + lengths.sigma * ndtri(u))
    if isinstance(lengths, GammaLengths):
        return lengths.mean / lengths.shape * gammaincinv(lengths.shape, u)
    if isinstance(lengths, ParetoLengths):
        with np.errstate(over="ignore"):
            return lengths.minimum * (1 - u) ** (-1 / lengths.alpha)
    # u first says which part, then, stretched to (0, 1) again, where in it: a prompt's samples stay correlated.
    weights = np.array([part.weight for part in lengths.parts])
    edges = np.concatenate([[0.0], np.cumsum(weights / weights.sum())])
    edges[-1] = 1.0
    which = np.clip(np.searchsorted(edges, u, side="right") - 1, 0, len(weights) - 1)
    drawn = np.empty(len(u))
    for place, part in enumerate(lengths.parts):
        here = which == place
        inside = (u[here] - edges[place]) / (edges[place + 1] - edges[place])
        tiny = np.finfo(float).tiny
        drawn[here] = quantile(part.lengths, np.clip(inside, tiny, 1 - 2.0**-53), cap)
    return drawn


def lognormal_mu(lengths: LognormalLengths, cap: float) -> float:
    """Mean of the logarithm. With `mean_capped`, solved so that E[min(X, cap)] is that mean. Raises ConfigError."""
    sigma = lengths.sigma
    if lengths.mean is not None:
        return float(np.log(lengths.mean) - sigma**2 / 2)
    target = lengths.mean_capped
    assert target is not None
    if target >= cap:
        raise ConfigError(
            f"workload.response_tokens.mean_capped = {target:g} is not below max_response_tokens = {cap:g}"
        )
    if sigma == 0:
        return float(np.log(target))
    # Uncapped, the mean would be the target at log(target) - sigma ** 2 / 2; the cap only lowers it.
    least = np.log(target) - sigma**2 / 2 - 1
    return float(brentq(lambda mu: capped_mean(mu, sigma, cap) - target, least, np.log(cap) + 60))


def capped_mean(mu: float, sigma: float, cap: float) -> float:
    """E[min(X, cap)] of a lognormal X: e^(mu + s^2/2) Phi((ln c - mu)/s - s) + c (1 - Phi((ln c - mu)/s))."""
    z = (np.log(cap) - mu) / sigma
    below = np.exp(min(mu + sigma**2 / 2, 700.0)) * ndtr(z - sigma)
    return float(below + cap * (1 - ndtr(z)))


def read_lengths(path: Path, column: str) -> np.ndarray:
    """The positive numbers of a column. Raises DataError naming the file, and the row of a bad value."""
    try:
        columns = _parquet_columns if path.suffix == ".parquet" else _csv_columns
        names, found = columns(path, column)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # each reader has its own exceptions
        reason = first_line(error)
        raise DataError(f"{path}: cannot be read: {reason}") from None
    if found is None:
        raise DataError(f"{path}: no column '{column}'; it has {', '.join(names)}")
    try:
        values = pd.to_numeric(found, errors="coerce").to_numpy(float)
    except OverflowError:
        raise DataError(f"{path}: column '{column}': holds a number that is too large") from None
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(values) == 0:
        raise DataError(f"{path}: column '{column}' is empty")
    if len(bad):
        raise DataError(f"{path}: column '{column}', row {bad[0] + 1}: not a positive number")
    return values


def _csv_columns(path: Path, column: str) -> tuple[list[str], pd.Series | None]:
    """The names of all columns, and the one. Never decompressed, whatever its name ends in."""
    table = pd.read_csv(BytesIO(read_whole(path, LARGEST_CSV_BYTES)))
    return list(map(str, table.columns)), table.get(column)


def _parquet_columns(path: Path, column: str) -> tuple[list[str], pd.Series | None]:
    with os.fdopen(opened(path), "rb") as handle:
        file = pq.ParquetFile(handle)
        names = list(file.schema_arrow.names)
        if names.count(column) != 1:
            return names, None
        kind = file.schema_arrow.field(column).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
            raise ValueError(f"column '{column}' is {kind}, not numbers")
        if file.metadata.num_rows > MOST_LENGTHS:
            raise ValueError(f"it claims {file.metadata.num_rows} rows; give at most {MOST_LENGTHS}")
        return names, file.read(columns=[column]).column(column).to_pandas()
