"""Starts a training run, or goes on with one: checks everything before anything is written."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from profiling import Profiler
from profiling.errors import ConfigError
from profiling.hosts import HostNames, this_host
from profiling.settings import to_toml
from profiling.writer import RunWriter
from tppo.checkpoints.content import POLICY, restore
from tppo.checkpoints.random_state import set_global_random_state
from tppo.checkpoints.store import Found, make_ready_to_resume
from tppo.cluster.led import LedEngines
from tppo.cluster.places import Places
from tppo.cluster.pool import EnginePool
from tppo.cluster.start import led_engines, make_pool, places_of, trainer_gpu_of
from tppo.config import RunConfig
from tppo.data.tasks import problems_of
from tppo.evaluation.evaluate import longest_prompt_of
from tppo.learner.recipe import recipe_of
from tppo.models.policy import architecture_of, describe_model, is_without_weights, own_stops
from tppo.models.value_source import check_value_rows_fit
from tppo.parallel.clocks import notes_of, offsets_to_main
from tppo.parallel.ranks import Ranks, joined_processes, on_devices
from tppo.parallel.silent import SilentWriter
from tppo.resume import DATA_JSON, check_problems_are_the_same, checkpoint_of, same_directory
from tppo.rewards.make import reward_of
from tppo.rollout.engines import check_rows_fit, make_engine, sampling_of
from tppo.rollout.protocol import Clock, RolloutEngine
from tppo.run_records import header_of
from tppo.schedule import Asynchronous, Oversample, Schedule, Synchronous, Truncated
from tppo.state import TrainingState, loaded, new_state
from tppo.torch_traces import steps_of
from tppo.tracking.protocol import About
from tppo.tracking.tracker import Tracker, check_trackers
from tppo.trainer import Outcome, Trainer

LIVE_SCHEDULES = ("oversample", "asynchronous")
"""They stop some rows because of others, or roll out while a step trains: one process has to see all engines."""


def train(config: RunConfig, *, resume: bool | Path = False, show_progress: bool = True) -> Outcome:
    """Train as `config` says and write the run directory `config.output`.

    resume: True goes on from the newest checkpoint in that directory; what was written after it is discarded. Another
    directory: from the newest checkpoint there, which stays as it is; the new run begins with the step after it.
    Raises ConfigError or DataError before anything is written, RunError when the run cannot go on.
    """
    with trainer_for(config, resume=resume) as trainer:
        return trainer.run(show_progress)


@contextmanager
def trainer_for(config: RunConfig, *, resume: bool | Path = False) -> Iterator[Trainer]:
    """A trainer that is ready for its next step, its run directory and its profiler. Raises ConfigError."""
    if config.output is None:
        raise ConfigError('output: no run directory is given; add `output = "runs/NAME"` or --output')
    steps_of(config.profile.torch_steps)
    torch.set_num_threads(config.train.threads)
    model, parallel = config.model, config.parallel
    with (
        joined_processes(device=model.device, dtype=model.dtype, replicas=parallel.replicas) as processes,
        places_of(config, processes) as places,
    ):
        gpu = trainer_gpu_of(places, processes)
        ranks = on_devices(processes, device=model.device, replicas=parallel.replicas, gpu=gpu)
        if config.profile.cuda_events and not torch.cuda.is_available():
            raise ConfigError("profile.cuda_events: torch sees no GPU; leave it out")
        check_it_fits_the_ranks(config, ranks)
        ranks.everyones(lambda: check_trackers(config.logging) if ranks.main else None)
        source = config.output if resume is True else resume or None
        found = ranks.everyones(lambda: checkpoint_of(config, source, ranks) if ranks.main else None)[0]
        with _trainer_of_rank(config, found, ranks, places) as trainer:
            yield trainer


@contextmanager
def _trainer_of_rank(config: RunConfig, found: Found | None, ranks: Ranks, places: Places | None) -> Iterator[Trainer]:
    """found: the checkpoint to go on from. places: of rollout engines on a cluster, on the first rank."""
    assert config.output is not None
    model_path = str(found.path / POLICY) if found else config.model.path
    start = config.model.path if config.model.lora_rank else model_path  # adapters are restored beside their base
    policy, tokenizer = loaded(start, config, ranks)
    stops = ranks.from_main(own_stops(policy))  # other ranks may know config.json alone
    problems = problems_of(config, tokenizer, ranks)
    if found is not None:
        check_problems_are_the_same(found.run, problems)
    for note in problems.notes if ranks.main else ():
        print(f"tppo: {note}", file=sys.stderr)
    longest_prompt = max(problems.task.longest_prompt(tokenizer), longest_prompt_of(problems.held_out, tokenizer))
    has_weights = not is_without_weights(policy)  # the check computes with them
    ranks.each(lambda: check_rows_fit(config, policy, tokenizer, longest_prompt) if has_weights else None)
    state = new_state(policy, tokenizer, config, ranks)
    row_tokens = longest_prompt + config.rollout.max_response_tokens
    check_value_rows_fit(state.value_model, config.value.path, row_tokens)
    restored = restore(state, found.path) if found else None
    goes_on_here = found is not None and same_directory(found.run, config.output)
    time_s = restored.time_s if restored and goes_on_here else 0.0
    schedule = schedule_of(config)
    engines = config.ray.engines if config.ray.address else ranks.world
    engine = engine_of(
        config, state, places, ranks, model_path=model_path, slots=slots_of(config, schedule, engines),
        max_tokens=row_tokens, clock=lambda: profiler.now(),
    )  # fmt: skip
    engine.update_weights(state.policy_version)
    header = header_of(schedule, config, ranks.world)
    if found is not None:
        header["resumed_from"] = {"run": str(found.run), "step": found.manifest.step}
    about = {"model.json": {"architecture": architecture_of(policy), **describe_model(policy)}}
    if problems.fingerprint is not None:
        about[DATA_JSON] = {"fingerprint": problems.fingerprint}
    with reward_of(config, tokenizer, own_stops=stops) as reward:
        writer = open_run(config, found if goes_on_here else None, ranks, header=header, about=about, last_t_s=time_s)
        hosts = ranks.gather(this_host())
        own, names = hosts[ranks.rank], HostNames(hosts)
        samples = config.profile.sampler and hosts.index(own) == ranks.rank  # one rank of each host
        offsets = offsets_to_main(ranks, hosts)
        zero_s = ranks.from_main(time.perf_counter() - time_s)
        profiler = Profiler(
            writer=writer,
            start_s=time.perf_counter() + offsets[ranks.rank].seconds - zero_s,
            sampler_interval_s=config.profile.interval_s if samples else None,
            links=config.profile.links,
            host=None if ranks.main else names.of(own),
        )
        with profiler, ExitStack() as stack:
            if found is not None and goes_on_here:
                text = f"resumed after step {found.manifest.step}"
                profiler.trace({"type": "note", "text": text, "resumed_s": time_s})
            for record in notes_of(hosts, offsets, names):
                profiler.trace(record)
            for rank, said in enumerate(ranks.gather(profiler.sampler_note)):
                if said is not None and rank:  # the first one's is there
                    profiler.trace({"type": "note", "text": f"host {names.of(hosts[rank])}: {said}"})
            if isinstance(engine, EnginePool | LedEngines):
                engine.attach(profiler.zero_s, profiler.trace, names)
                profiler.before_end(engine.detach)
            sampling = sampling_of(config, tokenizer, ranks, own_stops=stops)
            tracker = stack.enter_context(tracked(config, found, ranks, profiler))
            trainer = Trainer(
                config, state, problems.task, reward, schedule, engine, sampling, problems.held_out, writer, profiler,
                ranks, tracker,
            )  # fmt: skip
            if restored is not None:
                set_global_random_state(restored.global_random_state)  # last: what is built above may draw
            yield trainer


@contextmanager
def tracked(config: RunConfig, found: Found | None, ranks: Ranks, profiler: Profiler) -> Iterator[Tracker]:
    """The run's trackers, on the rank that writes. A run that has ended well has closed them itself."""
    assert config.output is not None
    if not ranks.main:
        yield Tracker()
        return
    about = About(
        config.output, config.logging, config.model_dump(mode="json"),
        resumed_after=found.manifest.step if found else None,
    )  # fmt: skip
    tracker = Tracker.of(about, note=lambda text: profiler.trace({"type": "note", "text": text}))
    try:
        yield tracker
    except KeyboardInterrupt:
        tracker.finish("interrupted")
        raise
    finally:
        tracker.finish("failed")


