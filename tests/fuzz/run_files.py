"""The files of a run directory, measured: every record and table, then what is computed from them."""

import functools
import json
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from profiling.attribution import device_estimates
from profiling.exports import chrome_trace
from profiling.markers import read_markers
from profiling.reader import Run
from profiling.schema import DEVICES, EVALUATIONS, SAMPLES, TABLES, WINDOWS, fault_in
from profiling.watch import snapshot
from profiling.writer import write_parquet
from tests.analysis.made_runs import RISING, make_run
from tests.fuzz.mutations import Bytes, hostile_table, hostile_text, json_text, lines_text, one_or_two, toml_text
from tests.fuzz.reader import Reader

RUN = "tppo-s0"


@functools.cache
def whole_run() -> dict[str, bytes]:
    """Every kind of file that a run may have, by its name in the folder of the run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / RUN
        make_run(path, accuracies=RISING[:3])
        samples = {"t": np.arange(0.0, 6.0, 0.5), "device": ["GPU-0"] * 12, "utilisation": [0.5] * 12}
        table(path, "devices", DEVICES, {**samples, "energy_joules": np.arange(12.0) * 50})
        table(path, "windows", WINDOWS, {"t_begin": [0.0, 1.0], "t_end": [1.0, 2.0], "device": ["GPU-0"] * 2,
                                         "metric": ["utilisation"] * 2, "value": [0.25, 0.75]})  # fmt: skip
        table(path, "samples", SAMPLES, {"step": [1], "row": [10], "prompt": ["1+1="], "response": ["2"],
                                         "answer": ["2"], "reward": [1.0], "correct": [True], "tokens": [1],
                                         "finished": [True], "policy_version": [0]})  # fmt: skip
        table(path, "evaluations", EVALUATIONS, {"step": [1, 1], "problem": [0, 1], "sample": [0, 0], "tokens": [3, 4],
                                                 "finished": [True, True], "correct": [True, False],
                                                 "answer": ["1", None]})  # fmt: skip
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def table(path: Path, name: str, schema: Any, columns: dict[str, Any]) -> None:
    rows = len(next(iter(columns.values())))
    whole = {field.name: columns.get(field.name, [None if field.nullable else 0] * rows) for field in schema}
    part = "part" if name in ("devices", "windows") else "step"
    write_parquet(path / name / f"{part}-000001.parquet", whole, schema)


def records(name: str) -> list[Any]:
    return [json.loads(line) for line in whole_run()[name].splitlines()]


def hostile_run() -> dict[str, Bytes]:
    """Name -> its hostile contents."""
    files = whole_run()
    hostile: dict[str, Bytes] = {n: hostile_table(c) for n, c in files.items() if n.endswith(".parquet")}
    hostile["trace.jsonl"] = hostile_text(records("trace.jsonl"), lines_text)
    hostile["metrics.jsonl"] = hostile_text(records("metrics.jsonl"), lines_text)
    hostile["summary.json"] = hostile_text(json.loads(files["summary.json"]), json_text)
    hostile["model.json"] = hostile_text(json.loads(files["model.json"]), json_text)
    hostile["config.toml"] = hostile_text(tomllib.loads(files["config.toml"].decode()), toml_text)
    return hostile


def reads(*names: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        run = Run(folder)
        for name in names:
            getattr(run, name)

    return read


def compute_everything(folder: Path) -> None:
    device_estimates(Run(folder))
    chrome_trace(Run(folder))
    snapshot(folder)


MARKERS = [
    {"host": "a", "boot": "b", "clock": 100.0, "unix": 1e9},
    {"name": "rollout", "step": 1, "start": 101.0, "end": 102.0, "depth": 1},
    {"name": "update_policy", "step": 1, "start": 102.0, "end": 103.0, "depth": 1},
]


def markers_of(folder: Path) -> None:
    for record in read_markers(folder, 99.0, 200.0, 1e9, "c"):
        assert fault_in(record) is None, record


def one_of(name: str) -> Any:
    """A run with a hostile file of this name (or of this folder), and little else."""

    def files() -> Any:
        chosen = {file: own for file, own in hostile_run().items() if file.split("/")[0] == name}
        whole = whole_run()
        return one_or_two({"trace.jsonl": whole["trace.jsonl"], **{file: whole[file] for file in chosen}}, chosen)

    return st.deferred(files)


READERS = (
    Reader("trace.jsonl", one_of("trace.jsonl"),
           reads("trace", "kind", "trailer", "phases", "device_phases", "probes"), share=2),
    Reader("metrics.jsonl", one_of("metrics.jsonl"), reads("metrics")),
    Reader("summary.json", one_of("summary.json"), reads("summary")),
    Reader("config.toml of a run", one_of("config.toml"), reads("config")),
    *(Reader(f"{name} (Parquet)", one_of(name), reads(name)) for name in TABLES),
    Reader("ledger.parquet", one_of("ledger.parquet"), reads("ledger")),
    Reader("a run, computed from", st.deferred(lambda: one_or_two(whole_run(), hostile_run())), compute_everything,
           share=0.7),
    Reader("markers of adapters", one_or_two({}, {"markers/a-1.jsonl": hostile_text(MARKERS, lines_text)}),
           markers_of),
)  # fmt: skip
