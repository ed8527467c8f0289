"""Shards a model over the ranks (FSDP2): every layer by itself, and what is left together."""

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from tppo.models.policy import SCORE, score_tokens
from tppo.parallel.ranks import Ranks


def shard(model: nn.Module, ranks: Ranks, *, compute: torch.dtype, cpu_offload: bool = False) -> None:
    """Shard `model` in place; weights and gradients become float32 on the ranks' devices, passes compute in `compute`.

    The same weights on every rank, on the CPU. cpu_offload: shards, their gradients and the optimiser stay on the
    CPU between passes. Layers are moved one by one, so that no device ever holds the whole model.
    """
    assert ranks.mesh is not None, "these ranks shard nothing"
    options: dict[str, Any] = {
        "mesh": ranks.mesh,
        "reshard_after_forward": True,  # also what is left: a model that is only scored would stay whole
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
    }
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for layer in layers_of(model):
        fully_shard(layer.float(), **options)
    fully_shard(model.float(), **options)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):  # rotary frequencies are no parameters
            setattr(module, name, buffer.to(ranks.device))
    if hasattr(model, "get_output_embeddings"):
        setattr(model, SCORE, MethodType(score_tokens, model))
        register_fsdp_forward_method(model, SCORE)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers: the longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)
