"""The rollout side of a step: plan, generate, grade. What comes back is ready to train on."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch

from profiling import Profiler
from tppo.algorithms.recipes import Recipe
from tppo.algorithms.rewards import informative_groups
from tppo.config import RunConfig
from tppo.data.problem import Task, prompt_ids
from tppo.generation import Records, generation_of
from tppo.learner.work import Work
from tppo.parallel.ranks import SINGLE, Ranks
from tppo.rewards.protocol import Grade, Reward
from tppo.rollout.drive import plan_step
from tppo.rollout.protocol import EngineError, RolloutEngine, Sampling
from tppo.rollout.rows import Row
from tppo.schedule import Demand, Schedule, StepPlan, Synchronous
from tppo.state import Ahead, TrainingState
from tppo.torch_traces import DeviceTimes, device_phase


class StepTimes:
    """Declares the phases of one step, and keeps their seconds."""

    def __init__(
        self, profiler: Profiler, step: int, on_device: DeviceTimes | None = None, ranks: Ranks = SINGLE
    ) -> None:
        self.step = step
        self.work: dict[str, Work] = {}
        """Of the step's training phases, on all ranks."""
        self._ranks = ranks
        self._on_device = on_device
        self.seconds: dict[str, float] = defaultdict(float)
        self._profiler = profiler

    @contextmanager
    def phase(self, name: str, work: Work | None = None) -> Iterator[None]:
        """work: a count that goes on; what is added to it in this phase is recorded as the phase's."""
        before = None if work is None else work.copy()
        start = self._profiler.now()
        with (
            self._profiler.phase(name, step=self.step),
            device_phase(self._on_device, name, self.step),
            torch.profiler.record_function(f"phase {name}"),
        ):
            yield
        self.seconds[name] += self._profiler.now() - start
        if work is not None and before is not None:
            own = work.since(before)
            done = Work(*self._ranks.total(torch.tensor(own.counts())).tolist())
            done.updates = own.updates  # every rank's is of its own shard
            if done.passes:
                self.work[name] = done
                self._profiler.trace({"type": "work", "name": name, "step": self.step, **asdict(done)})


@dataclass
class Collected:
    """A step's rows."""

    rows: list[Row] = field(default_factory=list)
    """Those that train or carry over."""
    discarded: list[Row] = field(default_factory=list)
    """Those that are dropped for good: only dynamic sampling drops any, whole prompts at a time."""
    records: Records = field(default_factory=list)
    grades: list[Grade] = field(default_factory=list)
    """Of every row that finished."""


@dataclass(frozen=True)
class _Before:
    """What a rollout changes, as it was."""

    next_row: int
    carried: list[Row]
    generator: torch.Tensor
    ahead: Ahead | None
    """Rolled out already, and not graded."""


