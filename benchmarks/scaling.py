"""What a second rank is worth on this machine, and how a training pass's memory grows with the length of its rows.

python -m benchmarks.scaling [--repeats 5] [--output runs/scaling] [--record]

Runs of one and of two ranks take turns, on one thread each: a random Qwen2 of 4 layers x 256, T-PPO, the same rows and
losses. Efficiency: time of one rank / (2 x time of two). Communication: share of a step in which the first rank waits
for or runs a gloo collective, from torch.profiler's trace of one step. Memory: the largest resident size of a process
that scores one row of 1,024 to 16,384 tokens and goes back, above what it had before. --record writes
docs/results/scaling.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from analysis import style
from benchmarks.pages import ROOT, markdown
from profiling.exports import TORCH_FOLDER
from profiling.reader import Run
from profiling.settings import to_toml
from tppo.data.tokenizer import character_tokenizer
from tppo.models.policy import new_qwen2, save_policy

RESULTS = ROOT / "docs" / "results" / "scaling"
PHASES = {"rollout": "rollout", "value forward": "value_forward", "value update": "update_value",
          "policy update": "update_policy", "weight sync": "weight_sync"}  # fmt: skip
LENGTHS = (1024, 2048, 4096, 8192, 16384)
STEPS, FIRST_STEP = 5, 2
"""Of a run, and the first that counts."""

MEMORY = """
import re, sys
from pathlib import Path
import torch
from tppo.models.policy import load_policy, token_log_probs

