"""The training loop: roll out, grade, score, update value, update policy. Read it top to bottom."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from profiling import Profiler
from profiling.errors import ConfigError
from profiling.reader import Run
from profiling.settings import check_settings, to_toml
from profiling.writer import RunWriter
from tppo.algorithms.geppo import next_learning_rate, reuse_weights
from tppo.algorithms.recipes import RECIPES
from tppo.algorithms.rewards import informative_groups
from tppo.config import RunConfig
from tppo.console import progress_bar, stop_on_interrupt
from tppo.data.arithmetic import ArithmeticTask, verify
from tppo.evaluate import Accuracy, evaluate
from tppo.learner.estimates import estimate, monte_carlo_batch, policy_spans, score_log_probs, score_values
from tppo.learner.policy_update import additive_width, total_variation, update_policy
from tppo.learner.value_update import update_value
from tppo.metrics import step_metrics
from tppo.models.policy import describe_model, load_policy
from tppo.probe import DriftProbe
from tppo.rollout.drive import plan_step, run_rollout
from tppo.rollout.rows import Row
from tppo.rollout.torch_engine import TorchEngine
from tppo.run_records import finish_run, header_of, write_step
from tppo.schedule import Demand, Schedule, StepPlan, Synchronous, Truncated
from tppo.state import TrainingState, latest_checkpoint, new_state, read_progress, restore, save_checkpoint

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
    if progress is not None:
        check_it_can_go_on(config)
    policy, tokenizer = load_policy(str(checkpoint / "policy") if checkpoint else config.model.path)
    state = new_state(policy, tokenizer, config)
    if checkpoint is not None and progress is not None:
        restore(state, checkpoint, progress)
    task = task_of(config)
    schedule = schedule_of(config)
    header = header_of(schedule)
    text = to_toml(config.model_dump(mode="json"))
    if progress is not None:
        writer = RunWriter.resume(config.output, offsets=progress["offsets"], last_step=state.step)
        writer.write_text("config.toml", text)
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


def check_it_can_go_on(config: RunConfig) -> None:
    """Before anything is changed: what the run has written can be read, and what defines its rows is as it was.

    Raises DataError or ConfigError.
    """
    assert config.output is not None
    run = Run(config.output)
    _ = run.trace, run.rollouts, run.engine
    before = check_settings(run.config, RunConfig, where=str(run.path / "config.toml"))
    for section in ("model", "data", "rollout"):
        if getattr(before, section) != getattr(config, section):
            raise ConfigError(f"{section}: a resumed run keeps the settings of {run.path / 'config.toml'}")
    if before.algorithm.name != config.algorithm.name:
        raise ConfigError(f"algorithm.name: the run was started as {before.algorithm.name}; start another run instead")


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
            finish_run(self.writer, self.schedule, config.rollout.max_response_tokens, wall_s)
        return Outcome(status, state.step, accuracy.mean if accuracy else None)

    def train_step(self, step: int) -> dict[str, Any]:
        """One step of the recipe; returns its row of metrics."""
        config, state, recipe, pad = self.config, self.state, self.recipe, self.pad_token_id
        seconds: dict[str, float] = defaultdict(float)
        start = self.clock()
        rows, discarded = self.collect(step, seconds)
        batches = [rows, *state.reusable]  # newest first
        age_of = {row.row: age for age, batch in enumerate(batches) for row in batch}
        spans = policy_spans([row for batch in batches for row in batch], recipe)
        ages = torch.tensor([age_of[row.row] for row in spans.rows], dtype=torch.long)
        current = reference = None
        if recipe.proximal == "step_start":
            with self.phase("logprob_forward", step, seconds):
                current = score_log_probs(state.policy, spans, config, pad)
        if state.reference is not None:
            with self.phase("reference_forward", step, seconds):
                reference = score_log_probs(state.reference, spans, config, pad)
        with self.phase("value_forward" if state.value_model else "reward", step, seconds):
            if state.value_model:
                score_values(state.value_model, spans, config, pad)
            policy_batch, value_batch = estimate(spans, ages, recipe, config, current=current, reference=reference)
        value_metrics: dict[str, Any] = {}
        if state.value_model and state.value_optimizer:
            with self.phase("update_value", step, seconds):
                critic_lr = set_learning_rate(
                    state.value_optimizer, config.optimizer.value_lr, step, config.optimizer.value_warmup_steps
                )
                value_metrics = update_value(
                    state.value_model, state.value_optimizer, value_batch, recipe, config, pad, state.generator,
                    epochs=config.value.epochs,
                    steps_per_epoch=config.value.mini_batches or config.train.mini_batches,
                    clip=config.algorithm.value_clip,
                )  # fmt: skip
                value_metrics["critic/lr"] = critic_lr
        with self.phase("update_policy", step, seconds):
            lr = set_learning_rate(
                state.policy_optimizer,
                config.optimizer.policy_lr * state.lr_scale,
                step,
                config.optimizer.warmup_steps,
            )
            policy_metrics = update_policy(
                state.policy, state.policy_optimizer, policy_batch, recipe, config, pad, state.generator,
                state.proximal,
            )  # fmt: skip
            if recipe.reuse > 1:
                moved = total_variation(state.policy, policy_batch, config, pad)
                policy_metrics["actor/total_variation"] = moved
                state.lr_scale = next_learning_rate(state.lr_scale, moved, additive_width(recipe))
                kept = len(reuse_weights(recipe.reuse)) - 1
                state.reusable = batches[:kept]
        with self.phase("weight_sync", step, seconds):
            self.engine.update_weights()
        trained = dict(zip([row.row for row in spans.rows], policy_batch.mask.sum(1).tolist(), strict=True))
        write_step(
            self.writer, step, [*rows, *discarded], state.policy_version, self.engine.take_records(),
            trained_tokens=trained, discarded={row.row for row in discarded},
        )  # fmt: skip
        state.policy_version += 1
        state.carried = [row for row in rows if not row.finished]
        end = self.clock()
        state.clock_s += end - start
        return {
            "step": step,
            "time_s": end,
            "clock_s": state.clock_s,
            **step_metrics(
                [*rows, *discarded], policy_batch, value_batch if state.value_model else None, seconds, end - start,
                config.rollout.max_response_tokens, len(discarded),
            ),
            **policy_metrics,
            **value_metrics,
            "actor/lr": lr,
            "val/accuracy": None,
            "val/accuracy_stderr": None,
        }  # fmt: skip

    def collect(self, step: int, seconds: dict[str, float]) -> tuple[list[Row], list[Row]]:
        """Roll out and grade the step's rows: those that train or carry over, and those that are dropped for good.

        Only dynamic sampling drops rows, whole prompts at a time, and rolls out again for what is missing; after
        `algorithm.max_sampling_rounds` the step goes on with what it has.
        """
        state, recipe = self.state, self.recipe
        wanted = self.config.rows_per_step // recipe.reuse
        rows: list[Row] = []
        discarded: list[Row] = []
        for _ in range(self.config.algorithm.max_sampling_rounds if recipe.dynamic_sampling else 1):
            longest = self.config.rollout.max_response_tokens
            demand = Demand(step, wanted - len(rows), state.next_row, longest)
            plan = plan_step(self.schedule, state.carried, demand, self.profiler.trace, self.clock)
            fresh = self.rows_of(plan, state.carried)
            with self.phase("rollout", step, seconds):
                self.generate(self.schedule, plan, fresh)
            with self.phase("reward", step, seconds):
                self.grade(fresh)
                keep = [True] * len(fresh)
                if recipe.dynamic_sampling:
                    right = torch.tensor([(row.reward or 0.0) > 0 for row in fresh])
                    keep = informative_groups(right, torch.tensor([row.group for row in fresh])).tolist()
            rows += [row for row, kept in zip(fresh, keep, strict=True) if kept]
            discarded += [row for row, kept in zip(fresh, keep, strict=True) if not kept]
            if len(rows) >= wanted:
                break
        return rows, discarded

    def pretrain_value(self) -> None:
        """Step 0: fit the value model to Monte-Carlo returns of the warm start's policy, which stays as it is
        (VAPO, arXiv 2504.05118; T-PPO's port). Its time counts."""
        config, state = self.config, self.state
        if config.value.pretrain_rows == 0 or state.value_model is None or state.value_optimizer is None:
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
            set_learning_rate(state.value_optimizer, config.optimizer.value_lr, step=1, warmup_steps=0)
            update_value(
                state.value_model, state.value_optimizer, monte_carlo_batch(rows, self.recipe.gamma), self.recipe,
                config, self.pad_token_id, state.generator, epochs=config.value.pretrain_epochs,
                steps_per_epoch=max(1, len(rows) * config.train.mini_batches // config.rows_per_step), clip=None,
            )  # fmt: skip
        write_step(self.writer, 0, rows, state.policy_version, self.engine.take_records(), trained_tokens={})
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

    @contextmanager
    def phase(self, name: str, step: int, seconds: dict[str, float]) -> Iterator[None]:
        start = self.clock()
        with self.profiler.phase(name, step=step):
            yield
        seconds[name] += self.clock() - start


def _columns(accuracy: Accuracy) -> dict[str, float]:
    return {"val/accuracy": accuracy.mean, "val/accuracy_stderr": accuracy.stderr}


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, warmup_steps: int) -> float:
    """Linear warm-up over `warmup_steps` steps, then constant. Returns the rate of this step."""
    lr = peak * min(1.0, step / max(warmup_steps, 1))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
