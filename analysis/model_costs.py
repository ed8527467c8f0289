"""FLOPs and bytes of a run's decode, prefill and training phases, from the model's dimensions: where its points lie
under a roofline.

Convention: attention is causal; a multiply-add is two FLOPs; norms, rotary embedding and softmax are left out; every
weight is read once a pass, keys and values once a token that attends to them. In training the way back costs twice
the way forward and reads each weight once and its gradient once, and writes that; an AdamW step reads weight, gradient
and both moments and writes all but the gradient. Activations are left out of the bytes, so that a training point's
intensity is an upper bound. Padding, and what activation checkpointing computes twice, is not counted as FLOPs.
"""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.tables import arm_of
from profiling.attribution import device_estimates
from profiling.errors import DataError
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


def matmul_parameters(model: dict[str, Any]) -> int:
    """Parameters that take part in a matrix product: all but the input embedding's table."""
    return model["parameters"] - model["embedding_parameters"]


def decode_flops(model: dict[str, Any], tokens: int, pairs: int) -> int:
    """2 P per token and 4 layers heads head_dim per attended pair (query-key and weight-value products)."""
    return 2 * matmul_parameters(model) * tokens + 4 * model["layers"] * model["heads"] * model["head_dim"] * pairs


def decode_bytes(model: dict[str, Any], steps: int, tokens: int, pairs: int) -> int:
    """Weights once a step; keys and values of the whole context read, and of the new tokens written."""
    weights = matmul_parameters(model) * model["bytes_per_parameter"]
    return weights * steps + model["kv_bytes_per_token"] * (pairs + tokens)


def prefill_flops(model: dict[str, Any], tokens: int, pairs: int) -> int:
    """As decoding, without the output layer, which a prefill does not need."""
    parameters = matmul_parameters(model) - model["lm_head_parameters"]
    return 2 * parameters * tokens + 4 * model["layers"] * model["heads"] * model["head_dim"] * pairs


def prefill_bytes(model: dict[str, Any], passes: int, tokens: int) -> int:
    """Weights once a pass; keys and values written and read once."""
    parameters = matmul_parameters(model) - model["lm_head_parameters"]
    return parameters * model["bytes_per_parameter"] * passes + 2 * model["kv_bytes_per_token"] * tokens


def training_flops(model: dict[str, Any], work: pd.Series, *, policy: bool) -> int:
    """Of a phase's passes: 2 P a token, 2 per output weight and position, 4 layers heads head_dim an attended pair,
    three times where it goes back. policy: with the output layer; the value model's head counts as nothing."""
    trunk = matmul_parameters(model) - model["lm_head_parameters"]
    attention = 4 * model["layers"] * model["heads"] * model["head_dim"]
    outputs = 2 * model["lm_head_parameters"] * (work.outputs + 2 * work.backward_outputs) if policy else 0
    tokens, pairs = work.tokens + 2 * work.backward_tokens, work.pairs + 2 * work.backward_pairs
    return int(2 * trunk * tokens + attention * pairs + outputs)


def training_bytes(model: dict[str, Any], work: pd.Series, *, policy: bool) -> int:
    """Weights once a pass; on the way back weights and gradients once, and the gradients written; six reads and
    writes of every parameter, gradients included, and one more, an update."""
    size = model["bytes_per_parameter"]
    head = 0 if policy else model["lm_head_parameters"]
    passes = (matmul_parameters(model) - head) * (work.passes + 3 * work.backward_passes)
    return int(size * (passes + 7 * (model["parameters"] - head) * work.updates))


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
            policy = phase not in ("value_forward", "update_value")
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
    records = [record for record in run.trace if record["type"] == "work" and record["step"] >= 1]
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
