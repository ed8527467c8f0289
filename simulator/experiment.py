"""The experiment file of `tppo simulate`. A field's docstring is its help; a cost that is left out is 0."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from profiling.errors import ConfigError
from profiling.schema import MOST_GPUS
from profiling.settings import Settings, check_settings, read_toml, with_overrides
from simulator.cost_settings import AffineCostSettings, CostSettings
from simulator.kv import BLOCK_TOKENS
from simulator.lengths import EmpiricalLengths, Lengths, PromptLengths
from tppo.schedule import Asynchronous, Oversample, Schedule, Synchronous, TailBatching, Truncated

MOST_ROWS = 50_000_000
"""Of an experiment: it keeps half a kilobyte of each (benchmarks.simulator prints the memory)."""


class Workload(Settings):
    steps: PositiveInt
    """Training steps."""
    prompts_per_step: PositiveInt
    """Prompts of a step."""
    samples_per_prompt: PositiveInt = 1
    """Responses to each prompt."""
    prompt_tokens: NonNegativeInt = 0
    """Tokens of every prompt (lengths of kind `run` bring their own)."""
    max_response_tokens: PositiveInt
    """A longer response ends there."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the per-row random streams."""
    response_tokens: Lengths
    """How long responses are."""
    prompt_lengths: PromptLengths | None = None
    """How long prompts are, instead of `prompt_tokens`; the same for all samples of a prompt."""
    group_correlation: float = Field(0.0, ge=0, le=1)
    """Correlation of the normal scores behind the lengths of one prompt's responses; 1: all as long as each other."""
    length_growth_per_step: float = Field(0.0, gt=-1, le=10)
    """Drift over training: the rows of each step's worth of ids are longer by this share than those before."""

    @property
    def longest_prompt(self) -> int:
        """Tokens; where prompts have a length law of their own, the longest that it bounds, else what is given."""
        bound = getattr(self.prompt_lengths, "value", None)
        return int(bound) if bound is not None else self.prompt_tokens

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @model_validator(mode="after")
    def check_the_rows_can_be_kept(self) -> "Workload":
        rows = self.steps * self.rows_per_step
        if rows > MOST_ROWS:
            raise ValueError(
                f"steps x prompts_per_step x samples_per_prompt = {rows:,} rows: more than {MOST_ROWS:,}; simulate "
                "fewer steps, a run repeats itself"
            )
        return self

    @model_validator(mode="after")
    def check_lengths_are_drawn(self) -> "Workload":
        given = self.response_tokens.kind in ("run", "fixed") or (
            isinstance(self.response_tokens, EmpiricalLengths) and self.response_tokens.order == "given"
        )
        if given and self.group_correlation:
            raise ValueError(
                f"workload.group_correlation: lengths of kind '{self.response_tokens.kind}' are not drawn; set it "
                "to 0, or response_tokens.order = 'sampled'"
            )
        return self


class SynchronousSchedule(Settings):
    kind: Literal["synchronous"]


class TruncatedSchedule(Settings):
    kind: Literal["truncated"]
    window: PositiveInt
    """New tokens per row and step."""
    trailing_tokens: NonNegativeInt = 0
    """Last tokens of a truncated row that do not train; counted, nothing else."""


class OversampleSchedule(Settings):
    kind: Literal["oversample"]
    factor: float = Field(1.5, ge=1, le=1000)
    """Rows started per row that a step trains on."""


class AsynchronousSchedule(Settings):
    kind: Literal["asynchronous"]
    max_staleness: int = Field(1, ge=1, le=1000)
    """Updates between sampling a row and training on it; our trainer runs 1. In flight: steps' worth of rows that may
    be started ahead."""
    in_flight_update: bool = False
    """Rows stream: they run on while a step trains, and take its weights in the middle."""


class TailBatchingSchedule(Settings):
    kind: Literal["tail_batching"]
    threshold: PositiveInt
    """New tokens per row in a short round; a row that is not done then waits for a long round."""


ScheduleSettings = (
    SynchronousSchedule | TruncatedSchedule | OversampleSchedule | AsynchronousSchedule | TailBatchingSchedule
)


class ClusterSettings(Settings):
    engines: int = Field(1, gt=0, le=MOST_GPUS)
    """Rollout engines."""
    gpus_per_engine: int = Field(1, gt=0, le=MOST_GPUS)
    """GPUs of each engine."""
    max_rows_per_engine: PositiveInt | None = None
    """Rows that run at once on an engine; left out: unlimited."""
    kv_tokens_per_engine: PositiveInt | None = None
    """Tokens that an engine's KV cache holds; left out: unlimited."""
    dispatch: Literal["round_robin", "shared_queue", "by_prompt"] = "round_robin"
    """round_robin: row i of a step goes to engine i mod engines. shared_queue: to the engine that frees a slot.
    by_prompt: prompt j's rows go to engine j mod engines, all of them."""
    prefill: Literal["together", "chunked"] = "together"
    """together: all admitted rows at once, decodes stalled. chunked: beside decodes, chunk_tokens an iteration."""
    chunk_tokens: PositiveInt = 2048
    """Tokens of an iteration, one for each row that decodes and the rest for prefills."""
    prefix_reuse: bool = False
    """The rows of a prompt that run on one engine share the full KV blocks of the prompt, and prefill them once."""
    overlap_reward: bool = False
    """Rows are graded as they finish, while others still run; else after the rollout."""
    trainer: Literal["colocated", "separate", "none"] = "colocated"
    """colocated: training runs on the engines' GPUs. none: no training phases."""
    trainer_gpus: int = Field(0, ge=0, le=MOST_GPUS)
    """GPUs of a separate trainer."""

    @property
    def training_gpus(self) -> int:
        """GPUs that train; 0: none."""
        colocated = self.engines * self.gpus_per_engine if self.trainer == "colocated" else 0
        return colocated or self.trainer_gpus

    @model_validator(mode="after")
    def check_a_run_can_hold_it(self) -> "ClusterSettings":
        gpus = self.engines * self.gpus_per_engine + self.trainer_gpus
        if gpus > MOST_GPUS:
            raise ValueError(f"{self.engines} engines of {self.gpus_per_engine} GPUs and {self.trainer_gpus} of the "
                             f"trainer are {gpus}: more than {MOST_GPUS}")  # fmt: skip
        return self

    @model_validator(mode="after")
    def check_the_trainer(self) -> "ClusterSettings":
        if self.trainer == "separate" and not self.trainer_gpus:
            raise ValueError("trainer = 'separate' needs trainer_gpus")
        if self.trainer != "separate" and self.trainer_gpus:
            raise ValueError(f"trainer_gpus = {self.trainer_gpus} needs trainer = 'separate'")
        return self


