"""Needs an NVIDIA driver; skipped visibly without one.

What sensors turn out to do is printed, kept as a property of its test, and written to nvml.json in the directory that
TPPO_GPU_RECORD names. tests/profiling/test_gpu_tests_on_the_stand_in.py runs this file on a simulated sensor.
"""

import itertools
import json
import os
import random
import statistics
import threading
import time
from pathlib import Path

import pynvml
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


@pytest.fixture(scope="module")
def recorded():
    """What was measured so far, written in the end."""
    found = {}
    yield found
    if found and (folder := os.environ.get("TPPO_GPU_RECORD")):
        path = Path(folder) / "nvml.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture
def record(recorded, source, record_property, capsys):
    def keep(name, value):
        recorded.setdefault("devices", [device.name for device in source.devices()])
        recorded[name] = value
        record_property(name, value)
        with capsys.disabled():
            print(f"\n  {name}: {value} ({recorded['devices'][0]})")

    return keep


@pytest.fixture
def uneven_load():
    """Kernels for uneven lengths of time, for readings change only then; without CUDA whatever else the GPU does."""
    stop, lengths = threading.Event(), random.Random(0)

    def work():
        a = torch.randn(4096, 4096, device="cuda")
        while not stop.is_set():
            until = time.perf_counter() + lengths.uniform(0.05, 0.5)
            while time.perf_counter() < until:
                a @ a
                torch.cuda.synchronize()
            stop.wait(lengths.uniform(0.05, 0.5))

    thread = threading.Thread(target=work)
    if torch.cuda.is_available():
        thread.start()
    yield
    stop.set()
    if thread.ident is not None:
        thread.join()


def test_a_real_gpu_answers_within_its_physical_limits(source):
    samples = list(source.read(0.0))
    assert len(samples) == len(source.devices()) > 0
    for sample in samples:
        assert sample.device.startswith(("GPU-", "MIG-"))
        assert sample.utilisation is None or 0 <= sample.utilisation <= 1
        assert sample.power_watts is None or 5 < sample.power_watts < 2000
        assert sample.memory_bytes is None or sample.memory_bytes > 0


def test_the_energy_counter_never_runs_backwards(source):
    readings = [[sample.energy_joules for sample in source.read(t)] for t in (0.0, 0.1, 0.2)]
    for own in zip(*readings, strict=True):
        known = [joules for joules in own if joules is not None]
        assert known == sorted(known)


def test_the_drivers_own_samples_follow_each_other(source, record):
    start = time.perf_counter()
    source.windows(time.perf_counter() - start)
    time.sleep(3.0)
    windows = [w for w in source.windows(time.perf_counter() - start) if w.metric == "utilisation"]
    states = {m["utilisation_windows"] for m in source.capabilities.states.values() if "utilisation_windows" in m}
    if states != {"ok"}:
        pytest.skip(f"the driver keeps no utilisation samples: {states}")
    lengths = sorted(window.t_end - window.t_begin for window in windows)
    record("ring_cadence_s", round(statistics.median(lengths), 4))
    assert 0.01 < lengths[0] <= lengths[-1] < 1.6
    assert all(0 <= window.value <= 1 for window in windows)


def test_utilisation_is_the_mean_over_a_window_of_a_second_or_less(source, record, uneven_load):
    """Under an uneven load a reading changes with every window."""
    handles = {d.uuid: pynvml.nvmlDeviceGetHandleByUUID(d.uuid) for d in source.devices() if d.part_of is None}
    changed = {uuid: [] for uuid in handles}
    last = {}
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < 5.0:
        for uuid, handle in handles.items():
            try:
                reading = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            except pynvml.NVMLError as error:
                pytest.skip(f"this GPU has no utilisation: {error}")
            if last.setdefault(uuid, reading) != reading:
                changed[uuid].append(now)
                last[uuid] = reading
        time.sleep(0.005)
    gaps = [b - a for a, b in itertools.pairwise(max(changed.values(), key=len))]
    if len(gaps) < 3:
        pytest.skip("readings do not change: nothing ran on the GPU, and this torch has no CUDA")
    record("utilisation_window_s", round(statistics.median(gaps), 3))
    assert 0.05 < statistics.median(gaps) < 1.5


def test_the_energy_counters_tick_is_about_what_the_estimators_assume(source, record):
    changes, last, began = [], None, time.perf_counter()
    while (now := time.perf_counter()) - began < 2.0:
        joules = next(source.read(now - began)).energy_joules  # of the first GPU: no other is read
        if joules is None:
            pytest.skip("this GPU has no energy counter")
        if joules != last:
            changes.append(now)
            last = joules
    gaps = [b - a for a, b in itertools.pairwise(changes)]
    assert gaps, "the counter stands still"
    record("energy_tick_s", round(statistics.median(gaps), 4))
    assert statistics.median(gaps) < 3 * TICK_S


def test_gpm_says_how_much_of_the_gpu_works(source, record, uneven_load):
    list(source.read(0.0))
    time.sleep(0.6)
    list(source.read(0.6))
    found = {w.metric: round(w.value, 4) for w in source.windows(0.6) if w.metric != "utilisation"}
    states = {m["gpm"] for m in source.capabilities.states.values() if "gpm" in m}
    if states != {"ok"}:
        pytest.skip(f"no GPM here: {states}")
    record("gpm", found)
    assert {"sm_activity", "sm_occupancy", "tensor_activity", "dram_activity"} <= set(found)
    assert all(0 <= value <= 1 for value in found.values())


def test_a_reading_of_all_metrics_takes_no_longer_than_a_tick(source, record):
    list(source.read(0.0))
    source.windows(0.0)  # says whether there is a ring: utilisation is polled where not
    took = []
    for tick in range(1, 41):
        begin = time.perf_counter()
        list(source.read(0.1 * tick))
        took.append(time.perf_counter() - begin)
    record("reading_ms", {"median": round(1e3 * statistics.median(took), 3), "most": round(1e3 * max(took), 3)})
    assert statistics.median(took) < 0.05


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
