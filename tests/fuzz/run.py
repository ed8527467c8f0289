"""`make fuzz`: at least 100,000 hostile files, each reader's in a process of its own, which may crash.

    python -m tests.fuzz.run [--cases N] [--jobs N] [--only WORD] [--record]

--record writes docs/results/fuzz/README.md: of a run of all readers that found nothing, nothing else. FUZZ_CASES in
the environment is another number of cases.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.fuzz.blow_ups import BLOW_UPS, MOST_MB, MOST_S, apart
from tests.fuzz.reader import run_cases
from tests.fuzz.readers import FUZZ_CASES, READERS, cases_of

RECORD = Path(__file__).parents[2] / "docs" / "results" / "fuzz" / "README.md"
BLOW_UP_MB = 1024
BATCH = 500
"""Cases under one seed: Hypothesis remembers all that it has tried, and slows down."""
MOST_MEMORY_BYTES = 12 * 2**30
"""Of a process's addresses: a reader that takes more fails, and the machine goes on."""


@dataclass
class Outcome:
    reader: str
    cases: int = 0
    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    fault: str | None = None
    """First lines of what went wrong, with the example; None: nothing."""


def fuzz(name: str, cases: int, first_seed: int) -> Outcome:
    """In this process. Stops at the first batch with a fault."""
    outcome, began = Outcome(name), time.perf_counter()
    while outcome.cases < cases and outcome.fault is None:
        batch = min(BATCH, cases - outcome.cases)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                ends = run_cases(READERS[name], batch, start=first_seed + outcome.cases)
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            outcome.fault = told(error)
            break
        outcome.cases += sum(ends.values())
        outcome.read += ends["read"]
        outcome.refused += ends["refused"]
        if not sum(ends.values()):
            outcome.fault = "Hypothesis finds no more cases"
    outcome.seconds = time.perf_counter() - began
    return outcome


def told(error: BaseException) -> str:
    errors = error.exceptions if isinstance(error, BaseExceptionGroup) else (error,)
    texts = [f"{type(own).__name__}: {own}\n" + "\n".join(getattr(own, "__notes__", ())) for own in errors]
    return "\n".join(text[:2000] for text in texts)


def fuzz_apart(name: str, cases: int, first_seed: int) -> Outcome:
    """In another process."""
    words = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.run", "--one", name, "--cases", str(cases), "--seed",
             str(first_seed)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=RECORD.parents[3], check=False, env=environment)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        return Outcome(**json.loads(last))
    except (ValueError, TypeError):
        return Outcome(name, fault=f"the process ended with {done.returncode}: {done.stderr[-2000:]}")


def blow_ups() -> list[Outcome]:
    """Files of a gigabyte that cost nothing to make, each in a process of its own."""
    outcomes = []
    for name in BLOW_UPS:
        own = Outcome(name, cases=1)
        try:
            (found,) = apart(BLOW_UP_MB, [name])
            own.seconds, own.refused, own.read = found["seconds"], found["end"] == "refused", found["end"] == "read"
            if found["mb"] > MOST_MB or found["seconds"] > MOST_S:
                own.fault = f"{found['mb']:.0f} MB, {found['seconds']:.0f} s"
        except AssertionError as error:
            own.fault = str(error)
        outcomes.append(own)
        print(f"{name}: {own.seconds:,.1f} s{'' if own.fault is None else ': FAULT ' + own.fault}", flush=True)
    return outcomes


def describe(outcomes: list[Outcome], blown: list[Outcome], wall_s: float) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True,
                             check=False)  # fmt: skip
    state = commit.stdout.strip() + (", with changes" if changed.stdout.strip() else "")
    rows = [f"| {own.reader} | {own.cases:,} | {own.read:,} | {own.refused:,} | {own.seconds:,.0f} |"
            for own in outcomes]  # fmt: skip
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    total = [sum(getattr(own, field) for own in outcomes) for field in ("cases", "read", "refused", "seconds")]
    return "\n".join(
        [
            "# Hostile files", "",
            f"{total[0]:,} generated files, none of which did more than be read or be refused in one line: no other "
            "exception, no hang, no rise in memory, nothing written beside the output, nothing executed. "
            "What earlier runs found is in the history of git, each with its test in `tests/fuzz`.", "",
            f"`make fuzz` on {datetime.now(UTC):%Y-%m-%d}, commit {state}, Python {platform.python_version()}, "
            f"{os.cpu_count()} cores, load {load}, {wall_s / 60:,.0f} minutes. Measured.", "",
            "| reader | cases | read | refused | seconds |", "|---|---:|---:|---:|---:|", *rows,
            f"| all | {total[0]:,} | {total[1]:,} | {total[2]:,} | {total[3]:,.0f} |", "",
            f"And {len(blown)} files that would take the machine's memory or hours, of {BLOW_UP_MB:,} MB where a size "
            f"can be chosen (`tests/fuzz/blow_ups.py`): {sum(own.refused for own in blown)} are refused and "
            f"{sum(own.read for own in blown)} read, each in under {MOST_S:.0f} s and with under {MOST_MB:,} MB more; "
            f"the longest took {max(own.seconds for own in blown):.1f} s.", "",
        ]
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=int(os.environ.get("FUZZ_CASES", FUZZ_CASES)))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="readers whose names hold this word")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore")
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
        print(json.dumps(asdict(fuzz(options.one, options.cases, options.seed))))
        return 0
    began = time.perf_counter()
    chosen = [reader for name, reader in READERS.items() if options.only in name]
    with ThreadPoolExecutor(options.jobs) as pool:
        running = [pool.submit(fuzz_apart, own.name, cases_of(own, options.cases), options.seed) for own in chosen]
        outcomes = []
        for job in running:
            own = job.result()
            outcomes.append(own)
            print(f"{own.reader}: {own.cases:,} cases, {own.read:,} read, {own.refused:,} refused, "
                  f"{own.seconds:,.0f} s{'' if own.fault is None else ': FAULT'}", flush=True)  # fmt: skip
            if own.fault is not None:
                print(own.fault, flush=True)
    blown = [] if options.only else blow_ups()
    faults = sum(own.fault is not None for own in (*outcomes, *blown))
    wall_s = time.perf_counter() - began
    print(f"{sum(own.cases for own in outcomes):,} cases in {wall_s:,.0f} s, {faults} readers with a fault")
    complete = not options.only and sum(own.cases for own in outcomes) >= FUZZ_CASES
    if options.record and complete and not faults:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_text(describe(outcomes, blown, wall_s))
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
