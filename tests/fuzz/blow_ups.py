"""Files that are small, or cost nothing to make, and would take the machine's memory or hours: each is read in a
process of its own, whose peak and time are measured.

    python -m tests.fuzz.blow_ups MEGABYTES NAME ...
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from profiling.errors import ToolkitError
from profiling.schema import SAMPLES
from tests.fuzz import checkpoint_files, foreign_files, run_files, settings_files
from tests.fuzz.oracle import check_message, deadline, peak_mb, write_files
from tests.fuzz.reader import Reader
from tests.fuzz.run_files import whole_run

MOST_MB = 1500
"""By which reading may raise the peak of the process."""
MOST_S = 60.0


@dataclass(frozen=True)
class BlowUp:
    name: str
    reader: str
    """Of tests.fuzz.readers."""
    make: Callable[[Path, int], None]
    """Writes the file at this path; the number: megabytes."""
    file: str


def zeros(path: Path, megabytes: int) -> None:
    """Sparse: one line, without an end."""
    with path.open("wb") as file:
        file.truncate(megabytes << 20)


def one_long_line(path: Path, megabytes: int) -> None:
    with path.open("wb") as file:
        file.write(b'{"type": "note", "text": "')
        for _ in range(megabytes):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n')


def nested(path: Path, megabytes: int) -> None:
    path.write_bytes(b"[" * (megabytes << 18) + b"]" * (megabytes << 18))


def long_key(path: Path, megabytes: int) -> None:
    path.write_text("a." * 100_000 + "b = 1\n")


def many_digits(path: Path, megabytes: int) -> None:
    path.write_bytes(b'{"schema": ' + b"9" * (megabytes << 20) + b"}")


def many_rows(path: Path, megabytes: int) -> None:
    """A Parquet file of kilobytes: one text of a megabyte, in as many rows."""
    text = "x" * (1 << 20)
    rows = megabytes * 16
    columns = {field.name: constant(field, rows, text) for field in SAMPLES}
    pq.write_table(pa.table(columns), path, use_dictionary=True, compression="zstd")


def constant(field: pa.Field, rows: int, text: str) -> pa.Array:
    if pa.types.is_string(field.type):
        return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    return pa.array([1] * rows, pa.int64()).cast(field.type)


def million_row_cell(path: Path, megabytes: int) -> None:
    messages = [[{"role": "user", "content": "x"}] * 1_000_000]
    pq.write_table(pa.table({"question": messages, "answer": ["#### 1"]}), path, compression="zstd")


def zip_bomb(path: Path, megabytes: int) -> None:
    """torch's archive, with a storage that is zeros."""
    whole = checkpoint_files.whole_checkpoint()[f"{checkpoint_files.FOLDER}/random.pt"]
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as before, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))
        after.writestr("random/data/999", bytes(megabytes << 20))
    path.write_bytes(file.getvalue())


def unary_minus(path: Path, megabytes: int) -> None:
    path.write_bytes(b"{" + b"-" * 900_000 + b"1}\n" + b"{" + b"(" * 900_000 + b"\n")


def pipe(path: Path, megabytes: int) -> None:
    """That nobody writes to."""
    os.mkfifo(path)


def endless(path: Path, megabytes: int) -> None:
    path.symlink_to("/dev/zero")


TEXTS = {
    "experiment TOML": "experiment.toml", "run configuration TOML": "run.toml", "calibration.json": "calibration.json",
    "Hugging Face config.json": "config.json", "lengths CSV": "lengths.csv", "trace.jsonl": "trace.jsonl",
    "metrics.jsonl": "metrics.jsonl", "summary.json": "summary.json", "config.toml of a run": "config.toml",
    "verl console log": "verl.log", "TRL printed log": "trl.log", "TRL trainer_state.json": "trainer_state.json",
    "verl CSV of wandb": "verl.csv", "data set JSON lines": "data.jsonl", "data set JSON": "data.json",
    "data set CSV": "data.csv", "predictions.csv": "predictions.csv", "hardware.json": "hardware.json",
    "checkpoint manifest that fits": f"{checkpoint_files.FOLDER}/manifest.json",
    "checkpoint, restored": f"{checkpoint_files.FOLDER}/progress.json",
    "lengths Parquet": "lengths.parquet", "samples (Parquet)": "samples/step-000001.parquet",
    "markers of adapters": "markers/a.jsonl",
}  # fmt: skip
NEVER_ENDING = ("calibration.json", "Hugging Face config.json", "lengths CSV", "lengths Parquet", "metrics.jsonl",
                "summary.json", "samples (Parquet)", "hardware.json", "predictions.csv",
                "checkpoint manifest that fits")  # fmt: skip
BLOW_UPS: dict[str, BlowUp] = {
    own.name: own
    for own in (
        *(BlowUp(f"{reader}: zeros", reader, zeros, file) for reader, file in TEXTS.items()),
        *(BlowUp(f"{reader}: one long line", reader, one_long_line, file) for reader, file in TEXTS.items()
          if file.endswith(("jsonl", "csv", "json", "log"))),
        *(BlowUp(f"{reader}: nested", reader, nested, file) for reader, file in TEXTS.items()
          if file.endswith(("json", "toml"))),
        *(BlowUp(f"{reader}: a pipe", reader, pipe, TEXTS[reader]) for reader in NEVER_ENDING),
        *(BlowUp(f"{reader}: /dev/zero", reader, endless, TEXTS[reader]) for reader in NEVER_ENDING),
        BlowUp("experiment TOML: a key of 100,000 dots", "experiment TOML", long_key, "experiment.toml"),
        BlowUp("calibration.json: millions of digits", "calibration.json", many_digits, "calibration.json"),
        BlowUp("samples (Parquet): one text in many rows", "samples (Parquet)", many_rows,
               "samples/step-000001.parquet"),
        BlowUp("data set Parquet: a cell of a million rows", "data set Parquet", million_row_cell, "data.parquet"),
        BlowUp("checkpoint, restored: a zip bomb", "checkpoint, restored", zip_bomb,
               f"{checkpoint_files.FOLDER}/random.pt"),
        BlowUp("TRL printed log: nested signs", "TRL printed log", unary_minus, "trl.log"),
    )
}  # fmt: skip


def try_it(name: str, megabytes: int) -> dict[str, Any]:
    """Make the file and read it, in this process. {"name", "end", "mb", "seconds"}: the rise of its peak, the time."""
    own = BLOW_UPS[name]
    modules = (settings_files, run_files, foreign_files, checkpoint_files)
    reader: Reader = next(r for module in modules for r in module.READERS if r.name == own.reader)
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "in"
        write_files(folder, {**whole_run(), **checkpoint_files.whole_checkpoint()})
        file = folder / own.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        own.make(file, megabytes)
        before, began = peak_mb(), time.perf_counter()
        try:
            with deadline(MOST_S):
                reader.read(folder)
            end = "read"
        except ToolkitError as error:
            check_message(str(error), folder, reader.names)
            end = "refused"
        return {"name": name, "end": end, "mb": peak_mb() - before, "seconds": time.perf_counter() - began}


def apart(megabytes: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """`try_it` of each, one after the other in one other process. Raises AssertionError when it does not end well."""
    words = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.blow_ups", str(megabytes), *names]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"after {len(found)} of {len(names)}: {done.stderr[-1500:]}"
    return found


if __name__ == "__main__":
    for word in sys.argv[2:]:
        print(json.dumps(try_it(word, int(sys.argv[1]))), flush=True)
