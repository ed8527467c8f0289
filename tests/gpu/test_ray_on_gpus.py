"""Rollout engines of a Ray cluster on real GPUs: weights by NCCL, and who gets which GPU."""

import json

import pytest
import torch

from profiling.reader import Run
from tests.tppo.ranks import on_ranks
from tppo.start import train

pytest.importorskip("ray", reason="needs the extra ray")
GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.gpu
one_gpu = pytest.mark.skipif(GPUS < 1, reason="needs an NVIDIA GPU and a CUDA build of torch")
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two NVIDIA GPUs: NCCL takes no two ranks on one")
four_gpus = pytest.mark.skipif(GPUS < 4, reason="needs four NVIDIA GPUs: two ranks and two engines")


def losses_of(run):
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [row["actor/pg_loss"] for row in rows if row.get("actor/pg_loss") is not None]


def run_on(make_config, name, **sections):
    own = {"rollout": {"draws": "row", "dtype": "float32"}, "model": {"dtype": "float32"}, "evaluation": {"every": 0}}
    for section, values in sections.items():
        own[section] = {**own.get(section, {}), **values}
    config = make_config(name, **own)
    train(config, show_progress=False)
    return Run(config.output)


@one_gpu
def test_an_engine_on_the_trainers_gpu_gives_its_memory_back_while_the_policy_trains(make_config):
    one = run_on(make_config, "one")
    there = run_on(make_config, "there", ray={"address": "local"}, rollout={"release_memory": True})
    assert there.header["gpus"] == 1
    assert losses_of(there) == pytest.approx(losses_of(one), abs=1e-4)


@two_gpus
def test_weights_reach_a_separate_engine_by_nccl(make_config):
    one = run_on(make_config, "one")
    there = run_on(make_config, "there", ray={"address": "local", "layout": "separate", "weight_sync": "nccl"})
    assert (there.header["gpus"], there.header["trainer_gpus"]) == (2, 1)
    assert losses_of(there) == pytest.approx(losses_of(one), abs=1e-4)


@two_gpus
@pytest.mark.parametrize("layout", ["colocated", pytest.param("separate", marks=four_gpus)])
def test_sharded_trainers_share_their_gpus_with_engines_or_leave_them_theirs(make_config, layout):
    """Two ranks, two engines. Separate: NCCL between ranks, and beside it between the first rank and the engines."""
    sections = {"rollout": {"release_memory": layout == "colocated"}}
    one = run_on(make_config, "one", **sections)
    ray = {"address": "local", "engines": 2, "layout": layout}
    on_ranks(2, lambda rank: run_on(make_config, "there", ray=ray, **sections))
    there = Run(one.path.parent / "there")
    trainers = 2 if layout == "separate" else 0
    assert (there.header["ranks"], there.header["gpus"], there.header["trainer_gpus"]) == (2, 2 + trainers, trainers)
    assert there.rollouts.row.tolist() == one.rollouts.row.tolist()
    assert losses_of(there) == pytest.approx(losses_of(one), abs=1e-4)
