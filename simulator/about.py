"""What a simulated run directory says of its model and its GPUs, where costs come from data sheets: the files that a
measured run has too, so that a roofline or a price needs nothing but the directory."""

import json
from typing import Any

from simulator.analytic import AnalyticEngineCosts
from simulator.costs import RolloutCosts
from simulator.models import Model


def files_about(costs: RolloutCosts) -> dict[str, str]:
    """Name -> content of model.json and hardware.json; nothing for costs that name no GPU."""
    if not isinstance(costs, AnalyticEngineCosts):
        return {}
    records = {"model.json": _model(costs), "hardware.json": _hardware(costs)}
    return {name: json.dumps(record, indent=1) + "\n" for name, record in records.items()}


def _model(costs: AnalyticEngineCosts) -> dict[str, Any]:
    """As a trainer writes it. A tied table counts twice: once it is looked up, once it is multiplied with. uncounted:
    what the FLOPs and bytes of profiling.model_flops do not know about; null for a dense model."""
    model = costs.model
    return {
        "name": model.name,
        "parameters": model.linear_parameters_per_token + 2 * model.embedding_parameters + model.vector_parameters,
        "embedding_parameters": model.embedding_parameters,
        "lm_head_parameters": model.embedding_parameters,
        "layers": model.layers,
        "hidden_size": model.hidden,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.qk_dim,
        "vocab_size": model.vocabulary,
        "bytes_per_parameter": costs.weight_bytes,
        "kv_bytes_per_token": model.kv_bytes_per_token(costs.kv_bytes),
        "uncounted": _uncounted(model),
    }


def _uncounted(model: Model) -> str | None:
    if model.experts:
        return "experts"
    if model.latent_dim:
        return "latent attention"
    return "layers that look back less far" if model.window_layers else None


def _hardware(costs: AnalyticEngineCosts) -> dict[str, Any]:
    """Of one GPU. peak_flops, memory_bytes_per_s: the data sheet's; empirical_*: what the efficiency factors leave of
    them, in large matrix products and in reading weights. link_bytes_per_s: one way. Null: not known."""
    gpu, has = costs.gpu, costs.efficiency
    return {
        "name": gpu.name,
        "measured": False,
        "peak_flops": costs.peak,
        "memory_bytes_per_s": gpu.memory_bytes_per_s,
        "empirical_flops": costs.peak * max(has.decode_gemm, has.prefill_gemm),
        "empirical_memory_bytes_per_s": gpu.memory_bytes_per_s * max(has.weight_bandwidth, has.kv_bandwidth),
        "empirical_from": f"in practice ({has.engine} on {has.family})",
        "link_bytes_per_s": None if gpu.link_bytes_per_s is None else gpu.link_bytes_per_s / 2,
        "link": gpu.link,
        "network_bytes_per_s": gpu.network_bytes_per_s,
        "gpus_per_node": gpu.gpus_per_node,
        "price_per_hour": gpu.price_per_hour,
        "price_date": gpu.price_date,
    }
