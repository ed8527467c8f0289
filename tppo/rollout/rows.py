"""A row: one response over its whole life, possibly over several windows and policies."""

from dataclasses import dataclass, field

from tppo.data.arithmetic import Problem


@dataclass(slots=True)
class Row:
    row: int
    group: int
    problem: Problem
    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    window_start: int = 0
    """Response tokens before the current window."""
    log_probs: list[float] = field(default_factory=list)
    """Of every response token, under the policy that sampled it."""
    values: list[float] = field(default_factory=list)
    """Of every response token, as stored when its window was first scored."""
    finished: bool = False
    reward: float | None = None
    """The verifier's, before shaping; None while unfinished."""
    t_start: float = 0.0
    t_end: float = 0.0

    @property
    def window_tokens(self) -> int:
        return len(self.response_ids) - self.window_start

    @property
    def context_before(self) -> int:
        return len(self.prompt_ids) + self.window_start

    @property
    def all_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)
