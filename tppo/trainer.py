"""The training loop: roll out, grade, score, update value, update policy. Read it top to bottom."""

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from profiling import Profiler
from profiling.errors import ConfigError
from profiling.settings import to_toml
from profiling.writer import RunWriter
from tppo.algorithms.recipes import RECIPES
from tppo.config import RunConfig
from tppo.data.arithmetic import ArithmeticTask, verify
from tppo.evaluate import Accuracy, evaluate
from tppo.metrics import step_metrics
from tppo.models.policy import describe_model, load_policy
from tppo.probe import DriftProbe
from tppo.rollout.drive import plan_step, run_rollout
from tppo.rollout.rows import Row
from tppo.rollout.torch_engine import TorchEngine
from tppo.run_records import finish_run, header_of, write_step
from tppo.schedule import Demand, Schedule, StepPlan, Synchronous, Truncated
from tppo.state import TrainingState, latest_checkpoint, new_state, read_progress, restore, save_checkpoint
from tppo.updates import (
    compute_advantages,
    monte_carlo_targets,
    score_rows,
    update_policy,
    update_value,
    value_targets,
)

EVALUATIONS_TO_STOP = 3
"""`train.stop_at_accuracy` is reached when the mean of this many consecutive evaluations is."""


@dataclass(frozen=True)
class Outcome:
    status: str
    """finished or interrupted"""
    steps: int
    accuracy: float | None
    """Of the last evaluation."""


def train(config: RunConfig, *, resume: bool = False, show_progress: bool = True) -> Outcome:
    """Train as `config` says and write the run directory `config.output`.

    With `resume`, go on from the newest checkpoint in that directory; what was written after it is discarded.
    Raises ConfigError or DataError before anything is written, RunError when the run cannot go on.
    """
    if config.output is None:
        raise ConfigError('output: no run directory is given; add `output = "runs/NAME"` or --output')
    torch.set_num_threads(config.train.threads)
    checkpoint = latest_checkpoint(config.output) if resume else None
    progress = read_progress(checkpoint) if checkpoint else None
    policy, tokenizer = load_policy(str(checkpoint / "policy") if checkpoint else config.model.path)
    state = new_state(policy, tokenizer, config)
    if checkpoint and progress:
        restore(state, checkpoint, progress)
    task = task_of(config)
    schedule = schedule_of(config)
    header = header_of(schedule)
    text = to_toml(config.model_dump(mode="json"))
    if progress:
        writer = RunWriter.resume(config.output, offsets=progress["offsets"], last_step=state.step)
    else:
        writer = RunWriter(config.output, header=header, config_toml=text)
        writer.write_text("model.json", json.dumps(describe_model(policy), indent=1) + "\n")
    profiler = Profiler(
        writer=writer,
        start_s=progress["time_s"] if progress else 0.0,
        sampler_interval_s=config.profile.interval_s if config.profile.sampler else None,
    )
    with profiler:
        return Trainer(config, state, task, schedule, writer, profiler).run(show_progress)


def task_of(config: RunConfig, seed: int | None = None) -> ArithmeticTask:
    data = config.data
    try:
        return ArithmeticTask(
            median_steps=data.median_steps,
            sigma=data.sigma,
            max_steps=data.max_steps,
            seed=data.seed if seed is None else seed,
        )
    except ValueError as error:
        raise ConfigError(f"data.{error}") from None


def schedule_of(config: RunConfig) -> Schedule:
    recipe = RECIPES[config.algorithm.name]
    return Truncated(window=config.rollout.window) if recipe.truncated else Synchronous()


