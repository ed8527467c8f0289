"""Forward passes of a backbone with a key-value cache."""

import inspect
from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor, cache: Cache
) -> Float[Tensor, "rows time hidden"]:
    """The last layer's output; keys and values go through `cache`. mask: True where a query may look, or
    numbers added to the scores, or None."""
    return model.base_model(
        input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=True,
        **{_cache_argument(type(model.base_model).forward): cache},
    ).last_hidden_state  # fmt: skip


@torch.compiler.assume_constant_result
def _cache_argument(forward: Callable[..., object]) -> str:
    return _name_in_signature(forward)


@lru_cache
def _name_in_signature(forward: Callable[..., object]) -> str:
    """transformers renamed this argument in 5.2x and drops the old name in 5.40."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
