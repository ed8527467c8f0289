"""Fits costs to what a run measured: non-negative least squares, with intervals and R2.

Each cost is affine in the work it depends on. Decode: a span of k steps of B rows took k c0 + k B c1 + pairs c2.
Prefill: base + tokens + attended pairs. A training phase: base + processed tokens.

Two rules make totals right, which is what a prediction is judged by. Spans are weighted by 1 / sqrt(steps), since the
noise of k steps adds up; and after the fit all coefficients of a cost are scaled by one factor, so that the fitted
seconds add up to the measured ones. Slow outliers, which a shared machine produces, thus keep their time.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from profiling.errors import ConfigError, DataError
from profiling.files import read_json
from profiling.ledger import innermost_phases
from profiling.reader import Run
from profiling.writer import write_atomically
from simulator.costs import PHASE_COSTS

SCHEMA_VERSION = 1
RESAMPLES = 100
INTERVAL_PERCENT = (2.5, 97.5)


@dataclass(frozen=True)
class Observations:
    """Work and seconds, one row an observation. `step` groups what one training step did, for the bootstrap."""

    names: tuple[str, ...]
    """Cost keys, one per column of `work`."""
    work: np.ndarray
    seconds: np.ndarray
    weight: np.ndarray
    step: np.ndarray


@dataclass(frozen=True)
class Fit:
    coefficients: dict[str, float]
    """Seconds per unit of work."""
    interval: dict[str, tuple[float, float]]
    """95 %, from a bootstrap over training steps."""
    r2: float | None
    """Share of the variance of the seconds that the fit explains; null when they do not vary."""
    observations: int
    total_measured_s: float
    total_fitted_s: float
    scale: float
    """Factor of the last rule: measured / first fitted total."""


@dataclass(frozen=True)
class Calibration:
    """Costs of simulator.cost_settings.AffineCostSettings, where they come from and how well they fit."""

    costs: dict[str, float]
    fits: dict[str, Fit | None]
    """Null: the runs hold nothing to fit it to."""
    runs: tuple[str, ...]
    probe_seconds: float | None
    """Median of the drift probe over the runs."""
    evaluation_s: float | None
    """Mean seconds of an evaluation; not a training cost."""

    def scaled(self, factor: float) -> "Calibration":
        """Every cost times `factor`: the same work on a machine that much slower."""
        return replace(self, costs={name: value * factor for name, value in self.costs.items()})

    def as_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA_VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        write_atomically(path, (json.dumps(self.as_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Raises ConfigError naming the file and what is wrong with it."""
        try:
            values = read_json(path)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such calibration file; make one with tppo calibrate") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
        if not isinstance(values, dict) or values.get("schema") != SCHEMA_VERSION:
            raise ConfigError(f"{path}: not a calibration of schema {SCHEMA_VERSION}")
        costs = values.get("costs")
        if not isinstance(costs, dict) or not all(_is_a_cost(value) for value in costs.values()):
            raise ConfigError(f"{path}: costs must be numbers of at least 0")
        try:
            fits = {name: Fit(**fit) if fit else None for name, fit in values["fits"].items()}
            return cls(costs, fits, tuple(values["runs"]), values["probe_seconds"], values["evaluation_s"])
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not as tppo calibrate writes it ({error}); calibrate again") from None


def calibrate(runs: Sequence[Run]) -> Calibration:
    """One cost model for all `runs`, from their training steps (1 and later). Raises DataError, naming the run,
    when one has no engine records."""
    for run in runs:
        _ = run.outline  # a broken trace is reported as such
        if run.engine[run.engine.step >= 1].empty:
            raise DataError(f"{run.path}: has no engine records of training steps; it cannot be calibrated on")
    observed = observations(runs)
    with numbers_that_fit(", ".join(str(run.path) for run in runs)):
        fits = {name: fit_prefill(own) if name == "prefill" else fit(own) for name, own in observed.items()}
    costs = {key: value for f in fits.values() if f for key, value in f.coefficients.items()}
    probes = pd.concat([run.probes for run in runs]).seconds
    evaluations = pd.concat([run.phases[run.phases.name == "evaluation"] for run in runs])
    return Calibration(
        costs,
        fits,
        tuple(run.name for run in runs),
        float(probes.median()) if len(probes) else None,
        float((evaluations.t_end - evaluations.t_start).mean()) if len(evaluations) else None,
    )


