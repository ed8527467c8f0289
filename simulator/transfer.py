"""Efficiency factors from a run that was measured: what carries over to another GPU or another model.

The physics (bytes, FLOPs, data sheets) is swapped; how much of it was reached is kept. Two numbers are fitted, one for
the engines and one for training, because a run on one model and one GPU cannot tell its factors apart: every factor of
a side moves together. The interval widens by what that leaves open.
"""

from dataclasses import dataclass

import numpy as np

from profiling.errors import ConfigError, DataError
from profiling.reader import Run
from simulator.analytic import AnalyticEngineCosts
from simulator.calibrate import Calibration, phase_observations
from simulator.hardware import Gpu
from simulator.hardware.efficiency import Efficiency
from simulator.models import Model

BEYOND_THE_PEAK = 1.2
"""A share of a peak that measurement errors do not explain."""
WIDER = 0.1
"""Added to the uncertainty of either side: the target differs from the run in what one number cannot say."""


ROLLOUT_SHARES = ("weight_bandwidth", "kv_bandwidth", "decode_gemm", "link", "prefill_gemm", "prefill_attention")
ROLLOUT_SECONDS = ("step_s", "layer_s", "row_s", "collective_s", "collective_per_doubling_s", "prefill_layer_s",
                   "prefill_step_s", "prefill_collective_s")  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    efficiency: Efficiency
    rollout_slower: float
    """Measured engine seconds / those of the factors that it started from."""
    training_slower: float | None
    """The same of training phases; None where the run has none."""


def transfer(run: Run, calibration: Calibration, model: Model, gpu: Gpu, start: Efficiency, *, tensor_parallel: int,
             trainer_gpus: int) -> Transfer:  # fmt: skip
    """Factors that give the run's own totals. Raises DataError when the run has no engine records, ConfigError when
    model, GPU and sizes cannot be what it ran on."""
    spans = run.engine[run.engine.step >= 1]
    if spans.empty:
        raise DataError(f"{run.path}: has no engine records of training steps; factors cannot be taken from it")
    if tensor_parallel < 1 or trainer_gpus < 0 or model.heads % tensor_parallel:
        raise ConfigError(
            f"--tensor-parallel {tensor_parallel}, --trainer-gpus {trainer_gpus}: must be at least 1, and divide the "
            f"{model.heads} attention heads"
        )
    costs = AnalyticEngineCosts(model, gpu, start, tensor_parallel=tensor_parallel)
    decode = spans[spans.kind == "decode"]
    prefill = spans[spans.kind == "prefill"]
    expected = float((decode.steps * costs.step_s(decode.batch.to_numpy())).sum())
    expected += costs.context_token_s * float(decode.attended_pairs.sum())
    tokens = prefill.fresh_tokens + prefill.resumed_tokens + prefill.recomputed_tokens
    expected += sum(
        costs.prefill_s(tokens=int(n), pairs=int(pairs))
        for n, pairs in zip(tokens, prefill.attended_pairs, strict=True)
    )
    measured = float((spans.t_end - spans.t_start).sum())
    slower = measured / expected
    training = _training_slower(run, calibration, model, gpu, start, trainer_gpus)
    shares = {name: getattr(start, name) / slower for name in ROLLOUT_SHARES}
    if training is not None:
        shares |= {name: getattr(start, name) / training for name in ("train_gemm", "train_attention")}
    worst = max(shares, key=lambda name: shares[name])
    if shares[worst] > BEYOND_THE_PEAK:
        raise ConfigError(
            f"{run.path}: would need {worst} = {shares[worst]:.3g}, beyond the peak of {gpu.name}; is --model "
            f"{model.name}, --gpu {gpu.name} with {tensor_parallel} GPUs an engine what the run used?"
        )
    changes = {name: min(1.0, share) for name, share in shares.items()}
    changes |= {name: getattr(start, name) * slower for name in ROLLOUT_SECONDS}
    source = f"fitted to the run {run.path.name} ({', '.join(calibration.runs)}), all factors of a side by one number"
    efficiency = start.model_copy(
        update={
            **changes, "family": gpu.family, "sources": dict.fromkeys(changes, source) | {
                name: text for name, text in start.sources.items() if name not in changes
            },
            "rollout_uncertainty": _wider(_spread(run)), "train_uncertainty": _wider(start.train_uncertainty
                                                                                    if training is None else 0.1),
            "fitted_context": int((run.rollouts.context_before + run.rollouts.tokens).max()),
        }
    )  # fmt: skip
    return Transfer(efficiency, slower, training)


def _wider(uncertainty: float) -> float:
    return round(min(0.9, uncertainty + WIDER), 3)


def _spread(run: Run) -> float:
    """Relative half-width that holds 90 % of the steps' engine seconds per generated token."""
    spans = run.engine[run.engine.step >= 1]
    seconds = (spans.t_end - spans.t_start).groupby(spans.step).sum()
    tokens = run.rollouts[run.rollouts.step >= 1].groupby("step").tokens.sum()
    rate = (seconds / tokens).dropna()
    return float(np.quantile(np.abs(rate / rate.median() - 1), 0.9)) if len(rate) > 1 else 0.1


def _training_slower(
    run: Run, calibration: Calibration, model: Model, gpu: Gpu, start: Efficiency, trainer_gpus: int
) -> float | None:
    """What update_policy took per token, as the calibration fits it (its base, optimizer steps, apart), / four passes'
    FLOPs at the start's factors."""
    observed = phase_observations(run, "update_policy")
    fitted = calibration.costs.get("policy_update_per_token_s", 0.0)
    if not len(observed.seconds) or not trainer_gpus or not fitted:
        return None
    rows = run.rollouts[~run.rollouts.discarded]
    context = (rows.context_before + rows.tokens).astype(float)
    by_step = (context * (context + 1) / 2).groupby(rows.step).sum()
    pairs = float(by_step.reindex(observed.step).fillna(0.0).sum())
    tokens = float(observed.work[:, 1].sum())
    flops = 2 * (model.linear_parameters_per_token + model.embedding_parameters) * tokens
    attention = model.attention_flops(pairs, tokens)
    peak = gpu.bf16_flops * trainer_gpus
    expected = 4 * (flops / (peak * start.train_gemm) + attention / (peak * start.train_attention))
    return fitted * tokens / expected
