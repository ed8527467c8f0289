"""Writes a run directory so that a killed run reads cleanly: append whole lines, rename whole files."""

import contextlib
import errno
import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from profiling import schema
from profiling.errors import ConfigError, DataError, RunError
from profiling.hosts import folders_of_hosts

APPEND_ONLY = ("trace.jsonl", "metrics.jsonl")
"""Files of a run directory that only grow: the ones that a checkpoint knows the length of, and resuming cuts back."""
_PHASE = ("type", *schema.TRACE_FIELDS["phase"])


def refuse_a_run(path: Path) -> None:
    """Raises ConfigError when `path` already holds a run."""
    if (path / "trace.jsonl").exists():
        raise ConfigError(f"{path}: already holds a run; choose another directory, or move it away")


class RunWriter:
    """Owns one run directory. Every method may raise RunError (disk full, directory gone), naming the file.

    Refuses a directory that already holds a run: nothing is overwritten.
    """

    def __init__(self, path: Path | str, *, header: Mapping[str, Any], config_toml: str) -> None:
        self.path = Path(path)
        refuse_a_run(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be created: {error.strerror}") from None
        self.write_text("config.toml", config_toml)
        self._trace = self._open("trace.jsonl")
        self._metrics: IO[bytes] | None = None
        self.trace({"type": "header", "schema": schema.SCHEMA_VERSION, **header})

    @classmethod
    def resume(
        cls, path: Path | str, *, offsets: Mapping[str, int], last_step: int, last_t_s: float = math.inf
    ) -> "RunWriter":
        """Go on writing a run as it was at a checkpoint: append-only files are cut back to `offsets` (bytes), part
        files of later steps and device samples after `last_t_s` are removed; ledger and summary stay until new ones
        replace them. Raises DataError when the files are shorter than the checkpoint says, before anything is
        changed. Raises RunError."""
        writer = cls.__new__(cls)
        writer.path = Path(path)
        for name, offset in offsets.items():
            file = writer.path / name
            if name not in APPEND_ONLY or file.is_symlink():  # cutting it back would change a file of something else
                raise DataError(f"{file}: not a file of this run that grows; it cannot be resumed")
            if not file.exists() or file.stat().st_size < offset:
                raise DataError(f"{file}: shorter than its checkpoint says ({offset} bytes); it cannot be resumed")
        by_step = [name for name, part in schema.PART_NAMES.items() if part == "step"]
        parts = [p for name in by_step for p in (writer.path / name).glob("step-*.parquet")]
        later = [p for p in parts if p.stem[5:].isdigit() and int(p.stem[5:]) > last_step]
        try:
            for name, offset in offsets.items():
                os.truncate(writer.path / name, offset)
            for part in later:
                part.unlink()
            for folder in (writer.path, *folders_of_hosts(writer.path)):
                for name, time in (("devices", "t"), ("windows", "t_end")):
                    _cut_samples(folder / name, time, last_t_s)
        except OSError as error:
            raise RunError(f"{writer.path}: cannot be resumed in place: {error.strerror}") from None
        writer._trace = writer._open("trace.jsonl")
        writer._metrics = None
        return writer

    def offsets(self) -> dict[str, int]:
        """Length in bytes of each append-only file, for a checkpoint."""
        return {name: (self.path / name).stat().st_size for name in APPEND_ONLY if (self.path / name).exists()}

    def sync(self) -> None:
        """Wait until the disk has everything that was written: what a checkpoint refers to must not be younger.
        Raises RunError."""
        folders = [self.path, *(self.path / name for name in schema.PART_NAMES if (self.path / name).is_dir())]
        try:
            for path in (*(self.path / name for name in self.offsets()), *folders):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror}") from None

    def trace(self, *records: Mapping[str, Any]) -> None:
        """Append records, all in one write. An invalid record is our own bug: ValueError."""
        self._append(self._trace, [_trace_line(record) for record in records], "trace.jsonl")

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append one row of training metrics; NaN and infinities become null."""
        if self._metrics is None:
            self._metrics = self._open("metrics.jsonl")
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._append(self._metrics, [_json(finite)], "metrics.jsonl")

    def table(self, name: str, number: int, columns: Mapping[str, Any]) -> None:
        """Write part `number` of table `name` of profiling.schema.TABLES, with its columns."""
        directory = self.path / name
        part = directory / f"{schema.PART_NAMES[name]}-{number:06d}.parquet"
        write_parquet(part, columns, schema.TABLES[name])

    def ledger(self, columns: Mapping[str, Any]) -> None:
        write_parquet(self.path / "ledger.parquet", columns, schema.LEDGER)

    def summary(self, values: Mapping[str, Any]) -> None:
        self.write_text("summary.json", json.dumps(values, indent=1, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, text.encode())

    def close(self, *, t: float, status: str, **extra: Any) -> None:
        """End the trace. status: finished, interrupted or failed."""
        self.trace({"type": "trailer", "t": t, "status": status, **extra})
        for file in (self._trace, self._metrics):
            if file is not None:
                file.close()

    def _open(self, name: str) -> IO[bytes]:
        try:
            return (self.path / name).open("ab", buffering=0)
        except OSError as error:
            raise RunError(f"{self.path / name}: cannot be written: {error.strerror}") from None

    def _append(self, file: IO[bytes], lines: Sequence[str], name: str) -> None:
        content = "".join(f"{line}\n" for line in lines).encode()
        end = file.seek(0, os.SEEK_END)
        whole = 0  # bytes of lines that are on disk
        try:
            written = file.write(content) or 0
            if written != len(content):
                whole = content.rfind(b"\n", 0, written) + 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            file.truncate(end + whole)  # no half line
            raise RunError(f"{self.path / name}: cannot be written: {error.strerror}") from None


_json = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_quoted = functools.lru_cache(json.dumps)


def _trace_line(record: Mapping[str, Any]) -> str:
    """Raises ValueError for an invalid record."""
    if (line := _phase_line(record)) is not None:
        return line
    if fault := schema.fault_in(record):
        raise ValueError(f"trace record: {fault}")
    return _json(record)


def _phase_line(record: Mapping[str, Any]) -> str | None:
    """A valid phase, as `_json` writes it but several times faster: the trainer waits meanwhile. None: something else,
    or a fault in it."""
    try:
        kind, name, step, start, end, depth = record.values()
    except ValueError:
        return None
    most = schema.LARGEST
    if (
        kind == "phase"
        and tuple(record) == _PHASE
        and type(name) is str
        and type(step) is int
        and type(depth) is int
        and type(start) is float
        and type(end) is float
        and -most <= step <= most
        and -most <= depth <= most
        and -most <= start <= most
        and -most <= end <= most
    ):
        return (
            f'{{"type":"phase","name":{_quoted(name)},"step":{step},"t_start":{start!r},"t_end":{end!r},'
            f'"depth":{depth}}}'
        )
    return None


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name and rename; on failure the old file stays. Raises RunError naming the file."""
    if not path.name:
        raise RunError(f"{path}: a directory; name a file")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # a link there would lead what is written elsewhere
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def write_parquet(path: Path, columns: Mapping[str, Any], columns_schema: pa.Schema) -> None:
    """Write a table whole or not at all. Columns that are missing or unknown are our own bug: ValueError."""
    missing = set(columns_schema.names) ^ set(columns)
    if missing:
        raise ValueError(f"{path.name}: columns {sorted(missing)} are missing or unknown")
    arrays = [pa.array(columns[field.name], field.type, from_pandas=True) for field in columns_schema]
    _write_table(path, pa.Table.from_arrays(arrays, schema=columns_schema))


def _write_table(path: Path, table: pa.Table) -> None:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_atomically(path, buffer.getvalue().to_pybytes())


def _cut_samples(folder: Path, time: str, last_t_s: float) -> None:
    """Remove samples after `last_t_s`. Parts are in the order of time. A part that cannot be read stays: its reader
    says so."""
    for part in sorted(folder.glob("part-*.parquet"), reverse=True):
        try:
            table = pq.read_table(part)
            kept = table.filter(pc.field(time) <= last_t_s)
        except (pa.ArrowInvalid, OSError):
            continue
        if kept.num_rows == table.num_rows:
            break
        if kept.num_rows == 0:
            part.unlink()
        else:
            _write_table(part, kept)
