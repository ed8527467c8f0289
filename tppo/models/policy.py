"""The policy: any Hugging Face causal language model, local or from the hub, or a new small one."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.core_model_loading import revert_weight_conversion

from profiling.errors import ConfigError
from tppo.models.prefix import behind_a_detached_prefix
from tppo.models.reading import read_model, reading_model, settings_of

# Shapes: rows = sequences of a micro-batch, time = their padded length, picked = positions with a loss.


SCORE = "score_tokens"
"""Name under which a sharded policy has `score_tokens` as a method: only inside one are its weights together."""


def looks_local(path: str) -> bool:
    """Rather than like a name on the hub: owner/name."""
    return Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1


def load_policy(
    path: str, *, attention: str = "sdpa", trust_remote_code: bool = False, weights: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32, on the CPU) and tokenizer from a local directory or a hub name. attention: sdpa,
    flash_attention_2 or eager. trust_remote_code: execute modelling code that comes with the model. weights: False:
    none are read, the model is on the meta device. Raises ConfigError when there is none."""
    trust = {"trust_remote_code": trust_remote_code}
    if looks_local(path) and not Path(path).expanduser().exists():
        raise ConfigError(f"model.path = {path!r}: no such directory")

    def fault(reason: str) -> ConfigError:
        if "attn_implementation" in reason:
            return ConfigError(f'model.attention = {attention!r}: this model has none; set model.attention = "eager"')
        if "flash_attn" in reason or "FlashAttention" in reason:
            return ConfigError(f"model.attention = {attention!r}: {reason}; install it, or set sdpa")
        absent = "" if Path(path).expanduser().exists() else "no such folder, and as a name on the hub "
        return ConfigError(f"model.path = {path!r}: {absent}no model can be loaded from it: {reason}")

    with reading_model(fault):
        settings = settings_of(path, **trust)
        how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": attention, **trust}
        model = read_model(AutoModelForCausalLM, path, settings, weights=weights, **how)
        tokenizer = AutoTokenizer.from_pretrained(path, **trust)
        tokenizer.decode(tokenizer("1")["input_ids"])  # what its settings break in use, they break here
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.path = {path!r}: its tokenizer has no end-of-sequence token")
    return model, tokenizer


def is_without_weights(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def new_qwen2(
    *, vocab_size: int, eos_token_id: int, pad_token_id: int, layers: int, hidden_size: int, heads: int,
    kv_heads: int, intermediate_size: int, max_tokens: int, seed: int,
) -> Qwen2ForCausalLM:  # fmt: skip
    """A Qwen2 model with random weights. Wide embeddings (std 0.5) and linear layers of std 0.7 / sqrt(fan in):
    with the library's std of 0.02 so narrow a model hardly trains."""
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=max_tokens, tie_word_embeddings=False,
        eos_token_id=eos_token_id, pad_token_id=pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 0.5, generator=generator)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0.0, 0.7 / math.sqrt(module.in_features), generator=generator)
    return model


@dataclass(frozen=True)
class Scored:
    log_probs: Float[Tensor, " picked"]
    entropy: Float[Tensor, " picked"]
    """Of the whole next-token distribution. Unit: nats."""


def token_log_probs(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "rows time"],
    row: Int[Tensor, " picked"],
    column: Int[Tensor, " picked"],
    targets: Int[Tensor, " picked"],
    temperature: float = 1.0,
    *,
    prefix_tokens: Int[Tensor, " rows"] | None = None,
    entropy_gradient: bool = False,
) -> Scored:
    """Log-probabilities of `targets` and entropies, where the token at (row, column) predicts the target after it.

    Logits are computed at those positions only. Rows are padded on the right, so under causal attention padding
    changes nothing. prefix_tokens: so many first tokens of each row are computed without gradient (their keys and
    values are constants); columns must lie behind them.
    """
    score = getattr(model, SCORE, None) or partial(score_tokens, model)
    return Scored(*score(input_ids, row, column, targets, temperature, prefix_tokens, entropy_gradient))


