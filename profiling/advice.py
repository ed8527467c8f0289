"""advice.json of a run directory: what other schedules would have cost, by a simulation of the run's own rows.

    schema        1
    trace_bytes   size of the trace that the advice is about; another size, or a younger trace: it is stale
    withheld      why there is no advice; null: there is some, and then everything below is there
    basis         where the costs come from
    rows, steps, resamples   what each simulation played, and how often the interval's were drawn anew
    replay_error  (simulated - measured) / measured time per finished response of the run's own schedule; null for a
                  simulated run, whose costs are known
    tail          time_share of the rollout is spent after all but the slowest row_share of its rows have ended
    own, others   the run's schedule and those beside it: seconds per finished response; saving = 1 - others / own
    margin        of the best one's saving: half of its 95 % interval; null for the others

Written by `tppo report` (a simulation is none of the figures' business), read by `analysis`.
"""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from profiling.errors import ConfigError, DataError
from profiling.files import read_json_table
from profiling.settings import Settings, check_settings
from profiling.writer import write_atomically

NAME = "advice.json"
REMEDY = "delete it, and tppo report writes it anew"
CAVEAT = (
    "Simulated, not measured. Per finished response only: a schedule also changes which responses a step learns from "
    "and how old they are."
)


class Tail(Settings):
    time_share: float = Field(ge=0, le=1)
    row_share: float = Field(gt=0, le=1)


class Option(Settings):
    kind: Literal["synchronous", "truncated"]
    window: PositiveInt | None = None
    """New tokens per row and step; null: rows run to their ends."""
    seconds_per_finished_row: PositiveFloat
    saving: float = Field(le=1)
    margin: NonNegativeFloat | None = None

    @property
    def name(self) -> str:
        return "no window" if self.window is None else f"a window of {tokens_text(self.window)}"

    @model_validator(mode="after")
    def check_the_window(self) -> "Option":
        if (self.kind == "truncated") != (self.window is not None):
            raise ValueError(f"kind = '{self.kind}' does not go with window = {self.window}")
        return self


class Advice(Settings):
    schema_version: Literal[1] = Field(1, alias="schema")
    trace_bytes: NonNegativeInt
    withheld: str | None = None
    basis: str | None = None
    rows: PositiveInt | None = None
    steps: PositiveInt | None = None
    resamples: PositiveInt | None = None
    replay_error: float | None = None
    tail: Tail | None = None
    own: Option | None = None
    others: tuple[Option, ...] = ()

    @model_validator(mode="after")
    def check_it_says_something(self) -> "Advice":
        if self.withheld is None and (self.own is None or not self.others or self.best.margin is None):
            raise ValueError("own, others and the best one's margin must be there, or a reason in withheld")
        return self

    @property
    def best(self) -> Option:
        return min(self.others, key=lambda option: option.seconds_per_finished_row)

    def sentence(self) -> str:
        """The warning, or that there is nothing to gain, or why nothing is known."""
        if self.withheld is not None:
            return f"No advice on the window: {self.withheld}."
        assert self.own is not None
        best = self.best
        assert best.margin is not None
        parts = []
        if self.tail is not None and self.tail.time_share >= 0.005:  # else 0 %
            parts.append(f"{self.tail.time_share:.0%} of rollout waits for {self.tail.row_share:.1%} of rows")
        change = f"{abs(best.saving):.0%} ± {100 * best.margin:.0f}"
        if best.saving > best.margin:
            parts.append(f"{best.name} would save {change} per finished response")
        else:
            how = "costs" if best.saving < 0 else "saves"
            own = "" if self.own.window is None else f", beside its own of {tokens_text(self.own.window)}"
            beyond = "" if best.saving < -best.margin else ", no more than the noise"
            parts.append(
                f"another window would not help{own}: the best of {len(self.others)} tried, {best.name}, {how} "
                f"{change} per finished response{beyond}"
            )
        text = "; ".join(parts)
        return f"{text[:1].upper()}{text[1:]}."


def tokens_text(tokens: int) -> str:
    """6144 -> 6K, as windows are named; 500 -> 500."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def trace_bytes_of(directory: Path) -> int:
    try:
        return (directory / "trace.jsonl").stat().st_size
    except OSError as error:
        raise DataError(f"{directory / 'trace.jsonl'}: cannot be read: {error.strerror}") from None


def read_advice(directory: Path) -> Advice | None:
    """None where there is none, or where the run has gone on since. Raises DataError naming file and field."""
    path = directory / NAME
    if not path.exists():
        return None
    values = read_json_table(path, REMEDY)
    try:
        advice = check_settings(values, Advice, where=str(path))
    except ConfigError as error:
        raise DataError(f"{error}; {REMEDY}") from None
    try:
        stale = path.stat().st_mtime < (directory / "trace.jsonl").stat().st_mtime
    except OSError:  # one of them has just gone
        return None
    return None if stale or advice.trace_bytes != trace_bytes_of(directory) else advice


def write_advice(directory: Path, advice: Advice) -> None:
    """Raises RunError where the directory cannot be written."""
    text = json.dumps(advice.model_dump(mode="json", by_alias=True), indent=1)
    write_atomically(directory / NAME, f"{text}\n".encode())