def observations(runs: Sequence[Run]) -> dict[str, Observations]:
    """By name of the fit: what the runs' training steps did, and how long it took."""
    parts: dict[str, list[Observations]] = {
        "decode": [decode_observations(run) for run in runs],
        "prefill": [prefill_observations(run) for run in runs],
    }
    for phase in PHASE_COSTS:
        parts[phase] = [phase_observations(run, phase) for run in runs]
    parts["reward"] = [reward_observations(run) for run in runs]
    for name in ("weight_sync", "switch", "rollout_other", "step_other"):
        parts[name] = [constant_observations(run, name) for run in runs]
    return {name: _together(own) for name, own in parts.items()}


def resampled_costs(run: Run, calibration: Calibration, count: int) -> list[dict[str, float]]:
    """Costs of the fits of `calibration` to `count` (at most RESAMPLES) resamples of the run's steps: what its costs
    might as well have been. The coefficients of a fit are drawn together."""
    drawn: list[dict[str, float]] = [{} for _ in range(count)]
    for name, observed in observations([run]).items():
        found = calibration.fits[name]
        if found is None:
            continue
        names = tuple(found.coefficients)
        own = replace(observed, names=names, work=observed.work[:, : len(names)])
        for costs, values in zip(drawn, _bootstrap(own, count), strict=True):
            costs |= dict(zip(names, values.tolist(), strict=True))
    return drawn


class TooLarge(ArithmeticError):
    """Observations whose squares no float can hold."""


@contextmanager
def numbers_that_fit(where: str) -> Iterator[None]:
    """where: the files that are fitted. Raises DataError."""
    try:
        yield
    except TooLarge as error:
        raise DataError(f"{where}: holds numbers too large for a fit of {error}; it is damaged") from None


def fit(observed: Observations) -> Fit | None:
    """Weighted non-negative least squares, scaled to the measured total; None without observations or work."""
    if len(observed.seconds) == 0:
        return None
    first = _solve(observed)
    fitted = observed.work @ first
    total = float(observed.seconds.sum())
    scale = total / float(fitted.sum()) if fitted.sum() > 0 else 1.0
    coefficients = first * scale
    residual = observed.seconds - observed.work @ coefficients
    spread = float(((observed.seconds - observed.seconds.mean()) ** 2).sum())
    low, high = np.percentile(_bootstrap(observed), INTERVAL_PERCENT, axis=0)
    return Fit(
        coefficients=dict(zip(observed.names, coefficients.tolist(), strict=True)),
        interval={name: (float(a), float(b)) for name, a, b in zip(observed.names, low, high, strict=True)},
        r2=1 - float((residual**2).sum()) / spread if spread > 0 else None,
        observations=len(observed.seconds),
        total_measured_s=total,
        total_fitted_s=float((observed.work @ coefficients).sum()),
        scale=scale,
    )


def fit_prefill(observed: Observations) -> Fit | None:
    """As `fit`, without the attended pairs where the data cannot tell them from the tokens.

    Prompts of similar length make the two columns nearly collinear; whichever then gets the time extrapolates wildly
    to longer contexts. When the 95 % interval of either reaches 0, the pairs are left out (their cost is 0).
    """
    whole = fit(observed)
    if whole is None or all(whole.interval[name][0] > 0 for name in observed.names[1:]):
        return whole
    return fit(replace(observed, names=observed.names[:2], work=observed.work[:, :2]))


def _solve(observed: Observations) -> np.ndarray:
    """NNLS on columns of unit norm, so that pairs (millions) and bases (ones) weigh alike. Raises TooLarge."""
    weighted = observed.work * observed.weight[:, None]
    target = observed.seconds * observed.weight
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(weighted, axis=0)
        if not np.isfinite([*norms, np.linalg.norm(target)]).all():
            raise TooLarge(", ".join(observed.names))
    norms[norms == 0] = 1.0
    solution, _ = nnls(weighted / norms, target)
    return solution / norms


def _bootstrap(observed: Observations, count: int = RESAMPLES) -> np.ndarray:
    """Coefficients of `count` fits to steps drawn with replacement (seeded)."""
    rng = np.random.default_rng(0)
    steps, place = np.unique(observed.step, return_inverse=True)
    results = []
    for _ in range(count):
        drawn = np.bincount(rng.integers(0, len(steps), len(steps)), minlength=len(steps))
        times = drawn[place]
        keep = times > 0
        resampled = Observations(
            observed.names,
            observed.work[keep],
            observed.seconds[keep],
            observed.weight[keep] * np.sqrt(times[keep]),
            observed.step[keep],
        )
        solution = _solve(resampled)
        fitted = float((times[keep] * (resampled.work @ solution)).sum())
        measured = float((times[keep] * resampled.seconds).sum())
        results.append(solution * (measured / fitted if fitted > 0 else 1.0))
    return np.array(results)


