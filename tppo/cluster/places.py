"""Where engines run: a bundle of resources for each, reserved together, so that a run gets all of them or none.

colocated: on the trainer's hosts, on the GPUs that its ranks compute on; Ray gives those to nobody else. A trainer
alone uses the first engine's; of several ranks each shares its GPU with a part of one engine. separate: anywhere,
packed on as few hosts as can be, and a GPU a rank of the trainer's hosts is kept free of engines. An engine with
several GPUs (tensor parallel) is one bundle, and a bundle is never split over hosts.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from profiling.errors import ConfigError
from tppo.cluster.hosts import Home, home_of_this_process, hosts_of
from tppo.config import RunConfig

RESERVE_TIMEOUT_S = 60.0
HOST_SHARE = 0.001
"""Of a host's own resource, `node:ADDRESS`: asking for a little of it means that host."""


@dataclass(frozen=True)
class Places:
    """Reserved resources. bundles: one an engine; in the separate layout on GPUs then one for each of the trainer's
    hosts."""

    ray: Any
    group: Any
    bundles: list[dict[str, float]]
    engines: int
    gpus_per_engine: int
    """0 on CPUs."""
    trainer_gpus: tuple[int, ...] = ()
    """By rank, as its host numbers them; empty where nothing says which."""

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
def reserved_places(ray: Any, config: RunConfig, homes: Sequence[Home] | None = None) -> Iterator[Places]:
    """homes: of the trainer's ranks; left out: it is this process. Raises ConfigError when the cluster is too small,
    or stays too busy for RESERVE_TIMEOUT_S."""
    from ray.util.placement_group import placement_group, remove_placement_group

    there = ray.cluster_resources()
    hosts = hosts_of(homes or [home_of_this_process()], ray, config.ray.address)
    on_gpus = computes_on_gpus(config, there)
    bundles = bundles_of(config, on_gpus=on_gpus, hosts=hosts)
    check_it_is_there(config, bundles, there)
    check_hosts_hold(config, bundles, {f"node:{n['NodeManagerAddress']}": n["Resources"] for n in ray.nodes()})
    together = config.ray.layout == "colocated" and len(set(hosts)) == 1
    group = placement_group(bundles, strategy="STRICT_PACK" if together else "PACK")
    try:
        if not group.wait(RESERVE_TIMEOUT_S):
            free = ray.available_resources()
            raise ConfigError(
                f"ray: {asked(bundles)} in {len(bundles)} places ({config.ray.layout}) are not to be had within "
                f"{RESERVE_TIMEOUT_S:g} s; {amount(free)} are free, in parts that may not fit: wait for other runs, "
                "or lower ray.engines"
            )
        places = Places(ray, group, bundles, config.ray.engines, config.gpus_per_engine if on_gpus else 0)
        if on_gpus and hosts:
            places = replace(places, trainer_gpus=gpus_of_ranks(places, hosts))
        yield places
    finally:
        remove_placement_group(group)


def computes_on_gpus(config: RunConfig, there: Mapping[str, float]) -> bool:
    """there: resources of the whole cluster."""
    return config.model.device == "cuda" or (config.model.device == "auto" and there.get("GPU", 0) > 0)


class _Probe:
    def gpus(self) -> list[int]:
        import ray

        return [int(number) for number in ray.get_gpu_ids()]


def gpus_of_ranks(places: Places, hosts: Sequence[str]) -> tuple[int, ...]:
    """Those that are reserved for the trainer, or else for engines, on each rank's host, in their order."""
    own = range(places.engines, len(places.bundles)) or range(places.engines)
    found: dict[str, list[int]] = {host: [] for host in hosts}
    for bundle in own:
        host = next(name for name in places.bundles[bundle] if name in found)
        if len(found[host]) < hosts.count(host):
            found[host] += reserved_gpus(places, bundle)
    return tuple(found[host].pop(0) for host in hosts)


def reserved_gpus(places: Places, bundle: int) -> list[int]:
    probe = places.actor(_Probe, bundle)
    numbers: list[int] = places.ray.get(probe.gpus.remote(), timeout=RESERVE_TIMEOUT_S)
    places.ray.kill(probe)
    return numbers


