"""The value model: the policy's architecture with a scalar head, a network of its own."""

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

VALUE_MODEL = "value_model.safetensors"
"""Its file in a checkpoint."""
VALUE_CONFIG = "value_config"
"""Folder in a checkpoint with the config.json of its backbone, where that is not the policy's."""


class ValueModel(nn.Module):
    """V(s_t), read at the last token of s_t. Starts from the policy's backbone; the head starts at zero, so every
    value is 0 before training."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.backbone: PreTrainedModel = copy.deepcopy(policy.base_model)  # type: ignore[assignment]
        self.head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, input_ids: Int[Tensor, "rows time"], row: Int[Tensor, " picked"], column: Int[Tensor, " picked"]
    ) -> Float[Tensor, " picked"]:
        """Values read at (row, column). Unit: reward."""
        hidden = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state  # (rows, time, hidden)
        return self.head(hidden[row, column]).sum(-1).to(torch.float32)  # no view, which sharding warns of
