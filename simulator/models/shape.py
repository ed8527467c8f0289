"""Parameters, KV bytes and FLOPs of a decoder, counted from its config.json. Pure arithmetic, no torch.

Conventions: a multiply-add is two FLOPs; norms, rotary embedding, softmax and routing's top-k are left out; attention
is counted per attended pair of query and key, so causal attention over n tokens has n (n + 1) / 2 of them.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiling.errors import ConfigError
from profiling.files import read_json

CONFIGS = Path(__file__).parent / "configs"

QKV_BIAS = ("qwen2", "gpt_oss")
"""Model types whose query, key and value projections have biases by default."""
QK_NORM = ("qwen3", "qwen3_moe")
LATENT = ("deepseek_v2", "deepseek_v3")
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")


@dataclass(frozen=True)
class Model:
    """Counts are of numbers, not bytes, unless named so. A layer is a decoder block."""

    name: str
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    """1 for latent attention, which keeps one vector per token for all heads."""
    qk_dim: int
    """Of a head's query and key."""
    v_dim: int
    tied: bool
    """The output layer is the embedding's table."""
    positions: int
    attention_parameters: int
    """Of a layer's projections, without biases."""
    vector_parameters: int
    """Of the whole model: norms, the projections' biases, attention sinks. No matrix product uses them."""
    dense_layers: int
    dense_mlp_parameters: int
    """Of a layer whose MLP every token passes."""
    experts: int = 0
    experts_per_token: int = 0
    expert_parameters: int = 0
    """Of one expert."""
    shared_parameters: int = 0
    """Of a mixture's layer that every token passes: router and shared experts."""
    latent_dim: int = 0
    """Latent attention: numbers kept per token and layer, compressed keys and values and the rotary key."""
    latent_value_dim: int = 0
    """Of these, the ones that values are made from."""
    window: int = 0
    window_layers: int = 0
    """Layers that attend to the last `window` tokens only."""
    qk_norm: bool = False
    """Queries and keys are normed."""

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def full_layers(self) -> int:
        """Layers that attend to the whole context."""
        return self.layers - self.window_layers

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them; a table that is tied counts once."""
        tables = self.embedding_parameters * (1 if self.tied else 2)
        experts = self.moe_layers * self.experts * self.expert_parameters
        return tables + self.vector_parameters + self._common_parameters + experts

    @property
    def backbone_parameters(self) -> int:
        """Without the output layer, as a value model with a scalar head has them."""
        return self.parameters - (0 if self.tied else self.embedding_parameters)

    @property
    def largest_layer_parameters(self) -> int:
        mixture = self.experts * self.expert_parameters + self.shared_parameters
        vectors = (self.vector_parameters - self.hidden) // self.layers
        return self.attention_parameters + vectors + max(self.dense_mlp_parameters, mixture)

    @property
    def inner_units_per_token(self) -> float:
        """Of the gated MLPs that a token passes, mean over layers: three matrices of hidden x inner."""
        mlps = self.linear_parameters_per_token - self.layers * self.attention_parameters
        return mlps / self.layers / (3 * self.hidden)

    @property
    def linear_parameters_per_token(self) -> int:
        """That one token multiplies with in all layers, the output layer apart."""
        return self._common_parameters + self.moe_layers * self.experts_per_token * self.expert_parameters

    @property
    def active_parameters(self) -> int:
        """That one token multiplies with, the output layer included: the A3B of a 30B-A3B, without the table."""
        return self.linear_parameters_per_token + self.embedding_parameters

    @property
    def _common_parameters(self) -> int:
        """Of projections, dense MLPs, routers and shared experts: what every token passes."""
        mlp = self.dense_layers * self.dense_mlp_parameters + self.moe_layers * self.shared_parameters
        return self.layers * self.attention_parameters + mlp

    def parameters_read(self, tokens: int) -> float:
        """Of the layers, expected when `tokens` tokens pass together."""
        return self._common_parameters + self.expert_parameters_read(tokens)

    def expert_parameters_read(self, tokens: int) -> float:
        """Of experts: k of E for each token, drawn evenly."""
        if not self.experts:
            return 0.0
        hit = self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens)
        return self.moe_layers * hit * self.expert_parameters

    @property
    def kv_numbers_per_token_and_layer(self) -> int:
        return self.latent_dim or self.kv_heads * (self.qk_dim + self.v_dim)

    def kv_bytes_per_token(self, bytes_each: float = 2.0) -> float:
        """Of layers that keep the whole context."""
        return self.full_layers * self.kv_numbers_per_token_and_layer * bytes_each

    def kv_bytes_per_row(self, bytes_each: float = 2.0) -> float:
        """Of layers with a sliding window, once it is full."""
        return self.window_layers * self.window * self.kv_numbers_per_token_and_layer * bytes_each

    def attention_flops(self, pairs: float, tokens: float) -> float:
        """Of attending to `pairs` query-key pairs from `tokens` queries: scores and weighted values."""
        per_pair = 2 * self.heads * (self.qk_dim + self.v_dim)
        return per_pair * (self.full_layers * pairs + self.window_layers * min(pairs, tokens * self.window))

    def decode_attention_flops_per_context_token(self) -> float:
        """Of one token that attends to one more. Latent attention works in the latent space (absorbed projections)."""
        dims = self.latent_dim + self.latent_value_dim if self.latent_dim else self.qk_dim + self.v_dim
        return 2.0 * self.full_layers * self.heads * dims

    def forward_flops(self, tokens: float, pairs: float, *, logits: float | None = None) -> float:
        """Of `tokens` tokens that attend to `pairs` pairs; the output layer for `logits` of them (default: all)."""
        out = 2 * self.embedding_parameters * (tokens if logits is None else logits)
        return 2 * self.linear_parameters_per_token * tokens + out + self.attention_flops(pairs, tokens)

    def verl_flops(self, tokens: float, squared_lengths: float) -> float:
        """Of a training step in verl's convention: 6 x (layers, embedding and output layer) per token, 12 per layer,
        head and dimension per pair of a full square (squared_lengths = sum of n ** 2), nothing for recomputation."""
        dense = self.linear_parameters_per_token + 2 * self.embedding_parameters
        return 6 * dense * tokens + 12 * self.layers * self.heads * self.qk_dim * squared_lengths


def bundled_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def bundled_config(name: str) -> Path | None:
    """The bundled config.json of a model's name, with or without organisation and -Instruct; None: there is none."""
    own = (CONFIGS / f"{known}.json" for known in bundled_names() if known.lower() == _plain(name))
    return next(own, None)


