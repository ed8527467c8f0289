"""Files that people write: experiments, configurations, GPUs, models, lengths, calibrations."""

import csv
import io
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import strategies as st

from simulator import load_experiment
from simulator.calibrate import Calibration
from simulator.costs import resolve
from simulator.hardware import GPUS, load_gpu
from simulator.hardware.efficiency import FILES, load_efficiency
from simulator.lengths import read_lengths
from simulator.models.shape import CONFIGS, load_model
from simulator.workload import RowSource
from tests.fuzz.mutations import (
    BYTE_CHANGES,
    CELLS,
    JUNK,
    TEXTS,
    bytes_changed,
    hostile_table,
    hostile_text,
    json_text,
    toml_text,
)  # fmt: skip
from tests.fuzz.reader import Reader
from tppo.commands.train import read_config

EXPERIMENT: dict[str, Any] = {
    "workload": {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2, "prompt_tokens": 16,
                 "max_response_tokens": 64, "seed": 1, "group_correlation": 0.0, "length_growth_per_step": 0.0,
                 "response_tokens": {"kind": "lognormal", "mean": 20.0, "sigma": 0.8}},
    "schedule": {"kind": "truncated", "window": 32, "trailing_tokens": 2},
    "cluster": {"engines": 2, "gpus_per_engine": 1, "max_rows_per_engine": 4, "kv_tokens_per_engine": 4096,
                "dispatch": "round_robin", "trainer": "colocated"},
    "cost": {"kind": "affine", "decode_base_s": 0.01, "decode_per_row_s": 1e-5, "policy_update_per_token_s": 1e-5},
}  # fmt: skip
OTHERS: tuple[dict[str, Any], ...] = (
    {"cost": {"kind": "analytic", "model": "Qwen2.5-0.5B", "gpu": "H100-SXM", "weight_bytes": 2.0}},
    {"cost": {"kind": "calibrated", "file": "calibration.json"}},
    {"schedule": {"kind": "oversample", "factor": 1.5}},
    {"schedule": {"kind": "tail_batching", "threshold": 32}},
    {"schedule": {"kind": "asynchronous", "max_staleness": 1},
     "cluster": {"engines": 2, "trainer": "separate", "trainer_gpus": 1}},
    {"workload": {**EXPERIMENT["workload"], "response_tokens": {"kind": "mixture", "parts": [
        {"weight": 1.0, "lengths": {"kind": "gamma", "mean": 9.0, "shape": 2.0}},
        {"weight": 2.0, "lengths": {"kind": "pareto", "minimum": 4.0, "alpha": 1.5}}]}}},
    {"workload": {**EXPERIMENT["workload"], "response_tokens": {"kind": "empirical", "file": "l.csv", "column": "n"}}},
    {"workload": {**EXPERIMENT["workload"], "response_tokens": {"kind": "run", "path": "."}}},
)  # fmt: skip
EXPERIMENTS = (EXPERIMENT, *({**EXPERIMENT, **own} for own in OTHERS))
CONFIG: dict[str, Any] = {
    "output": "runs/x",
    "model": {"path": "model", "dtype": "auto", "lora_rank": 0, "trust_remote_code": False},
    "data": {"task": "dataset", "path": "data.jsonl", "prompt_column": "q", "answer_column": "a",
             "prompt_template": "{problem}", "seed": 0},
    "reward": {"kind": "math", "format_pattern": "\\\\boxed\\{.*\\}", "format_reward": 0.1, "timeout_s": 1.0},
    "algorithm": {"name": "tppo", "lam": 0.95, "trailing_tokens": 2},
    "rollout": {"prompts_per_step": 8, "samples_per_prompt": 1, "max_response_tokens": 24, "window": 10, "top_p": 1.0,
                "stop_token_ids": [1, 2]},
    "optimizer": {"policy_lr": 1e-4, "betas": [0.9, 0.95]},
    "train": {"steps": 4, "mini_batches": 2, "seed": 3, "checkpoint_every": 2},
    "evaluation": {"every": 2, "problems": 8},
    "profile": {"sampler": False, "torch_steps": "1:2"},
    "guards": {}, "logging": {}, "parallel": {"replicas": 1}, "ray": {},
}  # fmt: skip
COSTS = {"decode_base_s": 0.01, "decode_per_row_s": 1e-4, "decode_per_context_token_s": 1e-7}
CALIBRATION = {
    "schema": 1, "costs": COSTS, "runs": ["ppo"], "probe_seconds": 0.5, "evaluation_s": None,
    "fits": {"decode": {"coefficients": COSTS, "interval": {name: [0.0, 1.0] for name in COSTS}, "r2": 0.9,
                        "observations": 5, "total_measured_s": 1.0, "total_fitted_s": 1.0, "scale": 1.0},
             "prefill": None},
}  # fmt: skip
LENGTHS = [{"n": 12, "other": "a"}, {"n": 7.5, "other": "b"}, {"n": 900, "other": "c"}]


