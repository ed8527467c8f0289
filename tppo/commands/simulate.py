"""`tppo simulate`."""

import json
from collections.abc import Sequence
from pathlib import Path

from profiling.console import plain_table, table_console
from profiling.settings import parse_overrides
from profiling.writer import refuse_a_run
from simulator import load_experiment, simulate


def run_simulation(path: Path, words: Sequence[str], *, output: Path | None, as_json: bool) -> None:
    experiment = load_experiment(path, overrides=parse_overrides(words))
    if output is not None:
        refuse_a_run(output)
    result = simulate(experiment)
    if output is not None:
        result.write(output)
    summary = result.summary()
    if as_json:
        print(json.dumps(summary, indent=1, allow_nan=False))
        return
    only = result.run.schedule.simulated_only
    kind = "simulated only: the trainer does not run this schedule" if only else "simulated"
    table = plain_table(f"{path.name} ({kind})", "", "value", left=("",))
    for key, value in summary.items():
        if not isinstance(value, dict):
            table.add_row(key, "not known" if value is None else f"{value:,.6g}")
    for cause, seconds in summary["ledger"].items():
        if seconds:
            share = seconds / summary["gpu_seconds"]
            table.add_row(f"ledger: {cause}", f"{seconds:,.6g} GPU s ({share:.1%})")
    table_console().print(table)
