"""One rollout: every engine runs from event to event until the schedule ends the step."""

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from profiling.errors import ConservationError
from simulator.closed_form import engine_columns, in_order_of_events
from simulator.costs import Costs
from simulator.engine import ONE_INSTANT_S, Engine, Job, Span
from simulator.experiment import Experiment
from simulator.kv import BLOCK_TOKENS, blocks_for
from simulator.log import REASONS, SPAN_COLUMNS, Columns, RowRecord, columns_of, compact
from tppo.schedule import Reason, RowEnd, Schedule, StepPlan, StepState


@dataclass(slots=True)
class RowState:
    """A row over its whole life."""

    row: int
    prompt_tokens: int
    length: int
    """Tokens of its whole response."""
    response_tokens: int = 0
    engine: int | None = None
    """Where it last ran."""


class Rollout:
    """The rollout of one step. `run` plays it and brings `rows` up to date; nothing outside can change its course, so
    it keeps a clock of its own."""

    def __init__(
        self,
        experiment: Experiment,
        costs: Costs,
        schedule: Schedule,
        rows: dict[int, RowState],
        policy_version: int,
        now_s: float,
        training_s: Callable[[Sequence[RowRecord]], float] | None = None,
    ) -> None:
        """training_s: where rows run on while the step trains (`in_flight`), the seconds that it takes to train, given
        the records up to the moment when the step had its rows."""
        self.rows, self.settings, self.costs, self.schedule = rows, experiment.cluster, costs, schedule
        self.samples = experiment.workload.samples_per_prompt
        self.longest = experiment.workload.max_response_tokens
        self.version = policy_version
        self.now = now_s
        self.ready_at = math.inf
        """When the step had the rows that it trains on."""
        self._over_at = math.inf
        """When engines end the iteration at hand and begin no other."""
        self._training_s = training_s
        self._shared: deque[Job] = deque()
        self._engines: list[Engine] = []
        self._stopped_at: list[float] = []
        """When each engine's last span ended."""
        self._records: list[RowRecord] = []
        self._spans: list[tuple] = []  # SPAN_COLUMNS

    def run(self, plan: StepPlan) -> tuple[Columns, Columns]:
        """Rows and spans of the step; afterwards `now` is its end."""
        self.dispatch(plan)
        self._state = StepState.of(plan)
        if self.nothing_waits(plan):
            return self.run_in_closed_form()
        return self.run_from_event_to_event()

    def run_from_event_to_event(self) -> tuple[Columns, Columns]:
        self._stopped_at = [self.now] * len(self._engines)
        pending: list[tuple[float, int, float, Span]] = []  # heap of (end, engine, start, span)
        self.note_whether_it_has_its_rows()
        for number in range(len(self._engines)):
            if self.now < self._over_at - ONE_INSTANT_S:
                self.go_on(number, pending)
        was_cut = False
        while pending:
            if not was_cut and pending[0][0] > self._over_at + ONE_INSTANT_S:
                pending, was_cut = self.cut(pending, self._over_at), True
            instant = pending[0][0]
            self.now = max(self.now, instant)
            due = [heapq.heappop(pending)]
            while pending and pending[0][0] <= instant + ONE_INSTANT_S:
                due.append(heapq.heappop(pending))
            due.sort(key=_engine_of)
            for end, number, began, span in due:
                self._spans.append((number, *span, began, end))
                self._stopped_at[number] = end
                for job in self._engines[number].finish_span(span):
                    self.row_ends(number, job, end)
            self.note_whether_it_has_its_rows()
            over = instant >= self._over_at - ONE_INSTANT_S
            for _, number, _, _ in due:
                if not over or self._engines[number].in_an_iteration:
                    self.go_on(number, pending)
        self.check_it_ended()
        self.abort_what_is_left()
        for engine in self._engines:
            engine.check_empty()
        return columns_of(self._records, RowRecord._fields), columns_of(self._spans, SPAN_COLUMNS)

    def note_whether_it_has_its_rows(self) -> None:
        if self._state.ended and self.ready_at == math.inf:
            self.ready_at = self.now
            self._over_at = self.now + (self._training_s(self._records) if self._training_s else 0.0)

    def check_it_ended(self) -> None:
        """Nothing runs any more: the step must have its rows, or it stalled. Raises ConservationError."""
        if self._state.ended:
            return
        waiting = [*self._shared, *(job for engine in self._engines for job in engine.queue)]
        free = ", ".join(f"{engine.kv.free:.0f}" for engine in self._engines[:8])
        held = "".join(f"; row {job.row} waits for {blocks_for(job.context)} blocks" for job in waiting[:5])
        raise ConservationError(
            f"step {self._state.step}: the rollout stalled at {self.now:.6g} s: no engine runs a row, "
            f"{self._state.finished} of {self._state.rows_wanted} rows wanted have finished, {len(waiting)} wait, "
            f"and schedule '{self.schedule.kind}' has not ended the step (free KV blocks by engine: {free}{held})"
        )

    def nothing_waits(self, plan: StepPlan) -> bool:
        """Every engine has a slot and memory for all of its rows, and all of them run to their ends."""
        limit = self.settings.max_rows_per_engine
        return (
            self.settings.prefill == "together"
            and not self.settings.prefix_reuse
            and not self._shared
            and (limit is None or all(len(engine.queue) <= limit for engine in self._engines))
            and all(engine.fits_at_once() for engine in self._engines)
            and plan.rows_wanted == len(plan.admissions)
            and not self.schedule.in_flight
        )

    def run_in_closed_form(self) -> tuple[Columns, Columns]:
        """The same without a loop over events; the schedule is told of every row all the same."""
        jobs: list[Job] = []
        engines, ends, spans = [], [], []
        for number, engine in enumerate(self._engines):
            if engine.queue:
                own = list(engine.queue)
                engine.queue.clear()
                rows, its_spans = engine_columns(number, own, engine.costs, self.now)
                jobs += [own[place] for place in rows["place"].tolist()]
                ends.append(rows["t_end"])
                engines.append(np.full(len(own), number))
                spans.append(its_spans)
        engine_of, t_end = np.concatenate(engines), np.concatenate(ends)
        order, instants = in_order_of_events(t_end, engine_of, np.array([job.row for job in jobs]))
        rows = self.record_ends([jobs[place] for place in order.tolist()], engine_of[order], t_end[order], instants)
        together = {name: np.concatenate([part[name] for part in spans]) for name in spans[0]}
        by_end, _ = in_order_of_events(together["t_end"], together["engine"], np.arange(len(together["t_end"])))
        self.now = float(together["t_end"].max())
        self.check_it_ended()
        ordered = compact({name: column[by_end] for name, column in together.items()})
        return rows, ordered

    def record_ends(self, jobs: list[Job], engine: np.ndarray, t_end: np.ndarray, instants: np.ndarray) -> Columns:
        """As `row_ends`, for rows that all run from the start of the rollout to their budget, in the order of their
        ends."""
        states = [self.rows[job.row] for job in jobs]
        tokens = np.array([job.left for job in jobs])
        prompt = np.array([state.prompt_tokens for state in states])
        length = np.array([state.length for state in states])
        response = np.array([state.response_tokens for state in states]) + tokens
        finished = response >= length
        ended = np.where(length >= self.longest, REASONS.index("length"), REASONS.index("stop"))
        reason = np.where(finished, ended, REASONS.index("budget"))
        state, told = self._state, self.schedule.on_row_end
        for row, new, whole, why in zip(states, tokens.tolist(), response.tolist(), reason.tolist(), strict=True):
            row.response_tokens = whole
            state = state.after(told(state, RowEnd(row.row, new, whole, REASONS[why])))
        self._state = state
        nothing = np.zeros(len(jobs))
        columns = {
            "row": np.array([job.row for job in jobs]), "engine": engine, "policy_version": nothing + self.version,
            "prompt_tokens": prompt, "context_before": prompt + response - tokens, "tokens": tokens,
            "finished": finished, "preempted": nothing, "reason": reason, "t_start": nothing + self.now,
            "t_end": t_end, "t_decided": instants,
        }  # fmt: skip
        return compact(columns)

    def dispatch(self, plan: StepPlan) -> None:
        """Fresh engines, their caches empty, with the step's rows in their queues."""
        settings = self.settings
        chunk = settings.chunk_tokens if settings.prefill == "chunked" else None
        limits = settings.max_rows_per_engine, self.costs.kv_tokens
        self._engines = [Engine(self.costs.engine, *limits, self._shared, chunk) for _ in range(settings.engines)]
        rows = self.rows
        jobs: list[Job] = []
        for number, done, budget in plan.admissions:
            row = rows[number]
            jobs.append(Job(number, row.prompt_tokens + done, min(budget, row.length - done), done > 0))
        if settings.prefix_reuse:
            for job in jobs:
                job.group = job.row // self.samples
                job.shared_blocks = rows[job.row].prompt_tokens // BLOCK_TOKENS
        if self.schedule.in_flight:  # where it ran before the weights came
            ran = [job for job in jobs if rows[job.row].engine is not None]
            jobs = [job for job in jobs if rows[job.row].engine is None]
            for job in ran:
                self._engines[rows[job.row].engine or 0].submit(job)
        self.deal(jobs)

    def deal(self, jobs: list[Job]) -> None:
        """One to each engine in turn, or all of a prompt; with a shared queue to the engine that has the fewest, until
        the slots are taken: the rest wait for the first that is free."""
        if self.settings.dispatch != "shared_queue":
            engines = len(self._engines)
            for place, job in enumerate(jobs):
                if self.settings.dispatch == "by_prompt":
                    place = job.row // self.samples
                self._engines[place % engines].queue.append(job)
            return
        capacity = self.settings.max_rows_per_engine or math.inf
        loads = [(len(engine.queue), number) for number, engine in enumerate(self._engines)]
        heapq.heapify(loads)
        for job in jobs:
            load, number = loads[0]
            if load >= capacity:
                self._shared.append(job)
            else:
                self._engines[number].submit(job)
                heapq.heapreplace(loads, (load + 1, number))

    def go_on(self, number: int, pending: list[tuple[float, int, float, Span]]) -> None:
        now = self.now
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
        row = self.rows[job.row]
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
            end = self.now
        else:
            row.engine = engine
        start = end if job.t_start is None else job.t_start
        self._records.append(
            RowRecord(
                row.row, engine, self.version, row.prompt_tokens, row.prompt_tokens + before, tokens, finished,
                job.preempted, REASONS.index(reason), start, end, self.now,
            )
        )  # fmt: skip
        event = RowEnd(row.row, tokens, row.response_tokens, reason)
        self._state = self._state.after(self.schedule.on_row_end(self._state, event))


def _engine_of(entry: tuple[float, int, float, Span]) -> int:
    return entry[1]
