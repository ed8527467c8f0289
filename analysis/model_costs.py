"""Where a run's decode, prefill and training phases lie under a roofline; profiling.model_flops says what counts.

Everything is of one GPU: of t GPUs that share an engine's weights each computes a t-th and reads a t-th of the weights
and of the keys and values, or one head's of these where there are more GPUs than heads. What they send each other is
not memory traffic (`all_reduce_ceiling`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.chosen import some_steps
from analysis.hardware import Hardware
from analysis.tables import arm_of
from profiling.attribution import device_estimates
from profiling.errors import DataError, shown
from profiling.files import read_json_table
from profiling.model_flops import (
    VALUE_PHASES,
    decode_bytes,
    decode_flops,
    matmul_parameters,
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
MOST_STEPS = 200
"""Of a longer run, so many steps are read, evenly spaced."""
NEEDED = (
    "parameters", "embedding_parameters", "lm_head_parameters", "layers", "heads", "kv_heads", "head_dim",
    "hidden_size", "bytes_per_parameter", "kv_bytes_per_token",
)  # fmt: skip


def model_of(run: Run) -> dict[str, Any]:
    """model.json of a run. Raises DataError when there is none, a field is missing, or the model is not dense."""
    path = run.path / "model.json"
    model = read_json_table(path, "FLOPs need the model's dimensions")
    for field in NEEDED:
        value = model.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
            raise DataError(f"{path}: {field} = {shown(value)} is not a number of at least 0; FLOPs need it")
    if model.get("uncounted"):
        raise DataError(f"{path}: has {model['uncounted']}; FLOPs and bytes are counted of dense models only")
    return model


def roofline_points(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run and kind of work (steps 1 and later): decode, prefill, and the training phases whose passes the
    run has counted. FLOPs and bytes of one GPU, seconds, arithmetic intensity (FLOP per byte), achieved FLOP/s of
    one GPU, and the share of the seconds of all of the run's points. tensor_activity, dram_activity: what the GPUs'
    own counters say of a phase, decode and prefill together; null without them. Raises DataError."""
    rows = []
    for run in runs:
        model = model_of(run)
        steps = some_steps(run, MOST_STEPS)
        spans = run.steps_of("engine", steps)
        if spans.empty:
            raise DataError(f"{run.path}: has no engine records")
        phases = run.phases[run.phases.step.isin(steps)]
        seconds = _seconds(phases, phases.name)
        engines = spans_work(run.header["gpus_per_engine"], model, spans)
        sums = engines.groupby("kind")[["flops", "bytes", "seconds"]].sum()
        # In seconds of the rollout, in which the engines run side by side.
        side_by_side = run.header["engines"]
        work = {str(kind): (own.flops, own.bytes, own.seconds, side_by_side) for kind, own in sums.iterrows()}
        gpus = run.header["trainer_gpus"] or run.header["engines"] * run.header["gpus_per_engine"]
        for phase, done in counted_work(run, steps).iterrows():
            policy = phase not in VALUE_PHASES
            if phase in seconds.index:
                own = {str(name): int(number) for name, number in done.items()}  # int64 would overflow: 1e9 x 3e10
                flops, size = (count(model, own, policy=policy) / gpus for count in (training_flops, training_bytes))
                work[str(phase)] = (flops, size, seconds[phase], 1)
        work = {kind: own for kind, own in work.items() if own[0] > 0 and own[2] > 0}
        total_s = sum(own[2] / own[3] for own in work.values())
        active = _activities(run)
        for kind, (flops, size, spent_s, together) in work.items():
            phase = "rollout" if kind in ("decode", "prefill") else kind
            rows.append(
                (run.name, arm_of(run), kind, flops, size, spent_s, flops / size, flops / spent_s,
                 spent_s / together / total_s, *(active.get((phase, name)) for name in ACTIVITIES))
            )  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def spans_work(gpus: int, model: dict[str, Any], spans: pd.DataFrame) -> pd.DataFrame:
    """kind, tokens, batch, context (mean of a row), flops and bytes of one GPU of the engine, and seconds, of each of
    the engines' spans. gpus: of an engine."""
    own = {**model, "kv_bytes_per_token": model["kv_bytes_per_token"] * gpus / min(gpus, model["kv_heads"])}
    decode = (spans.kind == "decode").to_numpy()
    tokens = np.where(decode, spans.steps * spans.batch, spans.context_tokens)
    pairs, steps = spans.attended_pairs.to_numpy(), spans.steps.to_numpy()
    flops = np.where(decode, decode_flops(own, tokens, pairs), prefill_flops(own, tokens, pairs))
    size = np.where(decode, decode_bytes(own, steps, tokens, pairs), prefill_bytes(own, 1, tokens))
    return pd.DataFrame(
        {
            "kind": spans.kind.to_numpy(),
            "tokens": tokens,
            "batch": spans.batch.to_numpy(),
            "context": pairs / np.maximum(tokens, 1),
            "flops": flops / gpus,
            "bytes": size / gpus,
            "seconds": (spans.t_end - spans.t_start).to_numpy(),
        }
    )


