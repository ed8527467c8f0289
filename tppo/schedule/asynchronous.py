"""Roll out the next steps while the last one is trained on (one-step-off: max_staleness = 1; AReaL, arXiv
2505.24298, for more).

Symbols: eta = max_staleness, in policy versions.
Policy: the rollout of step k + eta may begin when the rollout of step k + eta - 1 is over and step k is about to
train, with the newest weights there are, those that step k - 1 left behind. Every row runs to its end under one
policy.
Cost: a step lasts as long as the longer of rollout and training, where both have hardware of their own; on one device
they share it. Staleness: a row is trained eta updates after the policy that sampled it. Length bias: none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tppo.schedule.protocol import CarriedRow, Demand, Schedule, StepPlan, fill_with_fresh_rows


@dataclass(frozen=True, slots=True)
class Asynchronous(Schedule):
    max_staleness: int = 1
    """Policy versions between sampling a row and training on it."""

    kind: ClassVar[str] = "asynchronous"

    def __post_init__(self) -> None:
        if self.max_staleness < 1:
            raise ValueError(f"max_staleness = {self.max_staleness}: must be at least 1; 0 is synchronous")

    @property
    def simulated_only(self) -> bool:
        return self.max_staleness > 1

    @property
    def steps_ahead(self) -> int:
        return self.max_staleness

    def plan_step(self, carried: Sequence[CarriedRow], demand: Demand) -> StepPlan:
        admissions = fill_with_fresh_rows(carried, demand, demand.rows, max_new_tokens=None)
        return StepPlan(demand.step, admissions, rows_wanted=len(admissions))

    def startup_steps(self, max_response_tokens: int) -> int:
        return self.max_staleness
