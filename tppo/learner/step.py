"""One optimiser step, guarded, and its learning rate."""

import torch
from torch import nn

from tppo.config import RunConfig
from tppo.learner.finite import check_gradient
from tppo.parallel.tensors import whole


def step_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, name: str) -> float:
    """Clip the gradient and take the step; returns the norm before clipping. Raises NotFinite, with the weights and
    the gradient as they were, when the norm is not finite."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    total = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = float(whole(total))
    check_gradient(norm, model, name)  # before clipping, which would spread a NaN to every parameter
    nn.utils.clip_grads_with_norm_(parameters, config.optimizer.max_grad_norm, total)
    optimizer.step()
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, warmup_steps: int) -> float:
    """Linear warm-up over `warmup_steps` steps, then constant. Returns the rate of this step."""
    lr = peak * min(1.0, step / max(warmup_steps, 1))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
