"""How long a report takes: `tppo report` on a run of 1,000 steps with 8 engines, and opening it in Chromium.

python -m benchmarks.report [--rows 512] [--repeats 3] [--run DIRECTORY] [--record]

The run is simulated (its time is not counted); the command is timed as a user waits for it, in a process of its own,
with the advice computed anew each time. The page's time is from the start of its navigation to the end of its load
event, in a browser that runs already; medians. --record writes docs/results/report.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from benchmarks.pages import ROOT, markdown
from profiling.errors import RunError
from simulator import load_experiment, simulate

RESULTS = ROOT / "docs" / "results" / "report"
GOALS = {"tppo report, s": 15.0, "opening in Chromium, s": 2.0, "size, MB": 3.0}
SAMPLES_PER_PROMPT = 8
CHROMIUM = "/usr/bin/chromium"


def make_run(path: Path, rows: int) -> None:
    """1,000 synchronous steps on eight H100s: a 7B model, responses of 6,000 tokens on average, at most 24,576."""
    experiment = load_experiment(
        {
            "workload": {
                "steps": 1000, "prompts_per_step": rows // SAMPLES_PER_PROMPT,
                "samples_per_prompt": SAMPLES_PER_PROMPT, "prompt_tokens": 512, "max_response_tokens": 24576,
                "response_tokens": {"kind": "lognormal", "mean_capped": 6000.0, "sigma": 0.9},
            },
            "schedule": {"kind": "synchronous"},
            "cluster": {"engines": 8, "gpus_per_engine": 1},
            "cost": {"kind": "analytic", "model": "Qwen2.5-7B", "gpu": "H100-SXM"},
        }
    )  # fmt: skip
    simulate(experiment).write(path)


def reporting_s(run: Path, output: Path) -> float:
    (run / "advice.json").unlink(missing_ok=True)
    start = time.perf_counter()
    words = [sys.executable, "-m", "tppo", "report", str(run), "--output", str(output)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"tppo report failed: {done.stderr.strip()}")
    return time.perf_counter() - start


def opening_s(page_file: Path, repeats: int) -> list[float] | None:
    """None without playwright or Chromium."""
    executable = os.environ.get("CHROMIUM", CHROMIUM)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if not Path(executable).exists():
        return None
    timing = "performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"
    seconds = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(repeats):
            page = browser.new_page()
            page.goto(page_file.as_uri())
            page.wait_for_function(f"{timing} > 0")
            seconds.append(float(page.evaluate(timing)))
            page.close()
        browser.close()
    return seconds


def measured(run: Path, repeats: int) -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        output = Path(folder) / "report.html"
        values: dict[str, list[float] | None] = {
            "tppo report, s": [reporting_s(run, output) for _ in range(repeats)],
            "opening in Chromium, s": opening_s(output, repeats),
            "size, MB": [output.stat().st_size / 1e6],
        }
    return [_line(name, found) for name, found in values.items()]


def _line(name: str, found: list[float] | None) -> dict[str, Any]:
    if found is None:
        return {"quantity": name, "median": None, "least": None, "largest": None, "goal": GOALS[name],
                "verdict": "not measured: no Chromium or no playwright"}  # fmt: skip
    middle = statistics.median(found)
    return {"quantity": name, "median": middle, "least": min(found), "largest": max(found), "goal": GOALS[name],
            "verdict": "reached" if middle < GOALS[name] else "missed"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="rows a step, a multiple of 8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", type=Path, help="a run made earlier, with as many rows; made here if it is not there")
    parser.add_argument("--record", action="store_true", help="write docs/results/report")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with TemporaryDirectory() as folder:
        run = options.run or Path(folder) / "run"
        if not (run / "summary.json").exists():
            make_run(run, options.rows)
        table = pd.DataFrame(measured(run, options.repeats))
    machine = (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}. Load "
        f"average {load:.2f} before, {os.getloadavg()[0]:.2f} after."
    )
    parts = [
        "# Report: time and size",
        f"Written by `python -m benchmarks.report --record`. {machine} One simulated run of 1,000 steps with "
        f"{options.rows} rows each on 8 engines; {options.repeats} repeats.",
        markdown(table),
    ]
    page = "\n\n".join(parts) + "\n"
    print(page)
    if options.record:
        RESULTS.mkdir(parents=True, exist_ok=True)
        table.to_csv(RESULTS / "report.csv", index=False)
        (RESULTS / "README.md").write_text(page)


if __name__ == "__main__":
    main()