def decode_trajectory(run: Run, over: str, bins: int = 8) -> pd.DataFrame:
    """Decode spans of a run, binned by `over` ("batch" or "context", bins evenly spaced in its logarithm), from few to
    many: from, to, intensity, flops_per_s, seconds. Empty without decodes."""
    model = model_of(run)
    spans = run.steps_of("engine", some_steps(run, MOST_STEPS))
    work = spans_work(run.header["gpus_per_engine"], model, spans)
    work = work[(work.kind == "decode") & (work.seconds > 0) & (work[over] > 0)]
    if work.empty:
        return pd.DataFrame(columns=["from", "to", "intensity", "flops_per_s", "seconds"])
    least, most = work[over].min(), work[over].max()
    edges = np.geomspace(least, most, bins + 1) if most > least else np.array([least, most])
    place = np.clip(np.searchsorted(edges, work[over], side="right") - 1, 0, len(edges) - 2)
    sums = work[["flops", "bytes", "seconds"]].groupby(place).sum()
    return pd.DataFrame(
        {
            "from": edges[sums.index],
            "to": edges[sums.index + 1],
            "intensity": sums.flops / sums.bytes,
            "flops_per_s": sums.flops / sums.seconds,
            "seconds": sums.seconds,
        }
    ).reset_index(drop=True)


def all_reduce_ceiling(model: dict[str, Any], hardware: Hardware, gpus: int) -> tuple[str, float] | None:
    """Way and FLOP/s of one of `gpus` GPUs that share an engine, if sending took all of the time: two all-reduces a
    layer of hidden_size 16-bit numbers a token, of which a ring moves 2 (t - 1) / t through each GPU's link

        FLOP/s = (2 P / t) / (2 layers x 2 (t - 1) / t x hidden x 2 bytes) x bytes/s of the link, one way

    for a token's products with P weights; attention would add FLOPs and no bytes. None for one GPU, or where the
    link is not known."""
    between = hardware.between_gpus(gpus)
    if gpus < 2 or between is None:
        return None
    sent_bytes = 2 * model["layers"] * 2 * (gpus - 1) / gpus * model["hidden_size"] * 2
    return between[0], 2 * matmul_parameters(model) / gpus / sent_bytes * between[1]


def _seconds(spans: pd.DataFrame, by: pd.Series) -> pd.Series:
    return (spans.t_end - spans.t_start).groupby(by).sum()


def counted_work(run: Run, steps: Sequence[int]) -> pd.DataFrame:
    """By training phase, of these steps: sums of passes, tokens, pairs, updates. Empty where none is recorded."""
    wanted = set(steps)
    records = [record for record in run.outline if record["type"] == "work" and record["step"] in wanted]
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
