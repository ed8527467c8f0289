"""What an evaluation is pointed at: a run directory, one of its checkpoints, or a model. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from profiling.errors import ConfigError, DataError
from profiling.settings import read_toml
from tppo.checkpoints.store import chosen_checkpoint

KEPT: dict[str, tuple[str, ...] | None] = {
    "model": None,
    "data": None,
    "vllm": None,
    "evaluation": None,
    "reward": None,
    "rollout": (
        "prompts_per_step",
        "samples_per_prompt",
        "max_response_tokens",
        "temperature",
        "top_p",
        "top_k",
        "stop_token_ids",
        "engine",
        "dtype",
        "max_rows_per_engine",
    ),
    "train": ("threads", "mini_batches"),
}
"""Of a run's configuration, what matters to an evaluation; None: the whole section. The rest only says how it trains,
and may not fit another engine."""


@dataclass(frozen=True)
class Source:
    model_path: str
    """Local directory or hub name of the policy with its tokenizer."""
    step: int | None = None
    """Of the checkpoint; None: a model outside of any run."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Tables of the run's config.toml; empty without a run."""


def find_source(where: str, checkpoint: str | None = None) -> Source:
    """`checkpoint`: last, best or step-N of a run directory, the newest if left out. Raises ConfigError or DataError
    when `where` is nothing that can be evaluated."""
    path = Path(where)
    if any((path / name).exists() for name in ("config.toml", "trace.jsonl", "checkpoints")):
        return _from_checkpoint(chosen_checkpoint(path, checkpoint)[0], path)
    if checkpoint is not None:
        raise ConfigError(f"--checkpoint {checkpoint}: {where} is no run directory; leave it out")
    if (path / "progress.json").is_file():
        return _from_checkpoint(chosen_checkpoint(path, None)[0], path.resolve().parent.parent)
    if (path / "config.json").is_file():
        return Source(where)
    if path.exists():
        raise DataError(
            f"{where}: no run directory (config.toml, checkpoints/), no checkpoint (progress.json) and no model "
            "(config.json)"
        )
    if path.is_absolute() or where.startswith((".", "~")) or where.count("/") > 1:
        raise DataError(f"{where}: no such directory")
    return Source(where)  # a name on the hub


def _from_checkpoint(folder: Path, run: Path) -> Source:
    step = folder.name.removeprefix("step-")
    settings = kept_settings(read_toml(run / "config.toml", regular=True)) if (run / "config.toml").is_file() else {}
    return Source(str(folder / "policy"), int(step) if step.isdigit() else None, settings)


def kept_settings(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's configuration that KEPT names."""
    kept = {}
    for section, names in KEPT.items():
        table = tables.get(section, {})
        if names is not None and isinstance(table, Mapping):
            table = {name: value for name, value in table.items() if name in names}
        kept[section] = table
    return kept
