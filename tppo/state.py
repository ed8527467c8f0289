"""Everything a training run needs to go on: models, optimisers, random states, unfinished rows, data position."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from profiling.errors import ConfigError, DataError, RunError
from tppo.algorithms.ewma import ProximalPolicy, beta_for
from tppo.algorithms.recipes import RECIPES
from tppo.config import RunConfig
from tppo.data.problem import Problem
from tppo.models.policy import load_policy, save_policy
from tppo.models.value import ValueModel
from tppo.rollout.rows import Row

VALUE_MODEL = "value_model.safetensors"
PROXIMAL = "proximal_policy.safetensors"


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
    """The model the run started from, where there is a KL penalty; else None."""
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


def new_state(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> TrainingState:
    """The state before the first step. Raises ConfigError when value.path does not fit the policy."""
    recipe, settings = RECIPES[config.algorithm.name], config.optimizer
    value_model = ValueModel(policy) if recipe.has_value_model else None
    if value_model is not None and config.value.path:
        load_value_model(value_model, Path(config.value.path))
    updates = config.train.epochs * config.train.mini_batches
    beta = config.algorithm.ewma_beta or beta_for(updates)

    def adamw(parameters: Any, lr: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            parameters, lr=lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )

    return TrainingState(
        policy=policy,
        tokenizer=tokenizer,
        value_model=value_model,
        policy_optimizer=adamw(policy.parameters(), settings.policy_lr),
        value_optimizer=None if value_model is None else adamw(value_model.parameters(), settings.value_lr),
        generator=torch.Generator().manual_seed(config.train.seed),
        rollout_generator=torch.Generator().manual_seed(config.train.seed),
        proximal=ProximalPolicy(policy, beta) if recipe.proximal == "ewma" else None,
        reference=load_policy(config.model.path)[0].requires_grad_(False) if config.algorithm.kl_coef else None,
    )


def load_value_model(value_model: ValueModel, checkpoint: Path) -> None:
    """Weights from another run's checkpoint. Raises ConfigError naming the file when they do not fit."""
    path = checkpoint / VALUE_MODEL
    try:
        value_model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"value.path: {path} holds no value model for this policy: {reason}") from None


def save_checkpoint(directory: Path, state: TrainingState, offsets: dict[str, int], time_s: float) -> Path:
    """Write checkpoints/step-N: a temporary folder, then one rename, so that a checkpoint is whole or absent.

    `offsets`: length in bytes of the append-only files, so that resuming can discard what came after.
    """
    target = directory / "checkpoints" / f"step-{state.step:06d}"
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_policy(state.policy, state.tokenizer, temporary / "policy")
        optimizers = {
            "policy_optimizer": state.policy_optimizer.state_dict(),
            "generator": state.generator.get_state(),
            "rollout_generator": state.rollout_generator.get_state(),
        }
        if state.value_model is not None and state.value_optimizer is not None:
            save_file(state.value_model.state_dict(), temporary / VALUE_MODEL)
            optimizers["value_optimizer"] = state.value_optimizer.state_dict()
        if state.proximal is not None:
            save_file(state.proximal.state(), temporary / PROXIMAL)
        torch.save(optimizers, temporary / "optimizers.pt")
        progress = {
            "step": state.step,
            "next_row": state.next_row,
            "policy_version": state.policy_version,
            "clock_s": state.clock_s,
            "time_s": time_s,
            "accuracies": state.accuracies,
            "offsets": offsets,
            "started": state.started,
            "ahead": None if state.ahead is None else asdict(state.ahead),
            "lr_scale": state.lr_scale,
            "carried": [asdict(row) for row in state.carried],
            "reusable": [[asdict(row) for row in batch] for batch in state.reusable],
        }
        (temporary / "progress.json").write_text(json.dumps(progress))
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors report a full disk as their own
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"{target}: the checkpoint cannot be written: {error}; is the disk full? The one before is whole: make "
            "room and go on with --resume"
        ) from None
    return target


def latest_checkpoint(directory: Path) -> Path:
    found: Sequence[Path] = sorted((directory / "checkpoints").glob("step-[0-9]*"))
    if not found:
        raise DataError(f"{directory}: has no checkpoint to resume from")
    return found[-1]


def read_progress(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "progress.json"
    try:
        progress = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    kinds: dict[str, Any] = {"step": int, "time_s": (int, float), "offsets": dict, "carried": list, "reusable": list}
    for name, kind in kinds.items():
        if not isinstance(progress, dict) or not isinstance(progress.get(name), kind):
            raise DataError(f"{path}: {name} is missing or of the wrong kind; not a usable checkpoint")
    return progress


def restore(state: TrainingState, checkpoint: Path, progress: dict[str, Any]) -> None:
    """Load what `save_checkpoint` wrote into `state`, whose policy was already loaded from the checkpoint.

    Nothing is executed: weights are safetensors, the rest is read with weights_only.
    """
    try:
        optimizers = torch.load(checkpoint / "optimizers.pt", weights_only=True)
        state.policy_optimizer.load_state_dict(optimizers["policy_optimizer"])
        if state.value_model is not None and state.value_optimizer is not None:
            state.value_model.load_state_dict(load_file(checkpoint / VALUE_MODEL))
            state.value_optimizer.load_state_dict(optimizers["value_optimizer"])
        if state.proximal is not None:
            state.proximal.load(load_file(checkpoint / PROXIMAL))
        state.generator.set_state(optimizers["generator"])
        state.rollout_generator.set_state(optimizers["rollout_generator"])
        for name in ("step", "next_row", "policy_version", "clock_s", "accuracies", "lr_scale", "started"):
            setattr(state, name, progress[name])
        state.carried = [_row(row) for row in progress["carried"]]
        state.reusable = [[_row(row) for row in batch] for batch in progress["reusable"]]
        ahead = progress["ahead"]
        state.ahead = None if ahead is None else Ahead([_row(row) for row in ahead["rows"]], ahead["records"])
    except (
        OSError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{checkpoint}: not a usable checkpoint: {reason}") from None


def _row(values: dict[str, Any]) -> Row:
    return Row(**{**values, "problem": Problem(**values["problem"])})
