"""What a training run leaves in its run directory, in the schema of `profiling`."""

import importlib
import platform
import time
from collections.abc import Mapping
from typing import Any

from profiling.ledger import Cluster
from profiling.schema import ENGINE, ROLLOUTS
from profiling.writer import RunWriter
from tppo.collect import Collected
from tppo.config import RunConfig
from tppo.schedule import Schedule, describe


def cluster_of(config: RunConfig, ranks: int) -> Cluster:
    """An engine a rank, on the devices that train; or those of a Ray cluster, on their own devices if separate. A rank
    or an engine without a GPU counts as one."""
    if config.ray.address:
        own = ranks if config.ray.layout == "separate" else 0
        return Cluster(config.ray.engines, config.gpus_per_engine, trainer_gpus=own)
    return Cluster(engines=ranks, gpus_per_engine=config.gpus_per_engine)


def header_of(schedule: Schedule, config: RunConfig, ranks: int) -> dict[str, Any]:
    cluster = cluster_of(config, ranks)
    packages = ["torch", "transformers", *(["vllm"] if config.rollout.engine == "vllm" else [])]
    packages += ["ray"] if config.ray.address else []
    return {
        "clock": "perf_counter",
        "unix_time_s": time.time(),
        "host": platform.node(),
        "simulated": False,
        "devices": [],
        "capabilities": {},
        "gpus": cluster.gpus,
        "engines": cluster.engines,
        "gpus_per_engine": cluster.gpus_per_engine,
        "trainer_gpus": cluster.trainer_gpus,
        "ranks": ranks,
        "schedule": describe(schedule),
        "startup_steps": schedule.startup_steps(config.rollout.max_response_tokens),
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in packages}},
    }


def package_version(name: str) -> str | None:
    """As the module says: vLLM is distributed under several names."""
    return getattr(importlib.import_module(name), "__version__", None)


def write_step(writer: RunWriter, step: int, got: Collected, *, trained_tokens: Mapping[int, int]) -> None:
    """Write the step's rollout and engine records. trained_tokens: by row id, 0 if absent."""
    records = [
        {
            "step": step,
            "row": row.row,
            "group": row.group,
            "engine": row.engine,
            "policy_version": row.policy_version,
            "prompt_tokens": len(row.prompt_ids),
            "context_before": row.context_before,
            "tokens": row.window_tokens,
            "trained_tokens": trained_tokens.get(row.row, 0),
            "finished": row.finished,
            "discarded": discarded,
            "preempted": row.preempted,
            "reward": row.reward,
            "t_start": row.t_start,
            "t_end": row.t_end,
        }
        for rows, discarded in ((got.rows, False), (got.discarded, True))
        for row in rows
    ]
    writer.table("rollouts", step, {name: [r[name] for r in records] for name in ROLLOUTS.names})
    spans = [{"step": step, **record} for record in got.records]
    writer.table("engine", step, {name: [s[name] for s in spans] for name in ENGINE.names})
