import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model that is not there must not be looked for on the network

import pytest
import torch

from tppo.config import DataConfig, RunConfig
from tppo.data.arithmetic import ArithmeticTask
from tppo.data.tokenizer import character_tokenizer
from tppo.models.policy import new_qwen2, save_policy
from tppo.quiet import quieten_libraries
from tppo.warmstart import WarmStartConfig, warm_start

pytest_plugins = ["tests.reliability"]
quieten_libraries()
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Directory of a random two-layer Qwen2 with the character tokenizer; responses end early now and then."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = character_tokenizer()
    task = ArithmeticTask(median_steps=2, sigma=0.5, max_steps=6, seed=0)
    model = new_qwen2(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        layers=2, hidden_size=32, heads=2, kv_heads=1, intermediate_size=48,
        max_tokens=task.max_prompt_tokens + 80, seed=1,
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] += 0.35  # some responses end by themselves
    save_policy(model, tokenizer, path)
    return path


@pytest.fixture(scope="session")
def answering_model(tmp_path_factory):
    """Directory of a one-layer Qwen2, trained for two seconds: it answers problems of one or two steps in the right
    form, and about one in ten correctly."""
    data = DataConfig(median_steps=1, sigma=0.3, max_steps=2)
    task = ArithmeticTask(median_steps=1, sigma=0.3, max_steps=2, seed=0)
    settings = WarmStartConfig(layers=1, hidden_size=32, heads=2, kv_heads=1, intermediate_size=64, steps=150)
    return warm_start(settings, data, task, tmp_path_factory.mktemp("answering"), lambda step, loss: None)


@pytest.fixture
def one_process(monkeypatch):
    """`tppo plan` simulates small questions in this process: those that it would start take longer than they save."""
    monkeypatch.setattr("simulator.processes.os.cpu_count", lambda: 1)


@pytest.fixture
def make_config(tiny_model, tmp_path):
    """A run of a few seconds; keyword arguments replace whole sections' fields: rollout={"window": 3}."""

    def make(name, **sections):
        base = {
            "output": str(tmp_path / name),
            "model": {"path": str(tiny_model)},
            "data": {"median_steps": 2, "sigma": 0.5, "max_steps": 6},
            "algorithm": {"name": "tppo", "trailing_tokens": 2},
            "rollout": {"prompts_per_step": 8, "max_response_tokens": 24, "window": 10},
            "value": {"pretrain_rows": 8, "pretrain_epochs": 1},
            "train": {"steps": 4, "mini_batches": 2, "seed": 3},
            "evaluation": {"every": 2, "problems": 8},
            "profile": {"sampler": False},
        }
        for section, values in sections.items():
            base[section] = {**base.get(section, {}), **values}
        return RunConfig.model_validate(base)

    return make
