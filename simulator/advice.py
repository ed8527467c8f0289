"""What another window would have cost a run: its own rows, replayed under its own schedule and under others.

A measured run's costs are fitted to the run itself (simulator.calibrate), a simulated run has its own. The figure is
seconds per finished response once the mix of fresh and carried rows is steady. What the best of the windows saves gets
a 95 % interval from replays of resampled prompts with resampled costs: t x their standard deviation.

Bounded in time whatever the size of the run: so many rows of its steps, evenly spread, and so many replays.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from profiling.advice import Advice, Option, Tail, trace_bytes_of
from profiling.errors import DataError, InputError
from profiling.reader import Run
from simulator.calibrate import calibrate, resampled_costs, whole_responses_train
from simulator.cluster import TrainingRun
from simulator.experiment import Experiment, load_experiment
from simulator.run import no_garbage_collection
from simulator.workload import whole_rows

LEAST_STEPS = 5
"""Of a run, after start-up: fewer say nothing about how lengths differ from step to step."""
ROWS, STEPS = 3000, (6, 64)
"""What a replay plays: about so many rows, but at least and at most so many steps."""
REPLAYED_ROWS = 250_000
"""Of all replays for the interval together; sets their number, within RESAMPLES."""
RESAMPLES = (6, 10)
CALIBRATED_SPANS = 20_000
"""About as many engine spans are fitted to."""
DIVISORS = (1.5, 2, 3, 4, 6, 8)
"""Windows that are tried: the longest response over these."""
TAIL_ROWS = 0.03
"""The slowest share of a step's rows, at least one of them."""
WORST_REPLAY = 0.25
"""Relative error of the run's own replay from which the costs are not believed."""
SCHEDULES = ("synchronous", "truncated")
NOT_REPLAYED = ("evaluation_every", "checkpoint_every", "mtbf_hours", "restart_s")
"""Costs that no rate per response counts."""


class Withheld(Exception):
    """There is no advice; the message is the reason."""


def advise(run: Run) -> Advice:
    """Raises DataError when the run directory is damaged; a run that lacks what advice needs has `withheld` say so."""
    size = trace_bytes_of(run.path)
    try:
        return _advise(run, size)
    except Withheld as reason:
        return Advice(schema=1, trace_bytes=size, withheld=str(reason))


def _advise(run: Run, trace_bytes: int) -> Advice:
    replay = Replay(run)
    with TemporaryDirectory() as folder:
        own_s = replay.seconds(replay.schedule, replay.sample, Path(folder))
        error = replay.error(own_s)
        if error is not None and abs(error) > WORST_REPLAY:
            raise Withheld(f"a replay of the run itself misses its time per finished response by {error:+.0%}")
        found = [(each, replay.seconds(each, replay.sample, Path(folder))) for each in replay.others()]
        if not found:
            raise Withheld("its responses are too short for a window to cut")
        best = min(found, key=lambda pair: pair[1])[0]
        savings = list(replay.resampled_savings(best, Path(folder)))
    margin = float(student.ppf(0.975, len(savings) - 1) * np.std(savings, ddof=1))
    return Advice(
        schema=1, trace_bytes=trace_bytes, basis=replay.basis, rows=len(replay.sample), steps=replay.steps,
        resamples=len(savings), replay_error=error, tail=tail_of(run),
        own=_option(replay.schedule, own_s, own_s),
        others=tuple(_option(each, s, own_s, margin if each == best else None) for each, s in found),
    )  # fmt: skip


def _option(schedule: dict[str, Any], seconds: float, own_s: float, margin: float | None = None) -> Option:
    saving = 1 - seconds / own_s
    return Option(kind=schedule["kind"], window=schedule.get("window"), seconds_per_finished_row=seconds,
                  saving=saving, margin=margin)  # fmt: skip


def tail_of(run: Run) -> Tail | None:
    """Share of the rollouts' time after all but the slowest TAIL_ROWS of a step's rows have ended."""
    rows = run.rollouts[run.rollouts.step >= 1]
    waited_s = whole_s = 0.0
    shares = []
    for _, step in rows.groupby("step"):
        ends = np.sort(step.t_end.to_numpy())
        slowest = math.ceil(TAIL_ROWS * len(ends))
        if slowest < len(ends):
            waited_s += float(ends[-1] - ends[-1 - slowest])
            whole_s += float(ends[-1] - step.t_start.min())
            shares.append(slowest / len(ends))
    return Tail(time_share=min(waited_s / whole_s, 1.0), row_share=float(np.mean(shares))) if whole_s > 0 else None


