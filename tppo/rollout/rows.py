"""A row: one response over its whole life, possibly over several windows and policies."""

from dataclasses import dataclass, field, replace

from tppo.data.problem import Problem
from tppo.rollout.protocol import Completion


@dataclass(slots=True)
class Row:
    row: int
    group: int
    problem: Problem
    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    window_start: int = 0
    """Response tokens before the current window."""
    policy_version: int = 0
    """Of the policy that sampled the current window."""
    log_probs: list[float] = field(default_factory=list)
    """Of every response token, under the policy that sampled it."""
    values: list[float] = field(default_factory=list)
    """Of every response token, as stored when its window was first scored."""
    finished: bool = False
    reward: float | None = None
    """The verifier's, before shaping; None while unfinished."""
    correct: bool | None = None
    """Whether the answer is right; None while unfinished."""
    engine: int = 0
    """That ran the current window."""
    preempted: int = 0
    """Times in the current window that the engine computed its keys and values again."""
    t_start: float = 0.0
    t_end: float = 0.0

    @property
    def token_ids(self) -> list[int]:
        return [*self.prompt_ids, *self.response_ids]

    @property
    def window_tokens(self) -> int:
        return len(self.response_ids) - self.window_start

    @property
    def context_before(self) -> int:
        return len(self.prompt_ids) + self.window_start

    @property
    def all_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def begin_window(self) -> None:
        self.window_start = len(self.response_ids)

    def take(self, completion: Completion) -> None:
        """Append what the row generated in this window."""
        self.response_ids += completion.token_ids
        self.log_probs += completion.log_probs
        self.policy_version = completion.policy_version
        self.preempted = completion.preempted
        self.t_start, self.t_end = completion.t_start, completion.t_end
        if completion.engine is not None:
            self.engine = completion.engine

    def copy(self) -> "Row":
        return replace(
            self,
            response_ids=list(self.response_ids),
            log_probs=list(self.log_probs),
            values=list(self.values),
        )

    def undo_window(self) -> None:
        """Forget what was generated since `begin_window`."""
        del self.response_ids[self.window_start :], self.log_probs[self.window_start :]
        self.finished, self.reward, self.correct = False, None, None
