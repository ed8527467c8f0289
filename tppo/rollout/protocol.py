"""What the trainer asks of a rollout engine.

    engine.submit(requests, sampling)
    while completions := engine.run_until_a_row_ends(): ...
    engine.abort()                  rows that still run come back with what they have
    engine.update_weights(version)  between rollouts

A row is never lost: every submitted row comes back in exactly one completion, whatever becomes of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from profiling.errors import RunError

Clock = Callable[[], float]
"""Seconds since the start of the run."""


class EngineError(RunError):
    """The engine died; what it held is lost. The rows that were submitted are as they were before."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn from the model's logits: divided by the temperature, cut to the `top_k` likeliest, then to
    the fewest whose probabilities reach `top_p` together."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    stop_token_ids: tuple[int, ...] = ()
    """A row ends with the first of these that it samples."""
    seed: int | None = None
    """Of this submission's draws; None: the engine's own random state goes on."""
    by_row: bool = False
    """Every draw is a function of (seed, row, position) alone: a row is the same on any engine, beside any others."""


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
    """What a row generated since it was submitted.

    log_probs: of the sampled tokens, under the policy `policy_version` at the sampling temperature, before top-k and
    top-p: the trainer recomputes the same. reason: stop (it sampled a stop token, which is part of it), budget,
    aborted (by `abort`) or failed (the engine gave it up).
    """

    row: int
    token_ids: list[int]
    log_probs: list[float]
    reason: Literal["stop", "budget", "aborted", "failed"]
    policy_version: int
    t_start: float
    t_end: float
    preempted: int = 0
    """Times that its KV blocks were taken away and computed again."""
    engine: int | None = None
    """Which of several engines ran it; None where there is one."""


def always() -> bool:
    """Nobody interrupts."""
    return True


class RolloutEngine(Protocol):
    policy_version: int
    """Of the weights it samples from."""

    def submit(self, requests: list[Request], sampling: Sampling) -> None:
        """Queue rows, first come, first served. All rows under way share one `sampling`."""
        ...

    def run_until_a_row_ends(self) -> list[Completion]:
        """Run until at least one row ends; every row that ends in that iteration, by row id. [] when empty."""
        ...

    def abort(self) -> list[Completion]:
        """Stop all rows, running or waiting; by row id."""
        ...

    def take_records(self) -> list[dict[str, Any]]:
        """Prefill and decode records since the last call, with the fields of profiling.schema.ENGINE but `step`."""
        ...

    def update_weights(self, version: int) -> None:
        """The policy changed: sample from it as it is now, and forget what was computed with the old one (unless
        asked to keep it). Only between rollouts."""
        ...

    def release_memory(self) -> None:
        """Give back what memory can be given back until the next `submit`. Only between rollouts."""
        ...
