"""Everything a training run needs to go on: models, optimisers, random states, unfinished rows, data position."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from profiling.errors import DataError, RunError
from tppo.config import RunConfig
from tppo.data.arithmetic import Problem
from tppo.models.policy import save_policy
from tppo.models.value import ValueModel
from tppo.rollout.rows import Row


@dataclass
class TrainingState:
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    value_model: ValueModel
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer
    generator: torch.Generator
    """Draws the samples of rollouts and the order of mini-batches."""
    step: int = 0
    next_row: int = 0
    policy_version: int = 0
    """Weight updates so far."""
    clock_s: float = 0.0
    """Training time so far, evaluation and checkpoints left out."""
    carried: list[Row] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)


def new_state(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> TrainingState:
    value_model = ValueModel(policy)
    settings = config.optimizer

    def adamw(parameters: Any, lr: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            parameters, lr=lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )

    return TrainingState(
        policy=policy,
        tokenizer=tokenizer,
        value_model=value_model,
        policy_optimizer=adamw(policy.parameters(), settings.policy_lr),
        value_optimizer=adamw(value_model.parameters(), settings.value_lr),
        generator=torch.Generator().manual_seed(config.train.seed),
    )


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
        save_file(state.value_model.state_dict(), temporary / "value_model.safetensors")
        torch.save(
            {
                "policy_optimizer": state.policy_optimizer.state_dict(),
                "value_optimizer": state.value_optimizer.state_dict(),
                "generator": state.generator.get_state(),
            },
            temporary / "optimizers.pt",
        )
        progress = {
            "step": state.step,
            "next_row": state.next_row,
            "policy_version": state.policy_version,
            "clock_s": state.clock_s,
            "time_s": time_s,
            "accuracies": state.accuracies,
            "offsets": offsets,
            "carried": [asdict(row) for row in state.carried],
        }
        (temporary / "progress.json").write_text(json.dumps(progress))
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except (OSError, RuntimeError) as error:  # torch and safetensors report a full disk as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"{target}: the checkpoint cannot be written: {error}") from None
    return target


def latest_checkpoint(directory: Path) -> Path:
    found: Sequence[Path] = sorted((directory / "checkpoints").glob("step-*"))
    if not found:
        raise DataError(f"{directory}: has no checkpoint to resume from")
    return found[-1]


def read_progress(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "progress.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def restore(state: TrainingState, checkpoint: Path, progress: dict[str, Any]) -> None:
    """Load what `save_checkpoint` wrote into `state`, whose policy was already loaded from the checkpoint.

    Nothing is executed: weights are safetensors, the rest is read with weights_only.
    """
    try:
        state.value_model.load_state_dict(load_file(checkpoint / "value_model.safetensors"))
        optimizers = torch.load(checkpoint / "optimizers.pt", weights_only=True)
        state.policy_optimizer.load_state_dict(optimizers["policy_optimizer"])
        state.value_optimizer.load_state_dict(optimizers["value_optimizer"])
        state.generator.set_state(optimizers["generator"])
        for name in ("step", "next_row", "policy_version", "clock_s", "accuracies"):
            setattr(state, name, progress[name])
        state.carried = [Row(**{**row, "problem": Problem(**row["problem"])}) for row in progress["carried"]]
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{checkpoint}: not a usable checkpoint: {error}") from None
