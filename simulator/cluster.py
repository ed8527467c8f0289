"""The training loop on a virtual clock: two SimPy processes, one that rolls out and one that trains.

The schedule is the trainer's own object; it is told of every row that ends, in time order, and decides. A step's
rollout begins when the training of the step `1 + schedule.steps_ahead` before it is done. Where steps run ahead
(asynchronous), engines take the newest weights between two rollouts; the trainer gets the rows of the rollout before
once they have, so that with one step ahead rollout and training keep step, as in our trainer. Where rows are in
flight, a step's rollout lasts until the step has trained, on the rows that finished first.
"""

from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import simpy

from profiling.errors import ConservationError
from simulator.costs import Costs, graded_at, phase_s, resolve, reward_s
from simulator.experiment import Experiment
from simulator.failures import Outage, draw_outages, insert_outages
from simulator.log import Log, RowRecord, StepLog
from simulator.rollout import Rollout, RowState
from simulator.workload import RowSource
from tppo.schedule import CarriedRow, Demand, StepPlan

Process = Generator[simpy.Event, None, None]


class Finished(NamedTuple):
    """A row that has finished."""

    row: int
    context: int
    """Tokens of its prompt and response."""
    t_end: float


class Work(NamedTuple):
    """What rows with their whole context take to process."""

    tokens: int
    pairs: int
    """Of a query and a key: n (n + 1) / 2 for a row of n tokens."""

    @classmethod
    def of(cls, contexts: np.ndarray) -> "Work":
        return cls(int(contexts.sum()), int((contexts * (contexts + 1) // 2).sum()))


class TrainingRun:
    """One simulated run. `run()` plays it; the log and the rows tell what happened."""

    def __init__(self, experiment: Experiment, *, skipped_steps: int = 0, costs: Costs | None = None) -> None:
        """skipped_steps: played without a clock (`skip`), where the schedule allows it. costs: instead of the
        experiment's own."""
        self.experiment = experiment
        self.skipped_steps = skipped_steps
        self.skipped_tokens = 0
        self.schedule = experiment.make_schedule()
        self.all_costs = costs or resolve(experiment)
        self.costs = self.all_costs.phases
        self.source = RowSource(experiment.workload)
        self.env = simpy.Environment()
        self.log = Log()
        self.rows: dict[int, RowState] = {}
        """Rows by id that have not finished."""
        self.carried: list[CarriedRow] = []
        self.drawn_tokens = 0
        self.next_row = 0
        self.finished = 0
        self.trained = 0
        """Steps that have been trained on, which is the version of the newest policy."""
        self.version = 0
        """Of the policy that the engines have."""
        self.outages: list[Outage] = []
        """Put in when everything else is known."""
        self.down_s = 0.0
        self.trained_at: dict[int, int] = {}
        """In flight: row -> the step that it trained, which may come after the one in which it finished."""
        self._ready: list[Finished] = []
        """In flight: rows that have finished and wait for their step, in that order."""
        self._batches: dict[int, list[Finished]] = {}
        """In flight: what each step trains on."""
        steps = range(experiment.workload.steps + 1)
        self._handed_over: list[simpy.Event] = [self.env.event() for _ in steps]
        """By step: its rows have been given to the trainer."""
        self._trained_on: list[simpy.Event] = [self.env.event() for _ in steps]

    def run(self) -> None:
        self.skip()
        self.env.process(self.roll_out_in_flight() if self.schedule.in_flight else self.roll_out())
        self.env.process(self.train())
        self.env.run()
        self.check_rows()
        if self.costs.mtbf_hours is not None:
            self.outages = draw_outages(
                self.log, self.wall_s, mtbf_hours=self.costs.mtbf_hours, restart_s=self.costs.restart_s,
                seed=self.experiment.workload.seed,
            )  # fmt: skip
            self.down_s = insert_outages(self.log, self.outages)

    @property
    def wall_s(self) -> float:
        return float(self.env.now) + self.down_s

    def skip(self) -> None:
        """Steps whose rows all run to their ends or budgets, whatever the time: what they leave behind is known
        without it. They are in no record."""
        for step in range(1, self.skipped_steps + 1):
            plan = self.plan(step)
            if plan.rows_wanted != len(plan.admissions) or self.schedule.steps_ahead or self.schedule.in_flight:
                raise ValueError(f"schedule '{self.schedule.kind}': its steps depend on time and cannot be skipped")
            ran = [admission.row for admission in plan.admissions]
            for row, _, budget in plan.admissions:
                state = self.rows[row]
                tokens = min(budget, state.length - state.response_tokens)
                state.response_tokens += tokens
                self.skipped_tokens += tokens
            done = [row for row in ran if self.rows[row].response_tokens == self.rows[row].length]
            for row in done:
                del self.rows[row]
            self.finished += len(done)
            self.carry(set(ran) - set(done), ran=set(ran))
            del self.log.steps[step]
        self.trained = self.version = self.skipped_steps
        if self.skipped_steps:
            self._trained_on[self.skipped_steps].succeed()

    def carry(self, left: set[int], *, ran: set[int]) -> None:
        """Rows that a step left unfinished, and those that waited through it."""
        waited = {row.row for row in self.carried if row.row not in ran}
        self.carried = [CarriedRow(row, self.rows[row].response_tokens) for row in sorted(left | waited)]

    def roll_out(self) -> Process:
        """Rollout after rollout, as far ahead of training as the schedule allows."""
        ahead = self.schedule.steps_ahead
        steps = self.experiment.workload.steps
        for step in range(self.skipped_steps + 1, steps + 1):
            if step - 1 - ahead >= 1:
                yield self._trained_on[step - 1 - ahead]
            if ahead and step > 1:
                yield from self.take_newest_weights()
                self._handed_over[step - 1].succeed()
            plan = self.plan(step)
            start = self.wall_s
            rollout = Rollout(self.experiment, self.all_costs, self.schedule, self.rows, self.version, start)
            self.log.steps[step].rows, self.log.steps[step].spans = rollout.run(plan)
            yield self.env.timeout(rollout.now - start + self.costs.rollout_other_s)
            self.log.phases.append(("rollout", step, start, self.wall_s))
            self.after_rollout(step)
            if not ahead:
                self._handed_over[step].succeed()
        if ahead:
            if steps - ahead >= 1:
                yield self._trained_on[steps - ahead]
            yield from self.take_newest_weights()
            self._handed_over[steps].succeed()

    def roll_out_in_flight(self) -> Process:
        """Rollout after rollout, each until its step has trained and the engines have the new weights."""
        for step in range(1, self.experiment.workload.steps + 1):
            plan = self.plan(step)
            start = self.wall_s
            training_s = partial(self.take_batch, step)
            rollout = Rollout(
                self.experiment, self.all_costs, self.schedule, self.rows, self.version, start, training_s
            )
            self.log.steps[step].rows, self.log.steps[step].spans = rollout.run(plan)
            self.env.process(self.hand_over(step, after_s=rollout.ready_at - start))
            yield self.env.timeout(rollout.now - start + self.costs.rollout_other_s)
            self.log.phases.append(("rollout", step, start, self.wall_s))
            self._ready += _finished(self.log.steps[step].records())
            self._ready = [row for row in self._ready if row.row not in self.trained_at]
            self.after_rollout(step)
            yield self._trained_on[step]
            yield from self.take_newest_weights()

    def take_batch(self, step: int, records: Sequence[RowRecord]) -> float:
        """The rows that finished first are the step's; seconds to train on them."""
        batch = [*self._ready, *_finished(records)][: self.experiment.workload.rows_per_step]
        self._batches[step] = batch
        self.trained_at |= {row.row: step for row in batch}
        return sum(seconds for _, seconds in self.phases_of(step)) + self.costs.step_other_s

    def hand_over(self, step: int, *, after_s: float) -> Process:
        yield self.env.timeout(after_s)
        self._handed_over[step].succeed()

    def train(self) -> Process:
        """Step after step: wait for its rows, train, let the rollout that waited for it begin."""
        for step in range(self.skipped_steps + 1, self.experiment.workload.steps + 1):
            yield self._handed_over[step]
            yield from self.spend(step, self.phases_of(step))
            in_turns = not self.schedule.steps_ahead and not self.schedule.in_flight
            if in_turns:
                yield from self.spend(step, self.between_steps(step))
            yield self.env.timeout(self.costs.step_other_s)
            self.trained = step
            if in_turns:
                self.version = step
            self._trained_on[step].succeed()

    def take_newest_weights(self) -> Process:
        """Between two rollouts that run ahead or are in flight: what a step ends with otherwise, for the last step
        trained on."""
        step = self.trained
        if step == self.version:
            return
        yield from self.spend(step, self.between_steps(step))
        self.version = step

    def plan(self, step: int) -> StepPlan:
        workload = self.experiment.workload
        demand = Demand(step, workload.rows_per_step, self.next_row, workload.max_response_tokens)
        plan = self.schedule.plan_step(self.carried, demand)
        waiting = np.array(self.carried, dtype=np.int64).reshape(len(self.carried), 2)
        self.log.steps[step] = StepLog(step, self.wall_s, waiting, demand)
        fresh = [admission.row for admission in plan.admissions if admission.row not in self.rows]
        drawn = self.source.rows(self.next_row, len(fresh))
        for row, prompt, length in zip(
            fresh, drawn.prompt_tokens.tolist(), drawn.response_tokens.tolist(), strict=True
        ):
            self.rows[row] = RowState(row, prompt, length)
        self.drawn_tokens += int(drawn.response_tokens.sum())
        self.next_row += len(fresh)
        return plan

    def after_rollout(self, step: int) -> None:
        """Finished rows leave, the others carry over."""
        rows = self.log.steps[step].rows
        done = rows["finished"].astype(bool)
        for row in rows["row"][done].tolist():
            del self.rows[row]
        self.finished += int(done.sum())
        self.carry(set(rows["row"][~done].tolist()), ran=set(rows["row"].tolist()))

    def spend(self, step: int, phases: Iterator[tuple[str, float]]) -> Process:
        for name, seconds in phases:
            if seconds > 0 or name == "checkpoint":  # a run restarts from one that took no time all the same
                start = self.wall_s
                yield self.env.timeout(seconds)
                self.log.phases.append((name, step, start, self.wall_s))

    def phases_of(self, step: int) -> Iterator[tuple[str, float]]:
        """The phases after a rollout, one after the other, in the order of the trainer's loop."""
        costs, trainer = self.costs, self.experiment.cluster.trainer
        finished_at, of_finished, processed = self.batch_of(step)
        if trainer == "colocated":
            yield "switch", costs.switch_s
        if self.experiment.cluster.overlap_reward:
            began = max(self.wall_s, *finished_at) if finished_at else self.wall_s
            yield "reward", max(0.0, graded_at(costs, finished_at) - began)
        else:
            yield "reward", reward_s(costs, len(finished_at))
        if trainer != "none":
            for phase in ("logprob_forward", "reference_forward", "value_forward"):
                yield phase, phase_s(costs, phase, *processed)
            yield "update_value", phase_s(costs, "update_value", *of_finished)
            yield "update_policy", phase_s(costs, "update_policy", *processed)

    def batch_of(self, step: int) -> tuple[list[float], Work, Work]:
        """What the step trains on: when its finished rows ended, ascending; what they take to process; and all that it
        processes."""
        if self.schedule.in_flight:
            batch = self._batches[step]
            work = Work.of(np.array([row.context for row in batch], dtype=np.int64))
            return sorted(row.t_end for row in batch), work, work
        rows = self.log.steps[step].rows
        done = rows["finished"].astype(bool)
        context = (rows["context_before"] + rows["tokens"]).astype(np.int64)
        of_finished = Work.of(context[done])
        processed = of_finished if self.experiment.trains_whole_responses else Work.of(context)
        return np.sort(rows["t_end"][done]).tolist(), of_finished, processed

    def between_steps(self, step: int) -> Iterator[tuple[str, float]]:
        """What the engines take part in, between the training of `step` and a rollout."""
        costs, trainer = self.costs, self.experiment.cluster.trainer
        if trainer != "none":
            yield "weight_sync", costs.weight_sync_s
        if trainer == "colocated":
            yield "switch", costs.switch_s
        if costs.evaluation_every and step % costs.evaluation_every == 0:
            yield "evaluation", costs.evaluation_s
        if costs.checkpoint_every and step % costs.checkpoint_every == 0:
            yield "checkpoint", costs.checkpoint_s

    def check_rows(self) -> None:
        """Every step was trained on. Rows in = finished + carried; every finished row has its whole length.
        Raises ConservationError."""
        if self.trained != self.experiment.workload.steps:
            raise ConservationError(
                f"the run stalled after step {self.trained} of {self.experiment.workload.steps}: "
                f"{len(self.carried)} rows wait for a rollout that never begins"
            )
        if self.next_row != self.finished + len(self.carried):
            raise ConservationError(
                f"rows: {self.next_row} in, {self.finished} finished and {len(self.carried)} carried: "
                f"{self.next_row - self.finished - len(self.carried)} are missing"
            )
        left = sum(state.length for state in self.rows.values())
        generated = self.skipped_tokens + sum(int(log.rows["tokens"].sum()) for log in self.log.steps.values())
        expected = self.drawn_tokens - left + sum(row.response_tokens for row in self.carried)
        if generated != expected:
            raise ConservationError(f"tokens: {generated} generated, {expected} accounted for by rows")


def _finished(records: Sequence[RowRecord]) -> list[Finished]:
    return [Finished(r.row, r.context_before + r.tokens, r.t_end) for r in records if r.finished]
