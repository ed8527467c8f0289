"""Tensors that may be shards."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All shards together, on every rank: a collective where `tensor` is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_of(tensor: Tensor) -> Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """The whole `values`, which every rank has, as `tensor` is: on its device, sharded where it is."""
    if not isinstance(tensor, DTensor):
        return values.to(tensor.device)
    device = tensor.device_mesh.device_type
    return distribute_tensor(values.to(device), tensor.device_mesh, tensor.placements)
