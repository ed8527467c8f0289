"""Starts the trainer's ranks on a Ray cluster, as torchrun would if it were called on every host: one command for a
whole run.

Ray says on which hosts the ranks have their GPUs. On each an actor starts the rank, which is a process of its own with
torchrun's environment: everything behind it is the same as under torchrun. The actors hold no GPU; the first rank
reserves those of ranks and engines together (places.py).
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from profiling.errors import ConfigError, RunError
from tppo.cluster.places import RESERVE_TIMEOUT_S, computes_on_gpus
from tppo.cluster.session import LAUNCHED_ON, joined_cluster
from tppo.config import RunConfig

POLL_S = 0.2
LAST_LINES = 20
"""Of a rank's standard error, that are kept to be shown if it fails alone."""
OTHERS_END_S = 60.0
"""After the first rank has ended, or any has failed: the others save, if they can."""
OF_RAYS_WORKERS = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_RAYLET_NODE_ID", "CUDA_VISIBLE_DEVICES")
"""What Ray tells a worker of its own; a rank is none, and chooses among all GPUs of its host."""


def launches_ranks(config: RunConfig) -> bool:
    """Whether this process is to start the ranks: it is no rank itself. Raises ConfigError."""
    ranks, started = config.ray.ranks, os.environ.get("WORLD_SIZE")
    if ranks == 1:
        return False
    if not config.ray.address:
        raise ConfigError(f"ray.ranks = {ranks}: they are started on a cluster; add --ray ADDRESS, or use torchrun")
    if started is not None and started != str(ranks):
        raise ConfigError(f"ray.ranks = {ranks}: torchrun has started {started}; leave one of the two out")
    return started is None


def run_on_cluster(config: RunConfig, words: Sequence[str]) -> int:
    """Run `tppo WORDS` as config.ray.ranks ranks and wait for them. Ctrl-C and SIGTERM are passed on. Returns the exit
    code of the first rank that failed, by number, or 0. Raises ConfigError."""
    with joined_cluster(config.ray.address) as ray, _signals() as signals:
        if ray.util.client.ray.is_connected():
            raise ConfigError(f"--ray {config.ray.address}: start ray.ranks from a host of the cluster, at HOST:PORT")
        nodes = nodes_of_ranks(ray, config.ray.ranks, on_gpus=computes_on_gpus(config, ray.cluster_resources()))
        ranks = _started(ray, nodes, words)
        print(
            f"tppo: {len(ranks)} ranks on {len(set(nodes))} hosts; `tppo watch {config.output}` says how far they are",
            file=sys.stderr,
        )
        return _followed(ray, ranks, signals)


def nodes_of_ranks(ray: Any, ranks: int, *, on_gpus: bool) -> list[str]:
    """Ray's identifier of each rank's host: where as many GPUs (or CPUs) are free, on as few hosts as can be; this
    host's first. Raises ConfigError."""
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    kind = "GPU" if on_gpus else "CPU"
    there = ray.cluster_resources().get(kind, 0)
    if ranks > there:
        raise ConfigError(f"ray.ranks = {ranks}: a {kind} each, and the cluster has {there:g}; lower it")
    group = placement_group([{kind: 1}] * ranks, strategy="PACK")
    try:
        if not group.wait(RESERVE_TIMEOUT_S):
            free = ray.available_resources().get(kind, 0)
            raise ConfigError(
                f"ray.ranks = {ranks}: a {kind} each, and {free:g} are free after {RESERVE_TIMEOUT_S:g} s; wait for "
                "other runs, or lower it"
            )
        nodes = list(placement_group_table(group)["bundles_to_node_id"].values())
    finally:
        remove_placement_group(group)
    own = ray.get_runtime_context().get_node_id()
    order = sorted(dict.fromkeys(nodes), key=lambda node: node != own)
    return sorted(nodes, key=order.index)


