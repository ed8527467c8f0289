"""`tppo train`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from profiling.errors import ConfigError
from profiling.settings import check_settings, parse_overrides, read_toml, with_overrides
from tppo.config import RunConfig


def run_training(
    config_path: Path | None, words: Sequence[str], *, output: Path | None, resume: Path | None, ray: str | None = None
) -> int:
    """Train as the file says, changed by `--section.key value` words. A resumed run reads its own config.toml
    unless another is named. ray: address of a cluster for the rollout engines. Returns the exit code."""
    if config_path is None and resume is None:
        raise ConfigError("no configuration: write tppo train CONFIG.toml, or --resume DIR")
    if resume is not None and output is not None:
        raise ConfigError("--output: a resumed run goes on in its own directory; leave it out")
    source = config_path or resume / "config.toml"  # type: ignore[operator]
    overrides = parse_overrides(words)
    if "algorithm" in overrides:  # --algorithm ppo is short for --algorithm.name ppo
        overrides["algorithm.name"] = overrides.pop("algorithm")
    if ray is not None:
        if "ray.address" in overrides:
            raise ConfigError("--ray, --ray.address: one says what the other does; leave one out")
        overrides["ray.address"] = ray
    values = with_overrides(read_toml(source), overrides)
    directory = resume or output
    if directory is not None:
        values["output"] = str(directory)
    config = check_settings(values, RunConfig, where=str(source))
    if not config.model.path:
        raise ConfigError(f"{source}: missing key 'model.path'; name a local directory or a hub model")

    from tppo.quiet import quieten_libraries

    quieten_libraries()
    from tppo.start import train

    outcome = train(config, resume=resume is not None)
    accuracy = f", accuracy {outcome.accuracy:.3f}" if outcome.accuracy is not None else ""
    print(f"{config.output}: {outcome.status} after {outcome.steps} steps{accuracy}")
    return 0 if outcome.signal is None else 128 + outcome.signal  # as a shell reports it: 130, 143


def print_fields() -> None:
    """Every field: its name on the command line, default and help."""
    for name, default, text in fields_of(RunConfig):
        print(f"--{name}\n    {text} [{default!r}]")


def fields_of(model: type[BaseModel], prefix: str = "") -> list[tuple[str, Any, str]]:
    rows: list[tuple[str, Any, str]] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += fields_of(field.annotation, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", field.default, " ".join((field.description or "").split())))
    return rows
