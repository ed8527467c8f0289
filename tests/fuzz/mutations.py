"""Valid files made hostile: trees (JSON, TOML) changed in structure, Parquet tables by column, any file by bytes.

A change is (place, what, junk): `place` picks one of the spots there are, so that a change fits any tree and
Hypothesis can shrink it.
"""

import copy
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

Change = tuple[int, str, Any]
Bytes = st.SearchStrategy[bytes]


@dataclass(frozen=True)
class Raw:
    """Text that stands in a file as it is."""

    text: str


@dataclass(frozen=True)
class Pairs:
    """A table some of whose keys may stand twice."""

    items: tuple[tuple[str, Any], ...]


DEEP = Raw("[" * 2000 + "]" * 2000)
DIGITS = Raw("1" * 10_000)
TEXTS = (
    "", "0", "nan", "x" * 10_000, "\0", "a\0b", "\ud800", "\x1b[31mred\x1b[0m", "two\nlines\r\nand\u2028more",
    "é\u0301", "'\"\\", "{problem}", "%s%n", "$(touch canary)", "__import__('os').system('touch canary')",
)  # fmt: skip
PATHS = (
    "..", "../..", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/full", "/proc/self/environ", ".", "/",
    "~", "C:\\", "a" * 300, "a/" * 3000, "step-000001/../../x",
)  # fmt: skip
NUMBERS = (
    0, -0.0, 1, -1, 0.5, 2, 7, 255, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400, 1e-320,
    1e18, 1e300, -1e300, float("nan"), float("inf"), float("-inf"), Raw("1e999"), Raw("-1e999"), DIGITS, Raw("0x10"),
)  # fmt: skip
JUNK: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from((None, True, False, [], {}, [[]], [None], {"": {}}, [1, "a", None], {"kind": "affine"}, DEEP)),
    st.sampled_from(TEXTS + PATHS),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)
KEYS = st.sampled_from(("", "kind", "type", "step", "x" * 5000, "a.b", "\x1b[2J", "new\nline", "\ud800", "__class__"))
STRUCTURES = ("replace", "replace", "replace", "delete", "rename", "extra", "twice", "wrap", "exchange", "deepen")
CHANGES: st.SearchStrategy[list[Change]] = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from(STRUCTURES), JUNK), min_size=1, max_size=4
)
BYTE_CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(("flip", "cut", "drop", "insert", "insert", "repeat", "zero")),
        st.sampled_from(
            (b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3\x28", b"\xed\xa0\x80", b"\n", b"\r", b"\r\n", b'"',
             b"[" * 2000, b"{", b"}", b",", b"=", b"#", b"9" * 5000, b"-", b"NaN", b"\x1a", b"\x80\x04\x95",
             b"PK\x03\x04", b"PAR1")
        )
        | st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip
WHOLE = ("same", "same", "same", "utf-16", "bom", "crlf", "empty", "one zero", "no last line end")


def spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside a list or a table."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from spots(tree[key])


def changed(tree: Any, changes: Sequence[Change], key: str = "new") -> Any:
    box = [copy.deepcopy(tree)]
    for place, what, shared in changes:
        found, junk = list(spots(box)), copy.deepcopy(shared)
        container, at = found[place % len(found)]
        value = container[at]
        table = isinstance(container, dict)
        if what == "replace":
            container[at] = junk
        elif what == "delete":
            del container[at]
            box = box or [junk]
        elif what == "rename" and table:
            container[key] = container.pop(at)
        elif what == "extra" and isinstance(value, dict):
            value[key] = junk
        elif what == "twice" and isinstance(value, dict):
            first = next(iter(value), key)
            container[at] = Pairs((*value.items(), (first, junk)))
        elif what == "wrap":
            container[at] = [value]
        elif what == "exchange":
            other, there = found[(place * 7 + 3) % len(found)]
            container[at] = copy.deepcopy(other[there])
        elif what == "deepen":
            container[at] = DEEP if place % 2 else Raw('{"a":' * 2000 + "1" + "}" * 2000)
    return box[0] if box else None


def json_text(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, (dict, Pairs)):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {json_text(own)}" for key, own in pairs_of(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(json_text, value)) + "]"
    return json.dumps(value)


def pairs_of(value: Any) -> Any:
    return value.items if isinstance(value, Pairs) else value.items()


def toml_text(value: Any) -> str:
    """A document: every key of the first level on its own line, what is inside as inline tables."""
    if not isinstance(value, (dict, Pairs)):
        return inline(value)
    return "".join(f"{json.dumps(str(key))} = {inline(own)}\n" for key, own in pairs_of(value))


def inline(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, (dict, Pairs)):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {inline(own)}" for key, own in pairs_of(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, float):
        return repr(value)  # nan and inf are TOML
    return json.dumps(value)


def lines_text(records: Any) -> str:
    return "".join(json_text(record) + "\n" for record in records) if isinstance(records, list) else json_text(records)


