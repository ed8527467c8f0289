"""Where the value model comes from: the policy's backbone, another run's checkpoint, or a reward model."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from profiling.errors import ConfigError
from tppo.checkpoints.manifest import MANIFEST
from tppo.checkpoints.weights import read_weights, weight_files
from tppo.config import RunConfig
from tppo.models.policy import input_layer, is_without_weights
from tppo.models.reading import check_the_weights_can_be_there, read_model, reading_model, settings_of
from tppo.models.value import VALUE_CONFIG, VALUE_MODEL, ValueModel

CLASSES = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}
"""Reward models, by the end of the architecture's name in config.json."""


def value_model_of(config: RunConfig, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ValueModel:
    """As value.path says; without weights where the policy has none. Nothing is executed on reading: weights come from
    safetensors. Raises ConfigError naming value.path when it holds neither kind of value model, or one of another
    vocabulary."""
    with torch.device("meta") if is_without_weights(policy) else nullcontext():
        return _value_model_of(config, policy, tokenizer)


def _value_model_of(config: RunConfig, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ValueModel:
    weights = not is_without_weights(policy)
    path = config.value.path
    if not path:
        return ValueModel(policy)
    if is_checkpoint(Path(path)):
        own = Path(path) / VALUE_CONFIG
        value_model = ValueModel(_random_model(own) if own.is_dir() else policy)
        if weights:
            load_value_model(value_model, Path(path))
        return value_model
    attention, trust = config.model.attention, config.model.trust_remote_code
    return from_reward_model(path, tokenizer, attention=attention, trust_remote_code=trust, weights=weights)


def is_checkpoint(path: Path) -> bool:
    """Rather than a reward model."""
    return bool(weight_files(path / VALUE_MODEL)) or (path / MANIFEST).exists()


def backbone_settings(path: str, *, trust_remote_code: bool = False) -> PreTrainedConfig | None:
    """Of the value model at value.path; None: those of the policy. No weights are read. Raises ConfigError."""
    own = Path(path) / VALUE_CONFIG
    if is_checkpoint(Path(path)) and not own.is_dir():
        return None
    with reading_model(lambda reason: ConfigError(f"value.path: {path} holds no value model: {reason}")):
        return settings_of(own if own.is_dir() else path, trust_remote_code=trust_remote_code)


def _random_model(folder: Path) -> PreTrainedModel:
    with reading_model(lambda reason: ConfigError(f"value.path: {folder} describes no model: {reason}")):
        settings = settings_of(folder)
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(settings)
        check_the_weights_can_be_there(folder.parent, shapes)
        return AutoModelForCausalLM.from_config(settings, dtype=torch.float32)


def load_value_model(value_model: ValueModel, checkpoint: Path) -> None:
    """Weights from another run's checkpoint. Raises ConfigError naming the file when they do not fit."""
    path = checkpoint / VALUE_MODEL
    with reading_model(
        lambda reason: ConfigError(f"value.path: {path} holds no value model for this policy: {reason}")
    ):
        value_model.load_state_dict(read_weights(path))


def from_reward_model(
    path: str, tokenizer: PreTrainedTokenizerBase, *, attention: str = "sdpa", trust_remote_code: bool = False,
    weights: bool = True,
) -> ValueModel:  # fmt: skip
    """Backbone and head of a reward model: its scalar, read at the last token it saw, is the first guess of V. Its
    sizes may be others than the policy's, its tokens may not. weights: False: none are read, on the meta device.
    Raises ConfigError."""

    def fault(reason: str) -> ConfigError:
        return ConfigError(f"value.path: {path} {reason}")

    trust = {"trust_remote_code": trust_remote_code}
    with reading_model(lambda reason: fault(f"holds no value model for this policy: {reason}")):
        settings = settings_of(path, **trust)
        kinds = [kind for name in settings.architectures or () for end, kind in CLASSES.items() if name.endswith(end)]
        if not kinds:
            raise fault(
                f"holds no value model for this policy: {', '.join(settings.architectures or ['it'])} is no reward "
                f"model, and there is no {VALUE_MODEL}; name a checkpoint of a run, a sequence or a token classifier"
            )
        if settings.num_labels != 1:
            raise fault(f"has {settings.num_labels} outputs; a value model needs one with num_labels = 1")
        how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": attention, **trust}
        model = read_model(kinds[0], path, settings, weights=weights, use_safetensors=True, **how)
        own = AutoTokenizer.from_pretrained(path, **trust)
    head = next((layer for _, layer in model.named_children() if isinstance(layer, nn.Linear)), None)
    if head is None or head.out_features != 1:
        raise fault("has a head that is no linear layer with one output")
    if own.get_vocab() != tokenizer.get_vocab():
        raise fault("has another tokenizer than the policy; take a reward model of the same family")
    rows = input_layer(model).weight.shape[0]
    if rows < len(tokenizer):
        raise fault(f"has {rows} tokens, the policy's tokenizer {len(tokenizer)}")
    return with_head(model, head)


@torch.no_grad()
def with_head(model: PreTrainedModel, head: nn.Linear) -> ValueModel:
    value_model = ValueModel(model)
    value_model.head.weight.copy_(head.weight)
    if head.bias is not None:
        value_model.head.bias.copy_(head.bias)
    return value_model


def check_value_rows_fit(value_model: ValueModel | None, path: str, row_tokens: int) -> None:
    """Raises ConfigError when the value model has fewer positions than the longest row."""
    if value_model is None:
        return
    backbone = value_model.backbone
    positions = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and row_tokens > positions:
        raise ConfigError(
            f"value.path: {path} has {positions} positions, and a row needs up to {row_tokens}; lower "
            "rollout.max_response_tokens, or take another value model"
        )
