"""Successive batching of T-PPO (arXiv 2506.15050; METHOD of the authors' port, verl PR 3728).

A step has a fixed number of rows. Unfinished rows of the last step go first, fresh ones fill the rest, and every
row generates at most `window` new tokens. Rows that end are graded and their places refilled next step; the others
keep their tokens and continue.

Symbols: l = window, L = maximum response length.
Cost: a step lasts at most l decode steps; a row of n tokens needs ceil(n / l) steps, and its prefix is prefilled
again in each. Staleness: none for trained tokens, at most ceil(L / l) - 1 steps for a prefix. Length bias: none once
the first 2 ceil(L / l) steps are over; before that, finished rows are short ones. With l >= L this is `Synchronous`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tppo.schedule.protocol import CarriedRow, Demand, Schedule, StepPlan, fill_with_fresh_rows


@dataclass(frozen=True, slots=True)
class Truncated(Schedule):
    window: int
    """New tokens per row and step."""

    kind: ClassVar[str] = "truncated"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window = {self.window}: a step must allow at least 1 new token per row")

    def plan_step(self, carried: Sequence[CarriedRow], demand: Demand) -> StepPlan:
        admissions = fill_with_fresh_rows(carried, demand, demand.rows, max_new_tokens=self.window)
        return StepPlan(demand.step, admissions, rows_wanted=len(admissions))

    def startup_steps(self, max_response_tokens: int) -> int:
        visits = -(-max_response_tokens // self.window)
        return 2 * visits if visits > 1 else 0
