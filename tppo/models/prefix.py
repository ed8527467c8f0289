"""A forward pass whose first tokens carry no gradient: their keys and values are computed once and held constant."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tppo.models.cached import hidden_states


def behind_a_detached_prefix(
    model: PreTrainedModel, input_ids: Int[Tensor, "rows time"], prefix_tokens: Int[Tensor, " rows"]
) -> Float[Tensor, "rows rest hidden"]:
    """Hidden states of each row's tokens from `prefix_tokens` on (column 0 is the first of them).

    Equal to an ordinary forward pass in value; in the backward pass nothing flows into the prefix. Prefixes are
    padded on the left, so that all of them end where the rest begins; padding is never attended to.
    """
    (rows, time), device = input_ids.shape, input_ids.device
    longest, rest = int(prefix_tokens.max()), time - int(prefix_tokens.min())
    if longest == 0:
        return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    skipped = (longest - prefix_tokens)[:, None]  # (rows, 1): padding before a prefix
    place = torch.arange(longest, device=device) - skipped  # (rows, longest): position in the row, negative in padding
    real = place >= 0
    cache = DynamicCache()
    with torch.no_grad():
        causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        # Padding attends to itself, or its softmax would have nothing to sum over.
        itself = torch.eye(longest, dtype=torch.bool, device=device)
        mask = (causal & real[:, None]) | itself  # (rows, longest, longest)
        at = place.clamp(min=0)
        hidden_states(model, input_ids.gather(1, at), mask[:, None], at, cache)
    behind = prefix_tokens[:, None] + torch.arange(rest, device=device)  # (rows, rest)
    causal = torch.ones(rest, rest, dtype=torch.bool, device=device).tril().expand(rows, -1, -1)
    mask = torch.cat([real[:, None].expand(-1, rest, -1), causal], dim=2)  # (rows, rest, longest + rest)
    at = behind.clamp(max=time - 1)
    return hidden_states(model, input_ids.gather(1, at), mask[:, None], behind, cache)
