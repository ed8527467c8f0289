"""`tppo compare`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from analysis.compare import compare
from profiling.console import plain_table, table_console
from profiling.errors import ConfigError
from profiling.reader import Run

SHOWN_CHARACTERS = 60
"""Of a changed value."""


def run_compare(
    paths: Sequence[Path], against: Sequence[Path] | None, *, as_json: bool, block: int | None, target: float
) -> None:
    if not math.isfinite(target):
        raise ConfigError(f"--target {target}: must be a number")
    a, b = sides_of(paths, against)
    found = compare([Run(path) for path in a], [Run(path) for path in b], target=target, block=block)
    if as_json:
        print(json.dumps(found, indent=1, allow_nan=False, default=str))
        return
    show(found)


def sides_of(paths: Sequence[Path], against: Sequence[Path] | None) -> tuple[Sequence[Path], Sequence[Path]]:
    if against is not None:
        return paths, against
    if len(paths) != 2:
        raise ConfigError(
            f"tppo compare: {len(paths)} RUN{'' if len(paths) == 1 else 's'} given, needs two; seeds of two arms: "
            "tppo compare A-s0 A-s1 --against B-s0 B-s1"
        )
    return paths[:1], paths[1:]


def show(found: dict[str, Any]) -> None:
    console = table_console()
    for side in "ab":
        own = found[side]
        kept, skipped = (_list(own[key]) for key in ("steps_compared", "steps_left_out"))
        console.print(f"{side.upper()}: {', '.join(own['runs'])} ({own['kind']}); {kept} steps compared, the first "
                      f"{skipped} left out (start-up, warm-up)", highlight=False, soft_wrap=True)  # fmt: skip
    if found["changed"]:
        console.print(_changed(found["changed"]))
    else:
        console.print("Nothing changed: the same settings, versions, host and GPUs.")
    if found["quantities"]:
        console.print(_quantities(found))
    for row in found["quantities"]:
        console.print(f"B, {row['name']}: {row['words']}.", highlight=False, soft_wrap=True)
    if found["ledger"]:
        console.print(_ledger(found["ledger"]))
    for line in (*_score(found["score"]), *_energy(found["energy"]), *found["notes"]):
        console.print(line, highlight=False, soft_wrap=True)


def _changed(rows: Sequence[dict[str, Any]]) -> Table:
    table = plain_table("What changed", "field", "A", "B", left=("field", "A", "B"))
    for row in rows:
        table.add_row(row["field"], _value(row["a"]), _value(row["b"]))
    return table


def _value(value: Any) -> str:
    text = "not there" if value is None else json.dumps(value, default=str) if isinstance(value, list) else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"


def _quantities(found: dict[str, Any]) -> Table:
    units = "a moving-block bootstrap over steps" if found["units"] == "steps" else "the seeds, which are the units"
    title = f"What it did: intervals (95 %) from {units}"
    table = plain_table(title, "", "A", "B", "B / A", "95 % interval", "block, steps", left=("",))
    for row in found["quantities"]:
        interval = "not known" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        blocks = "–" if row["blocks"] is None else f"{row['blocks'][0]}, {row['blocks'][1]}"
        table.add_row(row["name"], f"{row['a']:.4g}", f"{row['b']:.4g}", f"{row['ratio']:.3f}", interval, blocks)
    return table


def _ledger(rows: Sequence[dict[str, Any]]) -> Table:
    table = plain_table("Ledger: GPU-seconds per step", "cause", "A", "share", "B", "share", "B - A")
    for row in rows:
        a, b = row["a_seconds_per_step"], row["b_seconds_per_step"]
        difference = "–" if a is None or b is None else f"{round(b - a, 9):+.4g}"
        table.add_row(row["cause"], _number(a), _share(row["a_share"]), _number(b), _share(row["b_share"]), difference)
    return table


def _score(score: dict[str, Any] | None) -> list[str]:
    if score is None:
        return []
    lines = []
    for name, unit in (("equal_time", "s of training"), ("equal_steps", "steps")):
        own = score[name]
        if own is None:
            lines.append(f"Score at {name.replace('_', ' ')}: not known; one was not evaluated by then.")
            continue
        if own["low"] is None:
            noise = "its noise is not known"
        elif own["exceeds_noise"]:
            noise = f"{100 * own['low']:+.1f} to {100 * own['high']:+.1f}, more than the noise"
        else:
            noise = f"{100 * own['low']:+.1f} to {100 * own['high']:+.1f}, no difference beyond the noise"
        where = f"{name.replace('_', ' ')} ({own['until']:.4g} {unit})"
        points = f"{100 * own['difference']:+.1f} points ({noise})"
        lines.append(f"Score at {where}: A {own['a']:.1%}, B {own['b']:.1%}: {points}.")
    times = score["time_to_target_s"]
    reached = [f"{side.upper()} {'not reached' if times[side] is None else f'{times[side]:.4g} s'}" for side in "ab"]
    return [*lines, f"Time to {score['target']:.0%}: {', '.join(reached)}."]


def _energy(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{row['name'].capitalize()}: A {row['a']:.4g}, B {row['b']:.4g}, B / A {row['ratio']:.3f} (no interval)."
        for row in rows
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))
