"""Start more rows than a step needs, stop when enough have finished, continue the rest in the next step
(APRIL, arXiv 2509.18521).

Symbols: N = rows that a step trains on, f = factor, L = maximum response length.
Cost: a step lasts until the N-th of ceil(f N) rows has finished, so the tail is never waited for; the prefix of a
continued row is prefilled again. Staleness: the tokens of a continued row come from several policies, hence
truncated importance sampling; a row that needs k steps is k - 1 versions behind at its beginning. Length bias: short
rows finish first, so the first steps train on short ones; long rows are never dropped, and run first in every later
step, so the mean length trained approaches the mean drawn. With f = 1 this is `Synchronous`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tppo.schedule.protocol import CarriedRow, Demand, Schedule, StepPlan, fill_with_fresh_rows

STARTUP_STEPS = 10
"""Steps until as many tokens are carried in as out, within a few per cent, for lognormal lengths and factors up to 2
(tests/tppo/test_schedules.py)."""


@dataclass(frozen=True, slots=True)
class Oversample(Schedule):
    factor: float
    """Rows started / rows wanted."""

    kind: ClassVar[str] = "oversample"

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor = {self.factor}: must be at least 1, and finite")

    def plan_step(self, carried: Sequence[CarriedRow], demand: Demand) -> StepPlan:
        admissions = fill_with_fresh_rows(carried, demand, self.rows_started(demand.rows), max_new_tokens=None)
        return StepPlan(demand.step, admissions, rows_wanted=demand.rows)

    def rows_started(self, rows_wanted: int) -> int:
        # 1.1 x 10 is 11.000000000000002 in floating point, and must start 11 rows.
        return math.ceil(round(self.factor * rows_wanted, 9))

    def startup_steps(self, max_response_tokens: int) -> int:
        return 0 if self.factor == 1 else STARTUP_STEPS
