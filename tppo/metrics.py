"""The row that a training step adds to metrics.jsonl. Names are those users of verl know."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from profiling.model_flops import VALUE_PHASES, training_flops
from tppo.learner.estimates import PolicyBatch, ValueBatch
from tppo.learner.work import Work
from tppo.rollout.rows import Row

TIMINGS = {
    "rollout": "timing_s/gen",
    "reward": "timing_s/reward",
    "logprob_forward": "timing_s/old_log_prob",
    "reference_forward": "timing_s/ref",
    "value_forward": "timing_s/values",
    "update_value": "timing_s/update_critic",
    "update_policy": "timing_s/update_actor",
    "weight_sync": "timing_s/weight_sync",
    "evaluation": "timing_s/testing",
}
"""Phase of profiling.schema.PHASES -> metric. Phases do not overlap, so the timings add up."""


def step_metrics(
    rows: Sequence[Row],
    policy_batch: PolicyBatch,
    value_batch: ValueBatch | None,
    seconds: Mapping[str, float],
    step_s: float,
    max_response_tokens: int,
    discarded: int,
    work: Work,
    utilisation: Mapping[str, float | None],
) -> dict[str, Any]:
    """Lengths, rewards, advantages and times of one step; what has no meaning in this step is null.

    rows: those generated in the step. response_length/*: over rows that finished in it, in tokens of all windows;
    clip_ratio: the share that hit the maximum. training/truncated_share: rows that carry over / rows of the step.
    training/off_policy_prefix_share: response tokens of earlier windows / processed tokens.
    perf/padding_waste: padding / tokens computed in all training passes of the step, forward ones included.
    critic/vf_explained_var: 1 - var(target - V) / var(target) over the value model's tokens, before its update.
    """
    done = [row for row in rows if row.finished]
    lengths = [len(row.response_ids) for row in done]
    scores = [float(row.reward or 0.0) for row in done]
    trained = policy_batch.spans.rows
    processed = sum(row.all_tokens for row in trained)
    advantages = policy_batch.advantages[policy_batch.mask]
    return {
        **{metric: seconds.get(phase, 0.0) for phase, metric in TIMINGS.items()},
        "timing_s/step": step_s,
        "response_length/mean": _mean(lengths),
        "response_length/max": max(lengths, default=None),
        "response_length/min": min(lengths, default=None),
        "response_length/clip_ratio": _mean([n >= max_response_tokens for n in lengths]),
        "prompt_length/mean": _mean([len(row.prompt_ids) for row in rows]),
        "critic/score/mean": _mean(scores),
        "critic/score/max": max(scores, default=None),
        "critic/score/min": min(scores, default=None),
        "critic/rewards/mean": _mean(scores),
        "critic/advantages/mean": _statistic(advantages, torch.mean),
        "critic/advantages/std": _statistic(advantages, lambda a: a.std(correction=0)),
        "critic/advantages/max": _statistic(advantages, torch.max),
        "critic/advantages/min": _statistic(advantages, torch.min),
        **_value_metrics(value_batch),
        "perf/total_num_tokens": processed,
        "perf/padding_waste": 1 - work.tokens / work.computed if work.computed else None,
        "perf/throughput": processed / step_s,
        **utilisation,
        "training/generated_tokens": sum(row.window_tokens for row in rows),
        "training/processed_tokens": processed,
        "training/finished_rows": len(done),
        "training/carried_rows": len(rows) - len(done),
        "training/discarded_rows": discarded,
        "training/reused_rows": len({row.row for row in trained} - {row.row for row in rows}),
        "training/truncated_share": 1 - len(done) / len(rows),
        "training/off_policy_prefix_share": sum(row.window_start for row in trained) / processed
        if processed
        else None,
    }


UTILISATIONS = {
    "perf/mfu/actor": ("update_policy",),
    "perf/mfu/critic": ("update_value",),
    "perf/mfu": ("logprob_forward", "reference_forward", "value_forward", "update_value", "update_policy"),
}


def model_flops_utilisation(
    work: Mapping[str, Work], seconds: Mapping[str, float], model: Mapping[str, Any], peak_flops: float | None
) -> dict[str, float | None]:
    """perf/mfu: FLOPs of the training passes / (their phases' seconds x peak), all of them and the two updates alone
    (PaLM, arXiv 2204.02311, appendix B, with causal attention; profiling.model_flops). work, seconds: by phase.
    peak_flops: of all devices together; null without one, where nothing was computed, and for a model whose FLOPs
    are not known."""
    found: dict[str, float | None] = {}
    if model.get("uncounted"):
        return dict.fromkeys(UTILISATIONS)
    for name, phases in UTILISATIONS.items():
        done = [phase for phase in phases if phase in work and seconds.get(phase)]
        flops = sum([training_flops(model, asdict(work[p]), policy=p not in VALUE_PHASES) for p in done])
        spent_s = sum(seconds[phase] for phase in done)
        found[name] = flops / (spent_s * peak_flops) if peak_flops and spent_s else None
    return found


def _value_metrics(batch: ValueBatch | None) -> dict[str, float | None]:
    names = ("critic/returns/mean", "critic/values/mean", "critic/values/max", "critic/values/min",
             "critic/vf_explained_var")  # fmt: skip
    if batch is None or not batch.spans.rows:
        return dict.fromkeys(names)
    valid = batch.spans.valid
    targets, values = batch.targets[valid], batch.old_values[valid]
    variance = targets.var(correction=0).item()
    explained = 1 - (targets - values).var(correction=0).item() / variance if variance > 0 else None
    found = (targets.mean().item(), values.mean().item(), values.max().item(), values.min().item(), explained)
    return dict(zip(names, found, strict=True))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _statistic(values: Tensor, of: Any) -> float | None:
    return of(values).item() if values.numel() else None
