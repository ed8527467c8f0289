"""`tppo eval`."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from profiling.console import PlainConsole, plain_table, table_console
from profiling.errors import ConfigError, InputError
from profiling.schema import EVALUATIONS
from profiling.settings import Settings, check_settings, parse_overrides, with_overrides
from profiling.writer import write_atomically, write_parquet
from tppo.config import MOST_SAMPLES, RunConfig
from tppo.consent import check_code_is_asked_for
from tppo.evaluation.source import Source, find_source

if TYPE_CHECKING:
    from tppo.evaluation.standalone import Evaluation

SAMPLES = 32
ALL = 10**9
"""Problems, of a data set that is named."""
SHOWN_CHARACTERS = 40
"""Of a prompt, in the table of problems."""
RESULT, TABLE = "evaluation.json", "evaluations.parquet"


class Flags(Settings):
    """What may stand on the command line; None: as the run, or RunConfig, says."""

    samples: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    problems: PositiveInt | None = None
    temperature: NonNegativeFloat | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: NonNegativeInt | None = None
    max_response_tokens: PositiveInt | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    engine: Literal["torch", "vllm"] | None = None


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_MODEL",
                        help="run directory, checkpoint folder, model directory or hub name")  # fmt: skip
    parser.add_argument("--data", metavar="FILE_OR_NAME", help="what to ask (a run's own held-out problems)")
    parser.add_argument("--samples", type=int, help=f"responses to each problem ({SAMPLES}; 1 at temperature 0)")
    parser.add_argument("--problems", type=int, help="problems (as many as the run evaluates)")
    parser.add_argument("--checkpoint", metavar="NAME", help="of a run: step-000100, best or last (last)")
    parser.add_argument("--temperature", type=float, help="of sampling (as the run evaluates, or 1)")
    parser.add_argument("--top-p", type=float, help="nucleus (as the run evaluates, or 1)")
    parser.add_argument("--top-k", type=int, help="likeliest tokens, 0 for all (as the run evaluates, or 0)")
    parser.add_argument("--max-response-tokens", type=int, help="a response of this length ends (as the run's)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    parser.add_argument("--engine", help="torch or vllm (as the run's, or torch)")
    parser.add_argument("--per-problem", action="store_true", help="also a row for each problem, hardest first")
    parser.add_argument("--output", type=Path, help=f"directory for {RESULT} and {TABLE}")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run_eval(options: argparse.Namespace, words: Sequence[str]) -> None:
    """Evaluate and print; nothing is written but to --output. words: `--section.key value` of RunConfig."""
    given = {name: getattr(options, name) for name in Flags.model_fields if getattr(options, name) is not None}
    flags = check_settings(given, Flags, where="tppo eval")
    source = find_source(options.source, options.checkpoint)
    config = config_of(source, flags, options.data, parse_overrides(words), where=options.source)
    if options.output is not None:
        claim(options.output)

    from tppo.quiet import quieten_libraries

    quieten_libraries()
    from tppo.evaluation.per_problem import hardest_first
    from tppo.evaluation.standalone import evaluate_model

    try:
        with progress() as advance:
            found = evaluate_model(config, seed=flags.seed, on_end=advance)
    except InputError:
        if options.output is not None:
            with suppress(OSError):  # something is in it
                options.output.rmdir()
        raise
    result = as_record(found, config, source, flags.seed, options.source)
    rows = hardest_first(found.problems, found.graded)
    if options.per_problem:
        result["per_problem"] = [asdict(row) for row in rows]
    if options.output is not None:
        write_parquet(options.output / TABLE, found.graded.columns(source.step), EVALUATIONS)
        write_atomically(options.output / RESULT, as_json(result).encode())
    if options.json:
        print(as_json(result), end="")
        return
    console = table_console()
    console.print(metrics_table(result))
    if options.per_problem:
        console.print(problems_table(result["per_problem"]))
    if options.output is not None:
        print(options.output / RESULT)


def config_of(
    source: Source, flags: Flags, data: str | None, overrides: Mapping[str, Any], *, where: str
) -> RunConfig:
    """The run's settings, changed by the command line. Raises ConfigError where nothing says what to ask."""
    says_what_to_ask = source.settings or data or any(name.split(".")[0] == "data" for name in overrides)
    if not says_what_to_ask:
        raise ConfigError(
            f"{where}: a model alone does not say what to ask it; add --data FILE, or the arithmetic task's settings "
            "(--data arithmetic --data.max_steps 50)"
        )
    flagged = {
        "model.path": source.model_path,
        "evaluation.temperature": flags.temperature,
        "evaluation.top_p": flags.top_p,
        "evaluation.top_k": flags.top_k,
        "evaluation.problems": flags.problems,
        "evaluation.samples": flags.samples,
        "rollout.max_response_tokens": flags.max_response_tokens,
        "rollout.engine": flags.engine,
    }
    changes = ({} if data is None else data_settings(data)) | dict(overrides)
    changes |= {name: value for name, value in flagged.items() if value is not None}
    check_code_is_asked_for(source.settings, overrides, where=where)
    values = with_overrides(sampled_by_evaluation(source.settings), changes)
    if "evaluation.samples" not in changes:
        own = values.get("evaluation")
        greedy = isinstance(own, Mapping) and own.get("temperature") == 0
        values = with_overrides(values, {"evaluation.samples": 1 if greedy else SAMPLES})
    config = check_settings(values, RunConfig, where=where)
    whole = config.rollout.model_copy(update={"window": config.rollout.max_response_tokens})  # nothing is truncated
    return config.model_copy(update={"rollout": whole})