class Trainer:
    def __init__(
        self,
        config: RunConfig,
        state: TrainingState,
        task: ArithmeticTask,
        schedule: Schedule,
        writer: RunWriter,
        profiler: Profiler,
    ) -> None:
        self.config = config
        self.recipe = RECIPES[config.algorithm.name]
        self.state = state
        self.task = task
        self.schedule = schedule
        self.writer = writer
        self.profiler = profiler
        self.clock = profiler.now
        self.pad_token_id = state.tokenizer.pad_token_id
        self.probe = DriftProbe()
        self.engine = TorchEngine(
            state.policy,
            slots=config.rollout.max_rows_per_engine or config.rows_per_step,
            max_tokens=task.max_prompt_tokens + config.rollout.max_response_tokens,
            eos_token_id=state.tokenizer.eos_token_id,
            pad_token_id=self.pad_token_id,
            generator=state.generator,
            clock=self.clock,
            temperature=config.rollout.temperature,
        )
        held_out = task_of(config, config.evaluation.seed)
        self.held_out = [held_out.problem(i) for i in range(config.evaluation.problems)]

    def run(self, show_progress: bool) -> Outcome:
        config, state = self.config, self.state
        accuracy: Accuracy | None = None
        with stop_on_interrupt() as interrupted, progress_bar(show_progress, config) as advance:
            if state.step == 0 and state.policy_version == 0:
                if config.evaluation.every:
                    accuracy = self.evaluate(step=0)
                    self.writer.metrics({"step": 0, "time_s": self.clock(), "clock_s": 0.0, **_columns(accuracy)})
                self.pretrain_value()
            while state.step < config.train.steps and not interrupted.is_set() and not self.score_reached():
                state.step += 1
                metrics = self.train_step(state.step)
                every = config.evaluation.every
                if every and state.step % every == 0:
                    accuracy = self.evaluate(state.step)
                    metrics |= _columns(accuracy)
                self.writer.metrics(metrics)
                if config.train.checkpoint_every and state.step % config.train.checkpoint_every == 0:
                    self.checkpoint()
                advance(state.step, accuracy)
            self.checkpoint()
            status = "interrupted" if interrupted.is_set() else "finished"
            wall_s = self.profiler.finish(status)
            trailing = config.algorithm.trailing_tokens if self.recipe.truncated else 0
            finish_run(self.writer, self.schedule, config.rollout.max_response_tokens, trailing, wall_s)
        return Outcome(status, state.step, accuracy.mean if accuracy else None)

    def train_step(self, step: int) -> dict[str, Any]:
        """One step of the recipe; returns its row of metrics."""
        config, state, recipe = self.config, self.state, self.recipe
        seconds: dict[str, float] = {}
        start = self.clock()
        demand = Demand(step, config.rows_per_step, state.next_row, config.rollout.max_response_tokens)
        plan = plan_step(self.schedule, state.carried, demand, self.profiler.trace, self.clock)
        rows = self.rows_of(plan, state.carried)
        with self.phase("rollout", step, seconds):
            self.generate(self.schedule, plan, rows)
        with self.phase("reward", step, seconds):
            self.grade(rows)
        with self.phase("value_forward", step, seconds):
            score_rows(state.value_model, rows, config, self.pad_token_id)
            estimates = compute_advantages(rows, recipe, config)
        with self.phase("update_value", step, seconds):
            trained, targets = value_targets(rows, recipe, estimates)
            value_metrics = update_value(
                state.value_model, state.value_optimizer, trained, targets, recipe, config, self.pad_token_id,
                self.shuffled(len(trained)), config.train.mini_batches, config.algorithm.value_clip,
            )  # fmt: skip
        with self.phase("update_policy", step, seconds):
            lr = config.optimizer.policy_lr * min(1.0, step / max(config.optimizer.warmup_steps, 1))
            for group in state.policy_optimizer.param_groups:
                group["lr"] = lr
            policy_metrics = update_policy(
                state.policy, state.policy_optimizer, rows, estimates, recipe, config, self.pad_token_id,
                self.shuffled(len(rows)),
            )  # fmt: skip
        with self.phase("weight_sync", step, seconds):
            self.engine.update_weights()
        write_step(self.writer, step, rows, state.policy_version, self.engine.take_records())
        state.policy_version += 1
        state.carried = [row for row in rows if not row.finished]
        end = self.clock()
        state.clock_s += end - start
        lengths = config.rollout.max_response_tokens
        return {
            "step": step,
            "time_s": end,
            "clock_s": state.clock_s,
            **step_metrics(rows, estimates, seconds, end - start, lengths),
            **policy_metrics,
            **value_metrics,
            "actor/lr": lr,
            "critic/lr": config.optimizer.value_lr,
            "val/accuracy": None,
            "val/accuracy_stderr": None,
        }

    def pretrain_value(self) -> None:
        """Step 0: fit the value model to Monte-Carlo returns of the warm start's policy, which stays as it is
        (VAPO, arXiv 2504.05118; T-PPO's port). Its time counts."""
        config, state = self.config, self.state
        if config.value.pretrain_rows == 0:
            return
        start = self.clock()
        demand = Demand(0, config.value.pretrain_rows, state.next_row, config.rollout.max_response_tokens)
        plan = plan_step(Synchronous(), [], demand, self.profiler.trace, self.clock)
        rows = self.rows_of(plan, [])
        with self.profiler.phase("rollout", step=0):
            self.generate(Synchronous(), plan, rows)
        with self.profiler.phase("reward", step=0):
            self.grade(rows)
        with self.profiler.phase("update_value", step=0):
            trained, targets = monte_carlo_targets(rows, self.recipe.gamma)
            batches = max(1, len(rows) * config.train.mini_batches // config.rows_per_step)
            for _ in range(config.value.pretrain_epochs):
                update_value(
                    state.value_model, state.value_optimizer, trained, targets, self.recipe, config,
                    self.pad_token_id, self.shuffled(len(trained)), batches, clip=None,
                )  # fmt: skip
        write_step(self.writer, 0, rows, state.policy_version, self.engine.take_records())
        state.clock_s += self.clock() - start

    def rows_of(self, plan: StepPlan, carried: Sequence[Row]) -> list[Row]:
        """The plan's rows in its order: carried ones as they are, fresh ones with the next problems."""
        known = {row.row: row for row in carried}
        rows = []
        for admission in plan.admissions:
            if admission.row in known:
                rows.append(known[admission.row])
                continue
            group = admission.row // self.config.rollout.samples_per_prompt
            problem = self.task.problem(group)
            prompt_ids = self.state.tokenizer(problem.prompt)["input_ids"]
            rows.append(Row(admission.row, group, problem, prompt_ids))
            self.state.next_row = admission.row + 1
        return rows

    def generate(self, schedule: Schedule, plan: StepPlan, rows: Sequence[Row]) -> None:
        by_id = {row.row: row for row in rows}
        limit = self.config.rollout.max_response_tokens
        run_rollout(schedule, self.engine, plan, by_id, limit, self.profiler.trace, self.clock)

    def grade(self, rows: Sequence[Row]) -> None:
        """+1 for a right final answer, -1 otherwise; unfinished rows have no reward yet."""
        for row in rows:
            if row.finished:
                right = verify(row.problem, str(self.state.tokenizer.decode(row.response_ids)))
                row.reward = 1.0 if right else -1.0

    def evaluate(self, step: int) -> Accuracy:
        """Held-out accuracy. The drift probe runs here too, outside the training clock."""
        with self.profiler.phase("evaluation", step=step):
            probe = {"type": "probe", "step": step, "t": self.clock(), "seconds": self.probe.run()}
            self.profiler.trace(probe)
            accuracy = evaluate(
                self.state.policy,
                self.state.tokenizer,
                self.held_out,
                max_response_tokens=self.config.rollout.max_response_tokens,
                temperature=self.config.rollout.temperature,
                seed=self.config.evaluation.seed + step,
            )
        self.state.accuracies.append(accuracy.mean)
        return accuracy

    def score_reached(self) -> bool:
        target = self.config.train.stop_at_accuracy
        last = self.state.accuracies[-EVALUATIONS_TO_STOP:]
        return target is not None and len(last) == EVALUATIONS_TO_STOP and sum(last) / len(last) >= target

    def checkpoint(self) -> None:
        with self.profiler.phase("checkpoint", step=self.state.step):
            self.profiler.flush()
            save_checkpoint(self.writer.path, self.state, self.writer.offsets(), self.clock())

    def shuffled(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.state.generator).tolist()

    @contextmanager
    def phase(self, name: str, step: int, seconds: dict[str, float]) -> Iterator[None]:
        start = self.clock()
        with self.profiler.phase(name, step=step):
            yield
        seconds[name] = self.clock() - start


def _columns(accuracy: Accuracy) -> dict[str, float]:
    return {"val/accuracy": accuracy.mean, "val/accuracy_stderr": accuracy.stderr}


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C asks the loop to stop after the step under way; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def progress_bar(show: bool, config: RunConfig) -> Iterator[Any]:
    name = config.output.name if config.output else ""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("accuracy {task.fields[accuracy]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not show, transient=False) as progress:
        bar = progress.add_task(name, total=config.train.steps, accuracy="-")

        def advance(step: int, accuracy: Accuracy | None) -> None:
            shown = f"{accuracy.mean:.2f}" if accuracy else "-"
            progress.update(bar, completed=step, accuracy=shown)

        yield advance
