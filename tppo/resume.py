"""Whether and from where a run can go on: checked before anything is changed."""

import sys
from pathlib import Path

from profiling.errors import ConfigError
from profiling.files import read_json_table
from profiling.hosts import FOLDER, folders_of_hosts
from profiling.ledger import Cluster
from profiling.reader import Run
from profiling.schema import TABLES
from profiling.settings import check_settings
from profiling.writer import refuse_a_run
from tppo.checkpoints.manifest import check_it_fits, check_plain
from tppo.checkpoints.store import Found, newest_usable
from tppo.config import RunConfig
from tppo.data.tasks import Problems
from tppo.parallel.ranks import Ranks
from tppo.run_records import cluster_of

MAY_CHANGE = ("device", "attention", "activation_checkpointing", "trust_remote_code")
"""Of [model]: how it is computed, not what."""
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
    model = read_json_table(path) if path.exists() else None
    before = check_it_can_go_on(config, source)
    if found.manifest.step > config.train.steps:
        raise ConfigError(f"train.steps = {config.train.steps}: {source} has done {found.manifest.step}; raise it")
    check_it_fits(found.path, found.manifest, algorithm=config.algorithm.name, model=model)
    if same_directory(source, config.output):
        check_the_cluster_is_the_same(before, cluster_of(config, ranks.world))
        places = [source, source / FOLDER, *folders_of_hosts(source)]
        parts = (path for place in places for name in ("", *TABLES) for path in (place / name).glob("*"))
        check_plain(parts, "a run that goes on has")  # it cuts back, deletes and writes there
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
    names = [name for name in type(config.model).model_fields if name not in MAY_CHANGE]
    kept = {f"model.{name}": (getattr(before.model, name), getattr(config.model, name)) for name in names}
    kept |= {"data": (before.data, config.data), "rollout": (before.rollout, config.rollout)}
    for name, (then, now) in kept.items():
        if then != now:
            raise ConfigError(f"{name}: a resumed run keeps the settings of {run.path / 'config.toml'}")
    if before.algorithm.name != config.algorithm.name:
        raise ConfigError(f"algorithm.name: the run was started as {before.algorithm.name}; start another run instead")
    return run


def check_the_cluster_is_the_same(before: Run, now: Cluster) -> None:
    """Raises ConfigError: a run directory's ledger counts the GPUs of one cluster."""
    if before.cluster != now:
        raise ConfigError(
            f"{before.path}: its ledger counts {_in_words(before.cluster)}, and there are {_in_words(now)} now; go on "
            f"in another directory: --resume {before.path} --output DIR"
        )


def _in_words(cluster: Cluster) -> str:
    words = f"{cluster.engines} engine{'s' if cluster.engines > 1 else ''} of {cluster.gpus_per_engine}"
    return f"{words} and {cluster.trainer_gpus} GPUs that train" if cluster.trainer_gpus else words


def check_problems_are_the_same(directory: Path, problems: Problems) -> None:
    """Raises ConfigError when a data set gives other problems than when the run was started, DataError when what they
    were cannot be read."""
    if problems.fingerprint is None:
        return
    path = directory / DATA_JSON
    before = read_json_table(path, "start another run instead").get("fingerprint")
    if before != problems.fingerprint:
        raise ConfigError(
            "data: the problems are not those that the run was started with; put the data set and [evaluation] back "
            "as they were, or start another run"
        )
