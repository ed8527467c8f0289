"""`tppo sweep`."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from profiling.console import PlainConsole, plain_table, table_console
from profiling.errors import ConfigError
from profiling.settings import parse_overrides
from simulator.sweep import cells_of, parse_vary, run_cells
from tppo.cluster.session import joined_cluster

SHOWN = ("wall_seconds", "rollout_seconds", "seconds_per_trained_token", "engine_idle_fraction", "staleness_mean")


def run_sweep(
    source: Path,
    words: Sequence[str],
    vary: Sequence[str],
    *,
    output: Path,
    jobs: int | None,
    ray: str | None,
    as_json: bool,
) -> int:
    """Simulate every combination. Returns the exit code: 1 when a cell failed. Raises ConfigError."""
    if not vary:
        raise ConfigError("tppo sweep: nothing varies; write --vary section.key=value,value")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: must be at least 1")
    varied = parse_vary(vary)
    cells = cells_of(source, parse_overrides(words), varied)
    console = PlainConsole(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        joined_cluster(ray) if ray is not None else nullcontext() as cluster,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("simulations", total=len(cells))
        table = run_cells(cells, output, lambda: progress.advance(task), jobs=jobs, ray=cluster)
    failed = table[table.status != "ok"]
    if as_json:
        print(table.to_json(orient="records", indent=1))
    else:
        names = [*varied, *(name for name in SHOWN if name in table), "status"]
        shown = plain_table(f"{source.name} (simulated)", *names, left=())
        for row in table[names].itertuples(index=False):
            shown.add_row(*map(_shown, row))
        table_console().print(shown)
        print(output / "sweep.parquet")
    for row in failed.to_dict("records"):
        cell = ", ".join(f"{name} = {row[name]}" for name in varied)
        console.print(f"failed: {cell}: {row['error']}", markup=False, highlight=False, soft_wrap=True)
    return 1 if len(failed) else 0


def _shown(value: object) -> str:
    if value is None or value != value:  # NaN: not known
        return "–"
    return f"{value:,.6g}" if isinstance(value, float) else str(value)
