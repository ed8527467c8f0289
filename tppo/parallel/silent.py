"""The run directory as ranks other than the first see it: they write nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from profiling.writer import RunWriter


class SilentWriter(RunWriter):
    def __init__(self, path: Path) -> None:
        self.path = path

    def offsets(self) -> dict[str, int]:
        return {}

    def sync(self) -> None:
        pass

    def trace(self, *records: Mapping[str, Any]) -> None:
        pass

    def metrics(self, row: Mapping[str, Any]) -> None:
        pass

    def table(self, name: str, number: int, columns: Mapping[str, Any]) -> None:
        pass

    def write_text(self, name: str, text: str) -> None:
        pass

    def close(self, *, t: float, status: str, **extra: Any) -> None:
        pass
