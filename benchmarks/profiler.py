"""How right the profiler's estimates are, against a workload that is known: `simulated sensor`, no GPU.

python -m benchmarks.profiler [--workloads 200] [--steps 30] [--record]

A stand-in for NVML's library (tests/profiling/fake_nvml.c) is really loaded by nvidia-ml-py and polled every 100 ms of
virtual time. Workloads are random: steps of about 12 s, whose phases vary by a quarter in length and a tenth in how
busy they keep the GPU; rollouts fade. --record writes docs/results/profiler.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from benchmarks.pages import ROOT, markdown
from profiling import schema
from profiling.attribution import device_estimates
from profiling.estimators import busy_by_phase, energy_by_phase
from profiling.phases import plain_header
from profiling.reader import Run
from profiling.sampler import LATER_PART_SECONDS
from profiling.windows import WINDOWS_TO_INTEGRATE, Pieces, Windows, windows_of_polls
from profiling.writer import RunWriter

RESULTS = ROOT / "docs" / "results" / "profiler"
LIBRARY = ROOT / "tests" / "profiling" / "fake_nvml.c"
POLL_S, MONITORING_S, WINDOW_S, RING_S = 0.1, 1.0, 1.0, 1 / 6
"""Readings while calibrating, and while only monitoring; the sensor's two windows."""
PHASES = {
    "rollout": (6.0, 0.80, 420.0), "reward": (0.9, 0.0, 70.0), "logprob_forward": (1.2, 0.95, 560.0),
    "update_policy": (2.4, 0.92, 650.0), "update_value": (1.1, 0.90, 620.0), "weight_sync": (0.4, 0.30, 250.0),
    "evaluation": (0.5, 0.10, 120.0),
}  # fmt: skip
"""Phase -> seconds, busy, watts; each workload scales and varies them."""
EVALUATE_EVERY = 12
"""Steps: a phase that few steps have, short and unlike the others."""
FADES = (1.2, 1.1, 1.0, 0.7)
"""Quarters of a rollout: rows leave it, so it keeps the GPU less busy towards its end."""
DAY_GOAL_S, CORE_GOAL = 10.0, 0.01
BUSY_GOAL, ENERGY_GOAL, COVERAGE, RESOLVED_GOAL = 0.02, 0.03, 0.95, 0.8