@dataclass(frozen=True)
class Replay:
    """How a run is played again. Raises Withheld where it cannot be."""

    run: Run

    def __post_init__(self) -> None:
        run = self.run
        if run.trailer is None or run.summary is None:
            raise Withheld("the run has not ended")
        if self.schedule.get("kind") not in SCHEDULES:
            raise Withheld(f"schedule '{self.schedule.get('kind')}' is neither synchronous nor truncated")
        rows = run.rollouts[run.rollouts.step >= 1]
        if self.schedule["kind"] == "truncated" and whole_responses_train(run):
            raise Withheld("its responses train when they are whole, and a replay trains every step's tokens")
        if rows.empty or run.engine.empty:
            raise Withheld("the run has no rollout records")
        steps = int(rows.step.nunique()) - int(run.summary.get("startup_steps") or 0)
        if steps < LEAST_STEPS:
            count = f"{max(steps, 0)} step{'' if steps == 1 else 's'}"
            raise Withheld(f"{count} after start-up are too few; {LEAST_STEPS} are needed")
        if not run.summary.get("seconds_per_finished_row"):
            raise Withheld("no response finished after start-up")
        if not run.simulated and int(rows.preempted.sum()):
            raise Withheld("its engines preempted rows, and the run does not record how many KV blocks they have")
        sizes = rows.groupby("step").size()
        if sizes.quantile(0.1) < sizes.quantile(0.9):
            raise Withheld(f"its steps have between {sizes.min():,} and {sizes.max():,} rows, not one number of them")

    @cached_property
    def schedule(self) -> dict[str, Any]:
        return dict(self.run.header["schedule"] or {})

    @cached_property
    def rows_per_step(self) -> int:
        rows = self.run.rollouts
        return int(rows[rows.step >= 1].groupby("step").size().median())

    @cached_property
    def sample(self) -> pd.DataFrame:
        """Rows by id, of whole steps' worth of ids, evenly spread over the run."""
        rows = whole_rows(self.run.rollouts).reset_index(drop=True)
        blocks = max(1, len(rows) // self.rows_per_step)
        wanted = min(blocks, max(STEPS[0], min(STEPS[1], ROWS // self.rows_per_step)))
        chosen = np.unique(np.linspace(0, blocks - 1, wanted).astype(int))
        block = np.arange(len(rows)) // self.rows_per_step
        return rows[np.isin(block, chosen)].reset_index(drop=True)

    @property
    def steps(self) -> int:
        return max(STEPS[0], len(self.sample) // self.rows_per_step)

    @cached_property
    def most_tokens(self) -> int:
        """No response is longer."""
        section = "workload" if self.run.simulated else "rollout"
        try:
            return int(self.run.config[section]["max_response_tokens"])
        except (KeyError, TypeError, ValueError):
            raise Withheld(f"config.toml has no {section}.max_response_tokens") from None

    @property
    def basis(self) -> str:
        return "the costs of its own experiment" if self.run.simulated else "costs fitted to the run itself"

    @cached_property
    def fitted(self) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Costs of a measured run, and what they might as well have been."""
        steps = np.sort(self.run.engine.step[self.run.engine.step >= 1].unique())
        spans = len(self.run.engine) / len(steps)
        kept = steps[:: max(1, math.ceil(len(steps) * spans / CALIBRATED_SPANS))]
        some = SomeSteps(self.run, kept if len(kept) >= LEAST_STEPS else steps)
        try:
            calibration = calibrate([some])
        except DataError as error:
            raise Withheld(str(error)) from None
        return calibration.costs, resampled_costs(some, calibration, self.resamples)

    @property
    def resamples(self) -> int:
        """Each plays both schedules."""
        return max(RESAMPLES[0], min(RESAMPLES[1], REPLAYED_ROWS // (2 * len(self.sample))))

    def others(self) -> list[dict[str, Any]]:
        """The schedules beside its own: shorter windows, no window."""
        longest = int(self.sample.length.max())
        windows = {_round(longest / divisor) for divisor in DIVISORS} - {self.schedule.get("window")}
        found: list[dict[str, Any]] = [
            {"kind": "truncated", "window": window} for window in sorted(windows) if 1 <= window < longest
        ]
        return [*found, {"kind": "synchronous"}] if self.schedule["kind"] == "truncated" else found

    def error(self, own_s: float) -> float | None:
        if self.run.simulated:
            return None
        assert self.run.summary is not None
        return own_s / float(self.run.summary["seconds_per_finished_row"]) - 1

    def resampled_savings(self, other: dict[str, Any], folder: Path) -> Iterator[float]:
        """With prompts drawn with replacement, each with all its responses; and with costs drawn likewise."""
        rng = np.random.default_rng(0)
        places = list(self.sample.groupby("group", sort=False).indices.values())
        for draw in range(self.resamples):
            drawn = rng.integers(0, len(places), len(places))
            rows = self.sample.iloc[np.concatenate([places[place] for place in drawn])]
            costs = None if self.run.simulated else self.fitted[1][draw]
            own_s = self.seconds(self.schedule, rows, folder, costs)
            yield 1 - self.seconds(other, rows, folder, costs) / own_s

    def seconds(
        self, schedule: dict[str, Any], rows: pd.DataFrame, folder: Path, costs: dict[str, float] | None = None
    ) -> float:
        """Per finished response, after start-up, which is played without a clock."""
        lengths = folder / "lengths.parquet"
        prompts = rows.prompt_tokens.clip(lower=1)
        pd.DataFrame({"response": rows.length.to_numpy(), "prompt": prompts.to_numpy()}).to_parquet(lengths)
        experiment, startup = self._experiment(schedule, lengths, costs)
        played = TrainingRun(experiment, skipped_steps=startup)
        with no_garbage_collection():
            played.run()
        finished = sum(int(step.rows["finished"].sum()) for step in played.log.steps.values())
        if not finished:
            raise Withheld("no response finishes in a replay of so few steps")
        return played.wall_s / finished  # without a ledger, which takes as long as the replay

    def _experiment(
        self, schedule: dict[str, Any], lengths: Path, costs: dict[str, float] | None
    ) -> tuple[Experiment, int]:
        """Every row is a prompt of its own, so that both its lengths follow its id."""
        run = self.run
        values: dict[str, Any]
        if run.simulated:
            own = run.config.get("cost")
            cost = {name: v for name, v in own.items() if name not in NOT_REPLAYED} if isinstance(own, dict) else own
            values = {"cluster": run.config.get("cluster", {}), "cost": cost}
        else:
            values = {"cluster": self._cluster(), "cost": {"kind": "affine", **(costs or self.fitted[0])}}
        known = {key: value for key, value in schedule.items() if key in ("kind", "window")}
        values["schedule"] = known
        values["workload"] = {
            "steps": self.steps, "prompts_per_step": self.rows_per_step, "max_response_tokens": self.most_tokens,
            "response_tokens": {"kind": "empirical", "file": str(lengths), "column": "response"},
            "prompt_lengths": {"kind": "empirical", "file": str(lengths), "column": "prompt"},
            "prompt_tokens": int(self.sample.prompt_tokens.max()),
        }  # fmt: skip
        try:
            startup = load_experiment(values).startup_steps
            values["workload"]["steps"] += startup
            return load_experiment(values), startup
        except InputError as error:
            raise Withheld(f"it cannot be replayed: {error}") from None

    def _cluster(self) -> dict[str, Any]:
        header, slots = self.run.header, int(self.run.engine.slots.max())
        values: dict[str, Any] = {"engines": header["engines"], "gpus_per_engine": header["gpus_per_engine"]}
        if slots:
            values["max_rows_per_engine"] = slots
        if header["trainer_gpus"]:
            values |= {"trainer": "separate", "trainer_gpus": header["trainer_gpus"]}
        ray = self.run.config.get("ray")
        dispatch = ray.get("dispatch") if isinstance(ray, dict) else None
        return {**values, "dispatch": dispatch} if dispatch else values


class SomeSteps(Run):
    """A run of which only some steps' engine and rollout records are looked at; its phases are all there."""

    def __init__(self, run: Run, steps: Sequence[int] | np.ndarray) -> None:
        super().__init__(run.path)
        self.outline = run.outline
        self.engine = run.engine[run.engine.step.isin(steps)]
        self.rollouts = run.rollouts[run.rollouts.step.isin(steps)]


def _round(tokens: float) -> int:
    """To three binary digits, as windows are chosen: 5461 -> 5120."""
    step = 2 ** max(0, int(math.log2(max(tokens, 1))) - 2)
    return max(1, round(tokens / step) * step)
