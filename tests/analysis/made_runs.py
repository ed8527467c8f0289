"""Small run directories with known numbers, for tests of tables, figures, reports and comparisons."""

import json
import tomllib

import pandas as pd

from profiling.phases import plain_header
from profiling.reader import Run
from profiling.schema import DEVICES, ENGINE, ROLLOUTS, WINDOWS
from profiling.summary import write_totals
from profiling.writer import RunWriter, write_parquet
from simulator import load_experiment, simulate

RISING = [0.5, 0.8, 0.84, 0.86, 0.88, 0.9]  # means of three: .713, .833, .86, .88: reached at the fifth

MODEL = {
    "parameters": 1000, "embedding_parameters": 100, "lm_head_parameters": 100, "layers": 2, "heads": 3, "kv_heads": 1,
    "head_dim": 4, "hidden_size": 12, "intermediate_size": 24, "vocab_size": 10, "bytes_per_parameter": 4,
    "kv_bytes_per_token": 64,
}  # fmt: skip


def make_run(path, *, accuracies, seconds_per_step=2.0, batch=2, finish=True):
    """Two rows a step: prefill 0.2 s, decode 1 s of 10 steps, policy update 0.6 s, rest nothing. Runs named ppo are
    synchronous, others truncated; a name ends in the seed (ppo-s0)."""
    synchronous = path.name.startswith("ppo")
    schedule = {"kind": "synchronous"} if synchronous else {"kind": "truncated", "window": 10}
    seed = int(path.name.rpartition("-s")[2]) if path.name[-1].isdigit() and "-s" in path.name else 0
    config = f"[train]\nsteps = 3\nseed = {seed}\n"
    writer = RunWriter(path, header={**plain_header(), "schedule": schedule}, config_toml=config)
    writer.write_text("model.json", json.dumps(MODEL))
    steps = len(accuracies)
    for step in range(1, steps + 1):
        t = (step - 1) * seconds_per_step
        for name, start, end in (("rollout", t, t + 1.2), ("update_policy", t + 1.2, t + 1.8)):
            writer.trace({"type": "phase", "name": name, "step": step, "t_start": start, "t_end": end, "depth": 0})
        zero = dict.fromkeys(ENGINE.names, 0) | {"step": step, "slots": 4, "batch": batch}
        prefill = zero | {"kind": "prefill", "t_start": t, "t_end": t + 0.2, "steps": 1, "context_tokens": 10,
                          "fresh_tokens": 10, "attended_pairs": 30}  # fmt: skip
        decode = zero | {"kind": "decode", "t_start": t + 0.2, "t_end": t + 1.2, "steps": 10, "context_tokens": 10,
                         "attended_pairs": 10 * 10 + batch * 45}  # fmt: skip
        own = [dict.fromkeys(ROLLOUTS.names, 0) | {"step": step, "row": 10 * step + i, "prompt_tokens": 5,
               "context_before": 5, "tokens": 10, "trained_tokens": 10, "discarded": False, "finished": True,
               "reward": 1.0, "policy_version": step - 1,
               "t_start": t, "t_end": t + 1.2} for i in range(batch)]  # fmt: skip
        writer.table("engine", step, {n: [prefill[n], decode[n]] for n in ENGINE.names})
        writer.table("rollouts", step, {n: [r[n] for r in own] for n in ROLLOUTS.names})
        writer.metrics(
            {"step": step, "clock_s": step * seconds_per_step, "val/accuracy": accuracies[step - 1],
             "training/finished_rows": batch, "training/trained_tokens": 10 * batch, "training/truncated_share": 0.25,
             "response_length/mean": 10.0, "response_length/max": 12}
        )  # fmt: skip
    if finish:
        wall_s = steps * seconds_per_step
        write_totals(writer, wall_s)
        writer.close(t=wall_s, status="finished")
    return Run(path)


