"""What the trainer asks of a rollout engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Clock = Callable[[], float]
"""Seconds since the start of the run."""


@dataclass(frozen=True, slots=True)
class Request:
    """Continue `token_ids` (prompt and response so far) by at most `budget_tokens` tokens."""

    row: int
    token_ids: list[int]
    response_tokens: int
    """How many of `token_ids` are response; more than 0 for a row carried over."""
    budget_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What a row generated since it was submitted. `log_probs`: of the sampled tokens, under the sampling policy.

    reason: stop (it sampled the end-of-sequence token, which is part of it) or budget.
    """

    row: int
    token_ids: list[int]
    log_probs: list[float]
    reason: Literal["stop", "budget"]
    t_start: float
    t_end: float


class RolloutEngine(Protocol):
    def submit(self, requests: list[Request]) -> None:
        """Queue rows, first come, first served."""
        ...

    def run_until_a_row_ends(self) -> list[Completion]:
        """Run until at least one row ends; every row that ends in that iteration, by row id. [] when empty."""
        ...

    def take_records(self) -> list[dict[str, Any]]:
        """Prefill and decode records since the last call, with the fields of profiling.schema.ENGINE but `step`."""
        ...

    def update_weights(self) -> None:
        """The policy changed: forget everything computed with the old one. Only between rollouts."""
        ...
