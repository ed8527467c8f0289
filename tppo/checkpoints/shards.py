"""Models and optimisers that may be sharded, as a checkpoint holds them: weights whole, optimiser states in shards
that load on any number of ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from tppo.models.lora import adapter_weights, plain_weights
from tppo.parallel.tensors import like
from tppo.state import TrainingState

SHARDS = "optimizers"
Trained = tuple[str, nn.Module, torch.optim.Optimizer]


@dataclass(frozen=True)
class Weights:
    """Of all models, whole, on the CPU."""

    policy: dict[str, Tensor]
    value_model: dict[str, Tensor] | None
    proximal: dict[str, Tensor] | None
    adapters: dict[str, Tensor]
    """Of the policy, where it has some; `policy` has them merged."""


def whole_weights(state: TrainingState) -> Weights:
    """A collective where models are sharded."""
    return Weights(
        _whole(state.policy),
        None if state.value_model is None else _whole(state.value_model),
        None if state.proximal is None else state.proximal.state(),
        adapter_weights(state.policy),
    )


def _whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in plain_weights(model)}


def optimizers_of(state: TrainingState) -> list[Trained]:
    """Name, model and optimiser."""
    both: list[Trained] = [("policy_optimizer", state.policy, state.policy_optimizer)]
    if state.value_model is not None and state.value_optimizer is not None:
        both.append(("value_optimizer", state.value_model, state.value_optimizer))
    return both


def save_shards(folder: Path, state: TrainingState) -> None:
    """Optimiser states, every rank its own. Raises OSError or CheckpointException."""
    dcp.save({name: get_optimizer_state_dict(model, own) for name, model, own in optimizers_of(state)},
             checkpoint_id=folder)  # fmt: skip


def load_shards(folder: Path, state: TrainingState) -> None:
    """On any number of ranks, also where nothing is sharded."""
    found = {name: get_optimizer_state_dict(model, own) for name, model, own in optimizers_of(state)}
    dcp.load(found, checkpoint_id=folder)
    for name, model, own in optimizers_of(state):
        set_optimizer_state_dict(model, own, found[name])


def load_optimizer(optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """A whole optimiser's state into one whose parameters may be shards."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        index: {
            name: like(parameters[index], value) if isinstance(value, Tensor) and value.ndim else value
            for name, value in own.items()
        }
        for index, own in stored["state"].items()
    }
    optimizer.load_state_dict({**stored, "state": states})


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Whole weights into a model that may be sharded. Raises RuntimeError or KeyError when they do not fit."""
    for name, tensor in model.state_dict().items():
        if tensor.shape != weights[name].shape:
            raise RuntimeError(f"{name}: of shape {tuple(weights[name].shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(like(tensor, weights[name]))
