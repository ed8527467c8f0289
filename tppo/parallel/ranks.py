"""The processes of a run, and what they tell each other. One process is a group of one, and says nothing."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from profiling.errors import ConfigError, RunError, ToolkitError, first_line
from profiling.shell import end_with_the_parent

T = TypeVar("T")

CPU = torch.device("cpu")
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "[gloo", "/gloo/")
"""In messages of gloo, which has no error of its own, when a rank has gone."""

TIMEOUT = timedelta(hours=4)
"""Of a collective: the ranks wait for the slowest one's rollout and rewards, or for a cluster's whole rollout. A rank
that has gone is noticed at once, by its connections."""


@dataclass(frozen=True)
class Ranks:
    """rank: of this process. world: processes. device: where this one computes. mesh: of the shards, (replicas,
    shards) with replicas; None where nothing is sharded."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    mesh: DeviceMesh | None = None

    @property
    def main(self) -> bool:
        """The one that writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks. values: on the CPU, of one shape on all of them."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        return bool(self.total(torch.tensor(int(flag))))

    def gather(self, value: T) -> list[T]:
        """Every rank's, by rank."""
        if self.world == 1:
            return [value]
        everyones: list[Any] = [None] * self.world
        dist.all_gather_object(everyones, value)
        return everyones

    def everyones(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on every rank. Where it raises an error of ours on one of them, all ranks raise that."""
        fault: ToolkitError | None = None
        own: T | None = None
        try:
            own = work()
        except ToolkitError as error:
            fault = error
        results = self.gather((own, fault))
        faults = [theirs for _, theirs in results if theirs is not None]
        if faults:
            raise fault or faults[0]
        return [value for value, _ in results]  # type: ignore[misc]

    def each(self, work: Callable[[], T]) -> T:
        """What `work` gives on this rank, once all have done theirs. Errors are as of `everyones`."""
        own: list[T] = []
        self.everyones(lambda: own.append(work()))
        return own[0]

    def from_main(self, value: T) -> T:
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank, where alone it is done. Where it raises an error of ours, all ranks
        raise that. What it gives may be large: it travels once to each."""
        own: list[T] = []
        self.everyones(lambda: own.append(work()) if self.main else None)
        return self.from_main(own[0] if own else None)  # type: ignore[return-value]

    def share(self, items: Sequence[T], sizes: Sequence[int]) -> list[tuple[T, bool]]:
        """This rank's of the items, the same number on every rank: sharded models compute in step.

        The largest goes first, to the rank that has least. A rank that has fewer than the others repeats the smallest
        item, marked False: it is computed and counts for nothing.
        """
        if self.world == 1:
            return [(item, True) for item in items]
        if not items:
            return []
        loads, own = [0] * self.world, [[] for _ in range(self.world)]  # type: ignore[var-annotated]
        for index in sorted(range(len(items)), key=lambda i: (-sizes[i], i)):
            least = min(range(self.world), key=lambda r: (loads[r], r))
            loads[least] += sizes[index]
            own[least].append(index)
        mine = sorted(own[self.rank])
        spare = min(range(len(items)), key=lambda i: (sizes[i], i))
        missing = max(map(len, own)) - len(mine)
        return [(items[i], True) for i in mine] + [(items[spare], False)] * missing


SINGLE = Ranks()


@contextmanager
def joined_ranks(
    *, device: str = "auto", dtype: str = "auto", replicas: int = 1, gpu: int | None = None
) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone, each on its device. device: auto, cpu or cuda. dtype: in
    which training passes compute; another than the weights' float32 is sharding's work, also where one process is
    alone. replicas: groups that each hold all shards (HSDP). gpu: this process's, of those that it sees; None: its
    local rank's. Raises ConfigError.
    """
    with joined_processes(device=device, dtype=dtype, replicas=replicas) as processes:
        yield on_devices(processes, device=device, replicas=replicas, gpu=gpu)


@contextmanager
def joined_processes(*, device: str = "auto", dtype: str = "auto", replicas: int = 1) -> Iterator[Ranks]:
    """Ranks that can talk, and have no device yet: who gets which may be something to talk about.
    Raises ConfigError or RunError."""
    world, rank = _from_environment("WORLD_SIZE", 1), _from_environment("RANK", 0)
    kind = device_of(device)
    if world % replicas:
        raise ConfigError(f"parallel.replicas = {replicas}: the {world} ranks cannot be divided into as many groups")
    if world == 1 and compute_dtype(dtype, kind) == torch.float32:
        yield Ranks()
        return
    if world > 1:
        end_with_the_parent()  # a launcher that is killed cannot end its ranks: SIGTERM saves
    backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
    alone: dict[str, Any] = {} if world > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, **alone)
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(f"the {world} ranks cannot join: {reason}; start them with torchrun") from None
    try:
        yield Ranks(rank, world)
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in LOST):
            raise
        raise RunError(
            f"rank {rank} of {world} lost another: {first_line(error)}; see what that one says, and go on "
            "from the last checkpoint with --resume"
        ) from error
    finally:
        dist.destroy_process_group()


def on_devices(ranks: Ranks, *, device: str = "auto", replicas: int = 1, gpu: int | None = None) -> Ranks:
    """Joined processes, each on its device, and a mesh of them for shards. Raises ConfigError, on all of them."""
    number = _from_environment("LOCAL_RANK", 0) if gpu is None else gpu
    own = ranks.everyones(lambda: device_of(device, number))[ranks.rank]
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        return replace(ranks, device=own)
    world = ranks.world
    shape = {"replicas": replicas, "shards": world // replicas} if replicas > 1 else {"shards": world}
    mesh = init_device_mesh(own.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    return replace(ranks, device=own, mesh=mesh)


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Of training passes. wanted: auto, float32 or bfloat16."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def _from_environment(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdigit():
        raise ConfigError(f"{name} = {text!r} in the environment: not a number; it is torchrun's to set")
    return int(text) if text else otherwise


def device_of(wanted: str, local_rank: int = 0) -> torch.device:
    """wanted: auto, cpu or cuda. Raises ConfigError."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError('model.device = "cuda": torch sees no GPU; set "cpu", or leave it out')
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: torch sees {torch.cuda.device_count()}; start as many "
            "ranks on a host as it has GPUs"
        )
    return torch.device("cuda", local_rank)
