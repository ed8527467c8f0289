"""Starts a training run, or goes on with one: checks everything before anything is written."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from profiling import Profiler
from profiling.errors import ConfigError, DataError
from profiling.reader import Run
from profiling.settings import check_settings, to_toml
from profiling.writer import RunWriter, refuse_a_run
from tppo.config import RunConfig
from tppo.data.tasks import Problems, problems_of
from tppo.learner.recipe import recipe_of
from tppo.models.policy import describe_model, load_policy
from tppo.rewards.make import reward_of
from tppo.rollout.engines import check_rows_fit, make_engine, sampling_of
from tppo.run_records import header_of
from tppo.schedule import Asynchronous, Oversample, Schedule, Synchronous, Truncated
from tppo.state import latest_checkpoint, new_state, read_progress, restore
from tppo.torch_traces import steps_of
from tppo.trainer import Outcome, Trainer

DATA_JSON = "data.json"
"""In the run directory: tells a data set's problems from others."""


def train(config: RunConfig, *, resume: bool = False, show_progress: bool = True) -> Outcome:
    """Train as `config` says and write the run directory `config.output`.

    With `resume`, go on from the newest checkpoint in that directory; what was written after it is discarded.
    Raises ConfigError or DataError before anything is written, RunError when the run cannot go on.
    """
    with trainer_for(config, resume=resume) as trainer:
        return trainer.run(show_progress)


@contextmanager
def trainer_for(config: RunConfig, *, resume: bool = False) -> Iterator[Trainer]:
    """A trainer that is ready for its next step, its run directory and its profiler."""
    if config.output is None:
        raise ConfigError('output: no run directory is given; add `output = "runs/NAME"` or --output')
    steps_of(config.profile.torch_steps)
    if config.profile.cuda_events and not torch.cuda.is_available():
        raise ConfigError("profile.cuda_events: torch sees no GPU; leave it out")
    torch.set_num_threads(config.train.threads)
    checkpoint = latest_checkpoint(config.output) if resume else None
    progress = read_progress(checkpoint) if checkpoint else None
    if progress is not None:
        check_it_can_go_on(config)
    else:
        refuse_a_run(config.output)
    model_path = str(checkpoint / "policy") if checkpoint else config.model.path
    policy, tokenizer = load_policy(model_path)
    problems = problems_of(config, tokenizer)
    if progress is not None:
        check_problems_are_the_same(config.output, problems)
    for note in problems.notes:
        print(f"tppo: {note}", file=sys.stderr)
    longest_prompt = problems.task.longest_prompt(tokenizer)
    check_rows_fit(config, policy, tokenizer, longest_prompt)
    state = new_state(policy, tokenizer, config)
    if checkpoint is not None and progress is not None:
        restore(state, checkpoint, progress)
    schedule = schedule_of(config)
    engine = make_engine(
        config, policy, tokenizer, model_path=model_path, slots=slots_of(config, schedule),
        max_tokens=longest_prompt + config.rollout.max_response_tokens, generator=state.rollout_generator,
        clock=lambda: profiler.now(),
    )  # fmt: skip
    engine.update_weights(state.policy_version)
    with reward_of(config, tokenizer) as reward:
        text = to_toml(config.model_dump(mode="json"))
        if progress is not None:
            writer = RunWriter.resume(config.output, offsets=progress["offsets"], last_step=state.step)
            writer.write_text("config.toml", text)
        else:
            writer = RunWriter(config.output, header=header_of(schedule, config), config_toml=text)
            writer.write_text("model.json", json.dumps(describe_model(policy), indent=1) + "\n")
            if problems.fingerprint is not None:
                writer.write_text(DATA_JSON, json.dumps({"fingerprint": problems.fingerprint}) + "\n")
        profiler = Profiler(
            writer=writer,
            start_s=progress["time_s"] if progress else 0.0,
            sampler_interval_s=config.profile.interval_s if config.profile.sampler else None,
            links=config.profile.links,
        )
        with profiler:
            sampling = sampling_of(config, tokenizer)
            yield Trainer(
                config, state, problems.task, reward, schedule, engine, sampling, problems.held_out, writer, profiler
            )


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


def check_problems_are_the_same(directory: Path, problems: Problems) -> None:
    """Raises ConfigError when a data set gives other problems than when the run was started."""
    if problems.fingerprint is None:
        return
    path = directory / DATA_JSON
    try:
        before = json.loads(path.read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; start another run instead") from None
    if before != problems.fingerprint:
        raise ConfigError(
            "data: the problems are not those that the run was started with; put the data set and [evaluation] back "
            "as they were, or start another run"
        )


def schedule_of(config: RunConfig) -> Schedule:
    if config.rollout.schedule == "oversample":
        return Oversample(config.rollout.oversample_factor)
    if config.rollout.schedule == "asynchronous":
        return Asynchronous(max_staleness=1)
    return Truncated(window=config.rollout.window) if recipe_of(config).truncated else Synchronous()


def slots_of(config: RunConfig, schedule: Schedule) -> int:
    """Rows that the engine runs at once."""
    rows = config.rows_per_step
    if isinstance(schedule, Oversample):
        rows = schedule.rows_started(rows)
    return config.rollout.max_rows_per_engine or rows
