"""Drives a schedule with an engine and the wall clock; every decision is logged. The simulator drives the same
schedule with a virtual clock."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from tppo.rollout.protocol import Clock, Completion, Request, RolloutEngine
from tppo.rollout.rows import Row
from tppo.schedule import CarriedRow, Decision, Demand, Reason, RowEnd, Schedule, StepPlan, StepState

Trace = Callable[[Mapping[str, Any]], None]


def plan_step(schedule: Schedule, carried: list[Row], demand: Demand, trace: Trace, clock: Clock) -> StepPlan:
    """The schedule's admissions for a step, logged."""
    waiting = [CarriedRow(row.row, len(row.response_ids)) for row in carried]
    plan = schedule.plan_step(waiting, demand)
    trace(
        {
            "type": "plan_step",
            "step": demand.step,
            "t": clock(),
            "carried": [asdict(row) for row in waiting],
            "demand": asdict(demand),
            "admissions": [asdict(admission) for admission in plan.admissions],
        }
    )
    return plan


def run_rollout(
    schedule: Schedule,
    engine: RolloutEngine,
    plan: StepPlan,
    rows: Mapping[int, Row],
    max_response_tokens: int,
    trace: Trace,
    clock: Clock,
) -> None:
    """Generate the plan's tokens into `rows`, until the schedule ends the step."""
    requests = []
    for admission in plan.admissions:
        row = rows[admission.row]
        row.window_start = len(row.response_ids)
        token_ids = [*row.prompt_ids, *row.response_ids]
        requests.append(Request(row.row, token_ids, len(row.response_ids), admission.budget_tokens))
    engine.submit(requests)
    state = StepState.of(plan)
    ended = False
    while not ended:
        for completion in engine.run_until_a_row_ends():
            row = rows[completion.row]
            event = _take(completion, row, max_response_tokens)
            decisions = schedule.on_row_end(state, event)
            _log(trace, clock(), state, event, decisions)
            row.finished = any(d.action == "finish" and d.row == row.row for d in decisions)
            ended = ended or any(d.action == "end_step" for d in decisions)
            state = state.after(decisions)


def _take(completion: Completion, row: Row, max_response_tokens: int) -> RowEnd:
    row.response_ids += completion.token_ids
    row.log_probs += completion.log_probs
    row.t_start, row.t_end = completion.t_start, completion.t_end
    length = len(row.response_ids)
    if completion.reason == "stop":
        return RowEnd(row.row, row.window_tokens, length, "stop")
    reason: Reason = "length" if length >= max_response_tokens else "budget"
    return RowEnd(row.row, row.window_tokens, length, reason)


def _log(trace: Trace, t: float, state: StepState, event: RowEnd, decisions: tuple[Decision, ...]) -> None:
    trace(
        {
            "type": "row_end",
            "step": state.step,
            "t": t,
            "running": state.running,
            "event": asdict(event),
            "decisions": [asdict(decision) for decision in decisions],
        }
    )
