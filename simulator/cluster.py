"""The training loop on a virtual clock: a SimPy process that rolls out, trains and starts again.

The schedule is the trainer's own object; it is told of every row that ends, in time order, and decides.
"""

import heapq
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import simpy

from profiling.errors import ConservationError
from simulator.costs import engine_costs, phase_s, resolve, reward_s
from simulator.engine import Engine, Job, Span
from simulator.experiment import Experiment
from simulator.workload import RowSource
from tppo.schedule import CarriedRow, Decision, Demand, Reason, RowEnd, StepPlan, StepState

ONE_INSTANT_S = 1e-12
"""Times that agree to this are one instant; its events go by (engine, row), so rounding never flips a dispatch."""

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


class TrainingRun:
    """One simulated run. `run()` plays it; the log and the rows tell what happened."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.schedule = experiment.make_schedule()
        self.costs = resolve(experiment.cost)
        self.source = RowSource(experiment.workload)
        self.env = simpy.Environment()
        self.log = Log()
        self.rows: dict[int, RowState] = {}
        """Rows by id that have not finished."""
        self.carried: list[CarriedRow] = []
        self.drawn_tokens = 0
        self.next_row = 0
        self.finished = 0
        self.version = 0

    def run(self) -> None:
        self.env.process(self.train())
        self.env.run()

    @property
    def wall_s(self) -> float:
        return float(self.env.now)

    def train(self) -> Process:
        """Step after step: plan, roll out, train, hand out the new weights."""
        for step in range(1, self.experiment.workload.steps + 1):
            plan = self.plan(step)
            yield from self.roll_out(plan)
            records = self.log.rows[-len(plan.admissions) :]
            yield from self.learn(step, records)
            yield self.env.timeout(self.costs.step_other_s)
            self.version += 1
        self.check_rows()

    def plan(self, step: int) -> StepPlan:
        workload = self.experiment.workload
        demand = Demand(step, workload.rows_per_step, self.next_row, workload.max_response_tokens)
        plan = self.schedule.plan_step(self.carried, demand)
        self.log.plans.append((self.wall_s, tuple(self.carried), demand, plan))
        fresh = [admission.row for admission in plan.admissions if admission.row not in self.rows]
        drawn = self.source.rows(self.next_row, len(fresh))
        for row, prompt, length in zip(
            fresh, drawn.prompt_tokens.tolist(), drawn.response_tokens.tolist(), strict=True
        ):
            self.rows[row] = RowState(row, prompt, length)
        self.drawn_tokens += int(drawn.response_tokens.sum())
        self.next_row += len(fresh)
        return plan

    def roll_out(self, plan: StepPlan) -> Process:
        """Every engine runs from event to event until the schedule ends the step."""
        start = self.wall_s
        engines = self.dispatch(plan)
        state, ended_step = StepState.of(plan), False
        pending: list[tuple[float, int, Span]] = []  # heap of (end, engine, span)
        for number, engine in enumerate(engines):
            self.go_on(number, engine, pending)
        while pending:
            instant = pending[0][0]
            yield self.env.timeout(max(0.0, instant - self.wall_s))
            due = []
            while pending and pending[0][0] <= instant + ONE_INSTANT_S:
                due.append(heapq.heappop(pending))
            due.sort(key=lambda entry: entry[1])
            for end, number, span in due:
                self.log.spans.append((plan.step, number, end - span.seconds, end, span))
                for job in engines[number].finish_span(span):
                    event = self.row_ends(plan.step, number, job, end)
                    decisions = self.schedule.on_row_end(state, event)
                    self.log.decisions.append((end, state, event, decisions))
                    self.apply(decisions)
                    ended_step = ended_step or any(d.action == "end_step" for d in decisions)
                    state = state.after(decisions)
            for _, number, _ in due:
                self.go_on(number, engines[number], pending)
        for engine in engines:
            engine.check_empty()
        if not ended_step:
            raise ConservationError(f"step {plan.step}: every engine is empty and the schedule has not ended the step")
        yield self.env.timeout(self.costs.rollout_other_s)
        self.log.phases.append(("rollout", plan.step, start, self.wall_s))

    def dispatch(self, plan: StepPlan) -> list[Engine]:
        """Fresh engines, their caches empty, with the step's rows in their queues."""
        settings = self.experiment.cluster
        shared: deque[Job] = deque()
        engines = [
            Engine(engine_costs(self.costs), settings.max_rows_per_engine, settings.kv_tokens_per_engine, shared)
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
                shared.append(job)
            else:
                engines[place % settings.engines].submit(job)
        return engines

    def go_on(self, number: int, engine: Engine, pending: list[tuple[float, int, Span]]) -> None:
        span = engine.next_span(self.wall_s)
        if span is not None:
            heapq.heappush(pending, (self.wall_s + span.seconds, number, span))

    def row_ends(self, step: int, engine: int, job: Job, end: float) -> RowEnd:
        row = self.rows[job.row]
        before = row.response_tokens
        row.response_tokens = job.context - row.prompt_tokens
        tokens = row.response_tokens - before
        finished = row.response_tokens >= row.length
        longest = self.experiment.workload.max_response_tokens
        reason: Reason = "budget" if not finished else "length" if row.length >= longest else "stop"
        assert job.t_start is not None
        record = RowRecord(
            step, row.row, engine, self.version, row.prompt_tokens, row.prompt_tokens + before, tokens, finished,
            job.preempted, job.t_start, end,
        )  # fmt: skip
        self.log.rows.append(record)
        return RowEnd(row.row, tokens, row.response_tokens, reason)

    def apply(self, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            if decision.row is None:
                continue
            if decision.action == "finish":
                del self.rows[decision.row]
                self.finished += 1

    def learn(self, step: int, records: Sequence[RowRecord]) -> Process:
        """The phases after the rollout, one after the other, in the order of the trainer's loop."""
        for name, seconds in self.phases_of(step, records):
            if seconds > 0:
                start = self.wall_s
                yield self.env.timeout(seconds)
                self.log.phases.append((name, step, start, self.wall_s))
        self.carried = sorted(
            (CarriedRow(r.row, self.rows[r.row].response_tokens) for r in records if not r.finished),
            key=lambda row: row.row,
        )

    def phases_of(self, step: int, records: Sequence[RowRecord]) -> Iterator[tuple[str, float]]:
        costs, trainer = self.costs, self.experiment.cluster.trainer
        processed = sum(record.context_before + record.tokens for record in records)
        finished = [record for record in records if record.finished]
        of_finished = sum(record.context_before + record.tokens for record in finished)
        if trainer == "colocated":
            yield "switch", costs.switch_s
        yield "reward", reward_s(costs, len(finished))
        if trainer != "none":
            for phase in ("logprob_forward", "reference_forward", "value_forward"):
                yield phase, phase_s(costs, phase, processed)
            yield "update_value", phase_s(costs, "update_value", of_finished)
            yield "update_policy", phase_s(costs, "update_policy", processed)
            yield "weight_sync", costs.weight_sync_s
        if trainer == "colocated":
            yield "switch", costs.switch_s
        if costs.evaluation_every and step % costs.evaluation_every == 0:
            yield "evaluation", costs.evaluation_s
        if costs.checkpoint_every and step % costs.checkpoint_every == 0:
            yield "checkpoint", costs.checkpoint_s

    def check_rows(self) -> None:
        """Rows in = finished + carried; every finished row has its whole length."""
        if self.next_row != self.finished + len(self.carried):
            raise ConservationError(
                f"rows: {self.next_row} in, {self.finished} finished and {len(self.carried)} carried: "
                f"{self.next_row - self.finished - len(self.carried)} are missing"
            )
        carried = {row.row: row.response_tokens for row in self.carried}
        left = sum(state.length for state in self.rows.values())
        generated = sum(record.tokens for record in self.log.rows)
        expected = self.drawn_tokens - left + sum(carried.values())
        if generated != expected:
            raise ConservationError(f"tokens: {generated} generated, {expected} accounted for by rows")
