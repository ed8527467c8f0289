"""Optimisers of models that may be sharded, as a checkpoint holds them: in shards that load on any number of ranks."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from profiling.files import read_json
from tppo.parallel.tensors import like
from tppo.state import TrainingState

SHARDS = "optimizers"
PLAIN = "optimizers.json"
"""In that folder: steps, learning rates and the like."""
MOMENTS = ("exp_avg", "exp_avg_sq")
Trained = tuple[str, nn.Module, torch.optim.Optimizer]


def optimizers_of(state: TrainingState) -> list[Trained]:
    """Name, model and optimiser."""
    both: list[Trained] = [("policy_optimizer", state.policy, state.policy_optimizer)]
    if state.value_model is not None and state.value_optimizer is not None:
        both.append(("value_optimizer", state.value_model, state.value_optimizer))
    return both


def save_shards(folder: Path, state: TrainingState) -> None:
    """Moments as safetensors, every rank its own shards; what is no tensor as JSON, by the first rank. (DCP's own
    format is read by unpickling, which executes code.) Raises OSError or CheckpointException."""
    moments: dict[str, Tensor] = {}
    plain = {}
    for name, model, optimizer in optimizers_of(state):
        steps = {}
        for place, parameter in named_places(model, optimizer).items():
            own = optimizer.state.get(parameter)
            if own:
                steps[place] = float(own["step"])
                moments |= {f"{name}.{place}.{moment}": own[moment] for moment in MOMENTS}
        plain[name] = {"steps": steps, "param_groups": optimizer.state_dict()["param_groups"]}
    if moments:
        dcp.save(moments, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    if not dist.is_initialized() or dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        (folder / PLAIN).write_text(json.dumps(plain))


def load_shards(folder: Path, state: TrainingState) -> None:
    """On any number of ranks, also where nothing is sharded."""
    plain = read_json(folder / PLAIN)
    moments: dict[str, Tensor] = {}
    for name, model, optimizer in optimizers_of(state):
        for place, parameter in named_places(model, optimizer).items():
            if place in plain[name]["steps"]:
                moments |= {f"{name}.{place}.{m}": torch.zeros_like(parameter).detach() for m in MOMENTS}
    if moments:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may load them, too
            dcp.load(moments, storage_reader=HuggingFaceStorageReader(str(folder)))
    for name, model, optimizer in optimizers_of(state):
        own = plain[name]
        states = {
            index: {
                "step": torch.tensor(own["steps"][place], dtype=torch.float32),
                **{moment: moments[f"{name}.{place}.{moment}"] for moment in MOMENTS},
            }
            for index, place in enumerate(named_places(model, optimizer))
            if place in own["steps"]
        }
        optimizer.load_state_dict({"state": states, "param_groups": own["param_groups"]})


def named_places(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The optimiser's parameters in its order, by their names in the model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}


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