class RankProcess:
    """One rank, in a process of its own on the actor's host."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._store: Any = None
        self._lines: deque[tuple[int, str]] = deque()
        self._readers: list[threading.Thread] = []

    def meeting_place(self) -> tuple[str, int]:
        """Where the ranks meet: a store of this actor's, as of torchrun's agent. A port that was only looked for here
        could be another process's before the first rank has it."""
        import ray
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def start(self, words: Sequence[str], environment: dict[str, str], directory: str) -> str | None:
        """None, or why it cannot be started."""
        import ray

        if not Path(directory).is_dir():
            return f"{socket.gethostname()} has no {directory}: run it in a directory that all hosts share"
        own = {name: value for name, value in os.environ.items() if name not in OF_RAYS_WORKERS}
        own = _interface(ray.util.get_node_ip_address()) | own
        # Words of our own command: no shell reads them.
        self._process = subprocess.Popen(  # nosec B603
            [sys.executable, "-m", "tppo", *words], env=own | environment, cwd=directory, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        for number, stream in ((1, self._process.stdout), (2, self._process.stderr)):
            reader = threading.Thread(target=self._read, args=(number, stream), daemon=True)
            reader.start()
            self._readers.append(reader)
        return None

    def _read(self, number: int, stream: IO[str]) -> None:
        for line in stream:
            self._lines.append((number, line))

    def poll(self) -> tuple[int | None, list[tuple[int, str]]]:
        """Its exit code, None while it runs, and what it has written since the last call: (1 or 2, line)."""
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            for reader in self._readers:
                reader.join(timeout=5.0)
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        return code, lines

    def signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def _interface(address: str) -> dict[str, str]:
    """Where other hosts reach this one: gloo would take what the host's name stands for, which often is loopback."""
    for name, found in psutil.net_if_addrs().items():
        if any(each.address == address for each in found):
            return {"GLOO_SOCKET_IFNAME": name}
    return {}


def _started(ray: Any, nodes: list[str], words: Sequence[str]) -> list[Any]:
    """An actor for each rank, with its process. Raises ConfigError."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ranks = [
        ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))(
            RankProcess
        ).remote()
        for node in nodes
    ]
    host, port = ray.get(ranks[0].meeting_place.remote())
    starting = []
    for number, (rank, node) in enumerate(zip(ranks, nodes, strict=True)):
        environment = {
            "RANK": number, "WORLD_SIZE": len(ranks), "LOCAL_RANK": nodes[:number].count(node),
            "LOCAL_WORLD_SIZE": nodes.count(node), "MASTER_ADDR": host, "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": True, LAUNCHED_ON: ray.get_runtime_context().gcs_address,
        }  # fmt: skip
        own = {name: str(value) for name, value in environment.items()}
        starting.append(rank.start.remote(list(words), own, str(Path.cwd())))
    for fault in ray.get(starting):
        if fault is not None:
            raise ConfigError(f"ray.ranks = {len(ranks)}: {fault}")
    return ranks


def _followed(ray: Any, ranks: list[Any], signals: "deque[int]") -> int:
    """The first rank's output is ours; of others that fail we show what the first has not said. Raises RunError when a
    host is lost."""
    codes: list[int | None] = [None] * len(ranks)
    last: list[deque[str]] = [deque(maxlen=LAST_LINES) for _ in ranks]
    ends_at: float | None = None
    while any(code is None for code in codes):
        while signals:
            number = signals.popleft()
            ray.get([rank.signal.remote(number) for rank, code in zip(ranks, codes, strict=True) if code is None])
        for rank, actor in enumerate(ranks):
            if codes[rank] is not None:
                continue
            try:
                codes[rank], lines = ray.get(actor.poll.remote())
            except ray.exceptions.RayActorError:
                raise RunError(
                    f"rank {rank} of {len(ranks)} is lost with its host; go on from the last checkpoint with --resume"
                ) from None
            for stream, line in lines:
                if rank == 0:
                    print(line, end="", file=(sys.stdout, sys.stderr)[stream - 1], flush=True)
                if stream == 2:
                    last[rank].append(line)
        if codes[0] is not None or any(codes):
            ends_at = ends_at or time.monotonic() + OTHERS_END_S
            if time.monotonic() > ends_at:
                signals.append(signal.SIGKILL)
        time.sleep(POLL_S)
    said = set(last[0])
    for rank, code in enumerate(codes):
        if code:
            sys.stderr.writelines(f"rank {rank}: {line}" for line in last[rank] if line not in said)
            said.update(last[rank])
    code = next((code for code in codes if code), 0)
    return code if code >= 0 else 128 - code  # as a shell reports a signal


@contextmanager
def _signals() -> Iterator["deque[int]"]:
    """Ctrl-C and SIGTERM as they come, to be passed on."""
    came: deque[int] = deque()
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
