"""What users upload: response lengths and a model's config.json, kept in a folder that goes when the server ends.

An upload is asked for by an id that is made of its content, never by a path; the same content is kept once.
"""

import hashlib
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from profiling.errors import DataError
from simulator.plan import Question

MOST_BYTES = {"lengths": 20 * 2**20, "model": 2**20}
MOST_LINE = 10_000
"""Characters of a line of a table: a longer one is not a table of lengths."""
MOST_KEPT = 20
PREFIX = "upload-"

Kind = Literal["lengths", "model"]


@dataclass(frozen=True)
class Upload:
    id: str
    kind: Kind
    name: str
    """As its owner calls it."""
    path: Path
    columns: tuple[str, ...] = ()
    """Of lengths."""


class Uploads:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: OrderedDict[str, Upload] = OrderedDict()

    def keep(self, kind: Kind, name: str, content: bytes) -> Upload:
        """Raises DataError naming the upload, what is wrong with it and what to do."""
        name = plain_name(name, kind)
        columns = columns_of(name, content) if kind == "lengths" else ()
        own = PREFIX + hashlib.sha256(f"{kind} {name} ".encode() + content).hexdigest()[:24]
        path = self._folder / own / name
        if own not in self._kept:
            path.parent.mkdir()
            path.write_bytes(content)
        self._kept[own] = Upload(own, kind, name, path, columns)
        self._kept.move_to_end(own)
        while len(self._kept) > MOST_KEPT:
            self.forget(next(iter(self._kept)))
        return self._kept[own]

    def forget(self, own: str) -> None:
        """The same content may have come twice, and be forgotten already."""
        upload = self._kept.pop(own, None)
        if upload is not None:
            upload.path.unlink()
            upload.path.parent.rmdir()

    def get(self, own: str, kind: Kind) -> Upload | None:
        found = self._kept.get(own)
        return found if found is not None and found.kind == kind else None

    def paths(self, kind: Kind) -> list[Path]:
        return [upload.path for upload in self._kept.values() if upload.kind == kind]

    def of(self, question: Question) -> list[Upload]:
        """That a question stands on."""
        return [
            upload for upload in self._kept.values() if str(upload.path) in (question.model, str(question.lengths))
        ]

    def with_names(self, text: str) -> str:
        """`text` with every upload's path as its name: a user has not seen our folder."""
        for upload in self._kept.values():
            text = text.replace(str(upload.path), upload.name)
        return text


def plain_name(name: str, kind: Kind) -> str:
    """Letters, digits, dots and dashes; with the suffix by which readers tell the kind."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).stem).strip("-.")[:60]
    return f"{stem or kind}{'.csv' if kind == 'lengths' else '.json'}"


def columns_of(name: str, content: bytes) -> tuple[str, ...]:
    """Of a CSV. Raises DataError for what is no table of text."""
    if not content.strip():
        raise DataError(f"{name}: is empty; upload a CSV with a line of column names and a line for each response")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise DataError(f"{name}: is not text; save it as CSV in UTF-8 (of a Parquet file, write its column as CSV)")
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if len(line) > MOST_LINE:
            raise DataError(f"{name}: line {number} has {len(line)} characters; write one response a line")
    columns = tuple(column.strip().strip('"') for column in lines[0].split(","))
    if all(_is_number(column) for column in columns):
        raise DataError(
            f"{name}: line 1 holds numbers, not column names; put a line such as 'tokens' in front of them"
        )
    if not any(line.strip() for line in lines[1:]):
        raise DataError(f"{name}: has column names but no rows; write a line for each response")
    return columns


def pasted(text: str) -> bytes:
    """Numbers between spaces, commas, semicolons or line ends as a CSV. Raises DataError naming the first that is
    none."""
    words = re.split(r"[\s,;]+", text.strip())
    if not words or words == [""]:
        raise DataError("pasted lengths: none; paste numbers of tokens, one for each response")
    for number, word in enumerate(words, start=1):
        if not _is_number(word) or not 0 < float(word) < float("inf"):
            raise DataError(f"pasted lengths: number {number}, {word[:20]!r}, is not a positive number of tokens")
    return "\n".join(["tokens", *words, ""]).encode()


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
