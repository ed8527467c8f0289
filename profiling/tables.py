"""Parquet tables of a run directory, read with no more trust than any other file."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from profiling.errors import DataError, first_line
from profiling.files import opened

MOST_ROWS = 50_000_000
"""Of a part file: a step's rows, spans or texts. A file of a kilobyte can claim more."""
MOST_BYTES = 2**30
"""Of a part file's columns in memory: one text may stand in a million rows."""
LARGEST_WHOLE = 2**53
"""Whole numbers up to here are exact as floats, which sums and JSON make of them."""


def read_table(path: Path, expected: pa.Schema) -> pa.Table:
    """The columns of `expected`, whatever others there are. Raises DataError naming the file and the column."""
    try:
        with os.fdopen(opened(path), "rb") as handle:
            texts = [field.name for field in expected if pa.types.is_string(field.type)]
            check_columns(path, pq.ParquetFile(handle).schema_arrow, expected)
            handle.seek(0)
            file = pq.ParquetFile(handle, read_dictionary=texts)
            check_size(path, file.metadata, expected)
            table = file.read(columns=expected.names)
        table.validate(full=True)
        texts_bytes = sum(text_bytes(table.column(name)) for name in texts)
        if texts_bytes > MOST_BYTES:
            raise DataError(f"{path}: has {texts_bytes} bytes of text, more than a part of a run can have")
        columns = [checked(path, field, table.column(field.name)) for field in expected]
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        reason = first_line(error)
        raise DataError(f"{path}: not a readable Parquet file: {reason}") from None
    return pa.Table.from_arrays(columns, schema=expected)


def check_columns(path: Path, found: pa.Schema, expected: pa.Schema) -> None:
    for field in expected:
        places = found.get_all_field_indices(field.name)
        if not places:
            raise DataError(f"{path}: column '{field.name}' is missing")
        if len(places) > 1:
            raise DataError(f"{path}: column '{field.name}' stands there {len(places)} times")
        kind = found.field(places[0]).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not plain.equals(field.type):
            raise DataError(f"{path}: column '{field.name}' is {plain}, not {field.type}")


def check_size(path: Path, facts: pq.FileMetaData, expected: pa.Schema) -> None:
    rows = facts.num_rows
    if not 0 <= rows <= MOST_ROWS or 8 * rows * len(expected) > MOST_BYTES:
        raise DataError(f"{path}: claims {rows} rows, more than a part of a run can have")
    claimed = sum(facts.row_group(place).total_byte_size for place in range(facts.num_row_groups))
    if claimed > MOST_BYTES:
        raise DataError(f"{path}: claims {claimed} bytes, more than a part of a run can have")


def checked(path: Path, field: pa.Field, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column in the expected type. Raises DataError."""
    if column.null_count and not field.nullable:
        raise DataError(f"{path}: column '{field.name}' has a null")
    if (
        pa.types.is_floating(field.type)
        and not pc.all(pc.is_finite(column)).as_py()
        and len(column) > column.null_count
    ):
        raise DataError(f"{path}: column '{field.name}' has a number that is not finite; unmeasured is null")
    if pa.types.is_integer(field.type) and (extremes := pc.min_max(column)).is_valid:
        for value in extremes.values():
            if value.is_valid and abs(value.as_py()) > LARGEST_WHOLE:
                raise DataError(f"{path}: column '{field.name}' has {value.as_py()}, beyond 2**53")
    return column.cast(field.type)


def text_bytes(column: pa.ChunkedArray) -> int:
    """Of a column that was read as a dictionary, were it written out."""
    lengths = [pc.take(pc.binary_length(chunk.dictionary), chunk.indices) for chunk in column.chunks]
    return sum(pc.sum(own).as_py() or 0 for own in lengths)
