"""`tppo plan`."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from profiling.console import PlainConsole, table_console
from profiling.errors import ConfigError
from profiling.settings import check_settings
from profiling.writer import write_atomically
from simulator.plan import Answer, Question, answer

LISTS = ("gpus", "steps_ratio", "schedules", "windows", "factors", "tensor_parallel")
"""Fields that take several values with commas."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a field of the question; its docstring is the help."""
    parser.add_argument("--config", type=Path, metavar="CONFIG", help="of tppo train: what flags leave open is taken "
                        "from it (model, lengths at most, batch, schedule, steps, memory)")  # fmt: skip
    for name, field in Question.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None,
                                help=field.description)  # fmt: skip
            continue
        default = None if field.is_required() else field.default
        shown = "" if default is None else f" (default: {_shown(default)})"
        help_text = f"{field.description or name.replace('_', ' ')}{shown}".replace("%", "%%")
        parser.add_argument(flag, dest=name, metavar="VALUE", help=help_text)


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def question_of(options: argparse.Namespace) -> Question:
    given: dict[str, Any] = {}
    if options.config is not None:
        from tppo.commands.plan_config import asked_by

        given = asked_by(options.config)
        if options.finished_rows is not None:
            del given["steps"]
        if options.lengths is not None:
            del given["mean_tokens"]
    for name in Question.model_fields:
        value = getattr(options, name)
        if value is None:
            continue
        if name in LISTS:
            value = tuple(part.strip() for part in str(value).split(","))
            if "" in value:
                raise ConfigError(f"--{name.replace('_', '-')}: an empty value between commas")
        given[name] = value
    try:
        return check_settings(given, Question, where="tppo plan")
    except ConfigError as error:  # there is no file: name the flag
        text = str(error).removeprefix("tppo plan: ").removeprefix("the file: ")
        for name in sorted(Question.model_fields, key=len, reverse=True):
            text = re.sub(rf"(?<![\w-]){name}(\.\d+)?(?=( = |:|,| and |$))", f"--{name.replace('_', '-')}", text)
        raise ConfigError(f"tppo plan: {text}") from None


def run_plan(options: argparse.Namespace) -> None:
    question = question_of(options)
    if options.output is not None and (options.output.is_dir() or not options.output.name):
        raise ConfigError(f"--output {str(options.output)!r}: is not a file to write")
    console = PlainConsole(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("simulating options", total=None)
        found = answer(question, lambda done, of: progress.update(task, completed=done, total=of))
    text = json.dumps({"question": question.model_dump(mode="json"), **found.as_dict()}, indent=1, allow_nan=False)
    if options.output is not None:
        write_atomically(options.output, text.encode())
    if options.json:
        print(text)
    else:
        print_answer(question, found)


def print_answer(question: Question, found: Answer) -> None:
    console = table_console()
    horizon = f"{question.steps} steps" if question.steps else f"{question.finished_rows} finished responses"
    table = Table(title=f"{question.model} on {question.gpu}, {horizon}: P50 (P10 to P90)", title_justify="left")
    for name in ("GPUs", "schedule", "TP", "hours", "dollars", "MWh", "idle", "headroom", "x step", "x response",
                 "x score", "cheapest"):  # fmt: skip
        table.add_column(name, justify="left" if name == "schedule" else "right", no_wrap=True)
    for row in found.rows:
        if row["fault"]:
            continue
        front = " *" if row["on_the_front"] else ""
        only = " +" if row["simulated_only"] else ""
        table.add_row(
            str(row["gpus"]), f"{row['schedule']}{only}{front}", str(row["tensor_parallel"]), _interval(row["hours"]),
            _interval(row["dollars"]), _interval(row["kwh"], 1e-3), f"{row['idle_share']:.0%}",
            f"{row['memory_headroom_gb']:.0f} GB", _times(row["speedup_per_step"]),
            _times(row["speedup_per_finished_row"]), _interval(row["speedup_at_equal_score"]),
            f"{row['probability_cheapest']:.0%}",
        )  # fmt: skip
    console.print(table)
    console.print("* no other option is both faster and cheaper. x: times as fast as the synchronous run on the same "
                  "GPUs, per step and per finished response.", highlight=False)  # fmt: skip
    if any(row["simulated_only"] for row in found.rows):
        console.print("+ simulated only: our trainer does not run this schedule.", highlight=False)
    for row in found.rows:
        if row["fault"]:
            console.print(f"{row['gpus']} GPUs, {row['schedule']}: cannot run: {row['fault']}.", highlight=False,
                          soft_wrap=True)  # fmt: skip
    for row in found.rows:
        if not row["fault"] and (row["on_the_front"] or row["probability_cheapest"] > 0.05):
            console.print(f"{row['gpus']} GPUs, {row['schedule']}: {row['why']}.", highlight=False, soft_wrap=True)
    _print_memory(console, found)
    console.print(f"\nWhat decides: {found.decides}.", highlight=False, soft_wrap=True)
    if found.best_window:
        console.print(f"Best window: {found.best_window}.", highlight=False, soft_wrap=True)
    console.print(f"Tail: {found.tail}.", highlight=False, soft_wrap=True)
    console.print("Assumed: " + "; ".join(found.assumptions) + ".", highlight=False, soft_wrap=True)


def _print_memory(console: Console, found: Answer) -> None:
    """Once for options that need the same."""
    said = set()
    for row in found.rows:
        for phase, needs in (row["memory_gb"] or {}).items():
            parts = ", ".join(f"{size:.1f} {part}" for part, size in needs.items())
            text = f"Memory of each of {row['gpus']} GPUs in {phase}: {sum(needs.values()):.1f} GB: {parts}."
            if text not in said:
                console.print(text, highlight=False, soft_wrap=True)
            said.add(text)


def _times(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2f}"


def _interval(values: dict[str, float] | None, scale: float = 1.0) -> str:
    if values is None:
        return "not known"
    low, middle, high = (scale * values[name] for name in ("p10", "p50", "p90"))
    if high - low < 1e-9 * max(abs(high), 1e-12):
        return f"{middle:,.3g}"
    return f"{_short(middle)} ({_short(low)} to {_short(high)})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
