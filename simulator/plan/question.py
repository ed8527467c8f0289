"""What a buyer asks, and every default that is assumed where nothing is said. A field's docstring is its help."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from profiling.schema import MOST_GPUS
from profiling.settings import Settings

Gpus = Annotated[int, Field(ge=1, le=MOST_GPUS)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Ratio = Annotated[float, Field(gt=0, le=100)]
Factor = Annotated[float, Field(ge=1, le=100)]
Seconds = Annotated[float, Field(ge=0, le=1e7)]
MOST_ROWS = 200_000
"""Of a step: more take minutes to simulate."""
P90 = 1.2816
"""Of a standard normal distribution."""

ScheduleName = Literal["synchronous", "truncated", "oversample", "asynchronous", "in_flight"]


class Question(Settings):
    model: str
    """A bundled name, or a config.json."""
    gpu: str
    """A bundled name, or a TOML file."""
    gpus: tuple[Gpus, ...] = Field(min_length=1, max_length=100)
    """GPUs in all, several with commas."""
    steps: Count | None = None
    """Training steps; or else finished_rows."""
    finished_rows: Count | None = None
    """Responses that have to finish, whatever the number of steps."""
    steps_ratio: tuple[Ratio, Ratio] | None = None
    """LOW,HIGH: steps that a schedule needs for the score of the synchronous one, per step of that; left out: no
    speed-up at equal score is given."""
    schedules: tuple[ScheduleName, ...] = ("synchronous", "truncated")
    """Of synchronous, truncated, oversample, asynchronous (one step off), in_flight. The synchronous one is always
    there to compare with."""
    windows: tuple[Count, ...] | None = None
    """Of the truncated schedule; left out: a third, half and two thirds of the longest response."""
    factors: tuple[Factor, ...] = (1.5,)
    """Of the oversample schedule."""
    tensor_parallel: tuple[Gpus, ...] | None = None
    """GPUs of an engine; left out: the fewest that hold the weights and eight of the longest rows."""
    trainer_share: float = Field(0.5, gt=0, lt=1)
    """Of the GPUs, for schedules that train beside the rollout."""
    prompts_per_step: int = Field(512, ge=1, le=100_000)
    samples_per_prompt: int = Field(16, ge=1, le=10_000)
    prompt_tokens: int = Field(512, ge=0, le=10**7)
    max_response_tokens: int = Field(24576, ge=1, le=10**7)
    mean_tokens: float = Field(8192.0, ge=1)
    """Mean response, after the cap."""
    sigma: float = Field(0.8, gt=0, le=5)
    """Of the logarithm of response lengths."""
    lengths: Path | None = None
    """A pilot's response lengths instead of the lognormal law: CSV, Parquet, or a run directory (with its prompts)."""
    lengths_column: str = "tokens"
    mean_uncertainty: float = Field(0.15, ge=0, lt=1)
    """Relative, of the mean length, where no lengths are given: 90 % are believed to lie within."""
    length_growth_per_step: float = Field(0.0, gt=-0.1, lt=0.1)
    """Drift of the mean length over training."""
    engine: Literal["vllm", "sglang", "trtllm", "torch"] = "vllm"
    """torch: our own, whole on each GPU; its memory is counted, and its speed is taken to be vLLM's."""
    expert_parallel: bool = False
    """An engine's GPUs hold whole experts."""
    memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of a GPU's memory that an engine takes; left out: 0.9, or what training leaves it on the same GPUs."""
    max_rows_per_engine: Count | None = None
    """Rows that run at once; left out: as many as the cache holds, under torch all."""
    release_memory: bool = True
    """Engines give their memory back while the policy trains; torch its cache, and not its weights."""
    value_model: bool = True
    reference_model: bool = False
    mini_batches: int = Field(16, ge=1, le=100_000)
    micro_batch_tokens: Count = 16384
    """Of one forward and backward pass; a longer row makes a pass of its own."""
    logit_tokens: Count = 4096
    """Tokens whose logits a pass holds at once. Our trainer holds a micro-batch's, and those of a whole response (of
    its window under the truncated schedule)."""
    cpu_offload: bool = False
    """Weights, gradients and moments are on the CPU between passes."""
    recompute: Literal["full", "none"] = "full"
    trainer: Literal["fsdp", "megatron"] = "fsdp"
    efficiency: Path | None = None
    """Efficiency factors of one's own (tppo calibrate --transfer writes some)."""
    reward_p50_s: Seconds = 0.0
    """Median latency of grading a response."""
    reward_p90_s: Seconds = 0.0
    reward_workers: int = Field(64, ge=1, le=10**6)
    evaluation_every: int = Field(0, ge=0, le=10**9)
    evaluation_s: Seconds = 0.0
    checkpoint_every: int = Field(0, ge=0, le=10**9)
    checkpoint_s: Seconds = 0.0
    weight_sync_s: Seconds | None = None
    """Left out: the policy's bytes over the network."""
    switch_s: Seconds = 0.0
    mtbf_hours: float | None = Field(None, gt=0, le=1e9)
    """Mean hours between failures of one GPU; the cluster fails as many times as often as it has GPUs."""
    restart_s: Seconds = 600.0
    price_per_hour: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """US dollars for a GPU-hour, reserved or otherwise; left out: the list price in the GPU's file."""
    deadline_hours: PositiveFloat | None = None
    """Options that miss it with more than half of the draws cannot be the cheapest."""
    whole_nodes: bool = True
    """Pay for whole nodes."""
    draws: int = Field(2000, ge=1, le=100_000)
    """Of the uncertain quantities."""
    seed: int = Field(0, ge=0, lt=2**63)
    extrapolate: bool = False
    """Answer far outside of what the efficiency factors were fitted on."""

    @model_validator(mode="after")
    def check_what_is_asked(self) -> "Question":
        if (self.steps is None) == (self.finished_rows is None):
            raise ValueError("state the horizon: either --steps or --finished-rows")
        if self.steps_ratio is not None and self.steps_ratio[0] > self.steps_ratio[1]:
            raise ValueError("steps_ratio: LOW,HIGH with LOW at most HIGH")
        if self.lengths is None and self.mean_tokens >= self.max_response_tokens:
            raise ValueError(
                f"mean_tokens = {self.mean_tokens:g} is not below max_response_tokens = {self.max_response_tokens}"
            )
        if self.rows_per_step > MOST_ROWS:
            raise ValueError(f"{self.rows_per_step} responses a step: more than {MOST_ROWS} take too long to simulate")
        for what in ("evaluation", "checkpoint"):
            if getattr(self, f"{what}_s") and not getattr(self, f"{what}_every"):
                raise ValueError(f"{what}_s: never happens without {what}_every")
        if "restart_s" in self.model_fields_set and self.mtbf_hours is None:
            raise ValueError("restart_s: never happens without mtbf_hours")
        if self.lengths is not None and not self.lengths.is_dir() and not self.lengths.is_file():
            raise ValueError(f"lengths = {str(self.lengths)!r}: no such file or run directory")
        if self.lengths is not None and self.model_fields_set & {"mean_tokens", "sigma", "mean_uncertainty"}:
            raise ValueError(
                "mean_tokens, sigma and mean_uncertainty: lengths take their place; leave one or the other out"
            )
        if abs(self.length_growth_per_step * (self.steps or 0)) > 20:
            raise ValueError("length_growth_per_step: over these steps lengths would change beyond all reason")
        if self.engine == "torch" and (self.memory_utilization is not None or set(self.tensor_parallel or ()) - {1}):
            raise ValueError("engine = torch: takes no memory_utilization, and no tensor_parallel above 1")
        if self.reward_p90_s < self.reward_p50_s:
            raise ValueError(f"reward_p90_s = {self.reward_p90_s:g} is below reward_p50_s = {self.reward_p50_s:g}")
        if self.length_growth_per_step and self.lengths is not None:
            raise ValueError("length_growth_per_step: scales the lognormal law; scale your own lengths yourself")
        return self

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def row_tokens(self) -> int:
        """Of the longest."""
        return self.prompt_tokens + self.max_response_tokens

    @property
    def factors_of(self) -> Literal["vllm", "sglang", "trtllm"]:
        """Engine whose efficiency factors are taken."""
        return "vllm" if self.engine == "torch" else self.engine

    @property
    def window_list(self) -> tuple[int, ...]:
        longest = self.max_response_tokens
        if self.windows is not None:  # one at the longest response or above is the synchronous run
            return tuple(dict.fromkeys(window for window in self.windows if window < longest))
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
