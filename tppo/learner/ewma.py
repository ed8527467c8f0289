"""The proximal policy of PPO-EWMA (arXiv 2110.00641; openai/ppo-ewma)."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tppo.parallel.tensors import like


def beta_for(updates_per_rollout: int) -> float:
    """Decay whose centre of mass, beta / (1 - beta), is `updates_per_rollout` updates: 8 give 0.889, 16 give 0.941."""
    return 1 - 1 / (updates_per_rollout + 1)


class ProximalPolicy:
    """An exponentially weighted moving average of a model's weights, kept in float32.

        W' = beta W + 1,  theta_prox <- (beta W / W') theta_prox + theta / W'      (W = 1, theta_prox = theta at first)

    The division by W' corrects for the start, as in Adam. `model` computes in the type of the policy.
    """

    def __init__(self, policy: PreTrainedModel, beta: float) -> None:
        self.beta = beta
        self.total_weight = 1.0
        self.model: PreTrainedModel = copy.deepcopy(policy).requires_grad_(False)
        self.restart(policy)

    def restart(self, policy: PreTrainedModel) -> None:
        """From the policy as it is: its weights may have moved to another device, or become shards."""
        self.total_weight = 1.0
        self._average = {name: p.detach().float().clone() for name, p in policy.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, policy: PreTrainedModel) -> None:
        """After every gradient step of the policy."""
        total = self.beta * self.total_weight + 1
        for name, parameter in policy.named_parameters():
            if name in self._average:  # adapters' frozen base is its own average
                self._average[name].mul_(self.beta * self.total_weight / total).add_(
                    parameter.float(), alpha=1 / total
                )
        self.total_weight = total
        self._publish()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, itself and no copy; tensors may be shards."""
        return {**self._average, "total_weight": torch.tensor(self.total_weight, dtype=torch.float64)}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        self.total_weight = float(state["total_weight"])
        for name, average in self._average.items():
            average.copy_(like(average, state[name]))
        self._publish()

    def _publish(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self._average:
                parameter.copy_(self._average[name])
