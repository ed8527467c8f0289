"""What a training run leaves in its run directory, in the schema of `profiling`."""

import platform
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from profiling.ledger import Cluster, build_ledger
from profiling.reader import Run
from profiling.schema import ENGINE, ROLLOUTS
from profiling.summary import summarise
from profiling.writer import RunWriter
from tppo.rollout.rows import Row
from tppo.schedule import Schedule, describe

CLUSTER = Cluster(engines=1, gpus_per_engine=1)
"""One process trains and samples on one device; a host without a GPU counts as one."""


def header_of(schedule: Schedule) -> dict[str, Any]:
    return {
        "clock": "perf_counter",
        "unix_time_s": time.time(),
        "host": platform.node(),
        "simulated": False,
        "devices": [],
        "capabilities": {},
        "gpus": CLUSTER.gpus,
        "engines": CLUSTER.engines,
        "gpus_per_engine": CLUSTER.gpus_per_engine,
        "trainer_gpus": CLUSTER.trainer_gpus,
        "schedule": describe(schedule),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def write_step(
    writer: RunWriter,
    step: int,
    rows: Sequence[Row],
    policy_version: int,
    engine_records: Sequence[dict[str, Any]],
    *,
    trained_tokens: Mapping[int, int],
    discarded: Collection[int] = (),
) -> None:
    """Write the step's rollout and engine records. trained_tokens: by row id, 0 if absent; discarded: row ids."""
    records = [
        {
            "step": step,
            "row": row.row,
            "group": row.group,
            "engine": 0,
            "policy_version": policy_version,
            "prompt_tokens": len(row.prompt_ids),
            "context_before": row.context_before,
            "tokens": row.window_tokens,
            "trained_tokens": trained_tokens.get(row.row, 0),
            "finished": row.finished,
            "discarded": row.row in discarded,
            "preempted": 0,
            "reward": row.reward,
            "t_start": row.t_start,
            "t_end": row.t_end,
        }
        for row in rows
    ]
    writer.table("rollouts", step, {name: [r[name] for r in records] for name in ROLLOUTS.names})
    spans = [{"step": step, **record} for record in engine_records]
    writer.table("engine", step, {name: [s[name] for s in spans] for name in ENGINE.names})


def finish_run(writer: RunWriter, schedule: Schedule, max_response_tokens: int, wall_s: float) -> None:
    """Ledger and summary, computed from what the directory holds, as for any other run."""
    run = Run(writer.path)
    ledger = build_ledger(cluster=CLUSTER, phases=run.phases, engine=run.engine, rollouts=run.rollouts, wall_s=wall_s)
    summary = summarise(
        cluster=CLUSTER, phases=run.phases, engine=run.engine, rollouts=run.rollouts, ledger=ledger, wall_s=wall_s,
        startup_steps=schedule.startup_steps(max_response_tokens),
    )  # fmt: skip
    writer.ledger({name: ledger[name] for name in ledger.columns})
    writer.summary(summary)
