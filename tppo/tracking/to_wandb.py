"""A wandb run, offline in the run directory unless asked otherwise."""

import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from profiling.errors import ConfigError
from tppo.tracking.identity import new_id, remember, remembered
from tppo.tracking.packages import keep_random_state
from tppo.tracking.protocol import About

INIT_S = 20.0
"""How long a server may take to answer at the start. wandb's own 90 s would also hold the end of a short run."""
FINISH_S = 10.0
"""How long the end of a run waits for what is not sent yet; its files stay, and `wandb sync` sends them."""
DRAWS = ("wandb.sdk.lib.retry", "urllib3.util.retry")
"""Modules that draw random numbers: pauses before another attempt."""


class WandbSink:
    def __init__(self, about: About) -> None:
        own = remembered(about.path, "wandb") or new_id()
        remember(about.path, "wandb", own)
        self._run = begin_wandb(
            about.path, project=about.settings.wandb_project, name=about.name, mode=about.settings.wandb_mode,
            run_id=own, config=about.config,
        )  # fmt: skip

    def metrics(self, step: int, unix_s: float, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        columns: list[str | int] = list(rows[0])
        data = [[row[str(name)] for name in columns] for row in rows]
        self._run.log({"step": step, "samples": wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def close(self, status: str) -> None:
        end_wandb(self._run, exit_code=0 if status == "finished" else 1)


def begin_wandb(
    directory: Path, *, project: str, name: str, mode: str = "offline", run_id: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """A quiet wandb run in `directory`/wandb whose metrics have the axis `step`. Asks nothing, reads no Git
    repository, and leaves this machine's statistics to the profiler."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when the package is imported
    import wandb

    keep_random_state(*DRAWS)
    quiet = wandb.Settings(
        init_timeout=INIT_S,
        silent=True, console="off", disable_git=True, x_disable_stats=True, finish_timeout=FINISH_S,
    )  # fmt: skip
    run = wandb.init(
        mode="online" if mode == "online" else "offline", dir=str(directory), project=project, name=name, id=run_id,
        resume="allow" if mode == "online" else None, config=dict(config or {}), settings=quiet,
    )  # fmt: skip
    run.define_metric("*", step_metric="step", step_sync=False)
    return run


def end_wandb(run: Any, *, exit_code: int = 0) -> None:
    import wandb

    run.finish(exit_code=exit_code)
    wandb.teardown()  # its service writes the file after the run has finished; wait for it


def check_wandb_key() -> None:
    """Raises ConfigError where wandb would ask for a login."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        if netrc.netrc(os.environ.get("NETRC")).authenticators(host):
            return
    except (OSError, netrc.NetrcParseError):
        pass
    raise ConfigError(
        f'logging.wandb_mode = "online": no API key for {host}; run `wandb login` or set WANDB_API_KEY, or use '
        '"offline" and `wandb sync` later'
    )