class Collector:
    """Rolls out with `engine` as `schedule` says; tppo.generation has the three ways. All of its state is in `state`,
    for checkpoints, but for a rollout that runs ahead in a thread: `wait` for it first."""

    def __init__(
        self,
        config: RunConfig,
        recipe: Recipe,
        state: TrainingState,
        task: Task,
        reward: Reward,
        schedule: Schedule,
        engine: RolloutEngine,
        sampling: Sampling,
        profiler: Profiler,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.ranks = ranks
        self.config, self.recipe, self.state, self.task, self.reward = config, recipe, state, task, reward
        self.schedule, self.profiler = schedule, profiler
        self.generation = generation_of(config, engine, sampling, profiler, ranks)
        self._under_way: tuple[list[Row], Callable[[], Records]] | None = None
        """Rows that are rolled out ahead, and how to wait for them."""
        self._before: _Before | None = None

    def collect(self, times: StepTimes) -> Collected:
        """Roll out and grade the step's rows, or take those that were rolled out ahead.

        Under dynamic sampling, roll out again for what is missing; after `algorithm.max_sampling_rounds` the step goes
        on with what it has.
        """
        state, recipe = self.state, self.recipe
        wanted = self.config.rows_per_step // recipe.reuse
        got = Collected()
        self.wait(times)
        self._remember()
        for _ in range(self.config.algorithm.max_sampling_rounds if recipe.dynamic_sampling else 1):
            if state.ahead is not None:
                fresh, got.records, state.ahead = state.ahead.rows, state.ahead.records, None
            else:
                plan, fresh = self.admit(self.schedule, times.step, wanted - len(got.rows))
                with times.phase("rollout"):
                    got.records += self.generation.run(self.schedule, plan, by_number(fresh))
            with times.phase("reward"):
                got.grades += self.grade(fresh)
                keep = [True] * len(fresh)
                if recipe.dynamic_sampling:
                    right = torch.tensor([bool(row.correct) for row in fresh])
                    informative = informative_groups(right, torch.tensor([row.group for row in fresh])).tolist()
                    # A row that the engine gave up is not done: it carries over.
                    keep = [good or not row.finished for good, row in zip(informative, fresh, strict=True)]
            got.rows += [row for row, kept in zip(fresh, keep, strict=True) if kept]
            got.discarded += [row for row, kept in zip(fresh, keep, strict=True) if not kept]
            if len(got.rows) >= wanted:
                break
        state.carried += [row for row in got.rows if not row.finished]
        return got

    def collect_for_values(self, rows: int, times: StepTimes, between: Callable[[], None]) -> Collected:
        """Finished rows of the policy as it is, whatever the schedule: for the value model's pre-training. between: as
        of `Generation.run`."""
        schedule = Synchronous()
        self._remember()
        plan, fresh = self.admit(schedule, times.step, rows)
        with times.phase("rollout"):
            records = self.generation.run(schedule, plan, by_number(fresh), between)
        with times.phase("reward"):
            grades = self.grade(fresh)
        return Collected(fresh, [], records, grades)

    def start_ahead(self, step: int) -> None:
        """Begin the rollout of `step`, which comes later, in a thread; `collect` takes it up.

        The step at hand still trains on its rows, so those that carry over go on as copies.
        """
        self.state.carried = [row.copy() for row in self.state.carried]
        self._remember()
        plan, fresh = self.admit(self.schedule, step, self.config.rows_per_step)
        self._under_way = fresh, self.generation.start(self.schedule, plan, by_number(fresh))

    def wait(self, times: StepTimes) -> None:
        """For the rollout that runs ahead, if one does; the time is the step's exposed rollout time. One that failed
        is undone."""
        if self._under_way is None:
            return
        (rows, records), self._under_way = self._under_way, None
        try:
            with times.phase("rollout"):
                self.state.ahead = Ahead(rows, records())
        except EngineError:
            self.undo()
            raise

    def undo(self) -> None:
        """The last rollout, or its grading, failed: rows, numbering and random state as they were before it. Once:
        later calls change nothing until the next rollout."""
        if self._before is None:
            return
        if self._before.ahead is None:  # else nothing was rolled out since
            for row in self._before.carried:
                row.undo_window()
        self.state.ahead = self._before.ahead
        self.state.carried = self._before.carried
        self.state.next_row = self._before.next_row
        self.state.rollout_generator.set_state(self._before.generator)
        self._before = None

    def _remember(self) -> None:
        state = self.state
        self._before = _Before(state.next_row, state.carried, state.rollout_generator.get_state(), state.ahead)

    def admit(self, schedule: Schedule, step: int, rows: int) -> tuple[StepPlan, list[Row]]:
        """The schedule's plan for `rows` rows and its rows in order: carried ones as they are, fresh ones with the
        next problems."""
        state = self.state
        demand = Demand(step, rows, state.next_row, self.config.rollout.max_response_tokens)
        plan = plan_step(schedule, state.carried, demand, self.profiler.trace, self.profiler.now)
        known = {row.row: row for row in state.carried}
        planned = {admission.row for admission in plan.admissions}
        state.carried = [row for row in state.carried if row.row not in planned]
        admitted = [known.get(admission.row) or self.fresh_row(admission.row) for admission in plan.admissions]
        state.next_row += sum(row.row not in known for row in admitted)
        for row in admitted:
            row.begin_window()
        return plan, admitted

    def fresh_row(self, number: int) -> Row:
        group = number // self.config.rollout.samples_per_prompt
        problem = self.task.problem(group)
        return Row(number, group, problem, prompt_ids(self.state.tokenizer, problem))

    def grade(self, rows: Sequence[Row]) -> list[Grade]:
        """Finished rows only; the others have no reward yet. Each rank grades its share."""
        done = [row for row in rows if row.finished]
        own = done[self.ranks.rank :: self.ranks.world]

        def grades() -> dict[int, Grade]:
            texts = [str(self.state.tokenizer.decode(row.response_ids)) for row in own]
            found = self.reward.grade([row.problem for row in own], texts)
            return {row.row: grade for row, grade in zip(own, found, strict=True)}

        known = {row: grade for part in self.ranks.everyones(grades) for row, grade in part.items()}
        for row in done:
            row.reward, row.correct = known[row.row].reward, known[row.row].correct
        return [known[row.row] for row in done]


def by_number(rows: Sequence[Row]) -> dict[int, Row]:
    return {row.row: row for row in rows}
