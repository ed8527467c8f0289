"""Everything a training run needs to go on: models, optimisers, random states, unfinished rows, data position."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo.algorithms.recipes import RECIPES
from tppo.config import RunConfig
from tppo.learner.ewma import ProximalPolicy, beta_for
from tppo.models.activations import checkpoint_activations
from tppo.models.lora import add_adapters
from tppo.models.policy import load_policy
from tppo.models.value import ValueModel
from tppo.models.value_source import value_model_of
from tppo.parallel.ranks import SINGLE, Ranks, compute_dtype
from tppo.parallel.shard import shard
from tppo.rollout.rows import Row


@dataclass(frozen=True)
class Ahead:
    """A step's rows, rolled out and not graded yet, and the engine's records of it."""

    rows: list[Row]
    records: list[dict[str, Any]]


@dataclass
class TrainingState:
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    value_model: ValueModel | None
    """None where the recipe has none (dapo)."""
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer | None
    generator: torch.Generator
    """Draws the order of mini-batches."""
    rollout_generator: torch.Generator
    """Draws the samples of rollouts."""
    proximal: ProximalPolicy | None = None
    """ppo-ewma's; else None."""
    reference: PreTrainedModel | None = None
    """The model the run started from, where there is a KL penalty; else None. The policy itself where it has adapters:
    they are then turned off."""
    step: int = 0
    next_row: int = 0
    policy_version: int = 0
    """Weight updates so far."""
    clock_s: float = 0.0
    """Training time so far, evaluation and checkpoints left out."""
    lr_scale: float = 1.0
    """geppo's adaptive factor on the policy's learning rate."""
    started: bool = False
    """The first evaluation and the value model's pre-training are behind it."""
    carried: list[Row] = field(default_factory=list)
    ahead: Ahead | None = None
    """The next step's rollout, where it is done before its turn (asynchronous)."""
    reusable: list[list[Row]] = field(default_factory=list)
    """Rollout batches of earlier steps that train again, newest first."""
    accuracies: list[float] = field(default_factory=list)
    """Of every evaluation so far."""
    evaluated_step: int | None = None
    """Of the last of them."""
    guards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the guards remember (tppo.guards), plain JSON."""


def new_state(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig, ranks: Ranks = SINGLE
) -> TrainingState:
    """The state before the first step; its models are on the ranks' devices, sharded where the ranks shard. Raises
    ConfigError when value.path does not fit the policy."""
    recipe, settings = RECIPES[config.algorithm.name], config.optimizer
    value_model = ranks.each(lambda: value_model_of(config, policy, tokenizer)) if recipe.has_value_model else None
    if config.model.lora_rank:
        add_adapters(policy, config.model, config.train.seed)
    updates = config.train.epochs * config.train.mini_batches
    proximal = None
    if recipe.proximal == "ewma":
        proximal = ProximalPolicy(policy, config.algorithm.ewma_beta or beta_for(updates))
    reference = None
    if config.algorithm.kl_coef:
        reference = policy if config.model.lora_rank else started_from(config, ranks)
    besides = None if reference is policy else reference
    for model in (policy, value_model, besides, proximal.model if proximal else None):
        if model is not None:
            place(model, config, ranks)
    if proximal is not None:
        proximal.restart(policy)

    def adamw(parameters: Any, lr: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            [p for p in parameters if p.requires_grad],
            lr=lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    return TrainingState(
        policy=policy,
        tokenizer=tokenizer,
        value_model=value_model,
        policy_optimizer=adamw(policy.parameters(), settings.policy_lr),
        value_optimizer=None if value_model is None else adamw(value_model.parameters(), settings.value_lr),
        generator=torch.Generator().manual_seed(config.train.seed),
        rollout_generator=torch.Generator().manual_seed(config.train.seed),
        proximal=proximal,
        reference=reference,
    )


def started_from(config: RunConfig, ranks: Ranks) -> PreTrainedModel:
    """Frozen."""
    model, _ = loaded(config.model.path, config, ranks)
    return model.requires_grad_(False)


def loaded(path: str, config: RunConfig, ranks: Ranks) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_policy`; where ranks shard, with weights on the first one alone: `place` brings each its part. Raises
    ConfigError, on all ranks."""
    own = config.model
    model, tokenizer = ranks.each(
        lambda: load_policy(
            path, attention=own.attention, trust_remote_code=own.trust_remote_code,
            weights=ranks.main or ranks.mesh is None,
        )
    )  # fmt: skip
    # other names and shapes in its files than in memory: transformers learns them by reading, and saves alike
    model._weight_conversions = ranks.from_main(getattr(model, "_weight_conversions", None))  # type: ignore[assignment]
    return model, tokenizer


def place(model: nn.Module, config: RunConfig, ranks: Ranks) -> None:
    """On this rank's device, as a whole or as a shard."""
    if config.model.activation_checkpointing:
        checkpoint_activations(model)
    if ranks.mesh is None:
        model.to(ranks.device)
    else:
        compute = compute_dtype(config.model.dtype, ranks.device)
        shard(model, ranks, compute=compute, cpu_offload=config.parallel.cpu_offload)