def as_seen_here(gpu: int) -> int:
    """Number of a host's GPU among those that this process sees. It goes on seeing all of them: its sampler watches
    the engines' too."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible.index(str(gpu)) if str(gpu) in visible else gpu


def bundles_of(config: RunConfig, *, on_gpus: bool, hosts: Sequence[str]) -> list[dict[str, float]]:
    """Resources of every engine, and of the trainer's hosts. hosts: Ray's name for each rank's; empty where the
    trainer is outside the cluster. Raises ConfigError."""
    own = config.ray
    if own.layout == "colocated":
        return [
            {"CPU": own.cpus_per_engine, **({"GPU": config.gpus_per_engine} if on_gpus else {}), host: HOST_SHARE}
            for host in hosts_of_engines(config, on_gpus=on_gpus, hosts=hosts)
        ]
    engine: dict[str, float] = {"CPU": own.cpus_per_engine, **({"GPU": config.gpus_per_engine} if on_gpus else {})}
    bundles = [dict(engine) for _ in range(own.engines)]
    if on_gpus:
        bundles += [{"CPU": 0, "GPU": ranks, host: HOST_SHARE} for host, ranks in Counter(hosts).items()]
    return bundles


def hosts_of_engines(config: RunConfig, *, on_gpus: bool, hosts: Sequence[str]) -> list[str]:
    """Of colocated engines: those of n GPUs are on the hosts of n ranks each, one after the other.
    Raises ConfigError."""
    own, each, ranks = config.ray, config.gpus_per_engine, len(hosts)
    if not hosts:
        raise ConfigError(
            f'ray.layout = "colocated": the trainer is outside the cluster {own.address}; set "separate", or start it '
            "on one of its hosts"
        )
    if on_gpus and ranks > 1 and own.engines * each != ranks:
        raise ConfigError(
            f"ray.engines = {own.engines}: colocated, {own.engines} x {each} GPUs must be those of the {ranks} "
            f'ranks; make ray.engines x ray.gpus_per_engine = {ranks}, or set ray.layout = "separate"'
        )
    shared = [hosts[engine * ranks // own.engines] for engine in range(own.engines)]
    if on_gpus and ranks > 1 and any(hosts[rank] != shared[rank // each] for rank in range(ranks)):
        raise ConfigError(
            f"ray.gpus_per_engine = {each}: an engine is on one host, and the ranks of a host cannot be divided into "
            "groups of as many; change it, or torchrun's --nproc-per-node"
        )
    return shared


def check_it_is_there(config: RunConfig, bundles: list[dict[str, float]], there: Mapping[str, float]) -> None:
    """Raises ConfigError when the whole cluster has less than all bundles together."""
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)
    for name, setting in (("GPU", "ray.gpus_per_engine"), ("CPU", "ray.cpus_per_engine")):
        if total[name] > there.get(name, 0):
            ranks = sum(bundle.get("GPU", 0) for bundle in bundles[config.ray.engines :])
            trainer = f" and {ranks:g} for the trainer" if name == "GPU" and ranks else ""
            each = bundles[0][name]
            raise ConfigError(
                f"ray.engines = {config.ray.engines}: with {each:g} {name}s each{trainer} they need {total[name]:g}, "
                f"and the cluster has {there.get(name, 0):g}; lower it, or {setting}"
            )


def check_hosts_hold(
    config: RunConfig, bundles: list[dict[str, float]], hosts: Mapping[str, Mapping[str, float]]
) -> None:
    """Raises ConfigError when engines that share the trainer's hosts ask for more than these have."""
    for host in {name for bundle in bundles for name in bundle if name in hosts}:
        for kind in ("GPU", "CPU"):
            needed = sum(bundle.get(kind, 0) for bundle in bundles if host in bundle)
            if needed > hosts[host].get(kind, 0):
                raise ConfigError(
                    f"ray.engines = {config.ray.engines}: colocated, they need {needed:g} {kind}s of the trainer's "
                    f"host ({host.removeprefix('node:')}), which has {hosts[host].get(kind, 0):g}; start the ranks on "
                    'the cluster too (--ray.ranks N, a GPU each), or set ray.layout = "separate"'
                )


def asked(bundles: list[dict[str, float]]) -> str:
    return amount({name: sum(bundle.get(name, 0) for bundle in bundles) for name in ("CPU", "GPU")})


def amount(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
