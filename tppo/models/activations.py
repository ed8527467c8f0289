"""Activation checkpointing: a layer's activations are computed again on the way back instead of kept."""

from torch import nn
from transformers import PreTrainedModel

from profiling.errors import ConfigError


def checkpoint_activations(model: nn.Module) -> None:
    """Of every decoder layer, whenever gradients are wanted. transformers does so in training mode only, in which a
    model may also drop activations: the policy that trains must be the one that sampled, so dropout is turned off.
    Raises ConfigError for a model that cannot."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.supports_gradient_checkpointing:
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            break
    else:
        raise ConfigError("model.activation_checkpointing: this model's layers cannot be checkpointed; leave it out")
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, float):  # attention_dropout, OPT's dropout and layerdrop
                setattr(part, name, 0.0)
    model.train()