def score_tokens(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "rows time"],
    row: Int[Tensor, " picked"],
    column: Int[Tensor, " picked"],
    targets: Int[Tensor, " picked"],
    temperature: float,
    prefix_tokens: Int[Tensor, " rows"] | None,
    entropy_gradient: bool,
) -> tuple[Float[Tensor, " picked"], Float[Tensor, " picked"]]:
    """What `token_log_probs` computes: log-probabilities and entropies."""
    if prefix_tokens is None:
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (rows, time, hidden)
    else:
        hidden = behind_a_detached_prefix(model, input_ids, prefix_tokens)  # (rows, longest rest, hidden)
        column = column - prefix_tokens[row]
    logits = output_layer(model)(hidden[row, column]).float()  # (picked, vocabulary)
    log_probs = (logits / temperature).log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, targets[:, None]).sum(-1), entropy  # (picked,); no view, which sharding warns of


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with; Llama's tokenizers have none. Padding is never attended to, so any token will do."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def own_stops(model: PreTrainedModel) -> tuple[int, ...]:
    """Tokens that end a response by the model's generation_config.json, <|eot_id|> of a chat model say; none where it
    has no such file, and only config.json's are known."""
    settings = model.generation_config
    if settings is None or getattr(settings, "_from_model_config", False):
        return ()
    found = settings.eos_token_id
    return () if found is None else tuple(found) if isinstance(found, list) else (found,)


def input_layer(model: PreTrainedModel) -> nn.Embedding:
    layer = model.get_input_embeddings()
    assert isinstance(layer, nn.Embedding)
    return layer


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """Hidden states to logits."""
    layer = model.get_output_embeddings()
    assert isinstance(layer, nn.Linear)
    return layer


def architecture_of(model: PreTrainedModel) -> str:
    """As config.json names it: Qwen2ForCausalLM."""
    return type(model).__name__.removeprefix("FSDP")


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """The dimensions that cost formulas need, and what these do not count (null: nothing). Unit of *_bytes*: bytes.
    A tied table counts twice: once it is looked up, once it is multiplied with."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    weight, output = input_layer(model).weight, output_layer(model).weight
    size = weight.element_size()
    return {
        "parameters": sum(p.numel() for p in model.parameters()) + (output.numel() if output is weight else 0),
        "embedding_parameters": weight.numel(),
        "lm_head_parameters": output.numel(),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": _intermediate_size(config),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": weight.shape[0],
        "bytes_per_parameter": size,
        "kv_bytes_per_token": 2 * config.num_hidden_layers * kv_heads * head_dim * size,
        "uncounted": uncounted(config),
    }


def uncounted(config: PreTrainedConfig) -> str | None:
    """What the FLOPs and bytes of profiling.model_flops do not know about; None for a dense model that looks back as
    far as it can. config: of the text model."""
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "experts"
    if getattr(config, "kv_lora_rank", None):
        return "latent attention"
    kinds = getattr(config, "layer_types", None)
    if kinds and set(kinds) != {"full_attention"}:
        return "layers that look back less far"
    return None


def _intermediate_size(config: PreTrainedConfig) -> int:
    """GPT-2 and OPT have names of their own, and GPT-2 may leave it out for four times the hidden size."""
    named = (getattr(config, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim"))
    return next((size for size in named if size), 4 * config.hidden_size)


def save_policy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """weights: whole, where the model's own are shards; empty: none are written."""
    model.save_pretrained(path, state_dict=weights)
    tokenizer.save_pretrained(path)


def save_part(model: PreTrainedModel, weights: dict[str, Tensor], file: Path) -> None:
    """Some of the model's layers, under the names and in the shapes that `save_policy` gives the whole model's."""
    stored = revert_weight_conversion(model, weights)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, file, metadata={"format": "pt"})
