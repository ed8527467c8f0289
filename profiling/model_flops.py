"""FLOPs and bytes of a run's decode, prefill and training passes, from the model's dimensions (model.json).

Convention: attention is causal; a multiply-add is two FLOPs; norms, rotary embedding and softmax are left out; every
weight is read once a pass, keys and values once a token that attends to them. In training the way back costs twice
the way forward and reads each weight once and its gradient once, and writes that; an AdamW step reads weight, gradient
and both moments and writes all but the gradient. Activations are left out of the bytes, so that a training point's
intensity is an upper bound. Padding, and what activation checkpointing computes twice, is not counted as FLOPs.
"""

from collections.abc import Mapping
from typing import Any

VALUE_PHASES = ("value_forward", "update_value")
"""Of the value model, which has no output layer."""


def matmul_parameters(model: Mapping[str, Any]) -> int:
    """Parameters that take part in a matrix product: all but the input embedding's table."""
    return model["parameters"] - model["embedding_parameters"]


def decode_flops(model: Mapping[str, Any], tokens: int, pairs: int) -> int:
    """2 P per token and 4 layers heads head_dim per attended pair (query-key and weight-value products)."""
    return 2 * matmul_parameters(model) * tokens + 4 * model["layers"] * model["heads"] * model["head_dim"] * pairs


def decode_bytes(model: Mapping[str, Any], steps: int, tokens: int, pairs: int) -> int:
    """Weights once a step; keys and values of the whole context read, and of the new tokens written."""
    weights = matmul_parameters(model) * model["bytes_per_parameter"]
    return weights * steps + model["kv_bytes_per_token"] * (pairs + tokens)


def prefill_flops(model: Mapping[str, Any], tokens: int, pairs: int) -> int:
    """As decoding, without the output layer, which a prefill does not need."""
    parameters = matmul_parameters(model) - model["lm_head_parameters"]
    return 2 * parameters * tokens + 4 * model["layers"] * model["heads"] * model["head_dim"] * pairs


def prefill_bytes(model: Mapping[str, Any], passes: int, tokens: int) -> int:
    """Weights once a pass; keys and values written and read once."""
    parameters = matmul_parameters(model) - model["lm_head_parameters"]
    return parameters * model["bytes_per_parameter"] * passes + 2 * model["kv_bytes_per_token"] * tokens


def training_flops(model: Mapping[str, Any], work: Mapping[str, Any], *, policy: bool) -> int:
    """Of a phase's passes: 2 P a token, 2 per output weight and position, 4 layers heads head_dim an attended pair,
    three times where it goes back. policy: with the output layer; the value model's head counts as nothing."""
    trunk = matmul_parameters(model) - model["lm_head_parameters"]
    attention = 4 * model["layers"] * model["heads"] * model["head_dim"]
    outputs = 2 * model["lm_head_parameters"] * (work["outputs"] + 2 * work["backward_outputs"]) if policy else 0
    tokens, pairs = work["tokens"] + 2 * work["backward_tokens"], work["pairs"] + 2 * work["backward_pairs"]
    return int(2 * trunk * tokens + attention * pairs + outputs)


def training_bytes(model: Mapping[str, Any], work: Mapping[str, Any], *, policy: bool) -> int:
    """Weights once a pass; on the way back weights and gradients once, and the gradients written; six reads and
    writes of every parameter, gradients included, and one more, an update."""
    size = model["bytes_per_parameter"]
    head = 0 if policy else model["lm_head_parameters"]
    passes = (matmul_parameters(model) - head) * (work["passes"] + 3 * work["backward_passes"])
    return int(size * (passes + 7 * (model["parameters"] - head) * work["updates"]))
