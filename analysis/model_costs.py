"""FLOPs and bytes of a run's decode and prefill, from the model's dimensions: where its points lie under a roofline.

Convention: attention is causal; a multiply-add is two FLOPs; norms, rotary embedding and softmax are left out; every
weight is read once a pass, keys and values once a token that attends to them.
"""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.tables import arm_of
from profiling.attribution import device_estimates
from profiling.errors import DataError
from profiling.reader import Run

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


def roofline_points(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run and kind of engine work (steps 1 and later): FLOPs, bytes, seconds, arithmetic intensity
    (FLOP per byte), achieved FLOP/s, and the share of the run's engine time. tensor_activity, dram_activity: what the
    GPUs' own counters say of the run's rollouts, decode and prefill together; null without them."""
    rows = []
    for run in runs:
        model = model_of(run)
        spans = run.engine[run.engine.step >= 1]
        if spans.empty:
            raise DataError(f"{run.path}: has no engine records")
        seconds = (spans.t_end - spans.t_start).groupby(spans.kind).sum()
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
        active = _activities(run)
        for kind, (flops, size) in work.items():
            if kind in seconds.index:
                rows.append(
                    (run.name, arm_of(run), kind, flops, size, seconds[kind], flops / size, flops / seconds[kind],
                     seconds[kind] / seconds.sum(), *active)
                )  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def _activities(run: Run) -> list[float | None]:
    """Tensor and DRAM activity of rollouts, the mean over GPUs where it is resolved."""
    if run.simulated or run.windows.empty:
        return [None, None]
    own = device_estimates(run)
    means = [
        own[(own.phase == "rollout") & (own.quantity == name)].value.mean()
        for name in ("tensor_activity", "dram_activity")
    ]
    return [None if pd.isna(mean) else float(mean) for mean in means]
