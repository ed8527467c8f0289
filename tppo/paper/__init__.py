"""The set of figures in the manner of the T-PPO paper (arXiv 2506.15050): what is simulated for it, and what each
figure is drawn from.

A simulation knows how long a step takes, not what it teaches. So the score against wall-clock comes from measured runs
(the demo's) as they are. Multiplying the demo's score per step by simulated seconds per step would draw a curve that
nobody has seen, of a small model's learning at a large model's speed: it is left out, on purpose.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from profiling.errors import ConfigError
from profiling.settings import Settings, load_settings
from simulator.experiment import Experiment, load_experiment

SETTINGS = Path(__file__).with_name("figures.toml")
PAIR = ("synchronous", "truncated")
"""The experiment and its twin, by the names of their run directories."""
OF_THE_PAIR = ("response_length", "roofline", "idle_ledger", "engine_timeline", "batch_occupancy")
OF_ALL = ("speedup",)
OF_THE_DEMO = ("accuracy_time", "response_length", "roofline", "idle_ledger", "engine_timeline")
SIMULATED, DEMO = "simulated", "demo"


class Published(Settings):
    """A number from the literature, drawn for reference."""

    figure: str
    label: str
    value: PositiveFloat
    source: str


class PaperSettings(Settings):
    experiment: Path
    """TOML file of `tppo simulate` with a truncated schedule, relative to this file."""
    rated_steps: PositiveInt = 2
    """Steps after the start-up of each schedule, which rates leave out."""
    windows: tuple[PositiveInt, ...] = ()
    """schedule.window, besides the experiment's."""
    engines: tuple[PositiveInt, ...] = ()
    """cluster.engines, besides the experiment's."""
    sigmas: tuple[PositiveFloat, ...] = ()
    """workload.response_tokens.sigma, besides the experiment's."""
    assumed: str = ""
    """Said under every simulated figure."""
    published: tuple[Published, ...] = ()
    not_shown: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Figure -> simulated or demo -> what it does not show."""


def load_paper(path: Path = SETTINGS) -> PaperSettings:
    """Raises ConfigError naming the file and the field."""
    settings = load_settings(path, PaperSettings)
    return settings.model_copy(update={"experiment": path.parent / settings.experiment})


def experiments_of(settings: PaperSettings) -> dict[str, Experiment]:
    """Name of a run directory -> what is simulated there: the pair, and for each other window, number of engines and
    tail weight a pair of its own (windows share the synchronous one). Raises ConfigError."""
    base = load_experiment(settings.experiment)
    window = getattr(base.schedule, "window", None)
    if base.schedule.kind != "truncated" or window is None:
        raise ConfigError(
            f"{settings.experiment}: schedule.kind = '{base.schedule.kind}': the set compares a truncated schedule "
            "with a synchronous one; set it to 'truncated'"
        )
    if settings.sigmas and getattr(base.workload.response_tokens, "sigma", None) is None:
        raise ConfigError(
            f"{settings.experiment}: workload.response_tokens has no sigma; take lognormal lengths, or no `sigmas`"
        )
    values = base.model_dump(mode="json", exclude_none=True)
    synchronous, truncated = {"kind": "synchronous"}, values["schedule"]
    steps = base.startup_steps + settings.rated_steps
    both = {"synchronous": synchronous, "truncated": truncated}
    # The pair is drawn step by step, so that both take as many steps; of the others only rates count.
    found = {name: load_experiment(values, {"schedule": both[name], "workload.steps": steps}) for name in PAIR}
    rated = {"workload.steps": settings.rated_steps}
    for own in settings.windows:
        found[f"window-{own}"] = _rated(values, {"schedule": truncated | {"window": own}}, settings.rated_steps)
    varied: list[tuple[str, dict[str, Any]]]
    varied = [(f"engines-{own}", {"cluster.engines": own}) for own in settings.engines]
    varied += [(f"sigma-{own:g}", {"workload.response_tokens.sigma": own}) for own in settings.sigmas]
    for name, changes in varied:
        found[f"{name}-synchronous"] = load_experiment(values, {**changes, **rated, "schedule": synchronous})
        found[f"{name}-truncated"] = _rated(values, changes, settings.rated_steps)
    return found


def _rated(values: Mapping[str, Any], changes: Mapping[str, Any], rated_steps: int) -> Experiment:
    """With as many steps after the start-up."""
    own = load_experiment(values, changes)
    return load_experiment(values, {**changes, "workload.steps": own.startup_steps + rated_steps})
