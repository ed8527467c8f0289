"""`make bench`: runs every benchmark, writes docs/results and what the README claims from it.

python -m benchmarks.everything [NAME ...] [--skip NAME ...]

All of them take most of a day on two cores; names run those alone, in the order below. Each runs by itself, one after
the other; docs/results/README.md says on which machine, at which commit and load it ran, and for how long. One that
fails leaves its page and its line as they were, and the others go on.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime

import pandas as pd

from benchmarks.claims import write_claims
from benchmarks.pages import RESULTS, ROOT, commit, markdown, with_block

INDEX = RESULTS / "README.md"
TABLE = RESULTS / "recorded.csv"
BENCHMARKS: dict[str, list[list[str]]] = {
    "simulator": [["benchmarks.simulator", "--record"]],
    "cost_model": [["benchmarks.cost_model", "--record"]],
    "published": [["benchmarks.published", "--record"]],
    "report": [["benchmarks.report", "--record"]],
    "explore": [["benchmarks.explore", "--record"]],
    "advantages": [["benchmarks.advantages", "--record"]],
    "scaling": [["benchmarks.scaling", "--record"]],
    "rollout": [["benchmarks.rollout", "--record"]],
    "training_step": [["benchmarks.training_step", "--record"]],
    "profiler": [["benchmarks.profiler", "--record"]],
    "demo": [["tppo", "demo"], ["benchmarks.record_results", "runs/demo", "demo"]],
    "short": [["benchmarks.time_to_score"], ["benchmarks.record_results", "runs/benchmark-short", "short"]],
    "prototype": [
        ["benchmarks.time_to_score", "--regime", "prototype"],
        ["benchmarks.record_results", "runs/benchmark-prototype", "prototype"],
    ],
    "learning": [["benchmarks.learning", "--record"]],
    "ablations": [["benchmarks.ablations", "--seeds", "20:22", "--record"]],
}
"""Folder of docs/results -> what writes it: modules with their arguments. Shortest first."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME")
    options = parser.parse_args()
    if unknown := {*options.names, *options.skip} - set(BENCHMARKS):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(BENCHMARKS)}")
    failed, at = [], commit()  # what is recorded makes the checkout dirty
    for name, commands in BENCHMARKS.items():
        if name in options.skip or (options.names and name not in options.names):
            continue
        if (line := measured(name, commands, at)) is None:
            failed.append(name)
        else:
            keep(line)
            write_claims()
    if failed:
        print(f"failed, left as they were: {', '.join(failed)}")
    return 1 if failed else 0


def measured(name: str, commands: list[list[str]], at: str) -> dict[str, object] | None:
    """Run one; what is to be known of it, or None where it failed."""
    before, start = os.getloadavg()[0], time.monotonic()
    for words in commands:
        print(f"== {name}: python -m {' '.join(words)}", flush=True)
        if subprocess.run([sys.executable, "-m", *words], cwd=ROOT).returncode != 0:
            return None
    return {
        "benchmark": name, "day": datetime.now(UTC).date().isoformat(), "commit": at,
        "machine": f"{os.cpu_count()}-core {platform.machine()}, Python {platform.python_version()}",
        "load before": round(before, 2), "load after": round(os.getloadavg()[0], 2),
        "minutes": round((time.monotonic() - start) / 60, 1),
    }  # fmt: skip


def keep(line: dict[str, object]) -> None:
    """In the table of when each was recorded, in place of its last line."""
    known = pd.read_csv(TABLE, dtype=str) if TABLE.exists() else pd.DataFrame(columns=list(line))
    others = known[known.benchmark != line["benchmark"]]
    rows = pd.concat([others, pd.DataFrame([line]).astype(str)]).set_index("benchmark")
    rows = rows.reindex([name for name in BENCHMARKS if name in rows.index]).reset_index()
    rows.to_csv(TABLE, index=False)
    INDEX.write_text(with_block(INDEX.read_text(), "recorded", markdown(rows)))


if __name__ == "__main__":
    sys.exit(main())
