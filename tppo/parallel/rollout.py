"""A step's rollout on several ranks: row i of the plan runs on rank i mod n, as in the simulator."""

from array import array
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from profiling.errors import ConfigError, RunError
from tppo.parallel.ranks import Ranks
from tppo.rollout.drive import Trace, engine_faults, requests_of, take_completion
from tppo.rollout.protocol import Completion, EngineError, RolloutEngine, Sampling
from tppo.rollout.rows import Row
from tppo.schedule import Schedule, StepPlan, StepState

LIVE_SCHEDULES = ("oversample", "asynchronous")
"""They stop some rows because of others, or roll out while a step trains: that takes one process that sees all."""


def check_schedule_fits(kind: str, ranks: Ranks) -> None:
    """Raises ConfigError for a schedule that needs to see all rows as they end."""
    if ranks.world > 1 and kind in LIVE_SCHEDULES:
        raise ConfigError(
            f'rollout.schedule = "{kind}": decides by what all engines do at the time, and {ranks.world} ranks roll '
            "out each for itself; use one process, or the algorithm's own schedule"
        )


def run_rollout_on_ranks(
    schedule: Schedule,
    engine: RolloutEngine,
    plan: StepPlan,
    rows: Mapping[int, Row],
    max_response_tokens: int,
    sampling: Sampling,
    trace: Trace,
    ranks: Ranks,
) -> list[dict[str, Any]]:
    """As `run_rollout`, each rank with its own engine and rows; then every rank hears of all ends, in the order of
    their times, and asks the schedule the same. Returns the engines' records, those of all ranks.

    Raises EngineError on every rank when one's engine fails.
    """
    requests = requests_of(plan, rows)
    for place, request in enumerate(requests):
        rows[request.row].engine = place % ranks.world

    def generate() -> tuple[list[Completion], list[dict[str, Any]]]:
        ended: list[Completion] = []
        with engine_faults(plan.step):
            engine.submit(requests[ranks.rank :: ranks.world], sampling)
            while completions := engine.run_until_a_row_ends():
                ended += map(_packed, completions)
            return ended, engine.take_records()

    everyones = ranks.everyones(generate)
    completions = [_unpacked(completion) for ended, _ in everyones for completion in ended]
    completions.sort(key=lambda completion: (completion.t_end, completion.row))
    if len(completions) != len(requests):
        raise EngineError(f"step {plan.step}: {len(requests) - len(completions)} rows have not come back")
    state = StepState.of(plan)
    for completion in completions:
        if state.ended:
            raise RunError(f"step {plan.step}: the schedule ended it early, which ranks apart cannot follow")
        state = take_completion(schedule, state, completion, rows, max_response_tokens, trace, completion.t_end)
    return [{**record, "engine": rank} for rank, (_, records) in enumerate(everyones) for record in records]


def _packed(completion: Completion) -> Completion:
    """Millions of tokens go from rank to rank: as numbers, not as objects."""
    return replace(completion, token_ids=array("q", completion.token_ids), log_probs=array("d", completion.log_probs))  # type: ignore[arg-type]


def _unpacked(completion: Completion) -> Completion:
    return replace(completion, token_ids=list(completion.token_ids), log_probs=list(completion.log_probs))
