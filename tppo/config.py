"""What `tppo train` reads from TOML. A field's docstring is its help; overrides are `--section.field value`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from profiling.settings import Settings

Beta = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Settings):
    path: str = ""
    """Local directory or hub name of a causal language model with its tokenizer."""


class DataConfig(Settings):
    task: Literal["arithmetic"] = "arithmetic"
    """arithmetic: running sums modulo 10 with written-out working."""
    median_steps: PositiveFloat = 7.5
    """Median number of steps of a problem; a step is five response tokens."""
    sigma: float = Field(0.85, ge=0, le=10)
    """Standard deviation of the logarithm of the number of steps."""
    max_steps: PositiveInt = 50
    """Most steps of a problem."""
    seed: NonNegativeInt = 0
    """Seed of the problems; row i is the same problem under every algorithm."""


class AlgorithmConfig(Settings):
    name: Literal["ppo", "ppo-ewma", "geppo", "vapo", "dapo", "tppo", "partial-rollout"] = "tppo"
    """The recipe (tppo.algorithms.recipes)."""
    lam: float | None = Field(None, ge=0, le=1)
    """Lambda of the advantage estimate; left out: the recipe's."""
    adaptive_lambda_alpha: PositiveFloat | None = None
    """Use lambda = 1 - 1 / (alpha length) instead (VAPO); left out under vapo: 1,229 / rollout.max_response_tokens."""
    adaptive_lambda_floor: float = Field(0.0, ge=0, le=1)
    """Smallest length-adaptive lambda (0.95 in T-PPO's port)."""
    trailing_tokens: NonNegativeInt = 8
    """Last tokens of a truncated row that do not train the policy; 8 of a window of 8,192 in T-PPO's port."""
    value_clip: PositiveFloat | None = None
    """Width of value clipping; left out: none."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound of the clipped policy loss where the advantage is negative; left out: none."""
    normalise_advantages: bool = True
    """Centre and scale advantages as the recipe says; false: leave them as they are."""
    clamp_advantages: NonNegativeFloat | None = None
    """Largest absolute advantage after that, 0 for no bound; left out: the recipe's (10 under tppo)."""
    prefix: Literal["gradient", "detached"] = "gradient"
    """How the earlier windows of a resumed row are forwarded: with gradient, or with constant keys and values."""
    lm_loss_coef: NonNegativeFloat | None = None
    """Weight of the language-model loss on correct responses; left out: the recipe's (0.1 under vapo)."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the k3 KL penalty against the model that the run started from."""
    overlong_cache_tokens: NonNegativeInt | None = None
    """Tokens before the maximum over which the reward falls by 1; left out: the recipe's (a fifth under dapo)."""
    ewma_beta: float | None = Field(None, gt=0, lt=1)
    """Decay of ppo-ewma's proximal policy; left out: its centre of mass is one step's updates."""
    max_sampling_rounds: PositiveInt = 10
    """Rollouts that dapo may start in a step to fill it with prompts answered both right and wrong."""


class RolloutConfig(Settings):
    prompts_per_step: PositiveInt = 32
    """Prompts of a step."""
    samples_per_prompt: PositiveInt = 1
    """Responses to each prompt."""
    max_response_tokens: PositiveInt = 256
    """A response of this length ends and is graded."""
    window: PositiveInt = 85
    """New tokens per row and step under tppo; longer responses carry over. At or above the maximum: synchronous."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature."""
    max_rows_per_engine: PositiveInt | None = None
    """Rows that run at once; left out: all rows of a step."""


class ValueConfig(Settings):
    path: str = ""
    """Checkpoint of another run to take the value model from; left out: the policy's backbone with a new head."""
    pretrain_rows: NonNegativeInt = 256
    """Rows of the warm start's policy on which the value model is trained before the first step."""
    pretrain_epochs: PositiveInt = 2
    """Passes over those rows."""
    epochs: PositiveInt = 1
    """Passes over a step's rows."""
    mini_batches: PositiveInt | None = None
    """Optimiser steps per pass; left out: as many as the policy's."""
    micro_batch_tokens: PositiveInt | None = None
    """Padded tokens of one forward and backward pass; left out: as the policy's."""


class OptimizerConfig(Settings):
    policy_lr: PositiveFloat = 1e-4
    """AdamW's learning rate of the policy."""
    value_lr: PositiveFloat = 5e-4
    """AdamW's learning rate of the value model."""
    warmup_steps: NonNegativeInt = 10
    """Steps over which the policy's learning rate rises linearly."""
    value_warmup_steps: NonNegativeInt = 0
    """The same for the value model."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's betas, of both."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay, of both."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm, each network's apart."""


class LoopConfig(Settings):
    steps: PositiveInt = 100
    """Training steps at most."""
    epochs: PositiveInt = 1
    """Passes of the policy over a step's rows."""
    mini_batches: PositiveInt = 2
    """Optimiser steps per pass; the rows of a step must be divisible by it."""
    micro_batch_tokens: PositiveInt = 4096
    """Padded tokens of one forward and backward pass."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of sampling and of the order of mini-batches."""
    threads: int = Field(1, ge=1, le=1024)
    """CPU threads of torch."""
    stop_at_accuracy: float | None = Field(None, gt=0, le=1)
    """End when the mean of three consecutive evaluations reaches this; left out: run all steps."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: only on Ctrl-C and at the end."""


class EvaluationConfig(Settings):
    every: NonNegativeInt = 5
    """Steps between evaluations; 0: none."""
    problems: PositiveInt = 256
    """Held-out problems, one sampled answer each."""
    seed: NonNegativeInt = 1_000_003
    """Seed of the held-out problems; must differ from data.seed."""


class ProfileConfig(Settings):
    sampler: bool = True
    """Sample GPUs (or the host) from a process of its own."""
    interval_s: PositiveFloat = 0.5
    """Seconds between samples."""


class RunConfig(Settings):
    """One training run."""

    output: Path | None = None
    """Run directory; must not hold a run."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    rollout: RolloutConfig = RolloutConfig()
    value: ValueConfig = ValueConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: LoopConfig = LoopConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    profile: ProfileConfig = ProfileConfig()

    @property
    def rows_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    @model_validator(mode="after")
    def check_it_fits_together(self) -> "RunConfig":
        if self.rows_per_step % self.train.mini_batches:
            raise ValueError(
                f"rollout.prompts_per_step x rollout.samples_per_prompt = {self.rows_per_step} rows cannot be "
                f"divided into train.mini_batches = {self.train.mini_batches}; change one of them"
            )
        if self.algorithm.name == "dapo" and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                "rollout.samples_per_prompt = 1: dapo compares the answers to one prompt; set at least 2, and "
                "rollout.prompts_per_step lower"
            )
        if self.algorithm.name == "geppo" and self.rollout.prompts_per_step % 2:
            raise ValueError(
                f"rollout.prompts_per_step = {self.rollout.prompts_per_step}: geppo generates half of a step's rows "
                "and reuses older ones; make it even"
            )
        if self.algorithm.prefix == "detached" and (self.algorithm.lm_loss_coef or self.algorithm.name == "vapo"):
            raise ValueError(
                'algorithm.prefix = "detached": the language-model loss trains earlier windows too; set '
                'algorithm.lm_loss_coef = 0 or prefix = "gradient"'
            )
        if self.evaluation.every and self.evaluation.seed == self.data.seed:
            raise ValueError("evaluation.seed equals data.seed: the held-out problems would be trained on")
        return self
