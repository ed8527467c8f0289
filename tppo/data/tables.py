"""Rows of a data set, read as they are needed: local files, folders of them, the bundled problems, the hub."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO

from profiling.errors import DataError, first_line

BUNDLED = ("original",)
ENDINGS = (".jsonl", ".json", ".parquet", ".csv")
SPLIT_NAMES = {"train", "test", "validation", "valid", "val", "dev", "eval"}
ROWS_AT_ONCE = 1000
MOST_BYTES_AT_ONCE = 2**28
"""Of Parquet, if each of the rows had all that is stored: a text that many rows share is stored once."""
LONGEST_LINE = 2**26
"""Characters, of JSON or CSV."""
LARGEST_JSON_BYTES = 2**29
WIDEST_CSV_FIELD_BYTES = 2**27


@dataclass(frozen=True)
class Table:
    where: str
    """What messages call it: a file, or a name on the hub."""
    columns: tuple[str, ...]
    rows: Callable[[Sequence[str]], Iterator[dict[str, Any]]]
    """Streams the rows' named columns, so that a large data set never stands in memory whole."""


def open_tables(path: str, *, split: str, subset: str, key: str) -> list[Table]:
    """The tables that `path` names: a bundled set, a local file or folder, else a data set on the hub.

    key: the section of the configuration that messages name. Raises DataError.
    """
    if path in BUNDLED:
        with (files("tppo.data") / "problems" / f"{path}.jsonl").open(encoding="utf-8") as file:
            return [_table_of(path, [json.loads(line) for line in file])]
    try:
        local = Path(path).expanduser()
    except RuntimeError as error:  # ~nobody
        raise DataError(f"{key}.path = {path!r}: {error}") from None
    if local.is_file():
        return [_open_file(local, key)]
    if local.is_dir():
        return [_open_file(file, key) for file in files_of(local, split=split, subset=subset, key=key)]
    if local.is_absolute() or path.startswith(("./", "../", "~")) or local.suffix in ENDINGS or path.count("/") != 1:
        raise DataError(
            f"{key}.path = {path!r}: no such file or folder, and not a name on the hub, which is written owner/name"
        )
    from tppo.data.hub import open_hub

    return [open_hub(path, split=split, subset=subset, key=key)]


def files_of(folder: Path, *, split: str, subset: str, key: str) -> list[Path]:
    """The folder's data files of one subset and split, told by the words of their names and sub-folders, as in a
    snapshot of a data set from the hub: main/train-00000-of-00001.parquet. Files that name no split belong to all.
    Raises DataError."""
    found = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in ENDINGS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not found:
        raise DataError(f"{key}.path = {str(folder)!r}: holds no {', '.join(ENDINGS)} file")
    if subset:
        chosen = [file for file in found if _names_subset(file.relative_to(folder), subset)]
        if not chosen:
            shown = ", ".join(str(file.relative_to(folder)) for file in found[:8])
            raise DataError(f"{key}.subset = {subset!r}: no file of {folder} is named so; there are {shown}")
        found = chosen
    splits = {file: SPLIT_NAMES & set(_words(file.relative_to(folder))) for file in found}
    named = [file for file in found if split.lower() in _words(file.relative_to(folder))]
    chosen = named or [file for file in found if not splits[file]]
    if not chosen:
        names = ", ".join(sorted(set().union(*splits.values())))
        raise DataError(f"{key}.split = {split!r}: {folder} has no such split; there are {names}")
    return chosen


def _names_subset(file: Path, subset: str) -> bool:
    return subset in file.parts[:-1] or file.stem.lower().startswith(subset.lower())


def _words(file: Path) -> list[str]:
    return re.split(r"[^a-z0-9]+", str(file.with_suffix("")).lower())


def _open_file(path: Path, key: str) -> Table:
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(f"{key}.path = {str(path)!r}: cannot be read; known endings are {', '.join(ENDINGS)}")
    try:
        return reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None


def _table_of(where: str, rows: Sequence[dict[str, Any]]) -> Table:
    columns = dict.fromkeys(name for row in rows for name in row)
    return Table(where, tuple(columns), lambda names: ({name: row.get(name) for name in names} for row in rows))


def _json_lines(path: Path) -> Table:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: line {number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number}: not a JSON object; write one object a line")
            rows.append(row)
    return _table_of(str(path), rows)


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """Raises DataError for one that is longer than any row."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path}: line {number}: more than {LONGEST_LINE >> 20} million characters; split the file"
            )
        yield line


def _json(path: Path) -> Table:
    """A list of objects; or lines of objects, as many data sets name their files."""
    if path.stat().st_size > LARGEST_JSON_BYTES:
        raise DataError(f"{path}: more than {LARGEST_JSON_BYTES >> 20} MiB of JSON; write one object a line (.jsonl)")
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            return _json_lines(path)
        raise DataError(f"{path}: not JSON: {error}") from None
    if isinstance(rows, dict) and all(not isinstance(value, list) for value in rows.values()):
        return _table_of(str(path), [rows])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: not a list of JSON objects; write [{{...}}, {{...}}], or one object a line (.jsonl)")
    return _table_of(str(path), rows)


def _csv(path: Path) -> Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        previous = csv.field_size_limit(WIDEST_CSV_FIELD_BYTES)  # the library's 128 KiB is less than some solutions
        try:
            reader = csv.DictReader(_lines(file, path))
            columns = tuple(reader.fieldnames or ())
            rows = list(reader)
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num}: not CSV: {error}") from None
        finally:
            csv.field_size_limit(previous)
    return Table(
        str(path), columns, lambda names: ({name: row.get(name) for name in names} for row in rows)
    )  # columns also of a file without rows


def _parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = tuple(pq.read_schema(path).names)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {first_line(error)}") from None

    def rows(names: Sequence[str]) -> Iterator[dict[str, Any]]:
        try:
            file = pq.ParquetFile(path)
            groups = [file.metadata.row_group(place).total_byte_size for place in range(file.num_row_groups)]
            at_once = max(1, min(ROWS_AT_ONCE, MOST_BYTES_AT_ONCE // max(1, *groups, 1)))
            for batch in file.iter_batches(at_once, columns=list(names)):
                yield from batch.to_pylist()
        except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
            raise DataError(f"{path}: not a readable Parquet file: {first_line(error)}") from None

    return Table(str(path), columns, rows)