def bytes_changed(content: bytes, changes: Sequence[tuple[float, str, bytes]], whole: str = "same") -> bytes:
    for place, what, junk in changes:
        at = int(place * len(content))
        end = min(len(content), at + 1 + int(place * 997) % 64)
        if what == "flip" and content:
            at = min(at, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ (1 << junk[0] % 8)]) + content[at + 1 :]
        elif what == "cut":
            content = content[:at]
        elif what == "drop":
            content = content[:at] + content[end:]
        elif what == "insert":
            content = content[:at] + junk + content[at:]
        elif what == "repeat":
            content = content[:end] + content[at:]
        elif what == "zero":
            content = content[:at] + bytes(end - at) + content[end:]
    if whole == "utf-16":
        return content.decode("utf-8", "replace").encode("utf-16")
    changes_of_all = {"bom": b"\xef\xbb\xbf" + content, "empty": b"", "one zero": b"\0", "same": content,
                      "crlf": content.replace(b"\n", b"\r\n"), "no last line end": content.rstrip(b"\n")}  # fmt: skip
    return changes_of_all[whole]


def hostile_text(tree: Any, write: Callable[[Any], str]) -> Bytes:
    """A file that holds `tree`: changed in structure, in its bytes, in both, or nothing of it left."""

    def structured(changes: list[Change], key: str) -> bytes:
        return write(changed(tree, changes, key)).encode("utf-8", "surrogatepass")

    structure = st.builds(structured, CHANGES, KEYS)
    whole = st.sampled_from(WHOLE)
    return st.one_of(
        structure,
        structure,
        structure,
        st.builds(bytes_changed, structure, BYTE_CHANGES, whole),
        st.builds(bytes_changed, st.just(write(tree).encode()), BYTE_CHANGES, whole),
        st.binary(max_size=200),
    )


CELLS = (None, 0, -1, 1, 2**31, 2**62, 2**63 - 1, -(2**63), float("nan"), float("inf"), 1e300, -1e300, 1e-320, True,
         "", "decode", "\0", "x" * 3000, "\x1b[31m")  # fmt: skip
COLUMN_CHANGES = st.lists(
    st.tuples(
        st.integers(0, 1000),
        st.sampled_from(
            ("cell", "cell", "cell", "column", "drop", "rename", "cast", "twice", "none", "empty", "rows")
        ),
        st.sampled_from(CELLS) | st.integers(-(2**63), 2**63 - 1) | st.floats(),
    ),
    min_size=1,
    max_size=3,
)
TYPES = (pa.string(), pa.float32(), pa.int8(), pa.bool_(), pa.binary(), pa.list_(pa.int64()), pa.int32(),
         pa.float64(), pa.dictionary(pa.int32(), pa.string()), pa.large_string(), pa.timestamp("us"), pa.null(),
         pa.int64())  # fmt: skip


def table_changed(content: bytes, changes: Sequence[Change]) -> bytes:
    """A Parquet file's columns with other cells, types, names, or none."""
    table = pq.read_table(io.BytesIO(content))
    for place, what, junk in changes:
        if not table.num_columns:
            break
        at = place % table.num_columns
        field, column = table.field(at), table.column(at)
        if what in ("cell", "column", "none"):
            values = values_of(column)
            junk = None if what == "none" else junk
            values = [junk if what != "cell" or row == place % len(values) else own for row, own in enumerate(values)]
            column = as_column(values, field.type)
            table = table.set_column(at, pa.field(field.name, column.type), column)
        elif what == "cast":
            column = as_column(values_of(column), TYPES[place % len(TYPES)])
            table = table.set_column(at, pa.field(field.name, column.type), column)
        elif what == "drop":
            table = table.remove_column(at)
        elif what == "rename":
            table = table.set_column(at, pa.field(str(junk), column.type), column)
        elif what == "twice":
            table = table.append_column(field, column)
        elif what == "empty":
            table = table.slice(0, 0)
        elif what == "rows":
            table = pa.concat_tables([table] * (2 + place % 40))
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink)
    except pa.ArrowException:  # a type that Parquet does not know
        return content[: len(content) // 2]
    return sink.getvalue()


def values_of(column: pa.ChunkedArray) -> list[Any]:
    """A timestamp as its number: Python's dates end in the year 9999."""
    return (column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column).to_pylist()


def as_column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    for own in (kind, None, pa.string()):
        try:
            return pa.array([str(value) for value in values] if own == pa.string() else values, type=own)
        except (pa.ArrowException, OverflowError, TypeError, ValueError, UnicodeEncodeError):
            continue
    return pa.nulls(len(values))


def hostile_table(content: bytes) -> Bytes:
    by_column = st.builds(table_changed, st.just(content), COLUMN_CHANGES)
    return st.one_of(
        by_column,
        by_column,
        by_column,
        st.builds(bytes_changed, st.just(content), BYTE_CHANGES),
        st.builds(bytes_changed, by_column, BYTE_CHANGES),
        st.binary(max_size=100),
    )


def one_or_two(files: Mapping[str, bytes], hostile: Mapping[str, Bytes]) -> st.SearchStrategy[dict[str, bytes]]:
    """All of `files`, with one or two of those that `hostile` knows made so, or missing."""

    def with_new(new: dict[str, bytes], missing: str | None) -> dict[str, bytes]:
        return {name: content for name, content in {**files, **new}.items() if name != missing}

    some = st.lists(st.sampled_from(sorted(hostile)), min_size=1, max_size=2, unique=True)
    gone = st.sampled_from((None,) * 12 + tuple(sorted(hostile)))
    return some.flatmap(lambda names: st.builds(with_new, st.fixed_dictionaries({n: hostile[n] for n in names}), gone))
