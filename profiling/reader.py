"""Reads a run directory, live, killed or finished, and validates every record on the way in."""

import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from profiling import schema
from profiling.errors import ConfigError, DataError
from profiling.files import parse_json, read_json, whole_lines
from profiling.hosts import folders_of_hosts, is_host
from profiling.ledger import TOLERANCE, Cluster
from profiling.lives import without_gaps
from profiling.settings import read_toml
from profiling.tables import read_table

_SCHEDULE_RECORD = (b'{"type":"plan_step"', b'{"type":"row_end"')
"""How profiling.writer begins these lines; written otherwise, they are read like the others."""


class Run:
    """A run directory. Tables are pandas DataFrames with the columns of profiling.schema, read when first used.

    Raises DataError naming the file, the line and the field. A torn last line (a run being written, or killed)
    is ignored.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not os.path.isdir(self.path):  # unlike Path.is_dir, of a name that is too long, too
            raise DataError(f"{self.path}: no such run directory")
        if not (self.path / "trace.jsonl").is_file():
            raise DataError(f"{self.path}: not a run directory: it has no trace.jsonl")

    @property
    def name(self) -> str:
        """Of its directory; bytes that are no text are written out."""
        return os.fsencode(self.path.name).decode(errors="backslashreplace")

    @cached_property
    def config(self) -> dict[str, Any]:
        try:
            return read_toml(self.path / "config.toml", regular=True)
        except ConfigError as error:
            raise DataError(str(error)) from None

    @cached_property
    def trace(self) -> list[dict[str, Any]]:
        """All records, in order."""
        return self._read_trace()

    @cached_property
    def outline(self) -> list[dict[str, Any]]:
        """The trace without the schedule's records, which are nearly all of a long run's (half a million for a
        thousand steps) and of which figures and reports need none."""
        return self._read_trace(leave_out=_SCHEDULE_RECORD)

    def _read_trace(self, leave_out: tuple[bytes, ...] = ()) -> list[dict[str, Any]]:
        path = self.path / "trace.jsonl"
        records = []
        last: tuple[int, bytes] | None = None  # read in any case: whether the run has ended depends on it
        for number, line in _lines(path):
            last = (number, line) if leave_out and line.startswith(leave_out) else None
            if last is None:
                records.append(_record(path, number, line))
        if last is not None:
            records.append(_record(path, *last))
        if not records or records[0]["type"] != "header":
            raise DataError(f"{path}: line 1: no header; the file is not a trace")
        return records

    @cached_property
    def header(self) -> dict[str, Any]:
        """The trace's first record. It was written before the sampler had looked: devices and capabilities are what
        the sampler said later. A profiled program, of which nothing else is known, has the GPUs that were sampled.
        Raises DataError."""
        header = dict(self.outline[0])
        found = [device for device in _listed(self.sampler.get("devices")) if isinstance(device, dict)]
        once: dict[str, Any] = {}
        for device in found:
            once.setdefault(str(device.get("uuid")), device)  # containers of one machine may share it
        gpus = [device for uuid, device in once.items() if not is_host(uuid)]
        header["devices"] = header["devices"] or gpus
        states = self.sampler.get("capabilities")
        header["capabilities"] = header["capabilities"] or (states if isinstance(states, dict) else {})
        if "zero_s" in header:
            whole = sum(device.get("part_of") is None for device in gpus)  # a MIG instance is part of one
            header["gpus"] = header["gpus_per_engine"] = max(1, whole)
        if fault := schema.fault_in_header(header):
            raise DataError(f"{self.path}: the sampler's devices: {fault}")
        return header

    @cached_property
    def sampler(self) -> dict[str, Any]:
        """What the sampler said of itself last: devices, what they can tell (both of all hosts), ticks. Empty without
        one."""
        said = self.trailer.get("sampler") if self.trailer is not None else _said_in(self.path)
        own = said if isinstance(said, dict) else {}
        own = dict(own)
        for other in map(_said_in, folders_of_hosts(self.path)):
            if isinstance(devices := other.get("devices"), list):
                own["devices"] = [*_listed(own.get("devices")), *devices]
            if isinstance(states := other.get("capabilities"), dict):
                ours = own.get("capabilities")
                own["capabilities"] = {**states, **(ours if isinstance(ours, dict) else {})}
        return own

    @cached_property
    def hosts(self) -> dict[str, pd.DataFrame]:
        """Device samples by host: of the first one, of those with a folder, and of those that the trace notes ranks or
        engines on, which may have none."""
        notes = [record.get("host") for record in self.outline if record["type"] == "note"]
        found = {str(self.outline[0]["host"]): _table_in(self.path, "devices").to_pandas()}
        for folder in folders_of_hosts(self.path):  # the first one's, too, where a resumed run began elsewhere
            own = _table_in(folder, "devices").to_pandas()
            found[folder.name] = pd.concat([found[folder.name], own]) if folder.name in found else own
        empty = schema.DEVICES.empty_table().to_pandas()
        return found | {note: empty for note in notes if isinstance(note, str) and note not in found}

    @property
    def unsampled_hosts(self) -> list[str]:
        """Hosts without device samples, of a run that has them from others."""
        empty = [name for name, samples in self.hosts.items() if samples.empty]
        return empty if len(empty) < len(self.hosts) else []

    @property
    def uncounted_hosts(self) -> list[str]:
        """Hosts without an energy counter, of a run that has counters on others."""
        without = [name for name, samples in self.hosts.items() if samples.energy_joules.isna().all()]
        return without if len(without) < len(self.hosts) else []

    @property
    def cluster(self) -> Cluster:
        return Cluster(self.header["engines"], self.header["gpus_per_engine"], self.header["trainer_gpus"])

    @property
    def simulated(self) -> bool:
        return bool(self.header["simulated"])

    @property
    def kind(self) -> str:
        """measured, simulated, or simulated only: no trainer of ours runs its schedule."""
        if not self.simulated:
            return "measured"
        return "simulated only" if self.header.get("simulated_only") else "simulated"

    @property
    def trailer(self) -> dict[str, Any] | None:
        """How the run ended, or None for one that is live or was killed."""
        return self.outline[-1] if self.outline[-1]["type"] == "trailer" else None

    @cached_property
    def phases(self) -> pd.DataFrame:
        """name, step, t_start, t_end, depth, process: one row per phase, in the order in which they ended. process:
        "", or the one of a profiled command that marked it (HOST-PID)."""
        return self._records("phase", "process")

    @cached_property
    def device_phases(self) -> pd.DataFrame:
        """As phases, by the GPU's time; empty unless the run kept CUDA events."""
        return self._records("device_phase")

    @cached_property
    def probes(self) -> pd.DataFrame:
        """step, t, seconds: the drift probe's timings."""
        return self._records("probe")

    def _records(self, kind: str, *optional: str) -> pd.DataFrame:
        columns = [*schema.TRACE_FIELDS[kind], *optional]
        rows = [[record.get(c, "") for c in columns] for record in self.outline if record["type"] == kind]
        return pd.DataFrame(rows, columns=columns)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        path = self.path / "metrics.jsonl"
        rows = _json_lines(path) if path.exists() else []
        for line, row in enumerate(rows, start=1):
            if fault := schema.fault_in_metrics(row):
                raise DataError(f"{path}: line {line}: {fault}")
        return pd.DataFrame(rows)

    @cached_property
    def rollouts(self) -> pd.DataFrame:
        return self._table("rollouts")

    @cached_property
    def engine(self) -> pd.DataFrame:
        return self._table("engine")

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """Empty where nothing was evaluated, and in runs of toolkits that kept no such table."""
        return self._table("evaluations")

    @cached_property
    def samples(self) -> pd.DataFrame:
        """Empty where none were asked for, and in runs of toolkits that kept no such table."""
        return self._table("samples")

    @cached_property
    def devices(self) -> pd.DataFrame:
        """Of all hosts, in the order of their times. Energy counters of a resumed run go on as if nothing lay between
        its lives."""
        tables = list(self.hosts.values())
        whole = tables[0]
        for own in tables[1:]:  # without what is told of a GPU already: containers of one machine may share it
            known = whole.groupby("device").t.agg(["min", "max"]).reindex(own.device)
            told = (own.t.to_numpy() >= known["min"].to_numpy()) & (own.t.to_numpy() <= known["max"].to_numpy())
            whole = pd.concat([whole, own[~told]])
        whole = whole if len(tables) == 1 else whole.sort_values("t", kind="stable", ignore_index=True)
        resumed = [record["resumed_s"] for record in self.outline if isinstance(record.get("resumed_s"), int | float)]
        return without_gaps(whole, resumed) if resumed else whole

    @cached_property
    def windows(self) -> pd.DataFrame:
        """Empty where no driver keeps samples of its own."""
        folders = [self.path, *folders_of_hosts(self.path)]
        windows = pa.concat_tables([_table_in(folder, "windows") for folder in folders]).to_pandas()
        if len(folders) == 1:
            return windows
        once = windows.drop_duplicates(["device", "metric", "t_end"])
        return once.sort_values("t_end", kind="stable", ignore_index=True)

    @cached_property
    def ledger(self) -> pd.DataFrame | None:
        """None for a run that has not ended. Raises DataError, also where its seconds are not the run's."""
        path = self.path / "ledger.parquet"
        if not path.exists():
            return None
        ledger = read_table(path, schema.LEDGER).to_pandas()
        if self.trailer is not None and self.summary is not None:  # else one of them may be about to be replaced
            _check_sums(path, ledger, self.summary["wall_seconds"], self.summary["gpu_seconds"])
        return ledger

    @cached_property
    def summary(self) -> dict[str, Any] | None:
        """None for a run that has not ended. Raises DataError."""
        path = self.path / "summary.json"
        if not path.exists():
            return None
        summary = _json(path)
        if fault := schema.fault_in_summary(summary):
            raise DataError(f"{path}: {fault}; not a summary of a run")
        return summary

    @cached_property
    def calibration(self) -> dict[str, Any] | None:
        path = self.path / "calibration.json"
        if not path.exists():
            return None
        calibration = _json(path)
        if not isinstance(calibration, dict):
            raise DataError(f"{path}: not a JSON object; calibrate again")
        return calibration

    def steps_of(self, name: str, steps: Iterable[int]) -> pd.DataFrame:
        """Of a table that has a part per step (rollouts, engine, evaluations, samples), some steps alone, as a
        figure of a long run reads them. A step without a part has no rows."""
        expected = schema.TABLES[name]
        parts = [self.path / name / f"step-{step:06d}.parquet" for step in steps]
        tables = [read_table(part, expected) for part in parts if part.exists()]
        return pa.concat_tables([expected.empty_table(), *tables]).to_pandas()

    def _table(self, name: str) -> pd.DataFrame:
        return _table_in(self.path, name).to_pandas()


