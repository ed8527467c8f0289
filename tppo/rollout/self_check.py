"""Refuses a model that the torch engine would sample from wrongly: a few tokens through the slot cache must give the
logits that the model itself gives, and no layer may look back less far than a row is long."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from profiling.errors import ConfigError, first_line
from tppo.models.cached import hidden_states
from tppo.models.policy import architecture_of, input_layer, output_layer
from tppo.rollout.slot_cache import SlotCache

ROWS, TOKENS = 2, 7
PREFILLED = (4, 2)
"""Tokens of each row that the check prefills; the others are decoded one by one, at different places."""
TOLERANCE = 1e-4
"""Of the deviation from the model's own logits, as a share of their spread. Rounding in float32 gives 1e-6 to 1e-5,
a scaled, capped or shifted logit 1e-3 and more."""


def check_it_can_be_served(model: PreTrainedModel, path: str, *, cached: bool = True) -> None:
    """Raises ConfigError when the trainer's pass or (cached) the torch engine's slots give other logits than the
    model, or these are no numbers. Takes some milliseconds for a small model; nothing is drawn at random."""
    if not isinstance(model.get_input_embeddings(), nn.Embedding):
        raise _refusal(model, path, "it has no table of input embeddings")
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise _refusal(model, path, "its logits do not come from a linear output layer")
    vocabulary, device = input_layer(model).weight.shape[0], input_layer(model).weight.device
    ids = (torch.arange(ROWS * TOKENS, device=device) % vocabulary).view(ROWS, TOKENS)
    try:
        with torch.inference_mode():
            own = model(input_ids=ids, use_cache=False).logits.float()  # (rows, tokens, vocabulary)
            finite = bool(own.isfinite().all())
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            scaled = _differs(output_layer(model)(hidden).float(), own)
            strays = False
            if cached and not scaled:
                logits, places = _decoded(model, ids)
                strays = _differs(logits, own[torch.arange(ROWS, device=device), places])
    except Exception as error:  # somebody else's modelling code may fail in any way
        reason = first_line(error)
        raise _refusal(model, path, f"its layers do not work with a cache of keys and values: {reason}") from None
    if not finite:
        raise ConfigError(f"model.path = {path!r}: its logits are not finite numbers; are its weights whole?")
    if scaled:
        raise _refusal(model, path, "it scales or caps its logits after the output layer, which training does not")
    if strays:
        raise _refusal(
            model, path, "decoding with a cache of keys and values gives other logits than a plain forward pass"
        )


def check_it_looks_back_far_enough(model: PreTrainedModel, path: str, row_tokens: int) -> None:
    """Raises ConfigError when a layer attends to fewer tokens than the longest row has."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    slides = getattr(config, "use_sliding_window", True) if kinds is None else set(kinds) != {"full_attention"}
    if window and slides and window < row_tokens:
        raise ConfigError(
            f"model.path = {path!r}: some of its layers attend to the last {window} tokens only, and a row has up to "
            f"{row_tokens}; lower rollout.max_response_tokens by {row_tokens - window}, or set rollout.engine = "
            '"vllm"'
        )


def _decoded(model: PreTrainedModel, ids: Int[Tensor, "rows tokens"]) -> tuple[Tensor, Tensor]:
    """Logits as the torch engine computes them, and the places that they belong to: both (steps, rows, ...)."""
    rows, tokens = ids.shape
    cache, slots = SlotCache(model, rows, tokens), torch.arange(rows, device=ids.device)
    width = max(PREFILLED)
    cache.for_prefill(slots, width)
    hidden_states(model, ids[:, :width], None, torch.arange(width, device=ids.device).expand(rows, -1), cache)
    logits, places = [], []
    for step in range(tokens - width):
        position = torch.tensor(PREFILLED, device=ids.device) + step
        cache.for_decode(position, width + step + 1)
        ahead = torch.arange(width + step + 1, device=ids.device) > position[:, None]  # (rows, width)
        mask = torch.zeros(ahead.shape, dtype=model.dtype, device=ids.device).masked_fill_(ahead, -torch.inf)
        hidden = hidden_states(model, ids[slots, position][:, None], mask[:, None, None], position[:, None], cache)
        logits.append(output_layer(model)(hidden[:, 0]).float())
        places.append(position)
    return torch.stack(logits), torch.stack(places)


def _differs(ours: Float[Tensor, "..."], theirs: Float[Tensor, "..."]) -> bool:
    spread = float((theirs - theirs.mean(-1, keepdim=True)).norm())
    return not float((ours - theirs).norm()) <= TOLERANCE * spread  # a NaN differs


def _refusal(model: PreTrainedModel, path: str, reason: str) -> ConfigError:
    return ConfigError(
        f"model.path = {path!r}: {architecture_of(model)} cannot be trained here: {reason}; take a model with plain "
        "attention in every layer (Qwen2, Qwen3, Llama, Mistral ...)"
    )
