"""Three ways to generate a step's rows; `generation_of` takes the one that fits the run.

    OneProcess        this process has the engine, or drives those of a cluster
    EveryRanksEngine  each rank has an engine: row i of the plan runs on rank i mod n, as in the simulator
    FirstRanksEngines the first rank drives those of a cluster, and tells the others how the rows ended

Afterwards all ranks hold the same rows with the same tokens, and have asked the same schedule about the same ends.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from profiling import Profiler
from tppo.cluster.led import LedEngines
from tppo.config import RunConfig
from tppo.parallel.ranks import Ranks
from tppo.rollout.drive import engine_faults, requests_of, run_rollout, take_completion
from tppo.rollout.packing import packed, unpacked
from tppo.rollout.protocol import Completion, EngineError, RolloutEngine, Sampling
from tppo.rollout.rows import Row
from tppo.schedule import Schedule, StepPlan, StepState
from tppo.signals import nothing

T = TypeVar("T")
Records = list[dict[str, Any]]
"""The engines', of a rollout."""


class Generation(Protocol):
    """All ranks call it together."""

    def run(
        self, schedule: Schedule, plan: StepPlan, rows: Mapping[int, Row], between: Callable[[], None] = nothing
    ) -> Records:
        """Generate the plan's tokens into `rows`, which have begun their window. between: called between the ends of
        rows, on ranks that drive engines; what it raises ends the rollout, on all ranks. Raises EngineError, likewise.
        """
        ...

    def start(self, schedule: Schedule, plan: StepPlan, rows: Mapping[int, Row]) -> Callable[[], Records]:
        """Begin that in a thread, while training goes on. Call what comes back to wait for it; until then `rows` are
        the thread's."""
        ...


def generation_of(
    config: RunConfig, engine: RolloutEngine, sampling: Sampling, profiler: Profiler, ranks: Ranks
) -> Generation:
    most = config.rollout.max_response_tokens
    if isinstance(engine, LedEngines):
        return FirstRanksEngines(engine, sampling, most, profiler, ranks)
    if ranks.world > 1:
        return EveryRanksEngine(engine, sampling, most, profiler, ranks)
    return OneProcess(engine, sampling, most, profiler)


@dataclass(frozen=True)
class OneProcess:
    engine: RolloutEngine
    sampling: Sampling
    max_response_tokens: int
    profiler: Profiler

    def run(
        self, schedule: Schedule, plan: StepPlan, rows: Mapping[int, Row], between: Callable[[], None] = nothing
    ) -> Records:
        run_rollout(
            schedule, self.engine, plan, rows, self.max_response_tokens, self.sampling, self.profiler.trace,
            self.profiler.now, between,
        )  # fmt: skip
        return self.engine.take_records()

    def start(self, schedule: Schedule, plan: StepPlan, rows: Mapping[int, Row]) -> Callable[[], Records]:
        return in_a_thread(lambda: self.run(schedule, plan, rows))


@dataclass(frozen=True)
class EveryRanksEngine:
    engine: RolloutEngine
    sampling: Sampling
    max_response_tokens: int
    profiler: Profiler
    ranks: Ranks

    def run(
        self, schedule: Schedule, plan: StepPlan, rows: Mapping[int, Row], between: Callable[[], None] = nothing
    ) -> Records:
        """Each rank with its own engine and rows; then every rank hears of all ends, in the order of their times.
        Raises EngineError."""
        ranks, requests = self.ranks, requests_of(plan, rows)
        for place, request in enumerate(requests):
            rows[request.row].engine = place % ranks.world

        def generate() -> tuple[list[Completion], Records]:
            ended: list[Completion] = []
            with engine_faults(plan.step):
                self.engine.submit(requests[ranks.rank :: ranks.world], self.sampling)
                while completions := self.engine.run_until_a_row_ends():
                    ended += map(packed, completions)
                    between()
                return ended, self.engine.take_records()

        everyones = ranks.everyones(generate)
        completions = [completion for ended, _ in everyones for completion in ended]
        completions.sort(key=lambda completion: (completion.t_end, completion.row))
        if len(completions) != len(requests):
            raise EngineError(f"step {plan.step}: {len(requests) - len(completions)} rows have not come back")
        replayed(schedule, plan, completions, rows, self.max_response_tokens, self.profiler)
        return [{**record, "engine": rank} for rank, (_, records) in enumerate(everyones) for record in records]

    def start(self, schedule: Schedule, plan: StepPlan, rows: Mapping[int, Row]) -> Callable[[], Records]:
        raise AssertionError("ranks with engines of their own do not roll out ahead: start.py refuses the schedule")


@dataclass(frozen=True)
class Generated:
    """What the first rank's rollout gave. state: the schedule's after it."""

    plan: StepPlan
    completions: list[Completion]
    state: StepState
    records: Records


@dataclass(frozen=True)
class FirstRanksEngines:
    """The first rank rolls out as a process alone does; what ended then goes to the others, in its order, and they
    ask the schedule the same. So a thread of the first rank may roll out ahead: it talks to engines, not to ranks."""

    engines: LedEngines
    sampling: Sampling
    max_response_tokens: int
    profiler: Profiler
    ranks: Ranks

    def run(
        self, schedule: Schedule, plan: StepPlan, rows: Mapping[int, Row], between: Callable[[], None] = nothing
    ) -> Records:
        return self._told(schedule, plan, rows, lambda: self._generated(schedule, plan, rows, between))

    def start(self, schedule: Schedule, plan: StepPlan, rows: Mapping[int, Row]) -> Callable[[], Records]:
        if not self.ranks.main:
            return lambda: self._told(schedule, plan, rows, self._nothing)
        generated = in_a_thread(lambda: self._generated(schedule, plan, rows, nothing))
        return lambda: self._told(schedule, plan, rows, generated)

    def _generated(
        self, schedule: Schedule, plan: StepPlan, rows: Mapping[int, Row], between: Callable[[], None]
    ) -> Generated:
        pool = self.engines.pool
        state, completions = run_rollout(
            schedule, pool, plan, rows, self.max_response_tokens, self.sampling, self.profiler.trace,
            self.profiler.now, between,
        )  # fmt: skip
        return Generated(plan, list(map(packed, completions)), state, pool.take_records())

    def _told(
        self, schedule: Schedule, plan: StepPlan, rows: Mapping[int, Row], generated: Callable[[], Generated]
    ) -> Records:
        got = self.ranks.from_first(generated)
        assert got.plan == plan, "ranks have planned different steps"
        if not self.ranks.main:
            state = replayed(schedule, plan, got.completions, rows, self.max_response_tokens, self.profiler)
            assert state == got.state, "ranks have decided differently about the same ends of rows"
        return got.records

    def _nothing(self) -> Generated:
        raise AssertionError("only the first rank generates")


def replayed(
    schedule: Schedule, plan: StepPlan, completions: list[Completion], rows: Mapping[int, Row],
    max_response_tokens: int, profiler: Profiler,
) -> StepState:  # fmt: skip
    """Give the rows what was generated elsewhere, packed, and ask the schedule about each end, in this order."""
    state = StepState.of(plan)
    for done in completions:
        state = take_completion(
            schedule, state, unpacked(done), rows, max_response_tokens, profiler.trace, done.t_end
        )  # fmt: skip
    return state


def in_a_thread(work: Callable[[], T]) -> Callable[[], T]:
    """Its result, or what it raises, when it is called for. A daemon's thread, unlike an executor's: a run that is
    stopped at once does not wait for its rollout."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # it is raised where the result is taken
            future.set_exception(error)

    threading.Thread(target=run, name="rollout", daemon=True).start()
    return future.result