def _table_in(folder: Path, name: str) -> pa.Table:
    expected = schema.TABLES[name]
    parts = sorted((folder / name).glob(f"{schema.PART_NAMES[name]}-*.parquet"))
    return pa.concat_tables([expected.empty_table(), *(read_table(part, expected) for part in parts)])


def _said_in(folder: Path) -> dict[str, Any]:
    """What the sampler of a host wrote into its folder last."""
    try:
        said = read_json(folder / "sampler.json")
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _check_sums(path: Path, ledger: pd.DataFrame, wall_s: float | None, gpu_s: float | None) -> None:
    """Every GPU's seconds are the wall time's, and all of them the run's GPU-seconds. Raises DataError."""
    if wall_s is None or gpu_s is None:
        return
    sums = ledger.groupby("gpu").seconds.sum()
    wrong = sums[(sums - wall_s).abs() > TOLERANCE * wall_s]
    if len(wrong):
        raise DataError(
            f"{path}: column 'seconds' of GPU {wrong.index[0]} sums to {wrong.iloc[0]:.6g}, not to the run's "
            f"{wall_s:.6g} s; it is not this run's ledger"
        )
    if abs(sums.sum() - gpu_s) > TOLERANCE * gpu_s:
        raise DataError(
            f"{path}: column 'seconds' sums to {sums.sum():.6g} GPU-seconds, not to the run's {gpu_s:.6g}; GPUs are "
            "missing"
        )


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    record: dict[str, Any] = _json_line(path, number, line)
    if fault := schema.fault_in(record):
        raise DataError(f"{path}: line {number}: {fault}")
    return record


def _json_lines(path: Path) -> list[Any]:
    return [_json_line(path, number, line) for number, line in _lines(path)]


def _json_line(path: Path, number: int, line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise DataError(f"{path}: line {number}: not JSON: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered, from 1."""
    try:
        yield from enumerate(whole_lines(path), start=1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
