"""Numbers first: tables of one or more runs. Figures and the report draw these and nothing else."""

import math
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.gather import numbers
from profiling.alarms import alarms
from profiling.attribution import device_estimates, interval_text
from profiling.errors import DataError
from profiling.reader import Run

SET_APART = ("evaluation", "checkpoint")
"""Causes that no table of training steps counts; what failures cost (`down`) they do."""
PREFILL = ("prefill", "re_prefill", "preempt_recompute")
DECODE = ("decode_useful", "decode_underfilled", "kv_stall", "decode_discarded")
WAITING = ("wait_tail", "wait_rollout", "wait_train", "wait_other", "decode_underfilled")


def arm_of(run: Run) -> str:
    return arm_named(run.name)


def arm_named(name: str) -> str:
    """A run's name without its seed: `tppo-s3` belongs to the arm `tppo`."""
    return re.sub(r"-s\d+$", "", name)


def seed_of(run: Run) -> int | None:
    found = re.search(r"-s(\d+)$", run.name)
    return int(found.group(1)) if found else None


def by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Arms in order of first appearance."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(arm_of(run), []).append(run)
    return arms


def provenance(runs: Sequence[Run]) -> str:
    """measured, simulated, or both."""
    return " and ".join(sorted({"simulated" if run.simulated else "measured" for run in runs}))


def told_apart(run: Run, runs: Sequence[Run]) -> str:
    """` (measured)` or ` (simulated)` after a run's name where `runs` are of both kinds."""
    return f" ({provenance([run])})" if len({own.simulated for own in runs}) > 1 else ""


def processor(runs: Sequence[Run]) -> str:
    """What the ledger's time is of: `GPU`, or `host` where the runs have seen no GPU."""
    with_gpus = {run.simulated or bool(run.header["devices"]) for run in runs}
    return " or ".join(name for known, name in ((True, "GPU"), (False, "host")) if known in with_gpus)


def accuracy_curve(run: Run) -> pd.DataFrame:
    """step, clock_s (training seconds, evaluation left out), trained_tokens (so far; null where not recorded),
    accuracy: one row per evaluation, in order of steps. Raises DataError."""
    metrics = run.metrics
    accuracy = numbers(metrics["val/accuracy"]) if "val/accuracy" in metrics else pd.Series(dtype=float)
    if accuracy.notna().sum() == 0:
        raise DataError(f"{run.path}: has no evaluations (val/accuracy in metrics.jsonl)")
    for name in ("step", "clock_s"):
        if name not in metrics:
            raise DataError(f"{run.path}: metrics.jsonl has no {name}; an evaluation needs it")
    curve = pd.DataFrame(
        {
            "step": metrics.step,
            "clock_s": numbers(metrics.clock_s),
            "trained_tokens": _trained_so_far(metrics),
            "accuracy": accuracy,
        }
    )
    return curve[accuracy.notna()].sort_values("step", kind="stable").reset_index(drop=True)


def _trained_so_far(metrics: pd.DataFrame) -> pd.Series:
    """By row of metrics.jsonl: tokens trained on by the end of the step. Null from the first that does not say."""
    if "training/trained_tokens" not in metrics:
        return pd.Series(np.nan, index=metrics.index)
    tokens = numbers(metrics["training/trained_tokens"]).where(metrics.step >= 1, 0.0)
    ordered = tokens.loc[metrics.step.sort_values(kind="stable").index]
    return ordered.cumsum(skipna=False).reindex(metrics.index)


def at_score(run: Run, quantity: str, target: float = 0.85, consecutive: int = 3) -> float | None:
    """A column of accuracy_curve at the end of the first `consecutive` evaluations whose mean is at least `target`;
    None where the run does not get there, or does not say."""
    curve = accuracy_curve(run)
    reached = curve.accuracy.rolling(consecutive).mean() >= target
    value = curve[quantity][reached].iloc[0] if reached.any() else None
    return None if value is None or pd.isna(value) else float(value)


