"""`simulate(experiment)`: a result in memory, or a run directory like a measured one."""

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from profiling.ledger import Cluster, build_ledger
from profiling.schema import ENGINE, ROLLOUTS
from profiling.settings import to_toml
from profiling.summary import summarise
from profiling.writer import RunWriter
from simulator.cluster import TrainingRun
from simulator.experiment import Experiment
from simulator.rollout import RowRecord
from tppo.schedule import describe
from tppo.schedule.log import plan_record, row_end_record


def simulate(experiment: Experiment) -> "Result":
    """Play the experiment on a virtual clock. Raises ConfigError when a row cannot fit the KV memory, and
    ConservationError when rows, tokens, KV blocks or GPU-seconds do not add up (a fault of ours)."""
    start = time.perf_counter()
    run = TrainingRun(experiment)
    run.run()
    result = Result(run)
    _ = result.ledger
    result.simulator_seconds = time.perf_counter() - start
    return result


class Result:
    """Tables in the schema of profiling.schema. Times: virtual seconds from the start of the run."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.experiment = run.experiment
        self.simulator_seconds = 0.0
        settings = run.experiment.cluster
        self.cluster = Cluster(settings.engines, settings.gpus_per_engine, settings.trainer_gpus)

    @cached_property
    def phases(self) -> pd.DataFrame:
        frame = pd.DataFrame(self.run.log.phases, columns=["name", "step", "t_start", "t_end"])
        return frame.assign(depth=0)

    @cached_property
    def engine(self) -> pd.DataFrame:
        slots = self.experiment.cluster.max_rows_per_engine or 0
        rows = [
            (step, number, span.kind, start, end, span.steps, span.batch, span.context_tokens, span.attended_pairs,
             span.fresh_tokens, span.resumed_tokens, span.recomputed_tokens, slots, span.waiting)
            for step, number, start, end, span in self.run.log.spans
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=ENGINE.names)

    def trained_tokens(self, record: RowRecord) -> int:
        """Tokens of this row that train the policy in the record's step."""
        if self.experiment.trains_whole_responses:
            return record.context_before + record.tokens - record.prompt_tokens if record.finished else 0
        return record.tokens if record.finished else max(record.tokens - self.experiment.trailing_tokens, 0)

    @cached_property
    def rollouts(self) -> pd.DataFrame:
        samples = self.experiment.workload.samples_per_prompt
        rows = [
            (r.step, r.row, r.row // samples, r.engine, r.policy_version, r.prompt_tokens, r.context_before, r.tokens,
             self.trained_tokens(r), r.finished, False, r.preempted, None, r.t_start, r.t_end)
            for r in self.run.log.rows
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=ROLLOUTS.names).astype({"reward": float})

    @cached_property
    def ledger(self) -> pd.DataFrame:
        """GPU-seconds by step, GPU and cause; checked against GPUs x wall time."""
        return build_ledger(
            cluster=self.cluster, phases=self.phases, engine=self.engine, rollouts=self.rollouts,
            wall_s=self.run.wall_s,
        )  # fmt: skip

    def summary(self) -> dict[str, Any]:
        run, workload = self.run, self.experiment.workload
        totals = summarise(
            cluster=self.cluster, phases=self.phases, engine=self.engine, rollouts=self.rollouts, ledger=self.ledger,
            wall_s=run.wall_s, startup_steps=run.schedule.startup_steps(workload.max_response_tokens),
            drawn_mean_tokens=run.drawn_tokens / run.next_row,
            trains_whole_responses=self.experiment.trains_whole_responses,
        )  # fmt: skip
        events = len(run.log.spans) + len(run.log.phases)
        return {**totals, "events": events, "simulator_seconds": self.simulator_seconds}

    def write(self, directory: Path | str) -> None:
        """A run directory with simulated = true. Refuses one that already holds a run."""
        writer = RunWriter(
            directory, header=self._header(), config_toml=to_toml(self.experiment.model_dump(mode="json"))
        )
        for record in self._trace():
            writer.trace(record)
        for step, rows in self.rollouts.groupby("step"):
            writer.table("rollouts", int(step), {name: rows[name] for name in ROLLOUTS.names})
        for step, spans in self.engine.groupby("step"):
            writer.table("engine", int(step), {name: spans[name] for name in ENGINE.names})
        writer.ledger({name: self.ledger[name] for name in self.ledger.columns})
        writer.summary(self.summary())
        writer.close(t=self.run.wall_s, status="finished")

    def _header(self) -> dict[str, Any]:
        return {
            "clock": "virtual",
            "unix_time_s": None,
            "host": None,
            "simulated": True,
            "devices": [],
            "capabilities": {},
            "gpus": self.cluster.gpus,
            "engines": self.cluster.engines,
            "gpus_per_engine": self.cluster.gpus_per_engine,
            "trainer_gpus": self.cluster.trainer_gpus,
            "schedule": describe(self.run.schedule),
            "simulated_only": self.run.schedule.simulated_only,
        }

    def _trace(self) -> list[dict[str, Any]]:
        """Plans, decisions and phases, in the order of their times."""
        log = self.run.log
        records: list[tuple[float, int, dict[str, Any]]] = []
        for t, carried, demand, plan in log.plans:
            records.append((t, 1, plan_record(t, carried, demand, plan)))
        for t, state, event, decisions in log.decisions:
            records.append((t, 2, row_end_record(t, state, event, decisions)))
        for name, step, start, end in log.phases:
            phase = {"type": "phase", "name": name, "step": step, "t_start": start, "t_end": end, "depth": 0}
            records.append((end, 0 if name != "rollout" else 3, phase))
        return [record for _, _, record in sorted(records, key=lambda entry: entry[:2])]
