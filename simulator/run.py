"""`simulate(experiment)`: a result in memory, or a run directory like a measured one."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from profiling.errors import ConfigError
from profiling.ledger import Cluster, build_ledger
from profiling.schema import ENGINE, LARGEST, ROLLOUTS
from profiling.settings import to_toml
from profiling.summary import summarise
from profiling.writer import RunWriter
from simulator.about import files_about
from simulator.cluster import TrainingRun
from simulator.costs import Costs
from simulator.engine import KINDS
from simulator.experiment import Experiment
from simulator.work import work_record
from tppo.schedule import describe
from tppo.schedule.log import plan_record, row_end_record


def simulate(experiment: Experiment, *, skipped_steps: int = 0, costs: Costs | None = None) -> "Result":
    """Play the experiment on a virtual clock.

    skipped_steps: the first ones leave their unfinished rows behind and take no time (schedules whose rows all run to
    their ends or windows); rates and totals are of the others. costs: instead of the experiment's own. Raises
    ConfigError when a row cannot fit the KV memory or the clock goes beyond a trace's numbers, and ConservationError
    when rows, tokens, KV blocks or GPU-seconds do not add up (a fault of ours).
    """
    start = time.perf_counter()
    with no_garbage_collection():
        run = TrainingRun(experiment, skipped_steps=skipped_steps, costs=costs)
        run.run()
        if run.wall_s > LARGEST:
            raise ConfigError(f"the run takes {run.wall_s:.1e} s, more than a trace can hold; look at [cost] again")
        result = Result(run)
        _ = result.ledger
    result.simulator_seconds = time.perf_counter() - start
    return result


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A run makes millions of small objects and no cycles: looking for some takes a third of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


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
        spans = self.run.log.spans()
        kind = np.array(KINDS, dtype=object)[spans.pop("kind")]
        slots = self.experiment.cluster.max_rows_per_engine or 0
        return pd.DataFrame({**spans, "kind": kind, "slots": slots})[ENGINE.names]

    @cached_property
    def rollouts(self) -> pd.DataFrame:
        rows = self.run.log.rows()
        finished = rows["finished"].astype(bool)
        if self.experiment.trains_whole_responses:
            trained = np.where(finished, rows["context_before"] + rows["tokens"] - rows["prompt_tokens"], 0)
            if self.run.schedule.in_flight:  # what waits for its step at the end of the run has not trained
                trained = np.where(np.isin(rows["row"], list(self.run.trained_at)), trained, 0)
        else:
            kept = np.maximum(rows["tokens"] - self.experiment.trailing_tokens, 0)
            trained = np.where(finished, rows["tokens"], kept)
        derived = {
            "group": rows["row"] // self.experiment.workload.samples_per_prompt, "trained_tokens": trained,
            "finished": finished, "discarded": False, "reward": np.nan,
        }  # fmt: skip
        return pd.DataFrame({**rows, **derived})[ROLLOUTS.names]

    @cached_property
    def ledger(self) -> pd.DataFrame:
        """GPU-seconds by step, GPU and cause; checked against GPUs x wall time."""
        return build_ledger(
            cluster=self.cluster, phases=self.phases, engine=self.engine, rollouts=self.rollouts,
            wall_s=self.run.wall_s,
        )  # fmt: skip

    def summary(self) -> dict[str, Any]:
        run = self.run
        totals = summarise(
            cluster=self.cluster, phases=self.phases, engine=self.engine, rollouts=self.rollouts, ledger=self.ledger,
            wall_s=run.wall_s, startup_steps=self.experiment.startup_steps,
            drawn_mean_tokens=run.drawn_tokens / run.next_row,
            trains_whole_responses=self.experiment.trains_whole_responses,
            trained_at=run.trained_at if run.schedule.in_flight else None,
        )  # fmt: skip
        events = len(self.engine) + len(run.log.phases)
        failures = sum(outage.failures for outage in run.outages)
        return {**totals, "failures": failures, "events": events, "simulator_seconds": self.simulator_seconds}

    def write(self, directory: Path | str) -> None:
        """A run directory with simulated = true. Refuses one that already holds a run."""
        writer = RunWriter(
            directory, header=self._header(), config_toml=to_toml(self.experiment.model_dump(mode="json"))
        )
        for name, text in files_about(self.run.all_costs.engine).items():
            writer.write_text(name, text)
        for record in self._trace():
            writer.trace(record)
        for step, rows in self.rollouts.groupby("step"):
            writer.table("rollouts", int(step), {name: rows[name] for name in ROLLOUTS.names})
        for step, spans in self.engine.groupby("step"):
            writer.table("engine", int(step), {name: spans[name] for name in ENGINE.names})
        writer.ledger(dict(self.ledger))
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
            "startup_steps": self.experiment.startup_steps,
            "simulated_only": self.run.schedule.simulated_only,
        }

    def _trace(self) -> list[dict[str, Any]]:
        """Plans, decisions, phases and what they computed, in the order of their times."""
        log = self.run.log
        records: list[tuple[float, int, dict[str, Any]]] = []
        schedule = self.run.schedule
        for entry in log.steps.values():
            carried, plan = entry.plan(schedule)
            records.append((entry.t_planned, 1, plan_record(entry.t_planned, carried, entry.demand, plan)))
            for t, state, event, decisions in entry.decisions(schedule):
                records.append((t, 2, row_end_record(t, state, event, decisions)))
        for name, step, start, end in log.phases:
            phase = {"type": "phase", "name": name, "step": step, "t_start": start, "t_end": end, "depth": 0}
            records.append((end, 0 if name != "rollout" else 3, phase))
            if (work := work_record(self.run, name, step)) is not None:
                records.append((end, 0, work))
        return [record for _, _, record in sorted(records, key=lambda entry: entry[:2])]
