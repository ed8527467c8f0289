"""What a run needs of a GPU's memory, counted on its real modules built without weights (torch's meta device)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from profiling.errors import ConfigError
from profiling.model_memory import Sizes
from tppo.algorithms.recipes import RECIPES
from tppo.config import RunConfig
from tppo.models.lora import add_adapters, is_adapter
from tppo.models.policy import describe_model
from tppo.models.reading import check_counts, reading_model
from tppo.models.value import ValueModel
from tppo.models.value_source import backbone_settings
from tppo.parallel.shard import layers_of

SHAPES = "shapes_only"
"""Name of the attention that computes nothing and keeps what flash attention keeps."""


@dataclass(frozen=True)
class Built:
    """On the meta device: shapes, no numbers."""

    policy: PreTrainedModel
    value_model: ValueModel | None


def build(values: Mapping[str, Any], config: RunConfig) -> Built:
    """values: of a config.json. The value model has the backbone that value.path names. Raises ConfigError."""
    AttentionInterface.register(SHAPES, _flash_like)

    def fault(reason: str) -> ConfigError:
        return ConfigError(f"model.path = {config.model.path!r}: its config.json builds no model: {reason}")

    with reading_model(fault), torch.device("meta"):
        check_counts(values)
        kind, others = str(values["model_type"]), {key: own for key, own in values.items() if key != "model_type"}
        settings = AutoConfig.for_model(kind, **others)
        policy = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation=SHAPES)
        value_model = _value_model(config, policy) if RECIPES[config.algorithm.name].has_value_model else None
        if config.model.lora_rank:
            add_adapters(policy, config.model, seed=0)
    return Built(policy, value_model)


def _value_model(config: RunConfig, policy: PreTrainedModel) -> ValueModel:
    trust = {"trust_remote_code": config.model.trust_remote_code}
    own = backbone_settings(config.value.path, **trust) if config.value.path else None
    if own is None:
        return ValueModel(policy)
    return ValueModel(AutoModelForCausalLM.from_config(own, dtype=torch.float32, attn_implementation=SHAPES, **trust))


def sizes_of(built: Built, config: RunConfig) -> Sizes:
    """Counted on the modules. Raises ConfigError for a model without rotary positions."""
    trained, frozen, policy = 0, 0, built.policy
    for model in (policy, built.value_model):
        for parameter in model.parameters() if model is not None else ():
            trained += parameter.numel() * parameter.requires_grad
            frozen += parameter.numel() * (not parameter.requires_grad)
    numbers = [p.numel() for p in policy.parameters()]
    copies = int(bool(config.algorithm.kl_coef) and not config.model.lora_rank)  # the reference
    copies += 2 * (RECIPES[config.algorithm.name].proximal == "ewma")  # the average, and the model that has it
    layers, about = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(policy)], describe_model(policy)
    return Sizes(
        trained=trained, frozen=frozen + copies * sum(numbers), layers=len(layers), largest_layer=max(layers),
        outside=sum(numbers) - sum(layers), largest_weight=max(numbers),
        outside_trains=any(p.requires_grad for p in policy.get_input_embeddings().parameters()),
        hidden=about["hidden_size"], vocabulary=about["vocab_size"], kept_bytes=kept_bytes_per_token(policy),
        engine=sum(p.numel() for name, p in policy.named_parameters() if not is_adapter(name)),  # adapters merged
        cached=about["kv_bytes_per_token"] / about["bytes_per_parameter"],
    )  # fmt: skip


def kept_bytes_per_token(policy: PreTrainedModel) -> float:
    """That autograd saves of the first layer in bfloat16. Attention as a flash kernel keeps it."""
    tokens = 16  # of which all grows linearly
    return _kept_by_a_layer(policy, tokens) / tokens


def _kept_by_a_layer(policy: PreTrainedModel, tokens: int) -> float:
    layer = layers_of(policy)[0].to(torch.bfloat16)
    storages: dict[int, int] = {}
    own = {p.untyped_storage()._cdata for p in layer.parameters()}
    hidden = torch.zeros(
        1, tokens, policy.config.get_text_config().hidden_size, device="meta", dtype=torch.bfloat16, requires_grad=True
    )
    places = torch.arange(tokens, device="meta")[None]
    saved: list[Tensor] = []  # alive, so that no two have the same storage one after the other

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    rotary = getattr(policy.base_model, "rotary_emb", None)
    if rotary is None:
        raise ConfigError("model.path: activations can be counted for models with rotary positions only")
    turned = rotary(hidden, places)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, attention_mask=None, position_ids=places, position_embeddings=turned)
    layer.to(torch.float32)
    return float(sum(storages.values()))


class _Flash(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys, values, the output, and a float32 a head and token. Of shapes
    only: there is no way back."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.shape[:-1] + value.shape[-1:])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def _flash_like(
    module: nn.Module, query: Float[Tensor, "rows heads time dim"], key: Float[Tensor, "rows kv_heads time dim"],
    value: Float[Tensor, "rows kv_heads time dim"], attention_mask: Tensor | None, **others: Any,
) -> tuple[Float[Tensor, "rows time heads dim"], None]:  # fmt: skip
    return _Flash.apply(query, key, value).transpose(1, 2), None


def tokens_of_a_pass(config: RunConfig, prompt_tokens: int) -> tuple[int, int]:
    """(padded tokens, tokens with a loss) of the largest forward and backward pass: a row stands alone where it is
    longer than micro_batch_tokens, and trains one window of it under tppo."""
    budget, longest = config.train.micro_batch_tokens, prompt_tokens + config.rollout.max_response_tokens
    recipe = RECIPES[config.algorithm.name]
    windowed = recipe.truncated and recipe.policy_tokens == "window"
    of_a_row = min(config.rollout.window, longest) if windowed else config.rollout.max_response_tokens
    return max(budget, longest), max(min(budget, config.rows_per_step * of_a_row), of_a_row)
