"""One rollout: every engine runs from event to event until the schedule ends the step."""

import heapq
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import simpy

from profiling.errors import ConservationError
from simulator.costs import engine_costs
from simulator.engine import ONE_INSTANT_S, Engine, Job, Span
from simulator.experiment import AffineCostSettings, Experiment
from tppo.schedule import CarriedRow, Decision, Demand, Reason, RowEnd, Schedule, StepPlan, StepState

Process = Generator[simpy.Event, None, None]


@dataclass(slots=True)
class RowState:
    """A row over its whole life."""

    row: int
    prompt_tokens: int
    length: int
    """Tokens of its whole response."""
    response_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RowRecord:
    step: int
    row: int
    engine: int
    policy_version: int
    prompt_tokens: int
    context_before: int
    tokens: int
    finished: bool
    preempted: int
    t_start: float
    t_end: float


@dataclass
class Log:
    """Everything that happened, in order."""

    phases: list[tuple[str, int, float, float]] = field(default_factory=list)
    spans: list[tuple[int, int, float, float, Span]] = field(default_factory=list)
    """(step, engine, t_start, t_end, span)"""
    rows: list[RowRecord] = field(default_factory=list)
    plans: list[tuple[float, tuple[CarriedRow, ...], Demand, StepPlan]] = field(default_factory=list)
    decisions: list[tuple[float, StepState, RowEnd, tuple[Decision, ...]]] = field(default_factory=list)
    _first: dict[int, tuple[int, int]] = field(default_factory=dict)

    def begin(self, step: int, rows: int) -> None:
        """The next `rows` records are those of `step`."""
        self._first[step] = (len(self.rows), len(self.rows) + rows)

    def rows_of(self, step: int) -> Sequence[RowRecord]:
        first, end = self._first[step]
        return self.rows[first:end]


class Rollout:
    """The rollout of one step. `run` plays it into the log; `rows` are brought up to date."""

    def __init__(
        self,
        env: simpy.Environment,
        experiment: Experiment,
        costs: AffineCostSettings,
        schedule: Schedule,
        log: Log,
        rows: dict[int, RowState],
        policy_version: int,
    ) -> None:
        self.env, self.log, self.rows = env, log, rows
        self.settings, self.costs, self.schedule = experiment.cluster, costs, schedule
        self.longest = experiment.workload.max_response_tokens
        self.version = policy_version
        self._shared: deque[Job] = deque()
        self._engines: list[Engine] = []
        self._stopped_at: list[float] = []
        """When each engine's last span ended."""

    def run(self, plan: StepPlan) -> Process:
        start = self.env.now
        self.log.begin(plan.step, len(plan.admissions))
        self.dispatch(plan)
        self._stopped_at = [start] * len(self._engines)
        self._state = StepState.of(plan)
        pending: list[tuple[float, int, float, Span]] = []  # heap of (end, engine, start, span)
        for number in range(len(self._engines)):
            self.go_on(number, pending)
        while pending:
            instant = pending[0][0]
            yield self.env.timeout(max(0.0, instant - self.env.now))
            due = []
            while pending and pending[0][0] <= instant + ONE_INSTANT_S:
                due.append(heapq.heappop(pending))
            was_over = self._state.ended
            for end, number, began, span in sorted(due, key=lambda entry: entry[1]):
                self.log.spans.append((plan.step, number, began, end, span))
                self._stopped_at[number] = end
                for job in self._engines[number].finish_span(span):
                    self.row_ends(number, job, end)
            if not self._state.ended:
                for _, number, _, _ in due:
                    self.go_on(number, pending)
            elif not was_over:
                pending = self.cut(pending, instant)
        self.abort_what_is_left()
        for engine in self._engines:
            engine.check_empty()
        if not self._state.ended:
            raise ConservationError(f"step {plan.step}: every engine is empty and the schedule has not ended the step")
        yield self.env.timeout(self.costs.rollout_other_s)
        self.log.phases.append(("rollout", plan.step, start, self.env.now))

    def dispatch(self, plan: StepPlan) -> None:
        """Fresh engines, their caches empty, with the step's rows in their queues."""
        settings = self.settings
        self._engines = [
            Engine(engine_costs(self.costs), settings.max_rows_per_engine, settings.kv_tokens_per_engine, self._shared)
            for _ in range(settings.engines)
        ]
        capacity = settings.max_rows_per_engine
        for place, admission in enumerate(plan.admissions):
            row = self.rows[admission.row]
            tokens = min(admission.budget_tokens, row.length - row.response_tokens)
            job = Job(row.row, row.prompt_tokens + row.response_tokens, tokens, resumed=row.response_tokens > 0)
            # A shared queue deals one row after the other to the engines until their slots are taken; the rest wait.
            shares = settings.dispatch == "shared_queue"
            if shares and capacity is not None and place >= capacity * settings.engines:
                self._shared.append(job)
            else:
                self._engines[place % settings.engines].submit(job)

    def go_on(self, number: int, pending: list[tuple[float, int, float, Span]]) -> None:
        now = self.env.now
        span = self._engines[number].next_span(now)
        if span is not None:
            heapq.heappush(pending, (now + span.seconds, number, now, span))

    def cut(
        self, pending: list[tuple[float, int, float, Span]], instant: float
    ) -> list[tuple[float, int, float, Span]]:
        """The step is over: every engine ends the iteration at hand, and no other begins."""
        shorter = []
        for _, number, began, span in pending:
            part = self._engines[number].cut(span, instant - began)
            shorter.append((began + part.seconds, number, began, part))
        heapq.heapify(shorter)
        return shorter

    def abort_what_is_left(self) -> None:
        """Rows that still ran or waited when the step was over, by id: they carry over with what they have."""
        left = [(job, number) for number, engine in enumerate(self._engines) for job in engine.abort()]
        left += [(job, 0) for job in self._shared]
        self._shared.clear()
        for job, number in sorted(left, key=lambda entry: entry[0].row):
            self.row_ends(number, job, self._stopped_at[number], aborted=True)

    def row_ends(self, engine: int, job: Job, end: float, *, aborted: bool = False) -> None:
        """Record what the row did, and let the schedule decide."""
        row, step = self.rows[job.row], self._state.step
        before = row.response_tokens
        row.response_tokens = job.context - row.prompt_tokens
        tokens = row.response_tokens - before
        finished = row.response_tokens >= row.length
        reason: Reason = "budget"
        if finished:
            reason = "length" if row.length >= self.longest else "stop"
        elif aborted:
            reason = "aborted"
        if job.t_start is None:  # it never ran
            end = self.env.now
        start = end if job.t_start is None else job.t_start
        record = RowRecord(
            step, row.row, engine, self.version, row.prompt_tokens, row.prompt_tokens + before, tokens, finished,
            job.preempted, start, end,
        )  # fmt: skip
        self.log.rows.append(record)
        event = RowEnd(row.row, tokens, row.response_tokens, reason)
        decisions = self.schedule.on_row_end(self._state, event)
        self.log.decisions.append((self.env.now, self._state, event, decisions))
        self._state = self._state.after(decisions)
