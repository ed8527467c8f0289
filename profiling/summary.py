"""The totals of a run, measured or simulated, under the names that users' scripts rely on."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from profiling.energy import energy_totals
from profiling.ledger import Cluster, build_ledger, innermost_phases, ledger_totals, without_rounding
from profiling.reader import Run
from profiling.schema import PHASES
from profiling.writer import RunWriter

NOT_TRAINING = ("down", "evaluation", "checkpoint")
"""Phases left out of rates per step, row and token, and of where a step begins and ends."""

NEEDS_RECORDS = (
    "preempt_recompute",
    "re_prefill",
    "prefill",
    "decode_useful",
    "decode_underfilled",
    "kv_stall",
    "decode_discarded",
    "wait_tail",
)
"""Causes that only engine records can tell; null for a program that writes none."""
WAITS = ("wait_rollout", "wait_train")
"""Of GPUs of a cluster's two sides: null for a program of whose cluster nothing is known."""
COMMAND = "command"
"""The phase around a profiled program: not one of its own."""


def summarise(
    *,
    cluster: Cluster,
    phases: pd.DataFrame,
    engine: pd.DataFrame,
    rollouts: pd.DataFrame,
    ledger: pd.DataFrame,
    wall_s: float,
    startup_steps: int,
    drawn_mean_tokens: float | None = None,
    trains_whole_responses: bool = False,
    trained_at: Mapping[int, int] | None = None,
    devices: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """Totals and rates. Seconds, tokens, rows; null for what this run cannot tell.

    Step 0 (value pre-training) counts in wall_seconds, gpu_seconds and the ledger, not in rows, tokens and rates.
    rollout_seconds: not hidden behind training; generation_busy_seconds: of the engines, hidden or not, each's mean.
    Rates leave out the first `startup_steps` steps (fewer when the run is shorter: `startup_steps` in the result is
    the number left out), evaluation, checkpoints and failures. What lies between two steps belongs to the one before.
    Steps of a program without records are those that it marks, under whatever names.
    drawn_mean_tokens: mean length of the rows drawn, where it is known; else it is known if all rows finished.
    trains_whole_responses: only rows that finished in a step are processed in it, else all of its rows.
    devices: samples of the GPUs, for energy; null without their counters.
    trained_at: row -> the step that it trained, where finished rows wait for theirs; else they train when they finish.
    """
    rows = rollouts[rollouts.step >= 1]
    own_step = rows.step if trained_at is None else rows.row.map(trained_at).fillna(rows.step).astype(int)
    rows = rows.assign(trained_at=own_step)
    tokens = rows.tokens.to_numpy()
    done = rows.finished if trained_at is None else rows.finished & rows.row.isin(list(trained_at))
    processed = rows[done] if trains_whole_responses else rows
    trained = rows.trained_tokens.to_numpy()
    finished = rows[rows.finished]
    rows_in = int(rows.row.nunique())
    pieces = innermost_phases(phases, wall_s)
    rollout_s = float(_seconds(pieces[(pieces.name == "rollout") & (pieces.step >= 1)]))
    spans = engine[engine.step >= 1]
    span_s = (spans.t_end - spans.t_start).to_numpy()
    busy_s = float(span_s.sum()) / cluster.engines
    # A rollout that runs beside training lasts longer than its exposed part.
    ends = spans.groupby("step").agg(first=("t_start", "min"), last=("t_end", "max"))
    engine_s = cluster.engines * max(rollout_s, float((ends["last"] - ends["first"]).sum()))
    recorded = len(spans) > 0
    own = pieces
    if not recorded:
        names = set(phases.name) - {COMMAND, *PHASES}
        own = innermost_phases(phases, wall_s, other_names=sorted(names))
    training = own[(own.step >= 1) & (own.name != "") & ~own.name.isin(NOT_TRAINING)]
    marked = training.step.nunique()
    steps = int(rows.step.nunique() if recorded else marked)
    totals = ledger_totals(ledger)
    ages, age_weights = staleness(rows)
    skipped = min(startup_steps, max(steps - 1, 0))
    late = rows.step > skipped
    timed = (own.step > skipped) & (own.step >= 1) & ~own.name.isin(NOT_TRAINING)
    if not recorded:  # a program may go on for long after its last step
        timed &= own.t_end <= (training.t_end.max() if marked else 0.0)
    step_s = float(_seconds(own[timed]))
    counts = {
        "step": steps - skipped,
        "finished_row": int(rows.finished[late].sum()),
        "trained_token": int(trained[late.to_numpy()].sum()),
    }
    return {
        "wall_seconds": wall_s,
        "pretrain_seconds": float(
            _seconds(pieces[(pieces.step == 0) & (pieces.name != "") & ~pieces.name.isin(NOT_TRAINING)])
        ),
        "rollout_seconds": rollout_s if recorded else None,
        "generation_busy_seconds": busy_s if recorded else None,
        "tail_seconds": _tail_seconds(rows) if recorded else None,
        "steps": steps if recorded or marked else None,
        "generated_tokens": int(tokens.sum()) if recorded else None,
        "processed_tokens": int((processed.context_before + processed.tokens).sum()) if recorded else None,
        "trained_tokens": int(trained.sum()) if recorded else None,
        "rows_in": rows_in if recorded else None,
        "rows_finished": len(finished) if recorded else None,
        "rows_carried": rows_in - len(finished) if recorded else None,
        "preemptions": int(rows.preempted.sum()) if recorded else None,
        "engine_idle_fraction": without_rounding(1 - span_s.sum() / engine_s, 1) if engine_s and recorded else None,
        "mean_running_rows": float((spans.batch * span_s).sum()) / engine_s if engine_s and recorded else None,
        "staleness_mean": float(np.average(ages, weights=age_weights)) if age_weights.sum() else None,
        "staleness_max": int(ages[age_weights > 0].max()) if age_weights.sum() else None,
        "length_bias": _length_bias(finished, rows_in, drawn_mean_tokens),
        "startup_steps": skipped,
        **{f"seconds_per_{name}": _ratio(step_s, count) for name, count in counts.items()},
        **energy_totals(devices, own, timed, counts),
        "ledger": {
            cause: None if cause in (*NEEDS_RECORDS, *WAITS) and not recorded and not seconds else seconds
            for cause, seconds in totals.items()
        },
        "gpu_seconds": cluster.gpus * wall_s,
    }


def write_totals(writer: RunWriter, wall_s: float, *, trains_whole_responses: bool = False) -> None:
    """Ledger and summary of a measured run, computed from what its directory holds.

    Energy is null where some host that took part has no counter and others have."""
    run = Run(writer.path)
    cluster, phases, engine, rollouts = run.cluster, run.phases, run.engine, run.rollouts
    ledger = build_ledger(cluster=cluster, phases=phases, engine=engine, rollouts=rollouts, wall_s=wall_s)
    summary = summarise(
        cluster=cluster, phases=phases, engine=engine, rollouts=rollouts, ledger=ledger, wall_s=wall_s,
        startup_steps=run.header.get("startup_steps", 0), trains_whole_responses=trains_whole_responses,
        devices=None if run.uncounted_hosts else run.devices,
    )  # fmt: skip
    writer.ledger(dict(ledger))
    writer.summary(summary)


def _seconds(pieces: pd.DataFrame) -> float:
    return float((pieces.t_end - pieces.t_start).sum())


def _tail_seconds(rows: pd.DataFrame) -> float:
    """Sum over steps of the last end minus the ceil(0.9 n)-th end of its n records."""
    total = 0.0
    for _, ends in rows.groupby("step").t_end:
        ordered = np.sort(ends.to_numpy())
        total += float(ordered[-1] - ordered[math.ceil(0.9 * len(ordered)) - 1])
    return total


def staleness(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """(versions behind, trained tokens): how many updates lie between sampling tokens and training on them.

    Step s trains the policy of version s - 1. A record that trains more tokens than it generated trains the whole
    response, whose earlier tokens are as old as the visits that generated them.
    """
    whole = rows.trained_tokens > rows.tokens
    own = rows[~whole]
    visits = rows[["row", "step", "tokens", "policy_version"]].merge(rows.loc[whole, ["row", "trained_at"]], on="row")
    visits = visits[visits.step <= visits.trained_at]
    ages = np.concatenate([own.trained_at - 1 - own.policy_version, visits.trained_at - 1 - visits.policy_version])
    return ages, np.concatenate([own.trained_tokens, visits.tokens])


def _length_bias(finished: pd.DataFrame, rows_in: int, drawn_mean_tokens: float | None) -> float | None:
    """Mean length trained (rows that finished) / mean length drawn."""
    if finished.empty:
        return None
    lengths = finished.context_before + finished.tokens - finished.prompt_tokens
    if drawn_mean_tokens is not None:
        return float(lengths.mean()) / drawn_mean_tokens
    return 1.0 if len(finished) == rows_in else None


def _ratio(seconds: float, count: int) -> float | None:
    return seconds / count if count > 0 else None
