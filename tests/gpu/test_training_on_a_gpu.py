"""T-PPO at the size of Qwen2.5-0.5B, random weights, on a real GPU: speed and MFU are printed and recorded."""

import math

import pytest
import torch

from profiling.reader import Run
from simulator.hardware import gpu_reported_as
from tests.tppo.at_size import config_for, random_model
from tppo.start import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("half") / "model", "Qwen2.5-0.5B")


@pytest.mark.parametrize("algorithm", ["tppo", "ppo"])
def test_a_step_at_half_a_billion_parameters(model, tmp_path, record_property, algorithm):
    gpu = gpu_reported_as(torch.cuda.get_device_name())
    config = config_for(
        model, tmp_path / "run", rows=64, tokens=1536, algorithm={"name": algorithm},
        profile={"sampler": True, "interval_s": 0.1, "cuda_events": True, "peak_flops": gpu and gpu.bf16_flops},
    )  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    train(config, show_progress=False)
    run = Run(config.output)
    steps = run.metrics[run.metrics.step >= 2]
    found = {
        "gpu": torch.cuda.get_device_name(),
        "tokens_per_s": float(steps["perf/throughput"].median()),
        "mfu_actor": float(steps["perf/mfu/actor"].median()),
        "mfu": float(steps["perf/mfu"].median()),
        "seconds_per_step": float(steps["timing_s/step"].median()),
        "rollout_s": float(steps["timing_s/gen"].median()),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "engine_mismatch": float(steps["rollout_corr/log_prob_diff_mean"].median()),
    }
    print(f"\n  {algorithm}: {found}")
    for name, value in found.items():
        record_property(name, value)
    assert found["tokens_per_s"] > 1000
    assert found["engine_mismatch"] < 0.05  # both compute in bfloat16
    assert gpu is None or 0.02 < found["mfu_actor"] < 1
    assert all(math.isfinite(loss) for loss in steps["actor/pg_loss"])
    assert run.summary["gpu_seconds"] == pytest.approx(sum(run.summary["ledger"].values()))


def test_shards_on_the_cpu_between_passes_train_alike(model, tmp_path):
    losses = []
    for offload in (False, True):
        config = config_for(
            model, tmp_path / f"offload-{offload}", rows=8, tokens=96, parallel={"cpu_offload": offload},
            rollout={"draws": "row"}, train={"steps": 2},
        )  # fmt: skip
        train(config, show_progress=False)
        losses.append(Run(config.output).metrics["actor/pg_loss"].dropna().tolist())
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
