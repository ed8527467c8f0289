"""Files that somebody else wrote: read whole up to a size, and JSON that every later step can rely on.

What is refused: what is no regular file (a pipe never ends, nor does /dev/zero), what is larger than such a file can
be, and JSON whose nesting, numbers or text no table can hold.
"""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from profiling.errors import DataError

LARGEST_BYTES = 64 * 2**20
"""Of a file that is read whole: a manifest, a summary, a calibration."""
LONGEST_LINE_BYTES = 64 * 2**20
"""Of an append-only file: the plan of a step of 100,000 rows has 20 MB."""
LARGEST_NUMBER = 2**63
SUSPICIOUS = re.compile(rb"\d{16}|\d[eE]|NaN|Infinity|\\u[dD]")
"""In JSON that may hold a number or a text that is refused; the rest needs no second look."""


def check_regular(descriptor: int) -> None:
    """Raises OSError for a pipe, a device or a folder."""
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file")


def opened(path: Path | str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file; of a pipe nobody waits for its other end. Raises OSError, or ValueError for a
    name with a NUL."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_whole(path: Path, most_bytes: int = LARGEST_BYTES) -> bytes:
    """The content of a regular file. Raises OSError, also when there is more than `most_bytes`; ValueError for a name
    with a NUL."""
    with os.fdopen(opened(path), "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"larger than {most_bytes >> 20} MiB: not such a file")
    return content


def read_json(path: Path, most_bytes: int = LARGEST_BYTES) -> Any:
    """Raises OSError and ValueError."""
    return parse_json(read_whole(path, most_bytes))


def read_json_table(path: Path, remedy: str = "") -> dict[str, Any]:
    """A JSON object, by name. Raises DataError naming the file, the fault and the remedy."""
    hint = f"; {remedy}" if remedy else ""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}{hint}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: not a JSON object{hint}")
    return values


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of an append-only file, without their ends; a torn last line is left out. Raises OSError."""
    with os.fdopen(opened(path), "rb") as file:
        while line := file.readline(LONGEST_LINE_BYTES + 1):
            if len(line) > LONGEST_LINE_BYTES:
                raise OSError(errno.EFBIG, f"has a line of more than {LONGEST_LINE_BYTES >> 20} MiB")
            if line.endswith(b"\n"):
                yield line[:-1]


def parse_json(content: bytes) -> Any:
    """JSON as the standard has it: no NaN, no infinity (1e999 is one), no half of a surrogate pair, whole numbers of
    at most 64 bits, nesting that Python can follow. Raises ValueError."""
    try:
        if not SUSPICIOUS.search(content):
            return json.loads(content)
        value = json.loads(content, parse_constant=_no_number, parse_float=_finite, parse_int=_whole)
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON; unmeasured is null")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _whole(text: str) -> int:
    if len(text) > 20 or not -LARGEST_NUMBER <= int(text) < LARGEST_NUMBER:
        raise ValueError(f"{text[:40]} has more than 64 bits")
    return int(text)
