"""The section [ray]. Imports nothing of Ray."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from profiling.schema import MOST_GPUS
from profiling.settings import Settings


class RayConfig(Settings):
    address: str = ""
    """Run the rollout engines on this Ray cluster: auto, local, HOST:PORT or ray://HOST:PORT. `--ray ADDRESS` sets it;
    left out: one engine, in this process."""
    ranks: Annotated[PositiveInt, Field(le=MOST_GPUS)] = 1
    """Ranks that train, a GPU each, started on the cluster as torchrun would start them. 1: this process trains, or
    the ranks that torchrun has started do."""
    engines: PositiveInt = 1
    """Rollout engines, each in a process of its own."""
    gpus_per_engine: PositiveInt | None = None
    """GPUs of one engine, on one host; left out: vllm.tensor_parallel with vLLM, else 1. None are asked for where the
    cluster has none."""
    cpus_per_engine: PositiveInt = 1
    """CPUs of one engine, and torch's threads in it."""
    layout: Literal["colocated", "separate"] = "colocated"
    """colocated: engines on the trainer's host, the first one on the trainer's GPU; of several ranks each shares its
    GPU with one engine. separate: anywhere, on GPUs that do not train."""
    dispatch: Literal["round_robin", "shared_queue"] = "round_robin"
    """round_robin: row i of a step goes to engine i mod engines. shared_queue: to the engine that frees a slot."""
    weight_sync: Literal["auto", "object_store", "nccl", "gloo"] = "auto"
    """How new weights reach the engines: through Ray's object store (shared memory on a host), or by broadcast. auto:
    nccl in the separate layout where trainer and engines have GPUs, else object_store."""
    retries: NonNegativeInt = 2
    """Engines started in place of failed ones, over the whole run."""
    engine_timeout_s: PositiveFloat = 600.0
    """An engine that makes no token, and gives no answer, for so long has failed."""