def engine_of(
    config: RunConfig, state: TrainingState, places: Places | None, ranks: Ranks, *, model_path: str, slots: int,
    max_tokens: int, clock: Clock,
) -> RolloutEngine:  # fmt: skip
    """One in this process, or all of a cluster's. slots: rows of each."""
    if config.ray.address and ranks.world > 1:
        return led_engines(
            places, config, state.policy, ranks, slots=slots, max_tokens=max_tokens, generator=state.rollout_generator
        )
    if places is not None:
        return make_pool(
            places, config, state.policy, slots=slots, max_tokens=max_tokens, generator=state.rollout_generator
        )
    return make_engine(
        config, state.policy, state.tokenizer, model_path=model_path, slots=slots, max_tokens=max_tokens,
        generator=state.rollout_generator, clock=clock,
    )  # fmt: skip


def open_run(
    config: RunConfig, found: Found | None, ranks: Ranks, *, header: dict[str, Any], about: dict[str, Any],
    last_t_s: float,
) -> RunWriter:  # fmt: skip
    """The run directory, new or as it was at the checkpoint; a silent one on ranks that do not write. about: files
    of a new one, name -> content. Raises InputError or RunError, on all ranks."""
    assert config.output is not None
    path, text = config.output, to_toml(config.model_dump(mode="json"))
    opened: list[RunWriter] = []

    def begin() -> None:
        opened.append(RunWriter(path, header=header, config_toml=text))
        for name, content in about.items():
            opened[0].write_text(name, json.dumps(content, indent=1) + "\n")

    def go_on(found: Found) -> None:
        make_ready_to_resume(path, found)
        offsets, step = found.manifest.offsets, found.manifest.step
        opened.append(RunWriter.resume(path, offsets=offsets, last_step=step, last_t_s=last_t_s))
        opened[0].write_text("config.toml", text)

    def open_here() -> None:
        if ranks.main:
            begin() if found is None else go_on(found)

    ranks.everyones(open_here)
    return opened[0] if opened else SilentWriter(path)


