"""The training loop: roll out, grade, score, update value, update policy. Read it top to bottom."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from profiling import Profiler
from profiling.errors import RunError
from profiling.schema import SAMPLES
from profiling.summary import write_totals
from profiling.writer import RunWriter
from tppo.algorithms.geppo import next_learning_rate, reuse_weights
from tppo.checkpoints.content import save_checkpoint
from tppo.checkpoints.store import prune_checkpoints
from tppo.collect import Collected, Collector, StepTimes
from tppo.config import RunConfig
from tppo.consent import words_that_allow
from tppo.data.problem import Problem, Task
from tppo.evaluation.evaluate import evaluate, evaluation_sampling, evaluation_slots, longest_prompt_of
from tppo.evaluation.graded import Graded, validation_metrics, validation_names
from tppo.evidence import keeping_evidence
from tppo.guards import check, guard_metrics
from tppo.learner.estimates import estimate, policy_spans, score_log_probs, score_values
from tppo.learner.policy_update import additive_width, total_variation, update_policy
from tppo.learner.recipe import recipe_of
from tppo.learner.step import set_learning_rate
from tppo.learner.value_update import update_value
from tppo.learner.work import Work
from tppo.metrics import model_flops_utilisation, step_metrics
from tppo.models.lora import adapters_off
from tppo.models.policy import describe_model, padding_of
from tppo.out_of_memory import saying_what_to_lower
from tppo.parallel.ranks import SINGLE, Ranks
from tppo.probe import DriftProbe
from tppo.progress import progress_bar
from tppo.rewards.protocol import Reward, RewardError, grade_metrics
from tppo.rollout.drive import engine_faults
from tppo.rollout.engines import evaluation_engine
from tppo.rollout.protocol import EngineError, RolloutEngine, Sampling
from tppo.run_records import write_step
from tppo.samples import chosen, sample_records
from tppo.schedule import Schedule
from tppo.signals import Stop, nothing, stop_on_signal
from tppo.state import TrainingState
from tppo.step_zero import step_zero
from tppo.torch_traces import DeviceTimes, TorchProfile, steps_of
from tppo.tracking.tracker import Tracker

EVALUATIONS_TO_STOP = 3
"""`train.stop_at_accuracy` is reached when the mean of this many consecutive evaluations is."""


@dataclass(frozen=True)
class Outcome:
    status: str
    """finished or interrupted"""
    steps: int
    accuracy: float | None
    """Of the last evaluation."""
    signal: int | None = None
    """The one that interrupted it."""
    rank: int = 0
    """Of the process that returns it."""


class Trainer:
    def __init__(
        self,
        config: RunConfig,
        state: TrainingState,
        task: Task,
        reward: Reward,
        schedule: Schedule,
        engine: RolloutEngine,
        sampling: Sampling,
        held_out: Sequence[Problem],
        writer: RunWriter,
        profiler: Profiler,
        ranks: Ranks = SINGLE,
        tracker: Tracker | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.tracker = tracker or Tracker()
        self.recipe = recipe_of(config)
        self.state = state
        self.schedule = schedule
        self.engine = engine
        self.sampling = sampling
        self.held_out = held_out
        self.reward = reward
        self.writer = writer
        self.profiler = profiler
        self.clock = profiler.now
        self.saved_step: int | None = None
        self.lost_engine: EngineError | None = None
        """It failed when it was to take the weights of a step that is trained."""
        self.last_metrics: dict[str, Any] | None = None
        self.pad_token_id = padding_of(state.tokenizer)
        self.probe = DriftProbe()
        self.dimensions = describe_model(state.policy)
        own_peak = config.profile.peak_flops
        self.peak_flops = None if own_peak is None else own_peak * ranks.world
        self.on_device = DeviceTimes(profiler) if config.profile.cuda_events else None
        self.torch_profile = TorchProfile(profiler, steps_of(config.profile.torch_steps) if ranks.main else None)
        self.collector = Collector(
            config, self.recipe, state, task, reward, schedule, engine, sampling, profiler, ranks
        )
        prompt_tokens = max(task.longest_prompt(state.tokenizer), longest_prompt_of(held_out, state.tokenizer))
        self.evaluation_engine = evaluation_engine(
            config, state.policy, state.tokenizer, engine, slots=evaluation_slots(config, len(held_out)),
            max_tokens=prompt_tokens + config.rollout.max_response_tokens,
        )  # fmt: skip

    def run(self, show_progress: bool) -> Outcome:
        config, state = self.config, self.state
        accuracy: Graded | None = None
        bar = progress_bar(
            show_progress and self.ranks.main, self.writer.path.name, total_steps=config.train.steps,
            done_steps=state.step,
        )  # fmt: skip
        with stop_on_signal() as stop, bar as advance:
            if not state.started:
                accuracy = step_zero(self, stop)
            while state.step < config.train.steps and not self.asked_to_stop(stop) and not self.score_reached():
                state.step += 1
                with self.torch_profile.around(state.step):
                    metrics = self.train_step_or_save(state.step)
                if self.lost_engine is not None:
                    with self.saving(state.step, metrics):
                        raise self.lost_engine
                if self.on_device:
                    self.on_device.collect()
                every = config.train.checkpoint_every
                due = every > 0 and state.step % every == 0
                if config.evaluation.every and state.step % config.evaluation.every == 0:
                    with self.saving(state.step, metrics):
                        self.wait_for_rollout()
                        accuracy, found = self.evaluate(state.step)
                    metrics |= found
                    due = due or self.is_a_best_to_keep()
                self.log(metrics | self.guarded(metrics))
                if due:
                    self.checkpoint()
                advance(state.step, accuracy.mean if accuracy else None, metrics)
            self.torch_profile.finish(state.step)
            if self.on_device:
                self.on_device.collect(everything=True)
            if self.saved_step != state.step:
                self.checkpoint()
            status = "interrupted" if stop.asked else "finished"
            wall_s = self.profiler.finish(status)
            self.ranks.gather(status)  # samples of other hosts are written
            if self.ranks.main:
                whole = self.recipe.policy_tokens == "finished_rows"
                write_totals(self.writer, wall_s, trains_whole_responses=whole)
            self.tracker.finish(status)
        return Outcome(status, state.step, accuracy.mean if accuracy else None, stop.signal, self.ranks.rank)

    def asked_to_stop(self, stop: Stop) -> bool:
        """Any rank may have got the signal: all end after the same step. One that comes while they ask each other
        stands until they ask again."""
        told = next((number for number in self.ranks.gather(stop.signal) if number is not None), None)
        if told is not None:
            stop.signal = told
        return told is not None

    def train_step_or_save(self, step: int) -> dict[str, Any]:
        """A step; when engine or reward fail in it, everything as it was before it goes into a checkpoint first."""
        try:
            with self.keeping_evidence(step), saying_what_to_lower(self.config, step):
                return self.train_step(step)
        except (EngineError, RewardError) as error:
            self.state.step = step - 1
            self.collector.undo()
            self.save_after(error)  # raises

    @contextmanager
    def saving(self, step: int, metrics: dict[str, Any] | None = None) -> Iterator[None]:
        """What is no part of a step's training: when engine or reward fail in it, everything up to it goes into a
        checkpoint. metrics: of the step, not written yet."""
        try:
            yield
        except (EngineError, RewardError) as error:
            if step == 0:
                self.collector.undo()
            if metrics is not None:
                self.log(metrics | self.guarded(metrics))
            self.save_after(error)

    def save_after(self, error: RunError) -> NoReturn:
        self.checkpoint()
        raise RunError(
            f"{error}; the checkpoint of step {self.state.step} holds every unfinished row: go on with --resume "
            f"{self.writer.path}{words_that_allow(self.config.model_dump())}"
        ) from error

    def train_step(self, step: int) -> dict[str, Any]:
        """One step of the recipe; returns its row of metrics."""
        config, state, recipe, pad = self.config, self.state, self.recipe, self.pad_token_id
        times = StepTimes(self.profiler, step, self.on_device, self.ranks)
        start = self.clock()
        got = self.collector.collect(times)
        if self.schedule.steps_ahead:
            self.sync_weights(times)
            if step < config.train.steps:
                self.collector.start_ahead(step + 1)
        elif config.rollout.release_memory:
            with times.phase("switch"), engine_faults(step):
                self.engine.release_memory()
        batches = [got.rows, *state.reusable]  # newest first
        age_of = {row.row: age for age, batch in enumerate(batches) for row in batch}
        spans = policy_spans([row for batch in batches for row in batch], recipe)
        ages = torch.tensor([age_of[row.row] for row in spans.rows], dtype=torch.long)
        current = reference = None
        if recipe.proximal == "step_start":
            with times.phase("logprob_forward", spans.work):
                current = score_log_probs(state.policy, spans, config, pad, self.ranks)
        if state.reference is not None:
            with times.phase("reference_forward", spans.work), adapters_off(state.reference):
                reference = score_log_probs(state.reference, spans, config, pad, self.ranks)
        with times.phase("value_forward" if state.value_model else "reward", spans.work):
            if state.value_model:
                score_values(state.value_model, spans, config, pad, self.ranks)
            policy_batch, value_batch = estimate(
                spans, ages, recipe, config, policy_version=state.policy_version, current=current, reference=reference
            )
        value_metrics: dict[str, Any] = {}
        if state.value_model and state.value_optimizer:
            with times.phase("update_value", value_batch.spans.work):
                critic_lr = set_learning_rate(
                    state.value_optimizer, config.optimizer.value_lr, step, config.optimizer.value_warmup_steps
                )
                value_metrics = update_value(
                    state.value_model, state.value_optimizer, value_batch, recipe, config, pad, state.generator,
                    epochs=config.value.epochs,
                    steps_per_epoch=config.value.mini_batches or config.train.mini_batches,
                    clip=config.algorithm.value_clip, ranks=self.ranks,
                )  # fmt: skip
                value_metrics["critic/lr"] = critic_lr
        with times.phase("update_policy", policy_batch.spans.work):
            lr = set_learning_rate(
                state.policy_optimizer,
                config.optimizer.policy_lr * state.lr_scale,
                step,
                config.optimizer.warmup_steps,
            )
            policy_metrics = update_policy(
                state.policy, state.policy_optimizer, policy_batch, recipe, config, pad, state.generator,
                state.proximal, self.ranks,
            )  # fmt: skip
            if recipe.reuse > 1:
                moved = total_variation(state.policy, policy_batch, config, pad, self.ranks)
                policy_metrics["actor/total_variation"] = moved
                state.lr_scale = next_learning_rate(state.lr_scale, moved, additive_width(recipe))
                kept = len(reuse_weights(recipe.reuse)) - 1
                state.reusable = batches[:kept]
        state.policy_version += 1
        if not self.schedule.steps_ahead:
            try:
                self.sync_weights(times)
            except EngineError as error:  # not the step's undoing: the policy has learned from its rows
                self.lost_engine = error
        trained = dict(zip([row.row for row in spans.rows], policy_batch.mask.sum(1).tolist(), strict=True))
        write_step(self.writer, step, got, trained_tokens=trained)
        end = self.clock()
        state.clock_s += end - start
        self.log_samples(step, got)
        return {
            "step": step,
            "time_s": end,
            "clock_s": state.clock_s,
            **step_metrics(
                [*got.rows, *got.discarded], policy_batch, value_batch if state.value_model else None, times.seconds,
                end - start, config.rollout.max_response_tokens, len(got.discarded),
                Work.of(times.work.values()),
                model_flops_utilisation(times.work, times.seconds, self.dimensions, self.peak_flops),
            ),
            **grade_metrics(got.grades),
            **policy_metrics,
            **value_metrics,
            "actor/lr": lr,
            **dict.fromkeys(validation_names(config.evaluation.samples)),
        }  # fmt: skip

    def log(self, metrics: dict[str, Any]) -> None:
        """A row of metrics, to metrics.jsonl and the trackers."""
        self.last_metrics = metrics
        self.writer.metrics(metrics)
        self.tracker.metrics(metrics)

    def guarded(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Let the guards look at the step; returns their metrics. All ranks see the same, one of them says it."""
        startup = self.schedule.startup_steps(self.config.rollout.max_response_tokens)
        self.state.guards, changes = check(metrics, self.state.guards, self.config.guards, startup_steps=startup)
        for change in changes:
            note = {"type": "note", "text": change.text, "guard": change.name, "raised": change.raised}
            self.profiler.trace({**note, "step": metrics["step"]})
            if change.raised and self.ranks.main:
                print(f"tppo: warning: {change.text}", file=sys.stderr)
        return guard_metrics(self.state.guards)

    def keeping_evidence(self, step: int) -> AbstractContextManager[None]:
        return keeping_evidence(self.writer.path, step, self.ranks, self.last_metrics)

    def log_samples(self, step: int, got: Collected) -> None:
        """Outside the training clock: it is no part of training."""
        every = self.config.logging.samples_every
        if not self.ranks.main or every == 0 or step % every:
            return
        rows = chosen([*got.rows, *got.discarded], self.config.logging.samples)
        if not rows:
            return
        records = sample_records(step, rows, self.state.tokenizer, self.reward)
        self.writer.table("samples", step, {name: [r[name] for r in records] for name in SAMPLES.names})
        self.tracker.samples(step, records)

    def sync_weights(self, times: StepTimes) -> None:
        with times.phase("weight_sync"), engine_faults(times.step):
            self.engine.update_weights(self.state.policy_version)

    def evaluate(self, step: int, between: Callable[[], None] = nothing) -> tuple[Graded, dict[str, float | None]]:
        """Answers to the held-out problems, graded, and their metrics; no random state of the training is touched.
        between: called between the ends of responses; what it raises ends the evaluation.

        The drift probe runs here too, outside the training clock."""
        with self.profiler.phase("evaluation", step=step), engine_faults(step):
            probe = {"type": "probe", "step": step, "t": self.clock(), "seconds": self.probe.run()}
            self.profiler.trace(probe)
            graded = evaluate(
                self.evaluation_engine,
                evaluation_sampling(self.config, self.sampling, seed=self.config.evaluation.seed + step),
                self.state.tokenizer,
                self.held_out,
                self.reward,
                max_response_tokens=self.config.rollout.max_response_tokens,
                samples=self.config.evaluation.samples,
                on_end=lambda ended, of: between(),
                ranks=self.ranks,
            )
            if self.config.rollout.release_memory and self.evaluation_engine is not self.engine:
                self.evaluation_engine.release_memory()
            metrics = validation_metrics(graded)
            self.writer.table("evaluations", step, graded.columns(step))
        self.state.accuracies.append(graded.mean)
        self.state.evaluated_step = step
        return graded, metrics

    def score_reached(self) -> bool:
        target = self.config.train.stop_at_accuracy
        last = self.state.accuracies[-EVALUATIONS_TO_STOP:]
        return target is not None and len(last) == EVALUATIONS_TO_STOP and sum(last) / len(last) >= target

    def is_a_best_to_keep(self) -> bool:
        """Whether the last evaluation belongs to the best ones, whose checkpoints are to be kept."""
        train, (*before, last) = self.config.train, self.state.accuracies
        best = sorted(before, reverse=True)[: train.keep_best]
        return train.checkpoint_every > 0 and train.keep_best > 0 and (len(best) < train.keep_best or last > best[-1])

    def wait_for_rollout(self) -> None:
        """Of the next step, where one runs ahead: an evaluation or a checkpoint must not hide its time."""
        start = self.clock()
        self.collector.wait(StepTimes(self.profiler, self.state.step + 1))
        self.state.clock_s += self.clock() - start

    def checkpoint(self) -> None:
        with self.saving(self.state.step):
            self.wait_for_rollout()
        with self.profiler.phase("checkpoint", step=self.state.step):
            self.profiler.flush()
            self.writer.sync()
            newest = save_checkpoint(
                self.writer.path, self.state, algorithm=self.config.algorithm.name, offsets=self.writer.offsets(),
                time_s=self.clock(), ranks=self.ranks,
            )  # fmt: skip
            train = self.config.train
            if self.ranks.main:
                prune_checkpoints(self.writer.path, newest, keep_last=train.keep_last, keep_best=train.keep_best)
        self.saved_step = self.state.step
