"""One optimiser step, guarded, and its learning rate."""

import math

import torch
from torch import nn

from profiling.errors import RunError
from tppo.config import RunConfig
from tppo.parallel.tensors import whole


def step_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, name: str) -> float:
    """Clip the gradient and take the step; returns the norm before clipping. Raises RunError, with the weights as
    they were, when the gradient is not finite."""
    norm = float(whole(nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)))
    if not math.isfinite(norm):
        raise RunError(
            f"the {name}'s gradient is not finite; its weights are left as they were, and no checkpoint is written: "
            "go on from the last one with a lower learning rate"
        )
    optimizer.step()
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, warmup_steps: int) -> float:
    """Linear warm-up over `warmup_steps` steps, then constant. Returns the rate of this step."""
    lr = peak * min(1.0, step / max(warmup_steps, 1))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
