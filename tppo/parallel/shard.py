"""Shards a model over the ranks (FSDP2): every layer by itself, and what is left together."""

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from tppo.models.policy import SCORE, score_tokens
from tppo.parallel.ranks import Ranks


def shard(model: nn.Module, ranks: Ranks, *, compute: torch.dtype, cpu_offload: bool = False) -> None:
    """Shard `model` in place; weights and gradients become float32 on the ranks' devices, passes compute in `compute`.

    The first rank has the weights, on the CPU; what the others have is not looked at, and may be on the meta device.
    cpu_offload: shards, their gradients and the optimiser stay on the CPU between passes. Layers are moved one by one,
    and then what is outside of them, so that no device ever holds the whole model, and no other rank's memory.
    """
    assert ranks.mesh is not None, "these ranks shard nothing"
    options: dict[str, Any] = {
        "mesh": ranks.mesh,
        "reshard_after_forward": True,  # also what is left: a model that is only scored would stay whole
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
    }
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    home = torch.device("cpu") if cpu_offload else ranks.device
    for layer in layers_of(model):
        bring_weights(layer.float(), ranks, home)
        fully_shard(layer, **options)
    bring_weights(model.float(), ranks, home)
    fully_shard(model, **options)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):  # rotary frequencies are no parameters
            setattr(module, name, buffer.to(ranks.device))
    if hasattr(model, "get_output_embeddings"):
        setattr(model, SCORE, MethodType(score_tokens, model))
        register_fsdp_forward_method(model, SCORE)


@torch.no_grad()
def bring_weights(model: nn.Module, ranks: Ranks, home: torch.device) -> None:
    """The first rank's weights, buffers and other tensors, to all ranks, on `home`; what is sharded stays as it is."""
    brought: dict[int, Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for table in tables:
            for name, tensor in table.items():
                if not isinstance(tensor, Tensor) or isinstance(tensor, DTensor):
                    continue
                if id(tensor) not in brought:  # tied weights stay one
                    here = torch.empty_like(tensor, device=ranks.device)
                    if ranks.main:
                        here.copy_(tensor)
                    if ranks.world > 1:
                        dist.broadcast(here, src=0)
                    here = here.to(home)
                    if isinstance(tensor, nn.Parameter):
                        here = nn.Parameter(here, requires_grad=tensor.requires_grad)
                    brought[id(tensor)] = here
                table[name] = brought[id(tensor)]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers: the longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)