def build_library(folder: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("no C compiler to build the stand-in NVML library")
    target = folder / "libnvidia-ml.so.1"
    command = [compiler, "-O2", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", "-o", str(target), str(LIBRARY)]
    subprocess.run(command, check=True)
    return target


def load_library(folder: Path) -> ctypes.CDLL:
    """The stand-in, loaded before nvidia-ml-py looks for libnvidia-ml.so.1."""
    target = build_library(folder)
    os.environ["FAKE_NVML_WINDOW"] = str(WINDOW_S)
    library = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
    number = ctypes.c_double
    library.sim_set_time.argtypes = [number]
    library.sim_add.argtypes = [ctypes.c_int, number, number, number, number]
    library.sim_integral.argtypes = [ctypes.c_int, ctypes.c_int, number, number]
    library.sim_integral.restype = number
    return library


def workload(library: ctypes.CDLL, random: np.random.Generator, steps: int) -> pd.DataFrame:
    """Set a random workload; its phases."""
    library.sim_clear()
    scale = {name: random.uniform(0.5, 1.5) for name in PHASES}
    t, rows = float(random.uniform(0.5, 1.5)), []
    for step in range(1, steps + 1):
        for name, (seconds, busy, watts) in PHASES.items():
            if name == "evaluation" and step % EVALUATE_EVERY:
                continue
            length = seconds * scale[name] * random.uniform(0.75, 1.25)
            share = float(np.clip(busy * random.uniform(0.9, 1.1), 0.0, 1.0))
            power = watts * random.uniform(0.9, 1.1)
            parts = FADES if name == "rollout" else (1.0,)
            for place, factor in enumerate(parts):
                begin, end = (t + length * n / len(parts) for n in (place, place + 1))
                library.sim_add(0, begin, end, min(1.0, share * factor), power * factor)
            rows.append((name, step, t, t + length))
            t += length
    return pd.DataFrame(rows, columns=["name", "step", "t_start", "t_end"])


def polled(library: ctypes.CDLL, random: np.random.Generator, until: float, poll_s: float) -> pd.DataFrame:
    """Readings about every poll_s, late by some milliseconds, through nvidia-ml-py. A sampler's clock and a sensor's
    are never in step for long: each workload polls up to 3 % faster or slower."""
    import pynvml as nvml

    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    rows = []
    for t in np.arange(random.uniform(0, poll_s), until + 1.0, poll_s * random.uniform(0.97, 1.03)):
        late = t + abs(random.normal(0, 0.003))
        library.sim_set_time(late)
        rows.append((late, nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
                     nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3))  # fmt: skip
    return pd.DataFrame(rows, columns=["t", "utilisation", "energy_joules"])


def ring(library: ctypes.CDLL, until: float) -> Windows:
    """The driver's own samples, read every ten seconds."""
    import pynvml as nvml

    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    ends, busy, seen = [], [], 0
    for t in np.arange(10.0, until + 11.0, 10.0):
        library.sim_set_time(float(t))
        _, samples = nvml.nvmlDeviceGetSamples(handle, nvml.NVML_GPU_UTILIZATION_SAMPLES, seen)
        for one in samples:
            seen = one.timeStamp
            ends.append(one.timeStamp / 1e6)
            busy.append(one.sampleValue.uiVal / 100)
    end = np.array(ends)
    return Windows(end - RING_S, end, np.array(busy))


def compared(library: ctypes.CDLL, seed: int, steps: int, poll_s: float) -> list[dict[str, Any]]:
    """One workload: a row for every phase and quantity."""
    random = np.random.default_rng(seed)
    phases = workload(library, random, steps)
    until = float(phases.t_end.max())
    samples = polled(library, random, until, poll_s)
    pieces = Pieces.of(phases)
    t, joules = samples.t.to_numpy(), samples.energy_joules.to_numpy()
    windows = windows_of_polls(t, samples.utilisation.to_numpy(), WINDOW_S)
    naive = {
        name: float(samples.utilisation[_inside(own, t)].mean()) for name, own in phases.groupby("name", sort=False)
    }
    found = {
        "busy, 1 s window": (busy_by_phase(pieces, windows), 0, WINDOW_S),
        "busy, sample ring": (busy_by_phase(pieces, ring(library, until)), 0, RING_S),
        "energy": (energy_by_phase(pieces, t, joules), 1, None),
    }
    rows = []
    for quantity, (estimates, what, window) in found.items():
        for name, own in phases.groupby("name", sort=False):
            seconds = own.t_end - own.t_start
            spent = [library.sim_integral(0, what, a, b) for a, b in zip(own.t_start, own.t_end, strict=True)]
            truth = sum(spent) / (1.0 if what else seconds.sum())
            got = estimates[str(name)]
            rows.append(
                {
                    "seed": seed, "quantity": quantity, "phase": name, "seconds": float(seconds.mean()),
                    "spans": window is not None and float(seconds.mean()) >= WINDOWS_TO_INTEGRATE * window,
                    "method": got.method, "truth": truth, "value": got.value,
                    "error": None if got.value is None else (got.value - truth) / (truth if what else 1.0),
                    "covered": got.low is not None and got.low - 1e-9 <= truth <= (got.high or 0.0) + 1e-9,
                    "has interval": got.low is not None,
                    "bucketed error": naive[str(name)] - truth if not what else None,
                }
            )  # fmt: skip
    return rows


def _inside(phases: pd.DataFrame, t: np.ndarray) -> np.ndarray:
    place = np.searchsorted(phases.t_start.to_numpy(), t, "right") - 1
    return (place >= 0) & (t < phases.t_end.to_numpy()[np.maximum(place, 0)])


def run(library: ctypes.CDLL, workloads: int, steps: int, poll_s: float) -> pd.DataFrame:
    rows = [row for seed in range(workloads) for row in compared(library, seed, steps, poll_s)]
    return pd.DataFrame(rows)


STEP = """
import json, statistics, sys, time
from pathlib import Path
import torch
from profiling.sampler_process import SamplerProcess
torch.set_num_threads(1)
a = torch.randn(400, 400)
def step():
    begin = time.perf_counter()
    for _ in range(12):
        a @ a
    return time.perf_counter() - begin
step()
with_s, without_s = [], []
sampler = None
reports = []
for turn in range(2 * int(sys.argv[2])):
    directory = Path(sys.argv[1]) / str(turn)
    if turn % 2:
        directory.mkdir()
        sampler = SamplerProcess(directory, interval_s=0.1, zero_s=time.perf_counter())
        sampler.start()
        time.sleep(0.3)
    (with_s if turn % 2 else without_s).append(statistics.median(step() for _ in range(60)))
    if turn % 2:
        time.sleep(12.0)
        reports.append(sampler.stop())
print(json.dumps({"with": with_s, "without": without_s, "reports": reports}))
"""


def overhead(folder: Path, pairs: int, call_us: int, *, keeps_samples: bool) -> dict[str, float]:
    """Median step of a small torch program beside the sampler at 100 ms on eight stand-in GPUs, against the same
    without it, in turns; and the sampler's share of a core, its start-up left out. call_us: that a driver call sleeps.
    keeps_samples: the driver keeps utilisation samples, so that it is not polled.
    """
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(folder), "FAKE_NVML_GPUS": "8", "FAKE_NVML_CALL_US": str(call_us),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    runs = folder / f"overhead-{call_us}-{keeps_samples}"
    runs.mkdir()
    if keeps_samples:
        (runs / "work").write_text("0 0 1000 0.5 300\n")
        environment["FAKE_NVML_WORK"] = str(runs / "work")
    done = subprocess.run([sys.executable, "-c", STEP, str(runs), str(pairs)], env=environment, cwd=ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    found = json.loads(done.stdout)
    ratio = np.array(found["with"]) / np.array(found["without"])
    shares = [
        (own["cpu_seconds"] - own["start_cpu_seconds"]) / (own["last_sample_s"] - own["first_sample_s"])
        for own in found["reports"]
    ]
    half = 1.96 * float(ratio.std(ddof=1)) / float(np.sqrt(len(ratio)))
    return {"ratio": float(ratio.mean()), "half": half, "core": float(np.median(shares))}


def sleep_cost_us() -> float:
    """CPU time that a sleep of 200 us costs a process here, whatever it does between them."""
    times = []
    for _ in range(5):
        begin = time.process_time()
        for _ in range(200):
            time.sleep(2e-4)
        times.append((time.process_time() - begin) / 200 * 1e6)
    return float(np.median(times))


def day_long() -> dict[str, float]:
    """A day of eight GPUs at 100 ms (864,000 sweeps), in parts as the sampler writes them: seconds to open it for
    analysis and to tell its phases apart, and by how many MiB the writer grew from its first hour to its last."""
    sweeps, gpus = int(LATER_PART_SECONDS / POLL_S), 8
    t = np.arange(sweeps) * POLL_S
    device = [f"GPU-{number}" for number in range(gpus)] * sweeps
    random = np.random.default_rng(0)
    columns = {name: random.random(sweeps * gpus) for name in schema.DEVICES.names} | {
        "device": device, "event_reasons": np.zeros(sweeps * gpus, dtype=int),
    }  # fmt: skip
    resident = []
    with tempfile.TemporaryDirectory() as folder:
        writer = RunWriter(Path(folder) / "run", header=plain_header(), config_toml="")
        for part in range(int(86_400 / LATER_PART_SECONDS)):
            columns["t"] = np.repeat(t + part * LATER_PART_SECONDS, gpus)
            columns["energy_joules"] = 400.0 * columns["t"]
            writer.table("devices", part, columns)
            resident.append(psutil.Process().memory_info().rss / 2**20)
        begin = 0.0
        for step in range(1, int(86_400 / 12)):
            for name, (seconds, _, _) in PHASES.items():
                end = begin + seconds
                writer.trace({"type": "phase", "name": name, "step": step, "t_start": begin, "t_end": end, "depth": 0})
                begin = end
        writer.close(t=max(begin, 86_400.0), status="finished")
        hour = int(3600 / LATER_PART_SECONDS)
        start = time.perf_counter()
        run = Run(writer.path)
        rows = len(run.devices)
        opened = time.perf_counter()
        device_estimates(run)
        return {
            "rows": rows, "seconds": opened - start, "estimates": time.perf_counter() - opened,
            "growth": max(resident[-hour:]) - max(resident[:hour]),
        }  # fmt: skip


def totals(rows: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for (quantity, phase), own in rows.groupby(["quantity", "phase"], sort=False):
        resolved, bounded = own[own.value.notna()], own[own["has interval"]]
        errors = resolved.error.astype(float)
        lines.append(
            {
                "quantity": quantity, "phase": phase, "seconds (mean)": own.seconds.mean(),
                "resolved": f"{len(resolved)} of {len(own)}",
                "methods": ", ".join(sorted(own.method.unique())),
                "median |error|": float(errors.abs().median()) if len(resolved) else None,
                "95th percentile |error|": float(errors.abs().quantile(0.95)) if len(resolved) else None,
                "interval covers": float(bounded.covered.mean()) if len(bounded) else None,
                "bucketing instead, median |error|": own["bucketed error"].astype(float).abs().median(),
            }
        )  # fmt: skip
    return pd.DataFrame(lines)


def verdicts(rows: pd.DataFrame) -> list[str]:
    busy = rows[rows.quantity == "busy, 1 s window"]
    resolved = busy[busy.value.notna()]
    spans = busy[busy.spans]
    energy = rows[(rows.quantity == "energy") & (rows.seconds >= 1.0)]
    known = rows[rows["has interval"]]
    checks = [
        ("busy within 2 points where resolved (95th percentile)", resolved.error.astype(float).abs().quantile(0.95),
         BUSY_GOAL, False),
        ("phases that span three windows resolved", spans.value.notna().mean(), RESOLVED_GOAL, True),
        ("energy of phases of 1 s and more within 3 % (95th percentile)",
         energy.error.astype(float).abs().quantile(0.95), ENERGY_GOAL, False),
        ("intervals that hold the truth", known.covered.mean(), COVERAGE, True),
        ("in the row of the table where they do so least", known.groupby(["quantity", "phase"]).covered.mean().min(),
         COVERAGE, True),
    ]  # fmt: skip
    return [
        f"{name}: {value:.3f} (goal {goal}): {'reached' if (value >= goal if least else value <= goal) else 'missed'}"
        for name, value, goal, least in checks
    ]


def _verdict(value: float, goal: float) -> str:
    return f"goal {goal:g}: {'reached' if value <= goal else 'missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=int, default=200)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=5, help="turns with and without the sampler")
    parser.add_argument("--record", action="store_true", help="write docs/results/profiler")
    options = parser.parse_args()
    import pynvml as nvml

    with tempfile.TemporaryDirectory() as folder:
        library = load_library(Path(folder))
        nvml.nvmlInit()
        rows, slow = (run(library, options.workloads, options.steps, poll_s) for poll_s in (POLL_S, MONITORING_S))
        nvml.nvmlShutdown()
    table, slow_table = totals(rows), totals(slow)
    day = day_long()
    with tempfile.TemporaryDirectory() as folder:
        build_library(Path(folder))
        cost, kept, own = (
            overhead(Path(folder), options.pairs, call_us, keeps_samples=keeps)
            for call_us, keeps in ((200, False), (200, True), (0, True))
        )
    page = "\n\n".join(
        [
            "# Estimates against the truth (simulated sensor)",
            f"Written by `python -m benchmarks.profiler --record`: {options.workloads} random workloads of "
            f"{options.steps} steps of about 12 s, polled every 100 ms. No GPU: a library with NVML's ABI and "
            "documented sensor windows, loaded by nvidia-ml-py. Busy errors are in points (one: 1 % of the time), "
            "energy errors relative. Bucketing is what is usually done: the mean of the readings within a phase. "
            f"Every {EVALUATE_EVERY}th step has an evaluation: too few for a regression.",
            markdown(table),
            "Goals: " + "; ".join(verdicts(rows)) + ".",
            "## Polled once a second, as `tppo train` does",
            "The goals are for readings every 100 ms, and the driver's own samples do not depend on them; what a "
            "second leaves is withheld where it says too little.",
            markdown(slow_table[slow_table.quantity != "busy, sample ring"]),
            "By the same measures: " + "; ".join(verdicts(slow[slow.quantity != "busy, sample ring"])) + ".",
            "## What it costs",
            f"The sampler at 100 ms beside a small torch program, eight stand-in GPUs whose calls sleep for 200 us: a "
            f"step takes {cost['ratio']:.3f} +- {cost['half']:.3f} times as long ({options.pairs} pairs, load "
            f"{os.getloadavg()[0]:.1f}). The sampler uses {kept['core']:.2%} of a core where the driver keeps "
            f"utilisation samples ({_verdict(kept['core'], CORE_GOAL)}), {cost['core']:.2%} where it is polled "
            f"besides ({_verdict(cost['core'], CORE_GOAL)}), and {own['core']:.2%} where calls return at once. Here a "
            f"process pays {sleep_cost_us():.0f} us of CPU for a sleep alone, and what it runs after one runs cold; "
            "the sampler calls each GPU once every 100 ms (twice where utilisation is polled), and some nine times "
            "more a second.",
            f"A day of eight GPUs at 100 ms ({day['rows']:,} rows) opens in {day['seconds']:.1f} s "
            f"({_verdict(day['seconds'], DAY_GOAL_S)}), and its busy time and energy by phase are found in "
            f"{day['estimates']:.0f} s more. Its writer holds a minute at most: from the first hour to the last it "
            f"grew by {day['growth']:.0f} MiB.",
        ]
    )
    print(page)
    if options.record:
        RESULTS.mkdir(parents=True, exist_ok=True)
        table.to_csv(RESULTS / "profiler.csv", index=False)
        slow_table.to_csv(RESULTS / "polled_once_a_second.csv", index=False)
        (RESULTS / "README.md").write_text(page + "\n")


if __name__ == "__main__":
    main()
