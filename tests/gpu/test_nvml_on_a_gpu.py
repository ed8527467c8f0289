"""Needs an NVIDIA driver; skipped visibly without one."""

import itertools
import time

import pytest
import torch

from profiling import Profiler
from profiling.estimators import TICK_S
from profiling.reader import Run
from profiling.sources.nvml import NoDriver, NvmlSource
from tppo.torch_traces import DeviceTimes

pytestmark = pytest.mark.gpu


@pytest.fixture
def source():
    try:
        found = NvmlSource()
    except NoDriver as error:
        pytest.skip(f"no NVIDIA driver: {error}")
    yield found
    found.close()


def test_a_real_gpu_answers_within_its_physical_limits(source):
    for sample in source.read(0.0):
        assert sample.device.startswith("GPU-")
        assert sample.utilisation is None or 0 <= sample.utilisation <= 1
        assert sample.power_watts is None or 5 < sample.power_watts < 2000
        assert sample.memory_bytes is None or sample.memory_bytes > 0


def test_the_energy_counter_never_runs_backwards(source):
    readings = [source.read(0.0)[0].energy_joules for _ in range(3)]
    known = [value for value in readings if value is not None]
    assert known == sorted(known)


def test_the_drivers_own_samples_follow_each_other(source, capsys):
    start = time.perf_counter()
    source.windows(0.0)
    time.sleep(4.0)
    windows = source.windows(time.perf_counter() - start)
    states = {m["utilisation_windows"] for m in source.capabilities.states.values() if "utilisation_windows" in m}
    if states != {"ok"}:
        pytest.skip(f"the driver keeps no utilisation samples: {states}")
    lengths = sorted(window.t_end - window.t_begin for window in windows)
    with capsys.disabled():
        print(f"\n  ring cadence {lengths[len(lengths) // 2]:.4f} s, {len(windows)} samples in 4 s")
    assert 0.01 < lengths[0] <= lengths[-1] < 1.6
    assert all(0 <= window.utilisation <= 1 for window in windows)


def test_the_energy_counters_tick_is_about_what_the_estimators_assume(source, capsys):
    changes, last, began = [], None, time.perf_counter()
    while time.perf_counter() - began < 3.0:
        joules = source.read(0.0)[0].energy_joules
        if joules is None:
            pytest.skip("this GPU has no energy counter")
        if joules != last:
            changes.append(time.perf_counter())
            last = joules
    gaps = sorted(b - a for a, b in itertools.pairwise(changes))
    with capsys.disabled():
        print(f"\n  energy tick {gaps[len(gaps) // 2]:.4f} s, {len(changes)} changes in 3 s")
    assert gaps[len(gaps) // 2] < 3 * TICK_S


def test_gpm_says_how_much_of_the_gpu_works(source, capsys):
    source.read(0.0)
    time.sleep(0.6)
    source.read(0.6)
    found = {w.metric: w.value for w in source.windows(0.6) if w.metric != "utilisation"}
    states = {m.get("gpm") for m in source.capabilities.states.values()}
    if states != {"ok"}:
        pytest.skip(f"no GPM here: {states}")
    with capsys.disabled():
        print(f"\n  GPM: {found}")
    assert {"sm_activity", "sm_occupancy", "tensor_activity", "dram_activity"} <= set(found)
    assert all(0 <= value <= 1 for value in found.values())


def test_a_reading_of_all_metrics_takes_no_longer_than_a_tick(source, capsys):
    source.read(0.0)
    took = []
    for tick in range(1, 41):
        begin = time.perf_counter()
        source.read(0.1 * tick)
        took.append(time.perf_counter() - begin)
    with capsys.disabled():
        print(f"\n  a reading takes {1e3 * sorted(took)[20]:.2f} ms, {1e3 * max(took):.2f} ms at most")
    assert sorted(took)[20] < 0.05


def test_phases_on_the_gpu_end_after_the_host_has_left_them(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA build of torch")
    with Profiler(tmp_path / "run", sampler_interval_s=None) as profiler:
        times = DeviceTimes(profiler)
        a = torch.randn(4096, 4096, device="cuda")
        with profiler.phase("update_policy", 1), times.phase("update_policy", 1):
            for _ in range(200):
                a @ a
        times.collect(everything=True)
    run = Run(tmp_path / "run")
    host, device = run.phases.iloc[0], run.device_phases.iloc[0]
    assert device.t_end > host.t_end
    assert abs(device.t_start - host.t_start) < 0.1
