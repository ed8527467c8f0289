"""What work costs, in seconds: affine in rows, tokens and attended pairs. Pure functions."""

import heapq
from dataclasses import dataclass, fields
from pathlib import Path

from profiling.settings import check_settings
from simulator.experiment import AffineCostSettings, CalibratedCostSettings

PHASE_COSTS = {
    "logprob_forward": "logprob_forward",
    "reference_forward": "reference_forward",
    "value_forward": "value_forward",
    "update_policy": "policy_update",
    "update_value": "value_update",
}
"""Phase of a step -> prefix of its costs."""


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """Costs of a rollout engine, in seconds."""

    decode_base_s: float = 0.0
    decode_per_row_s: float = 0.0
    decode_per_context_token_s: float = 0.0
    prefill_base_s: float = 0.0
    prefill_per_token_s: float = 0.0
    prefill_per_token_context_s: float = 0.0

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


def phase_s(settings: AffineCostSettings, phase: str, tokens: int) -> float:
    """Seconds of a training phase over `tokens` processed tokens; 0 for no tokens."""
    prefix = PHASE_COSTS[phase]
    if tokens == 0:
        return 0.0
    return getattr(settings, f"{prefix}_base_s") + getattr(settings, f"{prefix}_per_token_s") * tokens


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


def engine_costs(settings: AffineCostSettings) -> EngineCosts:
    return EngineCosts(**{field.name: getattr(settings, field.name) for field in fields(EngineCosts)})


def resolve(settings: AffineCostSettings | CalibratedCostSettings) -> AffineCostSettings:
    """The affine costs, read from the calibration file where one is named."""
    if isinstance(settings, AffineCostSettings):
        return settings
    from simulator.calibrate import Calibration

    costs = Calibration.load(Path(settings.file)).costs
    extra = settings.model_dump(exclude={"kind", "file"})
    together = {**costs, **{key: value for key, value in extra.items() if value}}
    return check_settings(together, AffineCostSettings, where=str(settings.file))
