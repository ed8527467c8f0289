"""Every row runs to its end before the policy is updated (PPO, VAPO, DAPO).

Cost: the step lasts as long as its longest row. Staleness: none. Length bias: none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tppo.schedule.protocol import CarriedRow, Demand, Schedule, StepPlan, fill_with_fresh_rows


@dataclass(frozen=True, slots=True)
class Synchronous(Schedule):
    kind: ClassVar[str] = "synchronous"

    def plan_step(self, carried: Sequence[CarriedRow], demand: Demand) -> StepPlan:
        admissions = fill_with_fresh_rows(carried, demand, demand.rows, max_new_tokens=None)
        return StepPlan(demand.step, admissions, rows_wanted=len(admissions))

    def startup_steps(self, max_response_tokens: int) -> int:
        return 0
