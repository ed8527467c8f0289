"""Long rows wait for rounds of their own (after RollPacker, arXiv 2509.21009).

Symbols: N = rows asked for, h = threshold, L = maximum response length.
Policy: in a short round N fresh rows run for at most h new tokens; those that have not finished then are deferred,
with what they have. As soon as N rows are deferred, a long round runs the N oldest of them to their ends, alone.
RollPacker itself starts deferred prompts anew in their long round, which keeps every token of one policy and generates
h tokens a row twice; it also starts more rows than needed in short rounds, as `Oversample` does.
Cost: a short round lasts at most h decode steps, and few long rounds have a tail; a short round trains on fewer rows
than N. Staleness: the first h tokens of a deferred row are as many versions behind as rounds passed until its long
one; hence truncated importance sampling. Length bias: none over a whole cycle, but every step is biased: short rounds
train on responses of at most h tokens, long rounds on longer ones. With h >= L this is `Synchronous`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tppo.schedule.protocol import CarriedRow, Demand, Schedule, StepPlan, fill_with_fresh_rows

STARTUP_STEPS = 10
"""Steps until a long round has followed the first short ones, where at least a fifth of the rows is deferred."""


@dataclass(frozen=True, slots=True)
class TailBatching(Schedule):
    threshold: int
    """New tokens per row in a short round."""

    kind: ClassVar[str] = "tail_batching"

    def __post_init__(self) -> None:
        if self.threshold < 1:
            raise ValueError(f"threshold = {self.threshold}: a short round must allow at least 1 new token per row")

    @property
    def simulated_only(self) -> bool:
        return True

    def plan_step(self, carried: Sequence[CarriedRow], demand: Demand) -> StepPlan:
        deferred = sorted(carried, key=lambda row: row.row)
        if len(deferred) >= demand.rows:
            admissions = fill_with_fresh_rows(deferred[: demand.rows], demand, demand.rows, max_new_tokens=None)
        else:
            admissions = fill_with_fresh_rows([], demand, demand.rows, max_new_tokens=self.threshold)
        return StepPlan(demand.step, admissions, rows_wanted=len(admissions))

    def startup_steps(self, max_response_tokens: int) -> int:
        return STARTUP_STEPS if self.threshold < max_response_tokens else 0
