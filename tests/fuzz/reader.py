"""One way in: what hostile files it is given, and what reads them."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.oracle import DEADLINE_S, judge

MEMORY = Path("/dev/shm")
"""Small files that live for a moment, where there is a disk in memory (Linux)."""
Files = st.SearchStrategy[dict[str, bytes]]


@dataclass(frozen=True)
class Reader:
    name: str
    files: Files
    """Name in the folder -> content."""
    read: Callable[[Path], Any]
    """Given the folder."""
    share: float = 1.0
    """Of the cases, relative to the others': a slow one gets fewer."""
    names: tuple[str, ...] = ()
    """What else a message may name: a flag, a section of the configuration."""
    writes: tuple[str, ...] = ()
    """Names of files that it may write in the folder."""
    deadline_s: float = DEADLINE_S
    """Of a case. One that starts processes waits for their imports."""


def run_cases(reader: Reader, cases: int, *, start: int | None = None) -> dict[str, int]:
    """Ends and how often. start: seed of the cases; None: always the same ones. A fault is raised with its example."""
    ends = {"read": 0, "refused": 0}

    @settings(
        max_examples=cases, derandomize=start is None, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(files=reader.files)
    def case(files: dict[str, bytes]) -> None:
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as top:
            folder = Path(top) / "in"
            folder.mkdir()
            ends[judge(reader.read, folder, files, reader.names, reader.writes, reader.deadline_s)] += 1
            assert {path.name for path in Path(top).iterdir()} <= {"in", "out"}, "written beside the folder"

    (seed(start)(case) if start is not None else case)()
    return ends
