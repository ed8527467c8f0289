"""What a tracker is given. Three implementations, a file each: TensorBoard, wandb, MLflow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tppo.tracking.settings import LoggingConfig


@dataclass(frozen=True)
class About:
    """The run that is tracked."""

    path: Path
    """Run directory."""
    settings: LoggingConfig
    config: dict[str, Any]
    """The whole configuration as plain data."""
    resumed_after: int | None = None
    """Step of the checkpoint that the run goes on from; None for a new run."""

    @property
    def name(self) -> str:
        return self.path.name


class Sink(Protocol):
    """Lives in a thread of its own: it may be slow, and whatever it raises ends it and nothing else."""

    def metrics(self, step: int, unix_s: float, values: Mapping[str, float]) -> None: ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """rows: with the columns of profiling.schema.SAMPLES."""
        ...

    def close(self, status: str) -> None:
        """status: finished, interrupted or failed."""
        ...