def resident_kib(what):
    return int(re.search(rf"{what}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def score_and_go_back(tokens):
    ids = torch.randint(2, 60, (1, tokens))
    column = torch.arange(tokens - 16, tokens - 1)
    scored = token_log_probs(model, ids, torch.zeros_like(column), column, ids[0, column])
    scored.log_probs.sum().backward()

torch.set_num_threads(1)
model = load_policy(sys.argv[1])[0]
score_and_go_back(64)  # allocates the gradients, and what libraries need once
Path("/proc/self/clear_refs").write_text("5")  # the largest size begins anew
before = resident_kib("VmRSS")
score_and_go_back(int(sys.argv[2]))
print((resident_kib("VmHWM") - before) / 1024)
"""


def model_at(directory: Path) -> Path:
    """A random model whose rows seldom end before the maximum."""
    path = directory / "model"
    if not path.is_dir():
        tokenizer = character_tokenizer()
        model = new_qwen2(
            vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            layers=4, hidden_size=256, heads=4, kv_heads=2, intermediate_size=768, max_tokens=16384, seed=0,
        )  # fmt: skip
        save_policy(model, tokenizer, path)
    return path


def config_of(model: Path, output: Path, torch_steps: str = "") -> dict[str, Any]:
    return {
        "output": str(output),
        "model": {"path": str(model)},
        "rollout": {"prompts_per_step": 32, "max_response_tokens": 256, "window": 128, "draws": "row"},
        "train": {"steps": STEPS, "micro_batch_tokens": 2048},
        "value": {"pretrain_rows": 0},
        "evaluation": {"every": 0},
        "profile": {"sampler": False, "torch_steps": torch_steps},
    }


def run_on(ranks: int, config: dict[str, Any], directory: Path) -> Run:
    file = directory / f"{Path(config['output']).name}.toml"
    file.write_text(to_toml(config))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "-m", "tppo", "train", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return Run(config["output"])


def seconds_of(run: Run) -> dict[str, float]:
    """Of a step, by phase and whole: medians over the steps that count."""
    phases = run.phases[(run.phases.step >= FIRST_STEP) & run.phases.name.isin(PHASES.values())]
    seconds = (phases.t_end - phases.t_start).groupby([phases.name, phases.step]).sum()
    steps = run.metrics[run.metrics.step >= FIRST_STEP]
    by_phase = {name: float(seconds[phase].median()) for name, phase in PHASES.items()}
    return {**by_phase, "step": float(steps["timing_s/step"].median())}


def scaling_table(model: Path, directory: Path, repeats: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Efficiencies by phase, and the runs' padding and rows."""
    pairs, about = [], []
    for repeat in range(repeats):
        found = {}
        for ranks in (1, 2) if repeat % 2 == 0 else (2, 1):
            run = run_on(ranks, config_of(model, directory / f"ranks-{ranks}-{repeat}"), directory)
            found[ranks] = seconds_of(run)
            steps = run.metrics[run.metrics.step >= FIRST_STEP]
            about.append(
                {
                    "ranks": ranks,
                    "padding waste": steps["perf/padding_waste"].mean(),
                    "generated tokens, a step": steps["training/generated_tokens"].mean(),
                    "policy loss of the last step": steps["actor/pg_loss"].iloc[-1],
                }
            )
        pairs.append(found)
    rows = []
    for name in (*PHASES, "step"):
        one, two = (np.array([pair[ranks][name] for pair in pairs]) for ranks in (1, 2))
        efficiency = one / (2 * two)
        rows.append({"phase": name, "one rank, s": np.median(one), "two ranks, s": np.median(two),
                     "efficiency": np.median(efficiency), "least": efficiency.min(),
                     "largest": efficiency.max()})  # fmt: skip
    table = pd.DataFrame(about).groupby("ranks", as_index=False).mean()
    return pd.DataFrame(rows), table


def communication_share(model: Path, directory: Path) -> pd.DataFrame:
    """Of one step of two ranks, by phase: time covered by gloo collectives / time."""
    run = run_on(2, config_of(model, directory / "traced", torch_steps="3"), directory)
    (path,) = (run.path / TORCH_FOLDER).glob("steps-*.json")
    events = json.loads(path.read_text())["traceEvents"]
    spans = sorted((1e-6 * e["ts"], 1e-6 * (e["ts"] + e["dur"])) for e in events
                   if e.get("ph") == "X" and str(e.get("name", "")).startswith("gloo:"))  # fmt: skip
    rows = []
    for name, phase in PHASES.items():
        own = run.phases[(run.phases.step == 3) & (run.phases.name == phase)]
        total = float((own.t_end - own.t_start).sum())
        inside = sum(covered(spans, start, end) for start, end in zip(own.t_start, own.t_end, strict=True))
        rows.append({"phase": name, "seconds": total, "in collectives": inside / total})
    return pd.DataFrame(rows)


def covered(spans: list[tuple[float, float]], first: float, last: float) -> float:
    """Seconds of first..last that at least one span covers. spans: by their starts."""
    seconds, reached = 0.0, first
    for start, end in spans:
        start, end = max(start, reached), min(end, last)
        if end > start:
            seconds, reached = seconds + end - start, end
    return seconds


def memory_table(model: Path) -> pd.DataFrame:
    def peak_mib(tokens: int) -> float:
        command = [sys.executable, "-c", MEMORY, str(model), str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return float(done.stdout)

    table = pd.DataFrame({"tokens": LENGTHS, "MiB": [peak_mib(tokens) for tokens in LENGTHS]})
    table["times the one before"] = table.MiB / table.MiB.shift()
    return table


def draw(scaling: pd.DataFrame, memory: pd.DataFrame) -> style.Figure:
    figure, (left, right) = style.subplots(columns=2, width=9.0, height=3.4)
    left.barh(scaling.phase[::-1], scaling.efficiency[::-1], color=style.BLUE)
    left.axvline(1.0, color=style.BLACK, linewidth=0.8)
    left.set_xlabel("efficiency of two ranks")
    right.loglog(memory.tokens, memory["MiB"], "o-", color=style.BLUE, label="measured")
    first = memory["MiB"].iloc[-1] / memory.tokens.iloc[-1]
    right.loglog(memory.tokens, first * memory.tokens, ":", color=style.BLACK, label="linear")
    right.set(xlabel="tokens of a row", ylabel="memory of a pass, MiB")
    right.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--record", action="store_true", help="write docs/results/scaling")
    options = parser.parse_args()
    if options.output.exists():
        raise SystemExit(f"{options.output}: is there already; move it away")
    options.output.mkdir(parents=True)
    load = os.getloadavg()[0]
    model = model_at(options.output)
    scaling, about = scaling_table(model, options.output, options.repeats)
    shares, memory = communication_share(model, options.output), memory_table(model)
    machine = (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, one thread a "
        f"rank, gloo. Load average {load:.2f} before, {os.getloadavg()[0]:.2f} after."
    )
    parts = [
        "# Several ranks, long rows",
        f"Written by `python -m benchmarks.scaling --repeats {options.repeats} --record`. {machine}",
        "Runs of one and of two ranks took turns; medians of paired ratios, with the least and the largest.",
        markdown(scaling),
        "The same rows and losses (means over the runs):",
        markdown(about),
        "Share of one traced step that the first rank spends in collectives (their waiting included):",
        markdown(shares),
        "What scoring one row and going back adds to the resident memory of a process (SDPA attention), at most:",
        markdown(memory),
        "![efficiency and memory](scaling.png)",
    ]
    print("\n\n".join(parts))
    if options.record:
        RESULTS.mkdir(parents=True, exist_ok=True)
        scaling.to_csv(RESULTS / "scaling.csv", index=False)
        memory.to_csv(RESULTS / "memory.csv", index=False)
        draw(scaling, memory).savefig(RESULTS / "scaling.png")
        (RESULTS / "README.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