def sampled_by_evaluation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """[evaluation] says how to sample, also where the run leaves that to [rollout]: what an engine cannot do in
    training, for want of log-probabilities, it can do here."""
    rollout, own = settings.get("rollout"), settings.get("evaluation")
    if not isinstance(rollout, Mapping) or not isinstance(own, Mapping):
        return dict(settings)
    moved = {name: rollout[name] for name in ("temperature", "top_p", "top_k") if name in rollout}
    rest = {name: value for name, value in rollout.items() if name not in moved}
    return {**settings, "rollout": rest, "evaluation": {**moved, **own}}


def data_settings(name: str) -> dict[str, Any]:
    """--data as overrides of [data] and [evaluation]: all of its problems."""
    if name == "arithmetic":
        return {"data.task": "arithmetic", "data.path": "", "evaluation.path": ""}
    return {"data.task": "dataset", "data.path": name, "evaluation.path": name, "evaluation.problems": ALL}


def claim(directory: Path) -> None:
    """Make the output directory, before hours of work. Raises ConfigError when it holds a result."""
    for name in (RESULT, TABLE):
        if (directory / name).exists():
            raise ConfigError(f"--output {directory}: already holds {name}; choose another directory, or move it away")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {directory}: cannot be created: {error.strerror}") from None


@contextmanager
def progress() -> Iterator[Any]:
    columns = (TextColumn("responses"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=PlainConsole(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda ended, of: bar.update(task, advance=ended, total=of)


def as_record(found: "Evaluation", config: RunConfig, source: Source, seed: int, where: str) -> dict[str, Any]:
    """What evaluation.json holds. Unmeasured is null."""
    graded, sampling = found.graded, found.sampling
    return {
        "evaluated": where,
        "step": source.step,
        "data": config.data.model_dump(mode="json"),
        "problem_seed": config.evaluation.seed,
        "problems": graded.problems,
        "samples": graded.samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_response_tokens": config.rollout.max_response_tokens,
        "seed": seed,
        "engine": config.rollout.engine,
        "confidence": 0.95,
        "metrics": {name: value and asdict(value) for name, value in graded.estimates.items()},
        "standard_error": graded.stderr,
        "mean_response_tokens": float(graded.tokens.mean()),
        "clip_ratio": float(graded.cut.mean()),
        "given_up_share": float((~graded.cut & ~graded.finished).mean()),
    }


def as_json(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=1, allow_nan=False) + "\n"


def metrics_table(result: Mapping[str, Any]) -> Table:
    step = "" if result["step"] is None else f", step {result['step']}"
    title = (
        f"{result['evaluated']}{step}: {result['problems']} problems x {result['samples']} samples, temperature "
        f"{result['temperature']:g}, top-p {result['top_p']:g}, at most {result['max_response_tokens']} tokens"
    )
    table = plain_table(title, "metric", "value", "95 % interval", left=("metric",))
    for name, estimate in result["metrics"].items():
        if estimate is None:
            table.add_row(name, "no answers to count", "")
        else:
            low, high = estimate["low"], estimate["high"]
            interval = "all problems alike" if low is None else f"{low:.1%} to {high:.1%}"
            table.add_row(name, f"{estimate['value']:.1%}", interval)
    table.add_row("tokens of a response", f"{result['mean_response_tokens']:,.1f}", "")
    table.add_row("cut at the maximum", f"{result['clip_ratio']:.1%}", "")
    if result["given_up_share"]:
        table.add_row("given up by the engine", f"{result['given_up_share']:.1%}", "")
    return table


def problems_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("problem", "prompt", "answer", "correct", "most frequent", "tokens", "cut")
    table = plain_table("problems, hardest first", *columns, left=("prompt",))
    for row in rows:
        prompt = " ".join(row["prompt"].split())
        shown = prompt if len(prompt) <= SHOWN_CHARACTERS else f"{prompt[:SHOWN_CHARACTERS]}…"
        vote = "none" if row["vote"] is None else f"{row['vote']} ({row['votes']})"
        table.add_row(
            str(row["problem"]), shown, row["answer"], f"{row['correct']}/{row['samples']}", vote,
            f"{row['mean_tokens']:,.1f}", str(row["clipped"]),
        )  # fmt: skip
    return table
