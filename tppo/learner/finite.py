"""Stops an update before the optimiser moves when a loss or a gradient is not finite, and says what it was made of."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from profiling.errors import RunError
from tppo.parallel.ranks import Ranks
from tppo.parallel.tensors import shard_of
from tppo.rollout.rows import Row


@dataclass(frozen=True)
class Found:
    """What one rank saw."""

    faults: dict[str, int]
    """Tensor or parameter -> its elements that are not finite."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """The micro-batch: tokens, and what was known and computed of them."""
    rows: list[Row] = field(default_factory=list)
    """Of the micro-batch; of the whole mini-batch where a gradient is at fault, which is the sum over it."""
    norms: dict[str, float] = field(default_factory=dict)
    """Parameter -> norm of its gradient on this rank."""


class NotFinite(RunError):
    """The update was stopped, on all ranks. what: loss or gradient. model: whose. found: None on a rank that saw
    nothing wrong itself."""

    def __init__(self, what: str, model: str, found: Found | None) -> None:
        super().__init__(f"the {model}'s {what} is not finite")
        self.what, self.model, self.found = what, model, found


def check_loss(loss: Tensor, model: str, ranks: Ranks, found: Callable[[], Found]) -> None:
    """Before the backward pass, in which sharded ranks need each other: all stop where one must. Raises NotFinite."""
    own = not math.isfinite(loss.item())
    if ranks.any(own):
        raise NotFinite("loss", model, found() if own else None)


def check_gradient(norm: float, model: nn.Module, name: str) -> None:
    """norm: over all ranks, so that all stop alike. Raises NotFinite; each rank names what is wrong in its shards."""
    if math.isfinite(norm):
        return
    gradients = {
        key: shard_of(parameter.grad).detach() for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }  # fmt: skip
    norms = {key: float(gradient.float().norm()) if gradient.numel() else 0.0 for key, gradient in gradients.items()}
    raise NotFinite("gradient", name, Found(not_finite(gradients), norms=norms))


@contextmanager
def of_rows(rows: Sequence[Row]) -> Iterator[None]:
    """A gradient at fault in here is the sum over these rows."""
    try:
        yield
    except NotFinite as fault:
        if fault.found is not None:
            fault.found.rows.extend(rows)
        raise


def not_finite(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> elements that are NaN or infinite, of those that have any."""
    counts = {
        name: int((~torch.isfinite(tensor)).sum()) for name, tensor in tensors.items() if tensor.is_floating_point()
    }
    return {name: count for name, count in counts.items() if count}


def found_in(model: nn.Module, tensors: Mapping[str, Tensor], rows: Sequence[Row]) -> Found:
    """Of a loss: the tensors that it was made of, and the model's parameters, which may be the cause."""
    parameters = {name: shard_of(parameter).detach() for name, parameter in model.named_parameters()}
    faults = not_finite(tensors) | {f"parameter {name}": count for name, count in not_finite(parameters).items()}
    return Found(faults, {name: tensor.detach().cpu() for name, tensor in tensors.items()}, list(rows))
