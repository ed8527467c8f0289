"""One rollout engine in a process of its own, a Ray actor. The trainer makes one call at a time to it, and asks it how
it is through a second thread (`interrupt`, `ping`).

A call of `advance` runs until a row ends, as the engine of one process does: then the trainer's schedule decides, and
the next call brings new rows. So a row that waits gets a slot as soon as one is free.
"""

import os
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from profiling.hosts import Host, this_host
from tppo.cluster.group import Meeting, WeightGroup
from tppo.cluster.packing import Layout, drop_weights, unpack
from tppo.config import RunConfig
from tppo.models.policy import load_policy
from tppo.quiet import quieten_libraries
from tppo.rollout.engines import engine_dtype, make_engine
from tppo.rollout.packing import packed
from tppo.rollout.protocol import Completion, Request, RolloutEngine, Sampling


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is built from."""

    config: RunConfig
    model_path: str
    slots: int
    max_tokens: int
    threads: int


@dataclass(frozen=True)
class About:
    """Of a worker's process. node: Ray's identifier of the host. gpus: as the host numbers them."""

    host: Host
    node: str
    pid: int
    gpus: list[int]


@dataclass(frozen=True)
class Advance:
    """What a call of `advance` brought; times are the worker's monotonic clock."""

    completions: list[Completion]
    records: list[dict[str, Any]]


OF_A_RANK = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip
"""What torchrun has told the trainer's rank that started this cluster, and an engine would take for its own."""


class EngineWorker:
    def __init__(self) -> None:
        for name in OF_A_RANK:
            os.environ.pop(name, None)
        self._engine: RolloutEngine | None = None
        self._group: WeightGroup | None = None
        self._call, self._interrupted = 0, 0
        self._progress_at = time.perf_counter()

    def about(self) -> About:
        import ray

        gpus = [int(number) for number in ray.get_gpu_ids()]
        return About(this_host(), ray.get_runtime_context().get_node_id(), os.getpid(), gpus)

    def now(self) -> float:
        return time.perf_counter()

    def ping(self) -> float:
        """Seconds since the engine last got anywhere: began a call, or made a token."""
        return time.perf_counter() - self._progress_at

    def build(self, spec: EngineSpec) -> None:
        """Make the engine, with the weights that `model_path` has. Raises ConfigError as make_engine does."""
        quieten_libraries()
        self._call, self._interrupted, self._group = 0, 0, None
        torch.set_num_threads(spec.threads)
        config = spec.config
        device = torch.device("cuda" if torch.cuda.is_available() and config.model.device != "cpu" else "cpu")
        model, tokenizer = load_policy(spec.model_path)
        self._is_vllm = config.rollout.engine == "vllm"
        for weight in model.requires_grad_(False).parameters():
            weight.data = weight.data.to(engine_dtype(config, device))
        if not self._is_vllm:  # vLLM has a copy of its own there
            model.to(device)  # type: ignore[arg-type]
        self._model, self._device = model, device
        # The model is this engine's alone: it needs no copy that stays as it is while another trains.
        own = config.model_copy(
            update={
                "rollout": config.rollout.model_copy(update={"schedule": "recipe"}),
                "model": config.model.model_copy(update={"activation_checkpointing": False}),
            }
        )
        self._engine = make_engine(
            own, model, tokenizer, model_path=spec.model_path, slots=spec.slots, max_tokens=spec.max_tokens,
            generator=torch.Generator(), clock=time.perf_counter, device=device,
        )  # fmt: skip
        self._engine.keep_going = self._keep_going  # type: ignore[attr-defined]
        self._forget()

    def advance(self, call: int, requests: list[Request], sampling: Sampling) -> Advance:
        """Take `requests`, and run until a row ends or `interrupt(call)`. call: numbered by the trainer, upwards."""
        engine = self._made()
        self._call = call
        self._progress_at = time.perf_counter()
        if requests:
            engine.submit(requests, sampling)
        return self._packed(engine.run_until_a_row_ends())

    def abort(self) -> Advance:
        return self._packed(self._made().abort())

    def interrupt(self, call: int) -> None:
        """From the other thread: let that call return soon, or at once when it comes."""
        self._interrupted = call

    def release_memory(self) -> None:
        self._made().release_memory()

    def receive(self, layout: Layout, numbers: np.ndarray) -> None:
        """A chunk of weights. numbers: its bytes, in the host's shared memory where Ray has put them, not copied."""
        flat = _tensor_of(numbers).view(layout.dtype)
        unpack(self._model, layout, flat, keep=self._is_vllm)

    def join(self, meeting: Meeting, rank: int) -> None:
        self._group = None  # of earlier members
        on_cpu = meeting.backend == "gloo"
        self._group = WeightGroup(meeting, rank, torch.device("cpu") if on_cpu else self._device)

    def receive_broadcast(self, layouts: list[Layout]) -> None:
        """All chunks, as the trainer broadcasts them."""
        assert self._group is not None, "the worker has joined no group"
        for layout in layouts:
            flat = torch.empty(layout.numbers, dtype=layout.dtype, device=self._group.device)
            self._group.broadcast(flat)
            unpack(self._model, layout, flat.cpu() if self._is_vllm else flat, keep=self._is_vllm)

    def use_weights(self, version: int) -> None:
        """All chunks have come: sample from them."""
        self._made().update_weights(version)
        self._forget()

    def _forget(self) -> None:
        """vLLM has read the weights; what they came in can go."""
        if self._is_vllm:
            drop_weights(self._model)

    def _made(self) -> RolloutEngine:
        assert self._engine is not None, "the worker has no engine yet"
        return self._engine

    def _keep_going(self) -> bool:
        self._progress_at = time.perf_counter()
        return self._interrupted != self._call

    def _packed(self, completions: list[Completion]) -> Advance:
        return Advance(list(map(packed, completions)), self._made().take_records())


def _tensor_of(numbers: np.ndarray) -> torch.Tensor:
    """The bytes as they lie. Shared memory is read-only, which torch warns of; nobody writes to it here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(numbers)
