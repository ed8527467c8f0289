"""From a configuration to the engines of a cluster."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from profiling.errors import ConfigError
from tppo.cluster.places import Places, reserved_places
from tppo.cluster.pool import EnginePool
from tppo.cluster.session import joined_cluster
from tppo.cluster.sync import ByBroadcast, ThroughTheObjectStore, WeightSync
from tppo.cluster.worker import EngineSpec
from tppo.config import RunConfig
from tppo.models.policy import input_layer
from tppo.rollout.engines import engine_dtype


@contextmanager
def places_of(config: RunConfig) -> Iterator[Places | None]:
    """What `[ray]` asks for, reserved; None, and no Ray, without an address. Raises ConfigError."""
    if not config.ray.address:
        yield None
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("--ray: the trainer is one process, and torchrun has started several; leave one of them out")
    with joined_cluster(config.ray.address) as ray, reserved_places(ray, config) as places:
        yield places


def make_pool(
    places: Places,
    config: RunConfig,
    model: PreTrainedModel,
    *,
    slots: int,
    max_tokens: int,
    generator: torch.Generator,
) -> EnginePool:
    """The engines, built, all with the weights of config.model.path: `update_weights` brings those of `model`, which
    the caller trains. slots: rows of an engine. Raises ConfigError or EngineError."""
    own, ray = config.ray, places.ray
    path = Path(config.model.path)  # engines on other hosts have the model there too, or get it from the hub
    spec = EngineSpec(
        config, str(path.resolve()) if path.exists() else config.model.path, slots, max_tokens, own.cpus_per_engine
    )
    dtype = engine_dtype(config, torch.device("cuda" if places.gpus_per_engine else "cpu"))
    trainer = input_layer(model).weight.device
    limit = own.engine_timeout_s
    store = ThroughTheObjectStore(
        ray, model, dtype, timeout_s=limit, keep=config.rollout.schedule == "asynchronous"
    )  # fmt: skip
    backend = backend_of(config, on_gpus=trainer.type == "cuda" and places.gpus_per_engine > 0)
    sync: WeightSync = store
    if backend is not None:
        host = ray.util.get_node_ip_address()
        sync = ByBroadcast(ray, model, dtype, backend=backend, host=host, device=trainer, timeout_s=limit)
    return EnginePool(places, spec, sync, store, generator=generator)


def backend_of(config: RunConfig, *, on_gpus: bool) -> str | None:
    """Of weight broadcasts; None: through the object store. on_gpus: trainer and engines. Raises ConfigError."""
    wanted, separate = config.ray.weight_sync, config.ray.layout == "separate"
    if wanted == "nccl" and not (on_gpus and separate):
        raise ConfigError(
            'ray.weight_sync = "nccl": is for layout = "separate" with trainer and engines on GPUs, no two on one; '
            'set "object_store", or leave it out'
        )
    if wanted == "auto":
        return "nccl" if on_gpus and separate and not config.ray.address.startswith("ray://") else None
    return None if wanted == "object_store" else wanted