class Experiment(Settings):
    workload: Workload
    schedule: Annotated[ScheduleSettings, Field(discriminator="kind")]
    cluster: ClusterSettings = ClusterSettings()
    cost: Annotated[CostSettings, Field(discriminator="kind")] = AffineCostSettings()

    @model_validator(mode="after")
    def check_failures(self) -> "Experiment":
        if self.cost.restart_s and self.cost.mtbf_hours is None:
            raise ValueError("cost.restart_s needs cost.mtbf_hours: without it nothing fails")
        return self

    @model_validator(mode="after")
    def check_what_runs_ahead(self) -> "Experiment":
        every = getattr(self.cost, "evaluation_every", 0) or getattr(self.cost, "checkpoint_every", 0)
        if self.make_schedule().steps_ahead > 1 and every:
            raise ValueError(
                "schedule.max_staleness: evaluations and checkpoints stop every GPU, which more than one step ahead "
                "cannot wait for; set cost.evaluation_every = 0 and cost.checkpoint_every = 0"
            )
        if self.schedule.kind == "asynchronous" and self.cluster.trainer == "colocated":
            raise ValueError(
                "schedule.kind = 'asynchronous': rollout and training overlap only on GPUs of their own; set "
                "cluster.trainer = 'separate' and cluster.trainer_gpus, or cluster.trainer = 'none'"
            )
        return self

    @property
    def startup_steps(self) -> int:
        """Until its mix of fresh and carried rows is steady; rates leave them out."""
        return self.make_schedule().startup_steps(self.workload.max_response_tokens)

    def make_schedule(self) -> Schedule:
        settings = self.schedule
        if isinstance(settings, TruncatedSchedule):
            return Truncated(window=settings.window)
        if isinstance(settings, OversampleSchedule):
            return Oversample(factor=settings.factor)
        if isinstance(settings, AsynchronousSchedule):
            return Asynchronous(settings.max_staleness, settings.in_flight_update)
        if isinstance(settings, TailBatchingSchedule):
            return TailBatching(threshold=settings.threshold)
        return Synchronous()

    @property
    def trains_whole_responses(self) -> bool:
        """Rows train when they finish, all their tokens at once; else a step trains the tokens it generated."""
        return self.schedule.kind in ("oversample", "tail_batching") or self.make_schedule().in_flight

    @property
    def trailing_tokens(self) -> int:
        return self.schedule.trailing_tokens if isinstance(self.schedule, TruncatedSchedule) else 0


def load_experiment(source: Path | str | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Experiment:
    """An experiment from a TOML file or from the same as a dict. overrides: {"schedule.window": 4096}.

    Paths inside a file are relative to it. Raises ConfigError naming file, field, fault and remedy.
    """
    if isinstance(source, Mapping):
        where, folder, values = "experiment", Path(), dict(source)
    else:
        path = Path(source)
        where, folder, values = str(path), path.parent, read_toml(path)
    values = with_overrides(values, overrides or {})
    if isinstance(values.get("cost"), Mapping):
        values["cost"] = {"kind": "affine", **values["cost"]}
    values = _with_absolute_paths(values, folder)
    experiment = check_settings(values, Experiment, where=where)
    check_a_row_fits(experiment, where)
    return experiment


def check_a_row_fits(experiment: Experiment, where: str) -> None:
    """The longest row that may occur must fit an engine's KV cache alone, or the run could never end.
    Raises ConfigError."""
    kv_tokens = experiment.cluster.kv_tokens_per_engine
    workload = experiment.workload
    longest = workload.longest_prompt + workload.max_response_tokens
    if kv_tokens is not None and -(-longest // BLOCK_TOKENS) > kv_tokens // BLOCK_TOKENS:
        raise ConfigError(
            f"{where}: cluster.kv_tokens_per_engine = {kv_tokens} cannot hold one row of {longest} tokens "
            f"(in blocks of {BLOCK_TOKENS}); raise it, or lower workload.max_response_tokens"
        )


def _with_absolute_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    for dotted in (
        "workload.response_tokens.file",
        "workload.response_tokens.path",
        "workload.prompt_lengths.file",
        "cost.file",
        "cost.efficiency",
        "cost.model",
        "cost.gpu",
    ):
        table: Any = values
        *sections, key = dotted.split(".")
        for name in sections:
            table = table.get(name) if isinstance(table, Mapping) else None
        known_by_name = dotted in ("cost.model", "cost.gpu")
        if isinstance(table, Mapping) and isinstance(table.get(key), str):
            if known_by_name and not os.path.exists(folder / table[key]):
                continue
            values = with_overrides(values, {dotted: str(folder / table[key])})
    return values
