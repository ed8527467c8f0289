"""Whether and from where a run can go on: checked before anything is changed."""

import json
import sys
from pathlib import Path

from profiling.errors import ConfigError, DataError
from profiling.reader import Run
from profiling.settings import check_settings
from profiling.writer import refuse_a_run
from tppo.checkpoints.manifest import check_it_fits
from tppo.checkpoints.store import Found, newest_usable
from tppo.config import RunConfig
from tppo.data.tasks import Problems
from tppo.parallel.ranks import Ranks

DATA_JSON = "data.json"
"""In the run directory: tells a data set's problems from others."""


def checkpoint_of(config: RunConfig, source: Path | None, ranks: Ranks) -> Found | None:
    """The newest usable checkpoint of the run in `source`, after checking that this one can go on from it, or None for
    a new run. Those that are passed over are named on standard error. Raises DataError or ConfigError, before anything
    is changed."""
    assert config.output is not None
    if source is None or not same_directory(source, config.output):
        refuse_a_run(config.output)
    if source is None:
        return None
    found = newest_usable(source, to_resume=True)
    path = source / "model.json"
    try:
        model = json.loads(path.read_bytes())
    except FileNotFoundError:
        model = None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    before = check_it_can_go_on(config, source)
    check_it_fits(found.path, found.manifest, algorithm=config.algorithm.name, model=model)
    if same_directory(source, config.output) and before.header.get("ranks", 1) != ranks.world:
        raise ConfigError(
            f"{source}: was written by {before.header.get('ranks', 1)} ranks, whose GPUs its ledger counts, and there "
            f"are {ranks.world} now; go on in another directory: --resume {source} --output DIR"
        )
    for reason in found.passed_over.values():
        print(f"tppo: {reason}; going on from {found.path.name}", file=sys.stderr)
    return found


def same_directory(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def check_it_can_go_on(config: RunConfig, source: Path) -> Run:
    """Before anything is changed: what the run in `source` has written can be read, and what defines its rows is as it
    was. Raises DataError or ConfigError."""
    run = Run(source)
    _ = run.trace, run.rollouts, run.engine
    before = check_settings(run.config, RunConfig, where=str(run.path / "config.toml"))
    kept = {"model.path": (before.model.path, config.model.path), "data": (before.data, config.data),
            "rollout": (before.rollout, config.rollout)}  # fmt: skip
    for name, (then, now) in kept.items():
        if then != now:
            raise ConfigError(f"{name}: a resumed run keeps the settings of {run.path / 'config.toml'}")
    if before.algorithm.name != config.algorithm.name:
        raise ConfigError(f"algorithm.name: the run was started as {before.algorithm.name}; start another run instead")
    return run


def check_problems_are_the_same(directory: Path, problems: Problems) -> None:
    """Raises ConfigError when a data set gives other problems than when the run was started."""
    if problems.fingerprint is None:
        return
    path = directory / DATA_JSON
    try:
        before = json.loads(path.read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; start another run instead") from None
    if before != problems.fingerprint:
        raise ConfigError(
            "data: the problems are not those that the run was started with; put the data set and [evaluation] back "
            "as they were, or start another run"
        )
