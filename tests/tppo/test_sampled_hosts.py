"""Every host that takes part in a run has a sampler, and joules are of all of them."""

import functools
import os

import pytest

from profiling.hosts import Host
from profiling.reader import Run
from tests.profiling.test_nvml_source import environment, library  # noqa: F401
from tests.tppo.ranks import on_ranks
from tppo import start

WATTS = (300, 200)
"""Of the GPU that each rank sees."""
ENERGY_WITHIN = 0.2
"""Enough to tell which GPUs were counted. Counters tick every 0.1 s: a run of 2 s may be a tick too short or long."""


def rank_of(config, library, work, names, rank):  # noqa: F811
    """Rank 1 is made to take itself for one of another host."""
    os.environ |= environment(library, FAKE_NVML_WORK=str(work), CUDA_VISIBLE_DEVICES=str(rank))
    start.this_host = lambda: Host(f"boot {names[rank]}", names[rank])
    start.train(config, show_progress=False)


@pytest.mark.parametrize("names", [("here", "far"), ("here", "here")], ids=["two hosts", "one host"])
def test_one_rank_of_each_host_samples_it_and_joules_are_of_all(make_config, tmp_path, library, names):  # noqa: F811
    work = tmp_path / "work"
    work.write_text("".join(f"{gpu} 0 1000 1.0 {watts}\n" for gpu, watts in enumerate(WATTS)))
    config = make_config("run", profile={"sampler": True, "interval_s": 0.1}, train={"steps": 2})
    on_ranks(2, functools.partial(rank_of, config, library, work, names))
    run = Run(config.output)
    far = names[0] != names[1]
    gpus = {"GPU-0000-0", "GPU-0000-1"} if far else {"GPU-0000-0"}
    assert set(run.devices.device) == gpus | ({"host", "host far"} if far else {"host"})
    assert run.unsampled_hosts == []
    wall_s = run.summary["wall_seconds"]
    assert run.devices.t.between(-0.1, wall_s + 10.0).all()
    assert run.summary["energy_joules"] == pytest.approx(sum(WATTS[: len(gpus)]) * wall_s, rel=ENERGY_WITHIN)
    notes = [record for record in run.trace if record["type"] == "note" and "host" in record]
    assert [(note["rank"], note["host"]) for note in notes] == ([(1, "far")] if far else [])


def test_joules_are_null_where_a_host_could_not_be_sampled(make_config, tmp_path, library):  # noqa: F811
    config = make_config("run", profile={"sampler": True, "interval_s": 0.1}, train={"steps": 1})
    (config.output).mkdir()
    (config.output / "hosts").write_text("a file where a folder should be")
    work = tmp_path / "work"
    work.write_text("0 0 1000 1.0 300\n")
    on_ranks(2, functools.partial(rank_of, config, library, work, ("here", "far")))
    run = Run(config.output)
    assert run.summary["energy_joules"] is None
    assert run.unsampled_hosts == ["far"]
