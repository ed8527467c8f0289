"""From a configuration to the engines of a cluster."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from profiling.errors import ConfigError
from tppo.cluster.hosts import home_of_this_process
from tppo.cluster.led import LedEngines
from tppo.cluster.places import Places, as_seen_here, reserved_places
from tppo.cluster.pool import EnginePool
from tppo.cluster.session import joined_cluster
from tppo.cluster.sync import ByBroadcast, ThroughTheObjectStore, WeightSync
from tppo.cluster.worker import EngineSpec
from tppo.config import RunConfig
from tppo.models.policy import input_layer
from tppo.parallel.ranks import SINGLE, Ranks
from tppo.rollout.engines import engine_dtype


@contextmanager
def places_of(config: RunConfig, ranks: Ranks = SINGLE) -> Iterator[Places | None]:
    """What `[ray]` asks for, reserved, on the first rank, which joins the cluster; None, and no Ray, on the others and
    without an address. Raises ConfigError, on all ranks."""
    if not config.ray.address:
        yield None
        return
    homes = ranks.gather(home_of_this_process())
    found: list[Places] = []
    with ExitStack() as stack:

        def reserve() -> None:
            if ranks.main:
                ray = stack.enter_context(joined_cluster(config.ray.address))
                found.append(stack.enter_context(reserved_places(ray, config, homes)))

        ranks.everyones(reserve)
        yield found[0] if found else None


def trainer_gpu_of(places: Places | None, ranks: Ranks) -> int | None:
    """The GPU that is reserved for this rank, of those that it sees; None where none is."""
    numbers = ranks.from_main(places.trainer_gpus if places else ())
    return as_seen_here(numbers[ranks.rank]) if numbers else None


def led_engines(
    places: Places | None,
    config: RunConfig,
    model: PreTrainedModel,
    ranks: Ranks,
    *,
    slots: int,
    max_tokens: int,
    generator: torch.Generator,
) -> LedEngines:
    """The engines as torchrun's ranks use them together. As `make_pool`, whose pool the first rank has; errors are
    raised on all ranks."""
    made: list[EnginePool] = []

    def make() -> None:
        if places is not None:
            made.append(
                make_pool(places, config, model, slots=slots, max_tokens=max_tokens, generator=generator, ranks=ranks)
            )

    ranks.everyones(make)
    return LedEngines(made[0] if made else None, model, ranks)


def make_pool(
    places: Places,
    config: RunConfig,
    model: PreTrainedModel,
    *,
    slots: int,
    max_tokens: int,
    generator: torch.Generator,
    ranks: Ranks = SINGLE,
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
    keep = config.rollout.schedule == "asynchronous" or ranks.world > 1
    store = ThroughTheObjectStore(ray, model, dtype, timeout_s=limit, keep=keep, ranks=ranks)
    backend = backend_of(config, on_gpus=trainer.type == "cuda" and places.gpus_per_engine > 0)
    sync: WeightSync = store
    if backend is not None:
        host = ray.util.get_node_ip_address()
        sync = ByBroadcast(
            ray, model, dtype, backend=backend, host=host, device=trainer, timeout_s=limit, ranks=ranks
        )  # fmt: skip
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