def with_gpu(run, *, rollout_watts=300.0, other_watts=100.0, seconds_per_step=2.0):
    """The run with samples of a GPU, every 50 ms: busy, and drawing rollout_watts, in the first 1.2 s of each step."""
    end = run.trailer["t"]
    t = [0.05 * tick for tick in range(int(end / 0.05) + 1)]
    on = [now % seconds_per_step < 1.2 for now in t]
    energy = [0.0]
    for busy in on[:-1]:
        energy.append(energy[-1] + 0.05 * (rollout_watts if busy else other_watts))
    unknown = [None] * len(t)
    devices = dict.fromkeys(DEVICES.names, unknown) | {"t": t, "device": ["GPU-1"] * len(t), "energy_joules": energy}
    windows = {"t_begin": t[:-1], "t_end": t[1:], "device": ["GPU-1"] * (len(t) - 1),
               "metric": ["utilisation"] * (len(t) - 1), "value": [float(busy) for busy in on[:-1]]}  # fmt: skip
    for name, columns, schema in (("devices", devices, DEVICES), ("windows", windows, WINDOWS)):
        (run.path / name).mkdir()
        write_parquet(run.path / name / "part-000000.parquet", columns, schema)
    step_j = 1.2 * rollout_watts + (seconds_per_step - 1.2) * other_watts
    per_token = step_j * run.summary["steps"] / run.summary["trained_tokens"]
    (run.path / "summary.json").write_text(json.dumps(run.summary | {"joules_per_trained_token": per_token}))
    header, *records = (run.path / "trace.jsonl").read_text().splitlines(keepends=True)
    devices = [{"uuid": "GPU-1", "name": "made up", "index": 0}]
    header = json.dumps(json.loads(header) | {"devices": devices}, separators=(",", ":")) + "\n"
    (run.path / "trace.jsonl").write_text(header + "".join(records))
    return Run(run.path)


def measured_runs(folder):
    """Three seeds of PPO and of T-PPO with a GPU each, and beside them hardware.json and predictions.csv."""
    found = []
    for seed in range(3):
        slow = make_run(folder / f"ppo-s{seed}", accuracies=RISING, seconds_per_step=4.0 + seed)
        fast = make_run(folder / f"tppo-s{seed}", accuracies=RISING, seconds_per_step=2.0, batch=4)
        found += [with_gpu(slow, seconds_per_step=4.0 + seed), with_gpu(fast)]
    hardware = {"name": "test CPU", "peak_flops": 1e9, "memory_bytes_per_s": 1e9, "measured": True}
    (folder / "hardware.json").write_text(json.dumps(hardware))
    rows = [
        {"target": f"tppo-s{seed}", "calibrated_on": "ppo", "kind": kind, "drift_corrected": corrected,
         "quantity": "training_seconds", "unit": "s", "predicted": 10 + seed, "measured": 10.0, "error": seed / 10}
        for seed in range(3) for kind in ("forecast", "replay") for corrected in (False, True)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "predictions.csv", index=False)
    return found


def run_of_rows(path, rows, *, schedule=None, config="", metrics=()):
    """A run with nothing but rollout records (each a dict of what matters, in one part) and rows of metrics."""
    writer = RunWriter(path, header=plain_header() | {"schedule": schedule}, config_toml=config)
    plain = dict.fromkeys(ROLLOUTS.names, 0) | {"prompt_tokens": 5, "context_before": 5, "discarded": False,
                                                "finished": True, "reward": None}  # fmt: skip
    whole = [plain | {"trained_tokens": row["tokens"]} | row for row in rows]
    if whole:
        writer.table("rollouts", 1, {name: [row[name] for row in whole] for name in ROLLOUTS.names})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return Run(path)


def simulated_run(path, changes=None):
    """EXPERIMENT with whole fields of its sections replaced: {"schedule": {...}, "cluster": {...}}."""
    values = tomllib.loads(EXPERIMENT)
    for section, fields in (changes or {}).items():
        values[section] = fields if section in ("schedule", "cost") else {**values[section], **fields}
    simulate(load_experiment(values)).write(path)
    return Run(path)


EXPERIMENT = """
[workload]
steps = 6
prompts_per_step = 16
samples_per_prompt = 4
prompt_tokens = 128
max_response_tokens = 2048
seed = 7
response_tokens = { kind = "lognormal", mean_capped = 500.0, sigma = 0.9 }
[schedule]
kind = "synchronous"
[cluster]
engines = 2
gpus_per_engine = 1
max_rows_per_engine = 24
[cost]
kind = "analytic"
model = "Qwen2.5-0.5B"
gpu = "H100-SXM"
"""
SCHEDULES: dict[str, dict] = {
    "synchronous": {},
    "truncated": {"schedule": {"kind": "truncated", "window": 512}},
    "oversample": {"schedule": {"kind": "oversample", "factor": 1.5}},
    "asynchronous": {
        "schedule": {"kind": "asynchronous", "max_staleness": 1},
        "cluster": {"trainer": "separate", "trainer_gpus": 1},
    },
}
"""Name -> what differs from EXPERIMENT."""
