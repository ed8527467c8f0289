"""The row that a training step adds to metrics.jsonl. Names are those users of verl know."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tppo.rollout.rows import Row
from tppo.updates import Advantages

TIMINGS = {
    "rollout": "timing_s/gen",
    "reward": "timing_s/reward",
    "value_forward": "timing_s/values",
    "update_value": "timing_s/update_critic",
    "update_policy": "timing_s/update_actor",
    "weight_sync": "timing_s/weight_sync",
    "evaluation": "timing_s/testing",
}
"""Phase of profiling.schema.PHASES -> metric. Phases do not overlap, so the timings add up."""


def step_metrics(
    rows: Sequence[Row],
    estimates: Advantages,
    seconds: Mapping[str, float],
    step_s: float,
    max_response_tokens: int,
) -> dict[str, Any]:
    """Lengths, rewards, advantages and times of one step; what has no meaning in this step is null.

    response_length/*: over rows that finished in this step, in tokens of all windows; clip_ratio: the share that hit
    the maximum. training/truncated_share: rows that carry over / rows of the step.
    """
    done = [row for row in rows if row.finished]
    lengths = [len(row.response_ids) for row in done]
    generated = sum(row.window_tokens for row in rows)
    mask = estimates.mask
    returns, values = estimates.returns[mask], estimates.values[mask]
    variance = returns.var(correction=0).item() if len(returns) else 0.0
    return {
        **{metric: seconds.get(phase, 0.0) for phase, metric in TIMINGS.items()},
        "timing_s/step": step_s,
        "response_length/mean": float(np.mean(lengths)) if lengths else None,
        "response_length/max": max(lengths, default=None),
        "response_length/min": min(lengths, default=None),
        "response_length/clip_ratio": float(np.mean([n >= max_response_tokens for n in lengths])) if lengths else None,
        "prompt_length/mean": float(np.mean([len(row.prompt_ids) for row in rows])),
        "critic/score/mean": float(np.mean([row.reward for row in done])) if done else None,
        "critic/rewards/mean": float(np.mean([row.reward for row in done])) if done else None,
        "critic/advantages/mean": estimates.advantages[mask].mean().item(),
        "critic/advantages/max": estimates.advantages[mask].max().item() if mask.any() else None,
        "critic/advantages/min": estimates.advantages[mask].min().item() if mask.any() else None,
        "critic/returns/mean": returns.mean().item(),
        "critic/values/mean": values.mean().item(),
        "critic/vf_explained_var": 1 - (returns - values).var(correction=0).item() / variance
        if variance > 0
        else None,
        "perf/total_num_tokens": sum(row.all_tokens for row in rows),
        "perf/throughput": sum(row.all_tokens for row in rows) / step_s,
        "training/generated_tokens": generated,
        "training/processed_tokens": sum(row.all_tokens for row in rows),
        "training/finished_rows": len(done),
        "training/carried_rows": len(rows) - len(done),
        "training/truncated_share": 1 - len(done) / len(rows),
    }
