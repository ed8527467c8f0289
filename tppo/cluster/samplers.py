"""Samplers on hosts of the cluster that have engines and no rank of the trainer: an actor each, beside the engines, so
that it outlives one that fails."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from profiling.errors import first_line
from profiling.hosts import Host, HostNames
from profiling.sampler_process import START_TIMEOUT_S, STOP_TIMEOUT_S, SamplerProcess
from tppo.cluster.member import Member
from tppo.config import RunConfig
from tppo.rollout.drive import Trace

ANSWERS_IN_S = START_TIMEOUT_S + STOP_TIMEOUT_S + 60.0
"""An actor's process has to start first."""


class HostSampler:
    """On one host."""

    def __init__(self) -> None:
        self._process: SamplerProcess | None = None

    def start(
        self, run: str, host: str, zero_s: float, interval_s: float, links: bool, gpus: Sequence[int]
    ) -> str | None:
        """gpus: the engines', as the host numbers them. Returns a note for the trace."""
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        if not (Path(run) / "trace.jsonl").exists():
            return f"it does not see {run}: write runs to a file system that all hosts share"
        self._process = SamplerProcess(Path(run), interval_s=interval_s, zero_s=zero_s, links=links, host=host)
        return self._process.start()

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()


class HostSamplers:
    """Of all such hosts, from the beginning of a run to `stop`. known: hosts that are sampled already. zero_s: our
    monotonic clock at the start of the run."""

    def __init__(
        self, ray: Any, members: Sequence[Member], config: RunConfig, *, known: Sequence[Host], names: HostNames,
        zero_s: float, trace: Trace,
    ) -> None:  # fmt: skip
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        assert config.output is not None
        self._ray = ray
        self._gpus: dict[Host, list[int]] = {}
        self._known = set(known)
        by_host: dict[Host, list[Member]] = {}
        for member in members:
            if member.about.host not in known:
                by_host.setdefault(member.about.host, []).append(member)
        starting = []
        for host, own in by_host.items():
            node = NodeAffinitySchedulingStrategy(own[0].about.node, soft=False)
            actor = ray.remote(num_cpus=0, scheduling_strategy=node)(HostSampler).remote()
            gpus = sorted({gpu for member in own for gpu in member.about.gpus})
            self._gpus[host] = gpus
            starting.append((names.of(host), actor, actor.start.remote(
                str(config.output.resolve()), names.of(host), zero_s - own[0].offset.seconds,
                config.profile.interval_s, config.profile.links, gpus,
            )))  # fmt: skip
        self._actors = [actor for _, actor, _ in starting]
        for name, _, started in starting:
            try:
                note = ray.get(started, timeout=ANSWERS_IN_S)
            except Exception as error:  # of Ray, which has many; the run goes on without these samples
                note = f"no device samples: {first_line(error)}"
            if note is not None:
                trace({"type": "note", "text": f"host {name}: {note}"})

    def see(self, member: Member) -> bool:
        """Whether its GPUs are sampled: a replacement may be elsewhere."""
        host = member.about.host
        return host in self._known or (host in self._gpus and set(member.about.gpus) <= set(self._gpus[host]))

    def stop(self) -> None:
        """Each writes what it has. One whose host has gone is left alone."""
        with contextlib.suppress(Exception):  # Ray's, which has many; a run that failed may have lost the cluster
            stopping = [actor.stop.remote() for actor in self._actors]
            if stopping:
                self._ray.wait(stopping, num_returns=len(stopping), timeout=ANSWERS_IN_S)
            for actor in self._actors:
                self._ray.kill(actor)
