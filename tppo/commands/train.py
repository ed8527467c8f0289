"""`tppo train`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from profiling.errors import ConfigError
from profiling.settings import check_settings, parse_overrides, read_toml, with_overrides
from tppo.checkpoints.manifest import MANIFEST
from tppo.config import RunConfig
from tppo.consent import check_code_is_asked_for


def run_training(
    config_path: Path | None, words: Sequence[str], *, output: Path | None, resume: Path | None, ray: str | None = None
) -> int:
    """Train as the file says, changed by `--section.key value` words. A resumed run reads its own config.toml
    unless another is named; with an output it goes on there, and stays as it is. ray: address of a cluster for the
    rollout engines. Returns the exit code."""
    config = read_config(config_path, words, output=output, resume=resume, ray=ray)

    from tppo.cluster.launch import launches_ranks, run_on_cluster

    if launches_ranks(config):
        flags = {"--output": output, "--resume": resume, "--ray": ray}
        own = [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
        return run_on_cluster(config, ["train", *([str(config_path)] if config_path else []), *own, *words])

    from tppo.quiet import quieten_libraries

    quieten_libraries()
    from tppo.start import train

    outcome = train(with_peak(config), resume=resume or False)
    code = 0 if outcome.signal is None else 128 + outcome.signal  # as a shell reports it: 130, 143
    if outcome.rank == 0:
        accuracy = f", accuracy {outcome.accuracy:.3f}" if outcome.accuracy is not None else ""
        print(f"{config.output}: {outcome.status} after {outcome.steps} steps{accuracy}")
    return code


def read_config(
    config_path: Path | None, words: Sequence[str], *, output: Path | None, resume: Path | None, ray: str | None = None
) -> RunConfig:
    """Raises ConfigError."""
    if config_path is None and resume is None:
        raise ConfigError("no configuration: write tppo train CONFIG.toml, or --resume DIR")
    for flag, given in (("--output", output), ("--resume", resume)):
        if given is not None and str(given) == ".":  # what an empty word becomes
            raise ConfigError(f"{flag}: names the current directory; give the run a directory of its own")
    if resume is not None and (resume / MANIFEST).exists():
        raise ConfigError(f"--resume {resume}: a checkpoint; name its run directory, {resume.resolve().parent.parent}")
    source = config_path or resume / "config.toml"  # type: ignore[operator]
    overrides = parse_overrides(words)
    if "algorithm" in overrides:  # --algorithm ppo is short for --algorithm.name ppo
        overrides["algorithm.name"] = overrides.pop("algorithm")
    if ray is not None:
        if "ray.address" in overrides:
            raise ConfigError("--ray, --ray.address: one says what the other does; leave one out")
        overrides["ray.address"] = ray
    tables = read_toml(source, regular=config_path is None)
    if config_path is None:
        check_code_is_asked_for(tables, overrides, where=str(source))
    values = with_overrides(tables, overrides)
    directory = output or resume
    if directory is not None:
        values["output"] = str(directory)
    config = check_settings(values, RunConfig, where=str(source))
    if not config.model.path:
        raise ConfigError(f"{source}: missing key 'model.path'; name a local directory or a hub model")
    return config


def check_training(
    config_path: Path | None, words: Sequence[str], *, output: Path | None, resume: Path | None, ray: str | None,
    gpu: str | None, gpus: int | None,
) -> None:  # fmt: skip
    """Whether it fits its GPUs (None: as many as it asks a cluster for, else one). Only its config.json is read,
    and nothing is written. Raises ConfigError."""
    config = read_config(config_path, words, output=output, resume=resume, ray=ray)

    from tppo.quiet import quieten_libraries

    quieten_libraries()
    from tppo.commands.check import run_check

    if gpus is None:
        apart = config.ray.engines * config.gpus_per_engine if config.ray.layout == "separate" else 0
        gpus = config.ray.ranks + (apart if config.ray.address else 0)
    run_check(config, gpu=gpu, gpus=gpus, where=str(config_path or resume))


def with_peak(config: RunConfig) -> RunConfig:
    """With the data sheet's peak of the GPU that it trains on, where that is known and no other is set."""
    import torch

    from simulator.hardware import gpu_reported_as

    if config.profile.peak_flops is not None or config.model.device == "cpu" or not torch.cuda.is_available():
        return config
    gpu = gpu_reported_as(torch.cuda.get_device_name())
    profile = config.profile.model_copy(update={"peak_flops": gpu.bf16_flops if gpu else None})
    return config.model_copy(update={"profile": profile})


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
