"""`tppo samples`: what the policy wrote."""

import json
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from profiling.console import PlainConsole
from profiling.errors import DataError
from profiling.reader import Run

HEAD, TAIL = 200, 400
"""Characters of a longer text that the table shows; --json has all of it. The end is where the answer is."""


def run_samples(directory: Path, *, step: int | None, as_json: bool, console: Console | None = None) -> None:
    """Print the sample generations of a step, the last one if none is named. Raises DataError."""
    run = Run(directory)
    steps = sorted(run.samples.step.unique().tolist())
    if not steps:
        raise DataError(f"{directory}: has no sample generations; train with logging.samples_every above 0")
    wanted = steps[-1] if step is None else step
    if wanted not in steps:
        near = min(steps, key=lambda other: abs(other - wanted))
        raise DataError(f"{directory}: has no samples of step {wanted}; the nearest step that has some is {near}")
    found = run.samples[run.samples.step == wanted]
    if as_json:
        print(json.dumps(json.loads(found.to_json(orient="records")), ensure_ascii=False, indent=1))
    else:
        (console or PlainConsole()).print(table_of(found, f"{run.name}, step {wanted}"))


def table_of(samples: pd.DataFrame, title: str) -> Table:
    table = Table(title=Text(title), show_lines=True)
    for name in ("row", "prompt", "response", "answer", "reward", "correct", "tokens", "policy"):
        # A response is the widest: the others keep their words whole.
        table.add_column(name, overflow="fold", ratio={"prompt": 2, "response": 5}.get(name))
    for record in samples.to_dict("records"):
        tokens = f"{record['tokens']}" if record["finished"] else f"{record['tokens']}, goes on"
        cells = (record["row"], record["prompt"], record["response"], record["answer"], record["reward"],
                 record["correct"], tokens, record["policy_version"])  # fmt: skip
        table.add_row(*(Text("-" if cell is None or cell != cell else shortened(str(cell))) for cell in cells))
    return table


def shortened(text: str) -> str:
    """Head and tail of a long text; what could steer a terminal becomes visible."""
    if len(text) > HEAD + TAIL:
        text = f"{text[:HEAD]} [... {len(text) - HEAD - TAIL} characters ...] {text[-TAIL:]}"
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