def experiment_of(folder: Path) -> Any:
    return load_experiment(folder / "experiment.toml")


def config_of(folder: Path) -> Any:
    return read_config(folder / "run.toml", [], output=None, resume=None)


def calibration_of(folder: Path) -> Any:
    Calibration.load(folder / "calibration.json").as_dict()
    values = {**EXPERIMENT, "cost": {"kind": "calibrated", "file": str(folder / "calibration.json")}}
    return resolve(load_experiment(values))


def model_of(folder: Path) -> Any:
    model = load_model(folder / "config.json")
    assert model.parameters >= 0
    return model.forward_flops(10, 100), model.kv_bytes_per_token(), model.parameters_read(3)


def csv_text(cells: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(cells)
    return text.getvalue().encode("utf-8", "surrogatepass")


def rows_of_lengths(name: str) -> Any:
    def read(folder: Path) -> Any:
        assert len(read_lengths(folder / name, "n"))
        lengths = {"kind": "empirical", "file": str(folder / name), "column": "n", "order": "sampled"}
        workload = {**EXPERIMENT["workload"], "response_tokens": lengths}
        drawn = RowSource(load_experiment({**EXPERIMENT, "workload": workload}).workload).rows(0, 16).response_tokens
        assert np.all((drawn >= 1) & (drawn <= 64))

    return read


def parquet_of(records: list[dict[str, Any]]) -> bytes:
    content = io.BytesIO()
    pd.DataFrame(records).to_parquet(content, index=False)
    return content.getvalue()


CSV_CELLS = st.lists(st.lists(st.sampled_from(CELLS + TEXTS) | JUNK, max_size=4), max_size=6)
HOSTILE_CSV = st.one_of(
    st.builds(lambda cells: csv_text([["n", "other"], [3, "a"], *cells]), CSV_CELLS),
    st.builds(csv_text, CSV_CELLS),
    st.builds(bytes_changed, st.just(csv_text([["n", "other"], [12, "a"], [7.5, "b"]])), BYTE_CHANGES),
)


def named(name: str, content: st.SearchStrategy[bytes]) -> st.SearchStrategy[dict[str, bytes]]:
    return st.builds(lambda own: {name: own}, content)


def texts(name: str, trees: Any, write: Any) -> st.SearchStrategy[dict[str, bytes]]:
    return named(name, st.one_of([hostile_text(tree, write) for tree in trees]))


READERS = (
    Reader("experiment TOML", texts("experiment.toml", EXPERIMENTS, toml_text), experiment_of, share=3),
    Reader("run configuration TOML", texts("run.toml", (CONFIG,), toml_text), config_of, share=3),
    Reader("calibration.json", texts("calibration.json", (CALIBRATION,), json_text), calibration_of),
    Reader("Hugging Face config.json", texts("config.json", [json.loads(path.read_text()) for path in
           sorted(CONFIGS.glob("*.json"))], json_text), model_of, share=2),
    Reader("GPU TOML", texts("gpu.toml", [tomllib.loads((GPUS / "h100-sxm.toml").read_text())], toml_text),
           lambda folder: load_gpu(folder / "gpu.toml")),
    Reader("efficiency TOML", texts("own.toml", [tomllib.loads((FILES / "hopper-vllm.toml").read_text())], toml_text),
           lambda folder: load_efficiency("hopper", "vllm", folder / "own.toml")),
    Reader("lengths CSV", named("lengths.csv", HOSTILE_CSV), rows_of_lengths("lengths.csv")),
    Reader("lengths Parquet", named("lengths.parquet", hostile_table(parquet_of(LENGTHS))),
           rows_of_lengths("lengths.parquet")),
)  # fmt: skip
