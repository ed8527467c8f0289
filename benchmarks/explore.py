"""How soon the page of `tppo explore` answers, in Chromium: from a change of a field to numbers and to pictures.

python -m benchmarks.explore [--repeats 10] [--record]

The default workload (512 x 16 responses), one number of GPUs at a time, the synchronous schedule and one window.
Three kinds of change take turns: of the price (nothing is simulated), of the window (one option) and of the mean
length (both). Times are the browser's own, the page's pause for typing included: to the first answer that is shown (an
estimate, where something is simulated) and its pictures, to the whole one and its pictures. --record writes
docs/results/explore.
"""

import argparse
import os
import platform
import signal
import subprocess
import sys

import pandas as pd
from playwright.sync_api import Page, sync_playwright

from benchmarks.pages import ROOT, markdown

RESULTS = ROOT / "docs" / "results" / "explore"
GPUS = (8, 16, 64)
QUESTION = "?model=Qwen2.5-7B&gpu=H100-SXM&gpus={gpus}&finished_rows=3000000&windows=8192"
CHANGES = {"price": "price_per_hour", "window": "windows", "mean length": "mean_tokens"}
COLUMNS = {
    "first": "first numbers", "firstPictures": "first pictures", "numbers": "numbers", "pictures": "pictures",
}  # fmt: skip
SIMULATED = {"price": 0, "window": 1, "mean length": 2}

CHANGE = """([name, value]) => new Promise((done) => {
  const body = document.body, began = performance.now(), took = {};
  const kinds = ["first", "firstPictures", "numbers", "pictures"];
  for (const what of kinds) delete body.dataset[what];
  new MutationObserver((_, observer) => {
    for (const what of kinds) {
      if (body.dataset[what] !== undefined) took[what] ??= (performance.now() - began) / 1000;
    }
    if (took.pictures === undefined) return;
    observer.disconnect();
    done({first: took.numbers, firstPictures: took.pictures, ...took});
  }).observe(body, {attributes: true});
  const field = document.querySelector(`[name="${name}"]`);
  field.value = value;
  field.dispatchEvent(new Event("input", {bubbles: true}));
})"""


def measure(page: Page, repeats: int) -> pd.DataFrame:
    """change, repeat, first, firstPictures, numbers, pictures (seconds)."""
    values = {"price": 2.0, "window": 4000, "mean length": 6000.0}
    rows = []
    for repeat in range(repeats + 1):
        for change, field in CHANGES.items():
            value = values[change] + repeat + 1
            took = page.evaluate(CHANGE, [field, f"{value:g}"])
            if repeat:  # the first warms caches of the processes
                rows.append({"change": change, "repeat": repeat, **took})
    return pd.DataFrame(rows)


def table(times: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (gpus, change), own in times.groupby(["gpus", "change"], sort=False):
        row = {"GPUs": gpus, "change of": change, "options simulated": SIMULATED[str(change)]}
        for what, name in COLUMNS.items():
            low, middle, high = own[what].quantile([0.1, 0.5, 0.9])
            row[f"{name}, s"] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--record", action="store_true", help="write docs/results/explore")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    server = subprocess.Popen([sys.executable, "-m", "tppo", "explore"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        address = server.stdout.readline().strip()
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(
                executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            page = chromium.new_page()
            times = []
            for gpus in GPUS:
                page.goto(address + QUESTION.format(gpus=gpus))
                page.wait_for_selector("body[data-pictures]")
                times.append(measure(page, options.repeats).assign(gpus=gpus))
            found = table(pd.concat(times))
            version = chromium.version
            chromium.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    text = "\n\n".join(
        [
            "# How soon the page answers",
            f"Written by `python -m benchmarks.explore --repeats {options.repeats} --record`. {platform.system()} "
            f"{platform.machine()}, {os.cpu_count()} cores, Chromium {version}. Load average {before:.2f} before, "
            f"{os.getloadavg()[0]:.2f} after.",
            "Seconds in the browser from the change of a field, median of the repeats (P10 to P90); 512 x 16 "
            "responses a step, one number of GPUs, two options. The changes took turns; each value is new to the "
            "server. First numbers and pictures: an estimate from a part of the cluster, dimmed and named as one, "
            "where something is simulated; the others are those of `tppo plan`.",
            markdown(found),
        ]
    )
    print(text)
    if options.record:
        RESULTS.mkdir(parents=True, exist_ok=True)
        found.to_csv(RESULTS / "explore.csv", index=False)
        (RESULTS / "README.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