def decode_observations(run: Run) -> Observations:
    spans = run.engine[(run.engine.kind == "decode") & (run.engine.step >= 1)]
    work = np.column_stack([spans.steps, spans.steps * spans.batch, spans.attended_pairs]).astype(float)
    names = ("decode_base_s", "decode_per_row_s", "decode_per_context_token_s")
    return _observations(names, work, spans.t_end - spans.t_start, spans.step, 1 / np.sqrt(spans.steps.to_numpy()))


def prefill_observations(run: Run) -> Observations:
    spans = run.engine[(run.engine.kind == "prefill") & (run.engine.step >= 1)]
    work = np.column_stack([np.ones(len(spans)), spans.context_tokens, spans.attended_pairs]).astype(float)
    names = ("prefill_base_s", "prefill_per_token_s", "prefill_per_token_context_s")
    return _observations(names, work, spans.t_end - spans.t_start, spans.step)


def phase_observations(run: Run, phase: str) -> Observations:
    """A phase's seconds against the tokens it processed: of the step's rows, or of the finished ones, for update_value
    and where whole responses train.

    A recipe that trains batches again (geppo) spends that on the tokens of the step's own rows.
    """
    prefix = PHASE_COSTS[phase]
    rows = run.rollouts[~run.rollouts.discarded]
    rows = rows[rows.finished] if phase == "update_value" or whole_responses_train(run) else rows
    tokens = (rows.context_before + rows.tokens).groupby(rows.step).sum()
    seconds = _phase_seconds(run, phase)
    steps = seconds.index.intersection(tokens.index)
    work = np.column_stack([np.ones(len(steps)), tokens.loc[steps]]).astype(float)
    return _observations((f"{prefix}_base_s", f"{prefix}_per_token_s"), work, seconds.loc[steps], steps)


def whole_responses_train(run: Run) -> bool:
    """Rather than every step's tokens: no row has trained that was not finished."""
    rows = run.rollouts
    return not (rows.trained_tokens[~rows.finished] > 0).any()


def reward_observations(run: Run) -> Observations:
    seconds = _phase_seconds(run, "reward")
    rows = run.rollouts[run.rollouts.finished].groupby("step").size()
    steps = seconds.index.intersection(rows.index)
    work = np.column_stack([np.ones(len(steps)), rows.loc[steps]]).astype(float)
    return _observations(("reward_base_s", "reward_per_row_s"), work, seconds.loc[steps], steps)


def constant_observations(run: Run, name: str) -> Observations:
    """What a step spends whatever its rows: a phase, or time outside spans (rollout_other) or phases (step_other)."""
    if name in ("weight_sync", "switch"):
        seconds = _phase_seconds(run, name)
    else:
        pieces = _pieces(run)
        own = pieces[pieces.step >= 1]
        lengths = (own.t_end - own.t_start).groupby([own.name, own.step]).sum()
        if name == "step_other":
            seconds = lengths.get("", pd.Series(dtype=float))
        else:
            spans = run.engine[run.engine.step >= 1]
            in_spans = (spans.t_end - spans.t_start).groupby([spans.step, spans.engine]).sum()
            busiest = in_spans.groupby("step").max()  # the others wait for it, which the replay adds by itself
            seconds = (lengths.get("rollout", pd.Series(dtype=float)) - busiest).dropna().clip(lower=0)
    return _observations((f"{name}_s",), np.ones((len(seconds), 1)), seconds, seconds.index)


def _phase_seconds(run: Run, phase: str) -> pd.Series:
    pieces = _pieces(run)
    chosen = pieces[(pieces.name == phase) & (pieces.step >= 1)]
    return (chosen.t_end - chosen.t_start).groupby(chosen.step).sum()


def _pieces(run: Run) -> pd.DataFrame:
    end = run.trailer["t"] if run.trailer else run.phases.t_end.max()
    return innermost_phases(run.phases, float(end))


def _observations(
    names: tuple[str, ...], work: np.ndarray, seconds: Any, step: Any, weight: np.ndarray | None = None
) -> Observations:
    values = np.asarray(seconds, float)
    return Observations(names, work, values, np.ones(len(values)) if weight is None else weight, np.asarray(step))


def _together(parts: Sequence[Observations]) -> Observations:
    """The runs' observations; steps of different runs are different steps."""
    steps = [part.step.astype(np.int64) + place * 10**9 for place, part in enumerate(parts)]
    return Observations(
        parts[0].names,
        np.concatenate([part.work for part in parts]),
        np.concatenate([part.seconds for part in parts]),
        np.concatenate([part.weight for part in parts]),
        np.concatenate(steps),
    )


def _is_a_cost(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and np.isfinite(value)