def time_to_score(run: Run, target: float = 0.85, consecutive: int = 3) -> float | None:
    """Training seconds to a score; see at_score."""
    return at_score(run, "clock_s", target, consecutive)


def steps_to_score(run: Run, target: float = 0.85, consecutive: int = 3) -> int | None:
    steps = at_score(run, "step", target, consecutive)
    return None if steps is None else int(steps)


def training_ledger(run: Run) -> pd.Series:
    """Seconds by cause of steps 1 and later, evaluation and checkpoints left out. Raises DataError."""
    if run.ledger is None:
        raise DataError(f"{run.path}: has no ledger yet; the run has not ended")
    return seconds_by_cause(run.ledger)


def seconds_by_cause(ledger: pd.DataFrame) -> pd.Series:
    """Of training steps: evaluation and checkpoints left out."""
    return ledger[(ledger.step >= 1) & ~ledger.cause.isin(SET_APART)].groupby("cause").seconds.sum()


def speed_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Per arm, medians over its finished runs: what a step, a finished response and a trained token cost, and where
    a step's time goes. Rates leave out start-up steps. rollout: wall seconds that training does not hide. GPU-s: of
    all GPUs."""
    rows = []
    for arm, members in by_arm(runs).items():
        values = [_speed(run) for run in members if run.summary is not None and run.ledger is not None]
        if values:
            rows.append({"arm": arm, "runs": len(values), **pd.DataFrame(values, dtype=float).median().to_dict()})
    return pd.DataFrame(rows)


def _speed(run: Run) -> dict[str, float | None]:
    """None: a run so short, or with so few finished responses, that its summary gives no rate."""
    assert run.summary is not None
    if run.summary.get("generated_tokens") is None:
        raise DataError(f"{run.path}: has no rollout records: it is not a training run")
    seconds = training_ledger(run)
    steps, rollout_s = run.summary["steps"], run.summary["rollout_seconds"]
    per_step = 1 / steps if steps else math.nan
    per_token = run.summary["seconds_per_trained_token"]

    def total(causes: Sequence[str]) -> float:
        return float(sum(seconds.get(cause, 0.0) for cause in causes))

    return {
        "s per step": run.summary["seconds_per_step"],
        "s per finished response": run.summary["seconds_per_finished_row"],
        "ms per trained token": None if per_token is None else 1e3 * per_token,
        "rollout, s": None if rollout_s is None else rollout_s * per_step,
        "decode, GPU-s": total(DECODE) * per_step,
        "prefill, GPU-s": total(PREFILL) * per_step,
        "waiting or unfilled": total(WAITING) / float(seconds.sum()) if seconds.sum() else None,
    }


def score_table(runs: Sequence[Run], target: float = 0.85) -> pd.DataFrame:
    """Per run: training seconds and steps to the target, the tokens and responses trained on by then."""
    rows = []
    for run in runs:
        seconds, steps = time_to_score(run, target), steps_to_score(run, target)
        metrics = run.metrics
        done = metrics[(metrics.step >= 1) & (metrics.step <= (steps or 0))]
        rows.append(
            {
                "run": run.name,
                "s to target": seconds,
                "steps": steps,
                "finished responses": int(done["training/finished_rows"].sum()) if steps else None,
                "trained tokens": int(done["training/trained_tokens"].sum()) if steps else None,
                "last accuracy": float(accuracy_curve(run).accuracy.iloc[-1]),
            }
        )
    return pd.DataFrame(rows)


def paired_speedup(
    runs: Sequence[Run], baseline: str, arm: str, target: float = 0.85, quantity: str = "clock_s"
) -> dict[str, float | int | None]:
    """Ratio of the times (or of another quantity of accuracy_curve) to target, baseline / arm, seed by seed: median,
    and a 95 % bootstrap interval of the median (10,000 resamples of the pairs, seeded; null with fewer than three
    pairs). Seeds in which a run did not reach the target are counted as `unreached`, not left out in silence."""
    times: dict[str, dict[int | None, float | None]] = {arm_of(run): {} for run in runs}
    for run in runs:
        times[arm_of(run)][seed_of(run)] = at_score(run, quantity, target)
    first, second = times.get(baseline, {}), times.get(arm, {})
    seeds = sorted(set(first) & set(second), key=str)
    pairs = [(first[s], second[s]) for s in seeds]
    ratios = np.array([a / b for a, b in pairs if a is not None and b])
    low = high = None
    if len(ratios) >= 3:
        draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
        low, high = (float(q) for q in np.percentile(np.median(draws, axis=1), [2.5, 97.5]))
    return {
        "pairs": len(ratios),
        "unreached": len(pairs) - len(ratios),
        "median": float(np.median(ratios)) if len(ratios) else None,
        "low": low,
        "high": high,
        "wins": int((ratios > 1).sum()),
    }


QUANTITIES = {
    "training_seconds": "training time, s",
    "rollout_seconds": "rollout, s",
    "decode_seconds": "decode, s",
    "prefill_seconds": "prefill, s",
    "seconds_per_step": "per step, s",
    "seconds_per_finished_row": "per finished response, s",
    "seconds_per_trained_token": "per trained token, s",
    "waiting_or_unfilled_share": "waiting or unfilled share",
    "seconds_to_target": "time to target, s (steps given)",
}
"""Predicted quantity -> its name in tables and figures, with its unit."""


def comparison_tables(predictions: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """(calibrated on, predicted arm) -> a row per quantity: measured, then forecast and replay with their errors.

    Medians over the target runs; error = (predicted - measured) / measured, as a fraction, also with all costs scaled
    by the drift probe. The range is that of the forecast's error over the runs.
    """
    frame = predictions.assign(
        arm=predictions.target.map(arm_named),
        drift_corrected=predictions.drift_corrected.astype(bool),
    )
    tables = {}
    for (source, arm), group in frame.groupby(["calibrated_on", "arm"], sort=False):
        rows = []
        for quantity, name in QUANTITIES.items():
            own = group[group.quantity == quantity]
            if own.empty:
                continue
            row: dict[str, object] = {"quantity": name, "measured": float(own.measured.median())}
            for kind in ("forecast", "replay"):
                plain = own[(own.kind == kind) & ~own.drift_corrected]
                corrected = own[(own.kind == kind) & own.drift_corrected]
                row[kind] = float(plain.predicted.median())
                row[f"{kind} error"] = float(plain.error.median())
                row[f"{kind} error, drift-corrected"] = float(corrected.error.median()) if len(corrected) else None
                if kind == "forecast":
                    row["forecast error, range"] = f"{plain.error.min():+.1%} to {plain.error.max():+.1%}"
            rows.append(row)
        tables[str(source), str(arm)] = pd.DataFrame(rows)
    return tables


def device_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Devices by phase, of the first measured run of each arm: busy share and energy, with 95 % intervals;
    `unresolved` where the sensors cannot tell. Raises DataError when no run was sampled."""
    rows = []
    for own in by_arm([run for run in runs if not run.simulated]).values():
        estimates = device_estimates(own[0])
        for (device, phase), group in estimates.groupby(["device", "phase"], sort=False):
            known = group.set_index("quantity")
            rows.append(
                {
                    "run": own[0].name, "device": device, "phase": phase, "seconds": float(group.seconds.iloc[0]),
                    "busy": interval_text(known, "busy", 100.0, " %"), "energy, J": interval_text(known, "joules"),
                }
            )  # fmt: skip
    if not rows:
        raise DataError("no device samples")
    return pd.DataFrame(rows)


def alarm_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Alarms of all runs that have ended; empty where there is none."""
    rows = [(run.name, text) for run in runs if run.ledger is not None for text in alarms(run.ledger, run)]
    return pd.DataFrame(rows, columns=["run", "alarm"])
