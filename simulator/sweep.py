"""Many simulations: every combination of some fields' values, in parallel, continued where a run before stopped."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from profiling.errors import ConfigError, ToolkitError
from profiling.files import read_json
from profiling.settings import parse_overrides
from profiling.writer import write_atomically
from simulator.experiment import load_experiment
from simulator.processes import in_processes
from simulator.run import simulate

Values = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One combination. `key` names it by everything that its result depends on."""

    overrides: Values
    key: str
    experiment: str
    """The whole experiment as JSON; empty when it is refused."""
    fault: str | None = None
    """Why it is refused."""


def parse_vary(words: Sequence[str]) -> dict[str, list[Any]]:
    """`schedule.window=4096,8192` -> {"schedule.window": [4096, 8192]}; values are TOML, or else plain text.
    Raises ConfigError."""
    varied: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        values = [part.strip() for part in text.split(",")]
        if not equals or not name or not all(values):
            raise ConfigError(f"--vary {word}: write --vary section.key=value,value")
        if name in varied:
            raise ConfigError(f"--vary {name}: given twice; put all of its values into one")
        varied[name] = [parse_overrides([f"--{name}={value}"]).popitem()[1] for value in values]
    return varied


def cells_of(source: Path, overrides: Values, varied: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """Every combination, in the order of the last field running fastest. Raises ConfigError when all are refused."""
    cells = []
    for combination in itertools.product(*varied.values()):
        own = dict(zip(varied, combination, strict=True))
        try:
            whole = load_experiment(source, {**overrides, **own}).model_dump_json()
        except ToolkitError as error:
            cells.append(Cell(own, _key(repr(own)), "", str(error)))
        else:
            cells.append(Cell(own, _key(whole), whole))
    if all(cell.fault for cell in cells):
        raise ConfigError(str(cells[0].fault))
    return cells


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def play(experiment: str) -> Values:
    """Summary of one cell, its ledger flat (`ledger.decode_useful`). Runs in another process or on another host."""
    summary = simulate(load_experiment(json.loads(experiment))).summary()
    ledger = summary.pop("ledger")
    return {**summary, **{f"ledger.{cause}": seconds for cause, seconds in ledger.items()}}


def run_cells(
    cells: Sequence[Cell],
    directory: Path,
    each: Callable[[], None],
    *,
    jobs: int | None = None,
    ray: Any = None,
) -> pd.DataFrame:
    """Play what is not in `directory` yet, on this machine's cores or on a cluster (Ray's module, connected); `each`
    is called after every cell. Returns the table, a row a cell in
    order: the varied fields, `status` (ok or failed), `error`, and the summary. Also written to sweep.parquet."""
    folder = directory / "cells"
    results: dict[str, Values] = {}
    waiting: dict[str, str] = {}
    for cell in cells:
        known = _read(folder / f"{cell.key}.json")
        if cell.fault or known is not None:
            results[cell.key] = known or {"status": "failed", "error": cell.fault}
            each()
        elif cell.key not in waiting:
            waiting[cell.key] = cell.experiment
    start = _on_ray(waiting, ray) if ray is not None else _on_this_machine(waiting, jobs)
    for key, answer in start:
        results[key] = answer
        if answer["status"] == "ok":
            write_atomically(folder / f"{key}.json", json.dumps(answer, allow_nan=False).encode())
        each()
    rows = [{**cell.overrides, **results[cell.key], **cell.overrides} for cell in cells]  # first, and as asked
    table = pd.DataFrame(rows)
    # A column of numbers and texts has no type in Parquet: it becomes text.
    for name in table.columns[[table[c].map(type).nunique() > 1 and table[c].dtype == object for c in table]]:
        if table[name].map(lambda value: isinstance(value, str)).any():
            table[name] = table[name].map(lambda value: value if value is None else str(value))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), sink)
    write_atomically(directory / "sweep.parquet", sink.getvalue().to_pybytes())
    return table


def _read(path: Path) -> Values | None:
    try:
        known = read_json(path)
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict) or known.get("status") != "ok":
        return None
    return known if all(isinstance(own, str | int | float | None) for own in known.values()) else None


def _answer(get: Callable[[], Values]) -> Values:
    try:
        return {"status": "ok", "error": None, **get()}
    except Exception as error:  # whatever a cell dies of, the others go on
        lines = str(error).splitlines() or [""]
        shown = lines[0] if isinstance(error, ToolkitError) else f"{type(error).__name__}: {lines[-1]}"
        return {"status": "failed", "error": shown}


def _on_this_machine(waiting: Mapping[str, str], jobs: int | None) -> Iterator[tuple[str, Values]]:
    for key, get in in_processes(play, waiting, jobs):
        yield key, _answer(get)


def _on_ray(waiting: Mapping[str, str], ray: Any) -> Iterator[tuple[str, Values]]:
    """ray: its module, connected to a cluster whose hosts have this package installed. Cells are given to it all at
    once; it queues them."""
    remote = ray.remote(play)
    futures = {remote.remote(experiment): key for key, experiment in waiting.items()}
    left = list(futures)
    while left:
        done, left = ray.wait(left, num_returns=1)
        reference = done[0]

        def fetch(reference: Any = reference) -> Values:
            return ray.get(reference)

        yield futures[reference], _answer(fetch)