def _plain(name: str) -> str:
    wanted = name.rsplit("/", 1)[-1].lower()
    for suffix in ("-instruct", "-base", "-chat", "-hf"):
        wanted = wanted.removesuffix(suffix)
    return wanted


def load_model(source: str | Path) -> Model:
    """A bundled name ("Qwen2.5-7B", with or without its organisation), a config.json, or a folder that holds one.

    Raises ConfigError naming the file and what is missing, or the nearest bundled name.
    """
    if not str(source).strip() or len(str(source)) > 1000:
        raise ConfigError(f"model {str(source)[:40]!r}: name a config.json, its folder, or a bundled model")
    path = Path(source)
    if os.path.isdir(path):
        path = path / "config.json"
        if not path.is_file():
            raise ConfigError(f"{path.parent}: holds no config.json")
    if os.path.isfile(path):
        return model_from_config(_read(path), name=path.parent.name if path.name == "config.json" else path.stem,
                                 where=str(path))  # fmt: skip
    own = bundled_config(str(source))
    if own is not None:
        return model_from_config(_read(own), name=own.stem, where=str(own))
    names, wanted = bundled_names(), _plain(str(source))
    near = difflib.get_close_matches(wanted, [name.lower() for name in names], n=1, cutoff=0.4)
    hint = f"; did you mean '{next(name for name in names if name.lower() == near[0])}'?" if near else ""
    raise ConfigError(
        f"model {str(source)!r}: no such config.json, and not one of the {len(names)} bundled models{hint}"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: is not a readable config.json: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: is not a readable config.json: it holds no table")
    return values.get("text_config", values) if isinstance(values.get("text_config", values), dict) else values


class _Config:
    """Whole numbers by key, with errors that name the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def number(self, *keys: str, default: int | None = None) -> int:
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**40:
                raise ConfigError(f"{self.where}: {key} = {str(value)[:40]!r} is not a positive whole number")
            return value
        if default is None:
            raise ConfigError(f"{self.where}: has no {' or '.join(keys)}, which the model's size depends on")
        return default

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key} = {str(value)[:40]!r} is neither true nor false")
        return default if value is None else value


def model_from_config(values: Mapping[str, Any], *, name: str, where: str) -> Model:
    """Raises ConfigError for an architecture that is not known, naming the nearest one that is."""
    kind = values.get("model_type")
    if kind not in KNOWN:
        near = difflib.get_close_matches(str(kind), KNOWN, n=1, cutoff=0.3)
        hint = f"; the nearest is '{near[0]}'" if near else ""
        raise ConfigError(f"{where}: model_type = {kind!r} is not one of {', '.join(KNOWN)}{hint}")
    config = _Config(values, where)
    hidden, layers = config.number("hidden_size"), config.number("num_hidden_layers")
    heads = config.number("num_attention_heads")
    attention = _latent_attention(config) if kind in LATENT else _attention(config, str(kind), hidden, heads)
    window, window_layers = _windows(config, str(kind), layers)
    vectors = layers * (2 * hidden + attention.pop("vectors")) + hidden
    if kind == "gpt_oss":
        vectors += layers * heads  # attention sinks
    return Model(
        name=name, layers=layers, hidden=hidden, vocabulary=config.number("vocab_size"), heads=heads,
        tied=config.flag("tie_word_embeddings", default=False), vector_parameters=vectors,
        positions=config.number("max_position_embeddings"), window=window, window_layers=window_layers,
        qk_norm=kind in QK_NORM,
        **attention, **_mlps(config, str(kind), hidden, layers),
    )  # fmt: skip


def _attention(config: _Config, kind: str, hidden: int, heads: int) -> dict[str, int]:
    kv_heads = config.number("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ConfigError(f"{config.where}: {heads} attention heads cannot share {kv_heads} heads of keys and values")
    if config.values.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"{config.where}: hidden_size = {hidden} does not divide into {heads} heads; give head_dim")
    dim = config.number("head_dim", default=max(1, hidden // heads))
    bias = kind in QKV_BIAS or config.flag("attention_bias", default=False)
    bias_of_output = (kind == "gpt_oss") or (config.flag("attention_bias", default=False) and kind != "qwen2")
    weights = hidden * dim * (2 * heads + 2 * kv_heads)
    biases = dim * (heads + 2 * kv_heads) * bias + hidden * bias_of_output
    vectors = biases + (2 * dim if kind in QK_NORM else 0)
    return {
        "kv_heads": kv_heads,
        "qk_dim": dim,
        "v_dim": dim,
        "attention_parameters": weights,
        "vectors": vectors,
    }


def _latent_attention(config: _Config) -> dict[str, int]:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    latent, rotary = config.number("kv_lora_rank"), config.number("qk_rope_head_dim")
    nope, v_dim = config.number("qk_nope_head_dim"), config.number("v_head_dim")
    q_rank = config.number("q_lora_rank", default=0)
    query = q_rank * (hidden + heads * (nope + rotary)) if q_rank else hidden * heads * (nope + rotary)
    keys_and_values = hidden * (latent + rotary) + latent * heads * (nope + v_dim)
    return {
        "kv_heads": 1, "qk_dim": nope + rotary, "v_dim": v_dim, "latent_dim": latent + rotary,
        "latent_value_dim": latent, "attention_parameters": query + keys_and_values + heads * v_dim * hidden,
        "vectors": q_rank + latent,
    }  # fmt: skip


def _mlps(config: _Config, kind: str, hidden: int, layers: int) -> dict[str, int]:
    if kind == "gpt_oss":
        experts, inner = config.number("num_local_experts"), config.number("intermediate_size")
        one = 3 * hidden * inner + 2 * inner + hidden  # with biases
        return {
            "dense_layers": 0, "dense_mlp_parameters": 0, "experts": experts, "expert_parameters": one,
            "experts_per_token": config.number("num_experts_per_tok"), "shared_parameters": hidden * experts + experts,
        }  # fmt: skip
    if kind not in ("qwen3_moe", *LATENT):
        inner = config.number("intermediate_size")
        bias = config.flag("mlp_bias", default=False) * (2 * inner + hidden)
        return {"dense_layers": layers, "dense_mlp_parameters": 3 * hidden * inner + bias}
    experts = config.number("num_experts", "n_routed_experts")
    if config.number("num_experts_per_tok") > experts:
        raise ConfigError(f"{config.where}: num_experts_per_tok is above the {experts} experts")
    inner = config.number("moe_intermediate_size")
    shared = config.number("n_shared_experts", default=0) * inner if kind in LATENT else 0
    if kind in LATENT:
        dense_layers = config.number("first_k_dense_replace", default=0)
        if dense_layers > layers:
            raise ConfigError(f"{config.where}: first_k_dense_replace = {dense_layers} is above {layers} layers")
    else:
        every = config.number("decoder_sparse_step", default=1)
        listed = config.values.get("mlp_only_layers") or []
        if not isinstance(listed, list) or not all(isinstance(layer, int) for layer in listed):
            raise ConfigError(f"{config.where}: mlp_only_layers is not a list of layers")
        only_dense = set(listed)
        dense_layers = sum(layer in only_dense or (layer + 1) % every != 0 for layer in range(layers))
    return {
        "dense_layers": dense_layers,
        "dense_mlp_parameters": 3 * hidden * config.number("intermediate_size") if dense_layers else 0,
        "experts": experts, "experts_per_token": config.number("num_experts_per_tok"),
        "expert_parameters": 3 * hidden * inner, "shared_parameters": hidden * experts + 3 * hidden * shared,
    }  # fmt: skip


def _windows(config: _Config, kind: str, layers: int) -> tuple[int, int]:
    """(window, layers that have one)."""
    kinds = config.values.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != layers or any(entry not in known for entry in kinds):
            raise ConfigError(f"{config.where}: layer_types must be {layers} times one of {', '.join(known)}")
        sliding = sum(entry == "sliding_attention" for entry in kinds)
    elif kind in ("qwen2", "qwen3", "qwen3_moe") and config.flag("use_sliding_window", default=False):
        sliding = max(0, layers - config.number("max_window_layers", default=28))
    elif kind == "gpt_oss":
        sliding = (layers + 1) // 2  # every other one, from the first
    elif kind == "mistral" and config.values.get("sliding_window"):
        sliding = layers
    else:
        sliding = 0
    return (config.number("sliding_window"), sliding) if sliding else (0, 0)