def check_it_fits_the_ranks(config: RunConfig, ranks: Ranks) -> None:
    """Raises ConfigError."""
    engines_of_their_own = ranks.world > 1 and not config.ray.address
    if engines_of_their_own and config.rollout.schedule in LIVE_SCHEDULES:
        raise ConfigError(
            f'rollout.schedule = "{config.rollout.schedule}": decides by what all engines do at the time, and '
            f"{ranks.world} ranks roll out each for itself; give them engines in common with --ray, or use one process"
        )
    if engines_of_their_own and config.rollout.engine == "vllm":
        raise ConfigError(
            f'rollout.engine = "vllm": cannot run inside {ranks.world} ranks that torchrun started; give it processes '
            'of its own with --ray, set "torch", or use one process'
        )
    if engines_of_their_own and config.rollout.draws == "engine":
        raise ConfigError(
            f'rollout.draws = "engine": the engines of {ranks.world} ranks would draw the same numbers for different '
            'rows; set "row" or "auto"'
        )
    if ranks.world > config.rollout.prompts_per_step * config.rollout.samples_per_prompt:
        raise ConfigError(
            f"rollout.prompts_per_step x rollout.samples_per_prompt = {config.rows_per_step} rows: fewer than the "
            f"{ranks.world} ranks; start fewer ranks"
        )


def schedule_of(config: RunConfig) -> Schedule:
    if config.rollout.schedule == "oversample":
        return Oversample(config.rollout.oversample_factor)
    if config.rollout.schedule == "asynchronous":
        return Asynchronous(max_staleness=1)
    return Truncated(window=config.rollout.window) if recipe_of(config).truncated else Synchronous()


def slots_of(config: RunConfig, schedule: Schedule, engines: int) -> int:
    """Rows that each of the engines runs at once."""
    rows = -(-config.rows_per_step // engines)
    if isinstance(schedule, Oversample):
        rows = schedule.rows_started(rows)
    return config.rollout.max_rows_per_engine or rows
