"""Every row runs to its end before the policy is updated (PPO, VAPO, DAPO).

Cost: the step lasts as long as its longest row. Staleness: none. Length bias: none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tppo.schedule.protocol import (
    CarriedRow,
    Decision,
    Demand,
    RowEnd,
    StepPlan,
    StepState,
    fill_with_fresh_rows,
    finish_or_carry,
)


@dataclass(frozen=True, slots=True)
class Synchronous:
    kind: ClassVar[str] = "synchronous"
    steps_ahead: ClassVar[int] = 0
    simulated_only: ClassVar[bool] = False

    def plan_step(self, carried: Sequence[CarriedRow], demand: Demand) -> StepPlan:
        admissions = fill_with_fresh_rows(carried, demand, demand.rows, max_new_tokens=None)
        return StepPlan(demand.step, admissions, rows_wanted=len(admissions))

    def on_row_end(self, state: StepState, event: RowEnd) -> tuple[Decision, ...]:
        return finish_or_carry(state, event)

    def startup_steps(self, max_response_tokens: int) -> int:
        return 0
