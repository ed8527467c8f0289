"""`tppo compare`: what changed between two runs (or arms of several seeds), what that did, and whether it exceeds the
noise. Everything is said of b beside a."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from analysis.ledgers import causes_per_step
from analysis.noise import Comparison, Steps, compare_seeds, compare_steps
from analysis.tables import accuracy_curve, provenance, seed_of, time_to_score
from profiling.errors import DataError, InputError
from profiling.ledger import innermost_phases
from profiling.reader import Run
from profiling.settings import flattened
from profiling.summary import NOT_TRAINING

WARM_UP_STEPS = 1
"""Of a measured run: kernels are compiled, caches are cold."""
QUANTITIES = {
    "step": "seconds per step",
    "finished_row": "seconds per finished response",
    "trained_token": "seconds per trained token",
}
ENERGY = ("joules_per_step", "joules_per_finished_row", "joules_per_trained_token")
NOT_SETTINGS = ("output",)
NORMAL = 1.96


def compare(a: Sequence[Run], b: Sequence[Run], *, target: float = 0.85, block: int | None = None) -> dict[str, Any]:
    """Plain data, as `--json` prints it. Raises InputError for a wrong block, DataError for runs without steps."""
    if block is not None and block < 1:
        raise InputError(f"--block {block}: must be at least 1; leave it out, and the autocorrelation chooses it")
    if not a or not b:
        raise InputError("tppo compare: each side needs at least one run")
    notes: list[str] = []
    steps = [{run.path: steps_of(run, notes) for run in side} for side in (a, b)]
    return {
        "a": _side(a, steps[0]),
        "b": _side(b, steps[1]),
        "changed": changed(a, b),
        "units": "steps" if len(a) == len(b) == 1 else "seeds",
        "quantities": _quantities(a, b, steps, block, notes),
        "ledger": _ledgers(a, b, notes),
        "score": _score(a, b, target, notes),
        "energy": _energy(a, b, notes),
        "notes": list(dict.fromkeys(notes)),
    }


def _side(runs: Sequence[Run], steps: Mapping[Any, pd.DataFrame]) -> dict[str, Any]:
    return {
        "runs": [run.name for run in runs],
        "kind": provenance(runs),
        "steps_compared": [len(table) for table in steps.values()],
        "steps_left_out": [left_out(run) for run in runs],
    }


def left_out(run: Run) -> int:
    """First steps that do not count: start-up of the schedule, and of a measured run the warm-up."""
    startup = (run.summary or run.header).get("startup_steps") or 0
    return max(int(startup), 0 if run.simulated else WARM_UP_STEPS)


def steps_of(run: Run, notes: list[str]) -> pd.DataFrame:
    """By step: seconds of its training phases and of what lies between them, finished rows and trained tokens (null
    for a run without rollout records). Only whole steps after `left_out`; of a run of so few steps, all of them.
    Raises DataError."""
    phases = run.phases
    inside = phases[(phases.step >= 1) & ~phases.name.isin(NOT_TRAINING)]
    if inside.empty:
        raise DataError(f"{run.path}: has no phase of a training step; there is nothing to compare")
    whole = run.trailer is not None and len(run.rollouts) > 0  # a profiled program may go on after its last step
    pieces = innermost_phases(phases, float(run.trailer["t"] if run.trailer and whole else inside.t_end.max()))
    chosen = pieces[(pieces.step >= 1) & ~pieces.name.isin(NOT_TRAINING)]
    table = (chosen.t_end - chosen.t_start).groupby(chosen.step).sum().to_frame("seconds")
    if run.trailer is None:
        table = table.iloc[:-1] if len(table) > 1 else table
        notes.append(f"{run.name} has not ended; its steps so far are compared, without the last one")
    rows = run.rollouts
    if rows.empty:
        notes.append(f"{run.name} has no rollout records: nothing per response or token is known of it")
        table["finished_row"] = table["trained_token"] = np.nan
    else:
        by_step = rows[rows.step >= 1].groupby("step")
        table["finished_row"] = by_step.finished.sum().reindex(table.index).fillna(0.0)
        table["trained_token"] = by_step.trained_tokens.sum().reindex(table.index).fillna(0.0)
    late = table[table.index > left_out(run)]
    if late.empty:
        notes.append(
            f"{run.name} has {_count(len(table), 'step')}, all of them start-up or warm-up; they are compared"
        )
    return (table if late.empty else late).assign(step=1.0)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def changed(a: Sequence[Run], b: Sequence[Run]) -> list[dict[str, Any]]:
    """Fields that differ: of the configuration, the schedule, versions, host and GPUs. A side with several values has
    them all, as a list; null: the field is not there."""
    sides = [[_facts(run) for run in side] for side in (a, b)]
    found = []
    for field in sorted({key for side in sides for facts in side for key in facts}):
        values = [_distinct([facts.get(field) for facts in side]) for side in sides]
        if values[0] != values[1]:
            found.append({"field": field, "a": _one(values[0]), "b": _one(values[1])})
    return found


def _facts(run: Run) -> dict[str, Any]:
    header = run.header
    config = {key: value for key, value in run.config.items() if key not in NOT_SETTINGS}
    schedule = {} if run.simulated else header["schedule"] or {}  # a simulated run's is in its configuration
    return {
        **flattened(config),
        **flattened(header.get("versions") or {}, "versions"),
        **flattened(schedule, "schedule"),
        "host": header["host"],
        "data": run.kind,
        "devices": ", ".join(str(device.get("name", "?")) for device in header["devices"]) or None,
        **{name: header[name] for name in ("gpus", "engines", "gpus_per_engine", "trainer_gpus")},
    }


def _distinct(values: Sequence[Any]) -> list[Any]:
    kept: list[Any] = []
    for value in values:
        if value not in kept:
            kept.append(value)
    return sorted(kept, key=str)


def _one(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _quantities(
    a: Sequence[Run], b: Sequence[Run], steps: Sequence[Mapping[Any, pd.DataFrame]], block: int | None,
    notes: list[str],
) -> list[dict[str, Any]]:  # fmt: skip
    found = []
    for column, name in QUANTITIES.items():
        made = _compared(a, b, [{p: _steps(t, column) for p, t in side.items()} for side in steps], block)
        if made is None:
            notes.append(f"{name} cannot be compared: a run does not say, or none finished")
        else:
            found.append(_entry(name, made))
    return found


def _entry(name: str, made: Comparison) -> dict[str, Any]:
    return {"name": name, **asdict(made), "exceeds_noise": made.exceeds_noise, "words": made.words()}


def _steps(table: pd.DataFrame, column: str) -> Steps | None:
    amount = table[column].to_numpy(float)
    return None if np.isnan(amount).any() else Steps(table.seconds.to_numpy(float), amount)


def _compared(
    a: Sequence[Run], b: Sequence[Run], steps: Sequence[Mapping[Any, Steps | None]], block: int | None
) -> Comparison | None:
    if len(a) == len(b) == 1:
        one, other = steps[0][a[0].path], steps[1][b[0].path]
        return None if one is None or other is None else compare_steps(one, other, block=block)
    rates = []
    for side, own in zip((a, b), steps, strict=True):
        values = {run: None if (s := own[run.path]) is None else s.rate for run in side}
        if any(value is None for value in values.values()):
            return None
        rates.append(by_seed({run: float(value) for run, value in values.items() if value is not None}))
    return compare_seeds(*rates)


def by_seed(values: Mapping[Run, float]) -> dict[object, float]:
    """By the seed in the run's name, or by path where that does not tell an arm's runs apart; paths never pair up."""
    seeds = [seed_of(run) for run in values]
    unique = None not in seeds and len(set(seeds)) == len(seeds)
    return dict(zip(seeds if unique else [str(run.path) for run in values], values.values(), strict=True))


def _ledgers(a: Sequence[Run], b: Sequence[Run], notes: list[str]) -> list[dict[str, Any]]:
    """By cause: GPU-seconds per step and share of each side, means over its runs; null: not known."""
    columns = []
    for side in (a, b):
        try:
            own = [causes_per_step(run, left_out(run)) for run in side]
        except DataError as error:
            notes.append(f"no ledger: {error}")
            return []
        seconds = pd.DataFrame(own).astype(float).mean(skipna=False)
        whole = float(seconds.sum() + np.mean([found.attrs.get("unresolved_s", 0.0) for found in own]))
        columns.append((seconds, whole))
    rows = []
    for cause in columns[0][0].index:
        values: dict[str, Any] = {}
        for name, (seconds, whole) in zip("ab", columns, strict=True):
            known = not pd.isna(seconds[cause])
            values[f"{name}_seconds_per_step"] = float(seconds[cause]) if known else None
            values[f"{name}_share"] = float(seconds[cause]) / whole if known and whole > 0 else None
        if any(value is None or value > 0 for value in values.values()):
            rows.append({"cause": str(cause), **values})
    return rows


def _energy(a: Sequence[Run], b: Sequence[Run], notes: list[str]) -> list[dict[str, Any]]:
    found = []
    for name in ENERGY:
        values = [_mean([(run.summary or {}).get(name) for run in side]) for side in (a, b)]
        if values[0] and values[1]:
            ratio = values[1] / values[0]
            found.append({"name": name.replace("_", " "), "a": values[0], "b": values[1], "ratio": ratio})
    if not found:
        notes.append("energy was not measured in both")
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _score(a: Sequence[Run], b: Sequence[Run], target: float, notes: list[str]) -> dict[str, Any] | None:
    """The last evaluation that both sides reached, by the clock and by the steps; and the time to the target."""
    try:
        curves = [[accuracy_curve(run) for run in side] for side in (a, b)]
    except DataError as error:
        notes.append(f"scores cannot be compared: {error}")
        return None
    common: dict[str, Any] = {}
    for column, name in (("clock_s", "equal_time"), ("step", "equal_steps")):
        limit = min(float(curve[column].max()) for side in curves for curve in side)
        last = [[_last_until(curve, column, limit) for curve in side] for side in curves]
        if any(row is None for side in last for row in side):
            common[name] = None
            continue
        common[name] = {"until": limit, **_difference([a, b], [[row for row in side if row is not None]
                                                               for side in last])}  # fmt: skip
    times = [[time_to_score(run, target) for run in side] for side in (a, b)]
    common["target"] = target
    common["time_to_target_s"] = {name: _mean(own) for name, own in zip("ab", times, strict=True)}
    return common


def _last_until(curve: pd.DataFrame, column: str, limit: float) -> pd.Series | None:
    reached = curve[curve[column] <= limit]
    return reached.iloc[-1] if len(reached) else None


def _difference(sides: Sequence[Sequence[Run]], last: Sequence[Sequence[pd.Series]]) -> dict[str, Any]:
    """Accuracies and their difference, b - a, with a 95 % interval: over seeds, or over the problems of the evaluation
    where the run keeps them; null where neither is there."""
    scores = [np.array([float(row.accuracy) for row in side]) for side in last]
    difference = float(scores[1].mean() - scores[0].mean())
    margin = None
    if min(map(len, scores)) >= 2:
        errors = [float(np.std(s, ddof=1) / math.sqrt(len(s))) for s in scores]
        freedom = min(map(len, scores)) - 1
        margin = float(student.ppf(0.975, freedom)) * math.hypot(*errors)
    elif len(sides[0]) == len(sides[1]) == 1:
        found = [_by_problem(side[0], int(rows[0].step)) for side, rows in zip(sides, last, strict=True)]
        asked = [[side[0].config.get(name) for name in ("data", "evaluation")] for side in sides]
        margin = _margin_over_problems(*found, paired=asked[0] == asked[1])
    interval = (None, None) if margin is None else (difference - margin, difference + margin)
    return {"a": float(scores[0].mean()), "b": float(scores[1].mean()), "difference": difference,
            "low": interval[0], "high": interval[1],
            "exceeds_noise": None if margin is None else abs(difference) > margin}  # fmt: skip


def _by_problem(run: Run, step: int) -> pd.Series:
    own = run.evaluations[run.evaluations.step == step]
    return own.correct.astype(float).groupby(own.problem).mean()


def _margin_over_problems(a: pd.Series, b: pd.Series, *, paired: bool) -> float | None:
    """Of the difference of means over problems, at 95 %."""
    if min(len(a), len(b)) < 2:
        return None
    if paired and set(a.index) == set(b.index):
        return NORMAL * _error(b - a)
    return NORMAL * math.hypot(_error(a), _error(b))


def _error(values: pd.Series) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))
