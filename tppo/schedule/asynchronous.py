"""Roll out the next steps while the last one is trained on.

Symbols: eta = max_staleness, in policy versions; N = rows that a step trains on; i = updates done so far.

Step by step (`in_flight_update` false; one-step-off with eta = 1): the rollout of step k + eta may begin when the
rollout of step k + eta - 1 is over and step k is about to train, with the newest weights there are, those that step
k - 1 left behind. Every row runs to its end under one policy. Staleness: a row is trained eta updates after the policy
that sampled it. Length bias: none.

In flight (fully asynchronous; AReaL, arXiv 2505.24298): rows stream, and a step is the time between two updates. As
many rows may have been started as (i + eta + 1) N, AReaL's bound. A step has its rows when the next N have finished,
in that order; the others run on while it trains. When it has trained, every engine ends the iteration at hand, takes
the weights, and goes on with the rows that it had, whose keys and values are computed anew. Staleness: at most eta + 1
batches are under way, so a row of usual length is about eta updates old at its beginning and newer towards its end,
but one that outlives more updates than that is older: eta bounds how many rows are ahead, not the age of each
(staleness_max says how old they get). Length bias: short rows finish first, so the first steps train on short ones.

Cost: a step lasts as long as the longer of rollout and training, where both have hardware of their own; on one device
they share it. In flight no engine waits for the tail of a step, at the price of a prefill of all that run per update.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tppo.schedule.protocol import CarriedRow, Demand, Schedule, StepPlan, fill_with_fresh_rows

STARTUP_STEPS_PER_STEP_AHEAD = 3
"""In flight the first (eta + 1) N rows start together and train in the order of their lengths; so many steps for each
of eta pass until the mean length trained is the mean drawn (tests/simulator/test_schedules_of_a_run.py)."""


@dataclass(frozen=True, slots=True)
class Asynchronous(Schedule):
    max_staleness: int = 1
    """Policy versions between sampling a row and training on it."""
    in_flight_update: bool = False
    """Rows stream and take new weights in the middle."""

    kind: ClassVar[str] = "asynchronous"

    def __post_init__(self) -> None:
        if self.max_staleness < 1:
            raise ValueError(f"max_staleness = {self.max_staleness}: must be at least 1; 0 is synchronous")

    @property
    def simulated_only(self) -> bool:
        return self.max_staleness > 1 or self.in_flight_update

    @property
    def steps_ahead(self) -> int:
        return 0 if self.in_flight_update else self.max_staleness

    @property
    def in_flight(self) -> bool:
        return self.in_flight_update

    def plan_step(self, carried: Sequence[CarriedRow], demand: Demand) -> StepPlan:
        if not self.in_flight_update:
            admissions = fill_with_fresh_rows(carried, demand, demand.rows, max_new_tokens=None)
            return StepPlan(demand.step, admissions, rows_wanted=len(admissions))
        finished = demand.next_row - len(carried)
        under_way = (demand.step + self.max_staleness) * demand.rows - finished
        admissions = fill_with_fresh_rows(carried, demand, under_way, max_new_tokens=None)
        return StepPlan(demand.step, admissions, rows_wanted=max(0, demand.step * demand.rows - finished))

    def startup_steps(self, max_response_tokens: int) -> int:
        return self.max_staleness * (STARTUP_STEPS_PER_STEP_AHEAD if self.in_flight_update else 1)
