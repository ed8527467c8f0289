"""Drives a schedule with an engine and the wall clock; every decision is logged. The simulator drives the same
schedule with a virtual clock."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from profiling.errors import ToolkitError, first_line
from tppo.rollout.protocol import Clock, Completion, EngineError, Request, RolloutEngine, Sampling
from tppo.rollout.rows import Row
from tppo.schedule import CarriedRow, Demand, Reason, RowEnd, Schedule, StepPlan, StepState
from tppo.schedule.log import plan_record, row_end_record
from tppo.signals import nothing

Trace = Callable[[Mapping[str, Any]], None]


def plan_step(schedule: Schedule, carried: Sequence[Row], demand: Demand, trace: Trace, clock: Clock) -> StepPlan:
    """The schedule's admissions for a step, logged."""
    waiting = [CarriedRow(row.row, len(row.response_ids)) for row in carried]
    plan = schedule.plan_step(waiting, demand)
    trace(plan_record(clock(), waiting, demand, plan))
    return plan


def run_rollout(
    schedule: Schedule,
    engine: RolloutEngine,
    plan: StepPlan,
    rows: Mapping[int, Row],
    max_response_tokens: int,
    sampling: Sampling,
    trace: Trace,
    clock: Clock,
    between: Callable[[], None] = nothing,
) -> tuple[StepState, list[Completion]]:
    """Generate the plan's tokens into `rows`, until the schedule ends the step; what still runs then is aborted and
    comes back with what it has. Rows have begun their window. Returns the schedule's state at the end, and what
    brought it there: every row's end, in order. between: called between ends; what it raises ends the rollout. Raises
    EngineError."""
    with engine_faults(plan.step):
        engine.submit(requests_of(plan, rows), sampling)
    state = StepState.of(plan)
    ended: list[Completion] = []
    while state.running:
        with engine_faults(plan.step):
            completions = engine.abort() if state.ended else engine.run_until_a_row_ends()
        if not completions:
            raise EngineError(
                f"step {plan.step}: the rollout engine is empty, but {state.running} rows have not ended"
            )
        for completion in completions:
            state = take_completion(schedule, state, completion, rows, max_response_tokens, trace, clock())
        ended += completions
        between()
    return state, ended


def requests_of(plan: StepPlan, rows: Mapping[int, Row]) -> list[Request]:
    """What the plan asks of an engine, in order."""
    admitted = [(rows[admission.row], admission.budget_tokens) for admission in plan.admissions]
    return [Request(row.row, row.token_ids, len(row.response_ids), budget) for row, budget in admitted]


def take_completion(
    schedule: Schedule,
    state: StepState,
    completion: Completion,
    rows: Mapping[int, Row],
    max_response_tokens: int,
    trace: Trace,
    now_s: float,
) -> StepState:
    """Give its row what it generated, and let the schedule decide, logged. Returns the step's state after that."""
    row = rows[completion.row]
    row.take(completion)
    reason = _reason(completion, row, max_response_tokens)
    event = RowEnd(row.row, row.window_tokens, len(row.response_ids), reason)
    decisions = schedule.on_row_end(state, event)
    trace(row_end_record(now_s, state, event, decisions))
    row.finished = any(d.action == "finish" and d.row == row.row for d in decisions)
    return state.after(decisions)


@contextmanager
def engine_faults(step: int | None = None) -> Iterator[None]:
    """Whatever an engine raises becomes an EngineError, one line; errors of ours go through."""
    try:
        yield
    except ToolkitError:
        raise
    except Exception as error:
        reason = first_line(error)
        where = "" if step is None else f"step {step}: "
        raise EngineError(f"{where}the rollout engine failed: {type(error).__name__}: {reason}") from error


def _reason(completion: Completion, row: Row, max_response_tokens: int) -> Reason:
    if completion.reason == "budget" and len(row.response_ids) >= max_response_tokens:
        return "length"
    return completion.reason
