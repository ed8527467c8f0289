"""Where a run's decode, prefill and training phases lie under a roofline; profiling.model_flops says what counts."""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.tables import arm_of
from profiling.attribution import device_estimates
from profiling.errors import DataError
from profiling.model_flops import (
    VALUE_PHASES,
    decode_bytes,
    decode_flops,
    prefill_bytes,
    prefill_flops,
    training_bytes,
    training_flops,
)
from profiling.reader import Run

ACTIVITIES = ("tensor_activity", "dram_activity")
COLUMNS = [
    "run", "arm", "work", "flops", "bytes", "seconds", "intensity", "flops_per_s", "time_share", "tensor_activity",
    "dram_activity",
]  # fmt: skip


def model_of(run: Run) -> dict[str, Any]:
    """model.json of a measured run. Raises DataError when there is none."""
    path = run.path / "model.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; FLOPs need the model's dimensions") from None


def roofline_points(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run and kind of work (steps 1 and later): decode, prefill, and the training phases whose passes the
    run has counted. FLOPs, bytes, seconds, arithmetic intensity (FLOP per byte), achieved FLOP/s, and the share of
    the seconds of all of the run's points. tensor_activity, dram_activity: what the GPUs' own counters say of a phase,
    decode and prefill together; null without them."""
    rows = []
    for run in runs:
        model = model_of(run)
        spans = run.engine[run.engine.step >= 1]
        if spans.empty:
            raise DataError(f"{run.path}: has no engine records")
        phases = run.phases[run.phases.step >= 1]
        seconds = pd.concat([_seconds(spans, spans.kind), _seconds(phases, phases.name)])
        decode, prefill = spans[spans.kind == "decode"], spans[spans.kind == "prefill"]
        tokens, pairs = int((decode.steps * decode.batch).sum()), int(decode.attended_pairs.sum())
        work = {
            "decode": (
                decode_flops(model, tokens, pairs),
                decode_bytes(model, int(decode.steps.sum()), tokens, pairs),
            ),
            "prefill": (
                prefill_flops(model, int(prefill.context_tokens.sum()), int(prefill.attended_pairs.sum())),
                prefill_bytes(model, len(prefill), int(prefill.context_tokens.sum())),
            ),
        }
        for phase, done in counted_work(run).iterrows():
            policy = phase not in VALUE_PHASES
            work[str(phase)] = (
                training_flops(model, done, policy=policy), training_bytes(model, done, policy=policy)
            )  # fmt: skip
        work = {kind: own for kind, own in work.items() if kind in seconds.index}
        total_s = sum(seconds[kind] for kind in work)
        active = _activities(run)
        for kind, (flops, size) in work.items():
            phase = "rollout" if kind in ("decode", "prefill") else kind
            rows.append(
                (run.name, arm_of(run), kind, flops, size, seconds[kind], flops / size, flops / seconds[kind],
                 seconds[kind] / total_s, *(active.get((phase, name)) for name in ACTIVITIES))
            )  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def _seconds(spans: pd.DataFrame, by: pd.Series) -> pd.Series:
    return (spans.t_end - spans.t_start).groupby(by).sum()


def counted_work(run: Run) -> pd.DataFrame:
    """By training phase (steps 1 and later): sums of passes, tokens, pairs, updates. Empty where none is recorded."""
    records = [record for record in run.outline if record["type"] == "work" and record["step"] >= 1]
    if not records:
        return pd.DataFrame()
    return pd.DataFrame(records).drop(columns=["type", "step"]).groupby("name", sort=False).sum()


def _activities(run: Run) -> dict[tuple[str, str], float]:
    """By (phase, counter): the mean over GPUs where it is resolved."""
    if run.simulated or run.windows.empty:
        return {}
    own = device_estimates(run)
    own = own[own.quantity.isin(ACTIVITIES) & own.value.notna()]
    means = own.groupby(["phase", "quantity"]).value.mean()
    return {key: float(value) for key, value in means.items()}
