import json

import pytest
import torch

from profiling import Profiler
from profiling.errors import ConfigError
from profiling.exports import TORCH_PIDS, chrome_trace
from profiling.reader import Run
from tppo.cli import main
from tppo.start import train
from tppo.torch_traces import ANCHOR, ANCHOR_AGAIN_S, DeviceTimes, steps_of


def test_steps_are_written_as_a_range_or_one():
    assert steps_of("") is None
    assert steps_of("3:5") == (3, 5)
    assert steps_of("3") == (3, 3)
    for wrong in ("0", "5:3", "a", "3:", "-1:2"):
        with pytest.raises(ConfigError, match=r"profile\.torch_steps"):
            steps_of(wrong)


def test_torchs_profile_has_the_runs_clock_and_lies_in_its_phases(make_config):
    """Each phase is an event of torch's too (record_function): both clocks must tell the same of it."""
    config = make_config("run", profile={"sampler": False, "torch_steps": "2:3"})
    train(config, show_progress=False)
    run = Run(config.output)
    own = json.loads((run.path / "torch" / "steps-2-3.json").read_text())["traceEvents"]
    (anchor,) = (event for event in own if event.get("name") == ANCHOR and event.get("ph") == "X")
    exact_s = 0.001 + anchor["dur"] / 2e6  # the anchor was read somewhere in its event
    before, after = [], []
    for name in ("rollout", "update_policy"):
        ours = run.phases[(run.phases.name == name) & run.phases.step.isin([2, 3])].sort_values("t_start")
        theirs = sorted((e for e in own if e.get("name") == f"phase {name}"), key=lambda e: e["ts"])
        theirs = [e for e in theirs if e.get("cat") == "user_annotation"]
        assert len(theirs) == len(ours) == 2
        for phase, event in zip(ours.itertuples(), theirs, strict=True):
            before.append(event["ts"] / 1e6 - phase.t_start)
            after.append(phase.t_end - (event["ts"] + event["dur"]) / 1e6)
    # The phase is around the event; between their boundaries this process may have to wait for a core now and then.
    assert min(*before, *after) > -exact_s
    assert min(before) < 0.004 + exact_s
    assert min(after) < 0.004 + exact_s
    notes = [record["text"] for record in run.trace if record["type"] == "note"]
    assert any("torch.profiler ran in steps 2 to 3" in text for text in notes)
    joined = chrome_trace(run, 2, 3)["traceEvents"]
    assert sum(isinstance(e.get("pid"), int) and e["pid"] >= TORCH_PIDS for e in joined) > 100
    other = chrome_trace(run, 4, 4)["traceEvents"]
    assert not any(isinstance(e.get("pid"), int) and e["pid"] >= TORCH_PIDS and "aten" in e["name"] for e in other)


@pytest.mark.slow
def test_one_step_and_steps_that_the_run_does_not_reach_are_written_all_the_same(make_config):
    late = make_config("late", profile={"sampler": False, "torch_steps": "3:9"}, evaluation={"every": 0})
    train(late, show_progress=False)
    assert (late.output / "torch" / "steps-3-4.json").exists()
    config = make_config("run", profile={"sampler": False, "torch_steps": 4}, evaluation={"every": 0})
    train(config, show_progress=False)
    assert (config.output / "torch" / "steps-4-4.json").exists()


class FakeGpu:
    """A GPU whose queue is `behind_s` longer than the host's; its clock started 1,000 s before ours."""

    def __init__(self, clock, behind_s):
        self.clock, self.behind_s, self.waits = clock, behind_s, 0

    def event(self):
        gpu = self

        class Event:
            def record(self):
                self.at = gpu.clock() + gpu.behind_s

            def query(self):
                return gpu.clock() >= self.at

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        return Event()

    def synchronise(self):
        self.waits += 1


class SetProfiler(Profiler):
    time = 0.0

    def now(self):
        return self.time


def test_phases_on_the_gpu_are_read_when_they_are_over_and_no_sooner(tmp_path):
    with SetProfiler(tmp_path / "run", sampler_interval_s=None) as profiler:
        gpu = FakeGpu(profiler.now, behind_s=0.0)
        times = DeviceTimes(profiler, event=gpu.event, synchronise=gpu.synchronise)
        waits = gpu.waits
        gpu.behind_s = 2.0
        with times.phase("update_policy", 1), times.phase("inner", 1):
            profiler.time = 1.0
        times.collect()
        assert gpu.waits == waits  # the host did not wait
        with times.phase("update_value", 1):
            profiler.time = 3.5
        times.collect()
        profiler.time = 3.5 + ANCHOR_AGAIN_S
        times.collect(everything=True)
    found = Run(tmp_path / "run").device_phases
    assert found.name.to_list() == ["inner", "update_policy", "update_value"]
    assert found.t_start.to_list() == pytest.approx([2.0, 2.0, 3.0])
    assert found.t_end.to_list() == pytest.approx([3.0, 3.0, 5.5])
    assert found.depth.to_list() == [1, 0, 0]


def test_wrong_requests_are_refused_before_anything_is_written(make_config, capsys, tmp_path):
    config = make_config("run", profile={"sampler": False, "torch_steps": "9:1"})
    with pytest.raises(ConfigError, match="FIRST:LAST"):
        train(config)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            train(make_config("run", profile={"sampler": False, "cuda_events": True}))
    assert not (tmp_path / "run").exists()
    assert main(["train", "--fields"]) == 0
    assert "--profile.torch_steps" in capsys.readouterr().out
