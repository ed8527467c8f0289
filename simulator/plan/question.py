"""What a buyer asks, and every default that is assumed where nothing is said. A field's docstring is its help."""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from profiling.settings import Settings

P90 = 1.2816
"""Of a standard normal distribution."""

ScheduleName = Literal["synchronous", "truncated", "oversample", "asynchronous", "in_flight"]


class Question(Settings):
    model: str
    """A bundled name, or a config.json."""
    gpu: str
    """A bundled name, or a TOML file."""
    gpus: tuple[PositiveInt, ...] = Field(min_length=1)
    """GPUs in all, several with commas."""
    steps: PositiveInt | None = None
    """Training steps; or else finished_rows."""
    finished_rows: PositiveInt | None = None
    """Responses that have to finish, whatever the number of steps."""
    steps_ratio: tuple[PositiveFloat, PositiveFloat] | None = None
    """LOW,HIGH: steps that a schedule needs for the score of the synchronous one, per step of that; left out: no
    speed-up at equal score is given."""
    schedules: tuple[ScheduleName, ...] = ("synchronous", "truncated")
    """Of synchronous, truncated, oversample, asynchronous (one step off), in_flight. The synchronous one is always
    there to compare with."""
    windows: tuple[PositiveInt, ...] | None = None
    """Of the truncated schedule; left out: a third, half and two thirds of the longest response."""
    factors: tuple[PositiveFloat, ...] = (1.5,)
    """Of the oversample schedule."""
    tensor_parallel: tuple[PositiveInt, ...] | None = None
    """GPUs of an engine; left out: the fewest that hold the weights and eight of the longest rows."""
    trainer_share: float = Field(0.5, gt=0, lt=1)
    """Of the GPUs, for schedules that train beside the rollout."""
    prompts_per_step: PositiveInt = 512
    samples_per_prompt: PositiveInt = 16
    prompt_tokens: NonNegativeInt = 512
    max_response_tokens: PositiveInt = 24576
    mean_tokens: PositiveFloat = 8192.0
    """Mean response, after the cap."""
    sigma: PositiveFloat = 0.8
    """Of the logarithm of response lengths."""
    lengths: Path | None = None
    """A pilot's response lengths instead of the lognormal law: CSV, Parquet, or a run directory (with its prompts)."""
    lengths_column: str = "tokens"
    mean_uncertainty: float = Field(0.15, ge=0, lt=1)
    """Relative, of the mean length, where no lengths are given: 90 % are believed to lie within."""
    length_growth_per_step: float = Field(0.0, gt=-0.1, lt=0.1)
    """Drift of the mean length over training."""
    engine: Literal["vllm", "sglang", "trtllm"] = "vllm"
    value_model: bool = True
    mini_batches: PositiveInt = 16
    recompute: Literal["full", "none"] = "full"
    trainer: Literal["fsdp", "megatron"] = "fsdp"
    efficiency: Path | None = None
    """Efficiency factors of one's own (tppo calibrate --transfer writes some)."""
    reward_p50_s: NonNegativeFloat = 0.0
    """Median latency of grading a response."""
    reward_p90_s: NonNegativeFloat = 0.0
    reward_workers: PositiveInt = 64
    evaluation_every: NonNegativeInt = 0
    evaluation_s: NonNegativeFloat = 0.0
    checkpoint_every: NonNegativeInt = 0
    checkpoint_s: NonNegativeFloat = 0.0
    weight_sync_s: NonNegativeFloat | None = None
    """Left out: the policy's bytes over the network."""
    switch_s: NonNegativeFloat = 0.0
    mtbf_hours: PositiveFloat | None = None
    """Mean hours between failures of one GPU; the cluster fails as many times as often as it has GPUs."""
    restart_s: NonNegativeFloat = 600.0
    price_per_hour: NonNegativeFloat | None = None
    """US dollars for a GPU-hour, reserved or otherwise; left out: the list price in the GPU's file."""
    deadline_hours: PositiveFloat | None = None
    """Options that miss it with more than half of the draws cannot be the cheapest."""
    whole_nodes: bool = True
    """Pay for whole nodes."""
    draws: PositiveInt = 2000
    """Of the uncertain quantities."""
    seed: NonNegativeInt = 0
    extrapolate: bool = False
    """Answer far outside of what the efficiency factors were fitted on."""

    @model_validator(mode="after")
    def check_what_is_asked(self) -> "Question":
        if (self.steps is None) == (self.finished_rows is None):
            raise ValueError("state the horizon: either --steps or --finished-rows")
        if self.steps_ratio is not None and self.steps_ratio[0] > self.steps_ratio[1]:
            raise ValueError("steps_ratio: LOW,HIGH with LOW at most HIGH")
        if self.lengths is None and self.mean_tokens >= self.max_response_tokens:
            raise ValueError(f"mean_tokens = {self.mean_tokens:g} is not below max_response_tokens")
        if self.reward_p90_s < self.reward_p50_s:
            raise ValueError(f"reward_p90_s = {self.reward_p90_s:g} is below reward_p50_s = {self.reward_p50_s:g}")
        if self.length_growth_per_step and self.lengths is not None:
            raise ValueError("length_growth_per_step: scales the lognormal law; scale your own lengths yourself")
        return self

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def window_list(self) -> tuple[int, ...]:
        if self.windows is not None:
            return self.windows
        longest = self.max_response_tokens
        return tuple(dict.fromkeys(max(1, round(longest * share)) for share in (1 / 3, 1 / 2, 2 / 3)))

    def response_tokens(self) -> dict[str, Any]:
        """The length law of an experiment; with drift, its mean over the horizon."""
        if self.lengths is not None and self.lengths.is_dir():
            return {"kind": "run", "path": str(self.lengths.resolve())}
        if self.lengths is not None:
            return {"kind": "empirical", "file": str(self.lengths.resolve()), "column": self.lengths_column,
                    "order": "sampled"}  # fmt: skip
        growth, steps = self.length_growth_per_step, self.steps or -(-(self.finished_rows or 1) // self.rows_per_step)
        mean = self.mean_tokens
        if growth:
            mean *= math.expm1(steps * math.log1p(growth)) / (steps * growth)
        return {"kind": "lognormal", "mean_capped": min(mean, 0.9 * self.max_response_tokens), "sigma": self.sigma}

    def reward_s(self) -> tuple[float, float]:
        """(mean seconds of a grading, of the slowest of a step), of a lognormal law through the two percentiles."""
        if not self.reward_p90_s:
            return 0.0, 0.0
        if not self.reward_p50_s:
            return self.reward_p90_s / 10, self.reward_p90_s
        sigma = math.log(self.reward_p90_s / self.reward_p50_s) / P90
        return self.reward_p50_s * math.exp(sigma**2 / 2), self.reward_p90_s
