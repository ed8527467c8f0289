"""What work costs, in seconds: affine in rows, tokens and attended pairs. Pure functions."""

import heapq
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np

from profiling.errors import ConfigError
from profiling.settings import check_settings
from simulator.analytic import AnalyticCosts
from simulator.cost_settings import AffineCostSettings, AnalyticCostSettings, CalibratedCostSettings
from simulator.experiment import Experiment

PHASE_COSTS = {
    "logprob_forward": "logprob_forward",
    "reference_forward": "reference_forward",
    "value_forward": "value_forward",
    "update_policy": "policy_update",
    "update_value": "value_update",
}
"""Phase of a step -> prefix of its costs."""


class RolloutCosts(Protocol):
    """Costs of a rollout engine, in seconds. A decode step is affine in the total context for each batch size."""

    @property
    def context_token_s(self) -> float: ...

    def step_s(self, batch: int | np.ndarray) -> float | np.ndarray:
        """Of a decode step of `batch` rows, apart from what grows with their context."""

    def decode_s(self, *, batch: int, context_tokens: int, steps: int) -> float: ...

    def prefill_s(self, *, tokens: int, pairs: int) -> float: ...


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """Affine costs of a rollout engine, in seconds."""

    decode_base_s: float = 0.0
    decode_per_row_s: float = 0.0
    decode_per_context_token_s: float = 0.0
    prefill_base_s: float = 0.0
    prefill_per_token_s: float = 0.0
    prefill_per_token_context_s: float = 0.0

    @property
    def context_token_s(self) -> float:
        """Of a decode step, per token of context."""
        return self.decode_per_context_token_s

    def step_s(self, batch: int | np.ndarray) -> float | np.ndarray:
        """Of a decode step of `batch` rows, apart from what grows with their context."""
        return self.decode_base_s + self.decode_per_row_s * batch

    def decode_s(self, *, batch: int, context_tokens: int, steps: int) -> float:
        """Seconds of `steps` decode steps of `batch` rows whose contexts sum to `context_tokens` before the first.

        One step: t = c0 + c1 B + c2 C, and C grows by B a step, so k steps take
        k (c0 + c1 B) + c2 (k C + B k (k - 1) / 2).
        """
        per_step = self.decode_base_s + self.decode_per_row_s * batch
        return steps * per_step + self.decode_per_context_token_s * decoded_pairs(batch, context_tokens, steps)

    def prefill_s(self, *, tokens: int, pairs: int) -> float:
        """Seconds to prefill `tokens` uncached tokens that attend to `pairs` pairs, whatever the rows."""
        return self.prefill_base_s + self.prefill_per_token_s * tokens + self.prefill_per_token_context_s * pairs


def decoded_pairs(batch: int, context_tokens: int, steps: int) -> int:
    """Sum over the steps of the total context."""
    return steps * context_tokens + batch * (steps * (steps - 1) // 2)


def prefilled_pairs(tokens: int) -> int:
    """Query-key pairs of a causal prefill from nothing: n (n + 1) / 2."""
    return tokens * (tokens + 1) // 2


def phase_s(settings: AffineCostSettings, phase: str, tokens: int, pairs: int) -> float:
    """Seconds of a training phase over `tokens` processed tokens that attend to `pairs` pairs; 0 for no tokens."""
    prefix = PHASE_COSTS[phase]
    if tokens == 0:
        return 0.0
    base_s, token_s = getattr(settings, f"{prefix}_base_s"), getattr(settings, f"{prefix}_per_token_s")
    return base_s + token_s * tokens + getattr(settings, f"{prefix}_per_token_context_s") * pairs


def reward_s(settings: AffineCostSettings, rows: int) -> float:
    """Seconds to grade `rows` rows, `reward_workers` at a time."""
    rounds = -(-rows // settings.reward_workers)
    return settings.reward_base_s + rounds * settings.reward_per_row_s if rows else 0.0


def graded_at(settings: AffineCostSettings, finished_at: list[float]) -> float:
    """When the last row is graded, where rows are graded as they finish (ascending times), each by the worker that is
    free first; `reward_base_s` comes at the end. 0 without rows."""
    free = [0.0] * settings.reward_workers  # a heap
    end = 0.0
    for t in finished_at:
        end = max(heapq.heappop(free), t) + settings.reward_per_row_s
        heapq.heappush(free, end)
    return max(free) + settings.reward_base_s if finished_at else 0.0


@dataclass(frozen=True)
class Costs:
    """What an experiment's work costs."""

    engine: RolloutCosts
    phases: AffineCostSettings
    """Of everything but the engines."""
    kv_tokens: int | None
    """That an engine's cache holds; None: unlimited."""


def resolve(experiment: Experiment) -> Costs:
    """The costs themselves: as given, from the calibration file, or from the model and the GPU.

    Raises ConfigError when a file cannot be used or something does not fit the GPUs' memory.
    """
    settings, cluster = experiment.cost, experiment.cluster
    if isinstance(settings, AnalyticCostSettings):
        return _analytic(settings, experiment)
    if isinstance(settings, CalibratedCostSettings):
        settings = _calibrated(settings)
    engine = EngineCosts(**{field.name: getattr(settings, field.name) for field in fields(EngineCosts)})
    return Costs(engine, settings, cluster.kv_tokens_per_engine)


def _calibrated(settings: CalibratedCostSettings) -> AffineCostSettings:
    from simulator.calibrate import Calibration

    costs = Calibration.load(Path(settings.file)).costs
    extra = settings.model_dump(exclude={"kind", "file"})
    together = {**costs, **{key: value for key, value in extra.items() if value}}
    return check_settings(together, AffineCostSettings, where=str(settings.file))


def _analytic(settings: AnalyticCostSettings, experiment: Experiment) -> Costs:
    workload, cluster = experiment.workload, experiment.cluster
    row_tokens = workload.longest_prompt + workload.max_response_tokens
    costs = AnalyticCosts(
        settings, engine_gpus=cluster.gpus_per_engine, trainer_gpus=cluster.training_gpus, engines=cluster.engines
    )
    if row_tokens > costs.model.positions:
        raise ConfigError(
            f"workload.max_response_tokens: rows of {row_tokens} tokens exceed the {costs.model.positions} positions "
            f"of {costs.model.name}; lower it, or raise max_position_embeddings in a copy of its config.json"
        )
    fits = costs.kv_tokens(row_tokens)
    given = cluster.kv_tokens_per_engine
    if given is not None and given > fits:
        raise ConfigError(
            f"cluster.kv_tokens_per_engine = {given}: only {fits} tokens of {costs.model.name} fit beside the weights "
            f"on {cluster.gpus_per_engine} x {costs.gpu.name}; lower it, or leave it out"
        )
    if cluster.trainer != "none":
        costs.training_memory(row_tokens).check(
            costs.gpu, "train on more GPUs, or lower cost.logit_tokens or workload.max_response_tokens"
        )
    tokens = workload.rows_per_step * workload.max_response_tokens / 3
    return Costs(costs.engine, costs.phases(tokens), fits if given is None else given)
