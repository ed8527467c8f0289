"""Where engines run: a bundle of resources for each, reserved together, so that a run gets all of them or none.

colocated: on the trainer's host; the trainer uses the first engine's GPU, and Ray gives those GPUs to nobody else.
separate: anywhere, packed on as few hosts as can be, and a GPU of the trainer's host is kept free of engines. An
engine with several GPUs (tensor parallel) is one bundle, and a bundle is never split over hosts.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from profiling.errors import ConfigError
from tppo.config import RunConfig

RESERVE_TIMEOUT_S = 60.0
HOST_SHARE = 0.001
"""Of a host's own resource, `node:ADDRESS`: asking for a little of it means that host."""


@dataclass(frozen=True)
class Places:
    """Reserved resources. bundles: one an engine, and a last one for the trainer in the separate layout on GPUs."""

    ray: Any
    group: Any
    bundles: list[dict[str, float]]
    engines: int
    gpus_per_engine: int
    """0 on CPUs."""
    trainer_gpu: int | None = None
    """Of those that this process sees; None where nothing says which."""

    @property
    def trainer_bundle(self) -> int:
        return self.engines if len(self.bundles) > self.engines else 0

    def actor(self, cls: Any, bundle: int, **options: Any) -> Any:
        """A new actor with everything that the bundle has. It has a thread for its work and one to be asked by."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        own = self.bundles[bundle]
        made = self.ray.remote(
            num_cpus=own["CPU"], num_gpus=own.get("GPU", 0), max_restarts=0, concurrency_groups={"control": 1},
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle),
            **options,
        )(cls)  # fmt: skip
        return made.remote()


@contextmanager
def reserved_places(ray: Any, config: RunConfig) -> Iterator[Places]:
    """Raises ConfigError when the cluster is too small, or stays too busy for RESERVE_TIMEOUT_S."""
    from ray.util.placement_group import placement_group, remove_placement_group

    there = ray.cluster_resources()
    host = None if ray.util.client.ray.is_connected() else f"node:{ray.util.get_node_ip_address()}"
    on_gpus = config.model.device == "cuda" or (config.model.device == "auto" and there.get("GPU", 0) > 0)
    bundles = bundles_of(config, on_gpus=on_gpus, host=host)
    check_it_is_there(config, bundles, there)
    strategy = "STRICT_PACK" if config.ray.layout == "colocated" else "PACK"
    group = placement_group(bundles, strategy=strategy)
    try:
        if not group.wait(RESERVE_TIMEOUT_S):
            free = ray.available_resources()
            raise ConfigError(
                f"ray: {asked(bundles)} in {len(bundles)} places ({config.ray.layout}) are not to be had within "
                f"{RESERVE_TIMEOUT_S:g} s; {amount(free)} are free, in parts that may not fit: wait for other runs, "
                "or lower ray.engines"
            )
        places = Places(ray, group, bundles, config.ray.engines, config.gpus_per_engine if on_gpus else 0)
        if on_gpus and host is not None:
            places = replace(places, trainer_gpu=trainer_gpu_of(places))
        yield places
    finally:
        remove_placement_group(group)


class _Probe:
    def gpus(self) -> list[int]:
        import ray

        return [int(number) for number in ray.get_gpu_ids()]


def trainer_gpu_of(places: Places) -> int:
    """The GPU that is reserved for this process, or the first engine's, as this process counts them. It goes on seeing
    all of them: its sampler watches the engines' too."""
    probe = places.actor(_Probe, places.trainer_bundle)
    numbers = places.ray.get(probe.gpus.remote(), timeout=RESERVE_TIMEOUT_S)
    places.ray.kill(probe)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible.index(str(numbers[0])) if str(numbers[0]) in visible else numbers[0]


def bundles_of(config: RunConfig, *, on_gpus: bool, host: str | None) -> list[dict[str, float]]:
    """Resources of every engine. host: Ray's name for the trainer's; None where the trainer is outside the cluster.
    Raises ConfigError."""
    own, colocated = config.ray, config.ray.layout == "colocated"
    if colocated and host is None:
        raise ConfigError(
            f'ray.layout = "colocated": the trainer is outside the cluster {own.address}; set "separate", or start it '
            "on one of its hosts"
        )
    engine: dict[str, float] = {"CPU": own.cpus_per_engine}
    if on_gpus:
        engine["GPU"] = config.gpus_per_engine
    if colocated and host is not None:
        engine[host] = HOST_SHARE
    bundles = [dict(engine) for _ in range(own.engines)]
    if on_gpus and not colocated and host is not None:
        bundles.append({"CPU": 0, "GPU": 1, host: HOST_SHARE})
    return bundles


def check_it_is_there(config: RunConfig, bundles: list[dict[str, float]], there: Mapping[str, float]) -> None:
    """Raises ConfigError when the whole cluster has less than all bundles together."""
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)
    for name, setting in (("GPU", "ray.gpus_per_engine"), ("CPU", "ray.cpus_per_engine")):
        if total[name] > there.get(name, 0):
            trainer = " and one for the trainer" if name == "GPU" and len(bundles) > config.ray.engines else ""
            each = bundles[0][name]
            raise ConfigError(
                f"ray.engines = {config.ray.engines}: with {each:g} {name}s each{trainer} they need {total[name]:g}, "
                f"and the cluster has {there.get(name, 0):g}; lower it, or {setting}"
            )


def asked(bundles: list[dict[str, float]]) -> str:
    return amount({name: sum(bundle.get(name, 0) for bundle in bundles) for name in ("CPU", "GPU")})


def amount(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
