"""The NVML source against a stand-in library that nvidia-ml-py really loads."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from profiling.schema import WINDOW_METRICS
from profiling.sources import Device, gpm
from profiling.sources.nvml import order_note, visible

READ = """
import json
from dataclasses import asdict
from profiling.sources.nvml import NoDriver, NvmlSource
try:
    source = NvmlSource()
except NoDriver as error:
    print(json.dumps({"no driver": str(error)}))
else:
    samples = [asdict(sample) for sample in source.read(0.0)]
    print(json.dumps({"samples": samples, "states": source.capabilities.states}))
    source.close()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the stand-in NVML library")
    target = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("fake_nvml.c")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", "-o", str(target), str(source)]
    subprocess.run(command, check=True)
    return target.parent


def environment(library, faults="", **extra):
    known = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    return known | {"LD_LIBRARY_PATH": str(library), "FAKE_NVML_FAULTS": f";{faults};"} | extra


def read(library, faults="", **extra):
    done = subprocess.run(
        [sys.executable, "-c", READ],
        env=environment(library, faults, **extra),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_every_metric_is_read_in_its_unit(library):
    got = read(library)
    assert got["samples"][1] == {
        "device": "GPU-0000-1", "utilisation": 0.41, "memory_bytes": 70.0, "power_watts": 250.5,
        "power_instant_watts": 250.5,
        "energy_joules": 1234.5, "sm_clock_mhz": 1980.0, "temperature_c": 41.0, "event_reasons": 4,
    }  # fmt: skip
    assert set(got["states"]["GPU-0000-0"].values()) == {"ok"}
    assert {"gpm", "energy_joules", "power_instant_watts"} <= set(got["states"]["GPU-0000-0"])


def test_what_a_gpu_cannot_tell_is_null_with_the_reason(library):
    faults = (
        "nvmlDeviceGetTotalEnergyConsumption=3;nvmlDeviceGetPowerUsage@1=4;nvmlDeviceGetTemperature=13;"
        "nvmlDeviceGetUtilizationRates@0=15"
    )
    got = read(library, faults)
    first, second = got["samples"]
    states = got["states"]
    assert first["energy_joules"] is None
    assert states["GPU-0000-0"]["energy_joules"] == "not supported"
    assert (first["power_watts"], second["power_watts"]) == (250.5, None)
    assert states["GPU-0000-1"]["power_watts"] == "no permission"
    assert states["GPU-0000-0"]["temperature_c"] == "missing symbol"
    assert (first["utilisation"], second["utilisation"]) == (None, 0.41)
    assert states["GPU-0000-0"]["utilisation"] == "lost"


@pytest.mark.parametrize("code", [9, 12, 18], ids=["not loaded", "no library", "version mismatch"])
def test_a_library_without_a_driver_means_no_gpu(library, code):
    assert "no driver" in read(library, f"nvmlInitWithFlags={code}")


def test_an_old_driver_without_fields_is_read_metric_by_metric(library):
    got = read(library, "nvmlDeviceGetFieldValues=13;nvmlGpmQueryDeviceSupport=3;nvmlDeviceGetMemoryInfo=25")
    first, states = got["samples"][0], got["states"]["GPU-0000-0"]
    assert (first["power_watts"], first["energy_joules"]) == (250.5, 1234.5)
    assert (first["power_instant_watts"], states["power_instant_watts"]) == (None, "missing symbol")
    assert (states["gpm"], states["memory_bytes"]) == ("not supported", "version mismatch")


def test_a_gpu_that_cannot_be_opened_does_not_hide_the_others(library):
    got = read(library, "nvmlDeviceGetUUID@0=4")
    assert [s["device"] for s in got["samples"]] == ["GPU-0000-1"]
    assert got["states"]["GPU 0"] == {"all": "no permission"}


def test_a_mig_instance_comes_with_its_gpu_which_alone_counts_energy(library):
    everything = read(library, FAKE_NVML_MIG="2")
    assert [s["device"] for s in everything["samples"]] == ["GPU-0000-0", "MIG-0000-0", "MIG-0000-1", "GPU-0000-1"]
    got = read(library, FAKE_NVML_MIG="2", CUDA_VISIBLE_DEVICES="MIG-0000-1")
    gpu, instance = got["samples"]
    assert (gpu["device"], instance["device"]) == ("GPU-0000-0", "MIG-0000-1")
    assert gpu["energy_joules"] == 1234.5
    assert (instance["energy_joules"], instance["utilisation"], instance["memory_bytes"]) == (None, None, 70.0)
    assert got["states"]["MIG-0000-1"]["energy_joules"] == "not supported"
    assert got["states"]["MIG-0000-1"]["gpm"] == "ok"


OVER_TIME = """
import ctypes, json, sys, time
library = ctypes.CDLL("libnvidia-ml.so.1")
library.sim_set_time.argtypes = [ctypes.c_double]
clock = zero = 10_000.0
step_s = 0.0
time.perf_counter, time.time = lambda: clock, lambda: clock + step_s
library.sim_set_time(clock)
from profiling.sources.nvml import NvmlSource
source, found = NvmlSource(links=True), []
for turn in range(int(sys.argv[2])):
    if turn == 4:
        step_s = float(sys.argv[1])
    list(source.read(clock - zero))
    found += source.windows(clock - zero)
    clock += 0.6
    library.sim_set_time(clock)
print(json.dumps({"windows": [[w.device, w.metric, w.t_begin, w.t_end, w.value] for w in found],
                  "processes": source.processes(), "end": clock - zero}))
"""
"""A reading every 0.6 s of a clock of the test's own; the wall clock is set before the fifth. Both begin at 10,000 s:
set back by an hour, the wall clock is still above zero."""


def over_time(library, clock_step_s=0.0, turns=4, **extra):
    done = subprocess.run([sys.executable, "-c", OVER_TIME, str(clock_step_s), str(turns)],
                          env=environment(library, **extra), capture_output=True, text=True, check=True)  # fmt: skip
    return json.loads(done.stdout)


def test_gpm_and_links_are_means_between_two_readings(library):
    got = over_time(library, turns=3, FAKE_NVML_SHARED="1")
    own = [w for w in got["windows"] if w[0] == "GPU-0000-0"]
    values = {w[1]: w[4] for w in own}
    assert {*values, "utilisation"} <= set(WINDOW_METRICS)
    assert values["sm_activity"] == pytest.approx(0.4)
    assert values["dram_activity"] == pytest.approx(0.12)
    assert values["nvlink_sent_bytes_per_s"] == 100 * 2**20
    first = next(w for w in own if w[1] == "sm_activity")
    assert first[2:4] == pytest.approx([0.0, 0.6])
    assert [p["memory_bytes"] for p in got["processes"]["GPU-0000-1"]] == [2**30]
    assert "GPU-0000-0" not in got["processes"]


def test_pcie_traffic_without_gpm_is_read_from_its_counters(library):
    got = over_time(library, turns=2, FAKE_NVML_FAULTS=";nvmlGpmQueryDeviceSupport=3;")
    values = {w[1]: w[4] for w in got["windows"]}
    assert values == {"pcie_sent_bytes_per_s": 1000 * 1024, "pcie_received_bytes_per_s": 1001 * 1024}


BY_THE_CLOCK = """
import ctypes, json, sys
library = ctypes.CDLL("libnvidia-ml.so.1")
library.sim_set_time.argtypes = [ctypes.c_double]
library.sim_set_time(0.0)
from profiling.sources.nvml import NvmlSource
source, samples, found, states = NvmlSource(), [], [], []
for tick in range(int(sys.argv[1])):
    now = tick / 10
    library.sim_set_time(now)
    samples += [[now, s.device, s.power_watts, s.energy_joules] for s in source.read(now)]
    found += [[w.device, w.metric, w.t_begin, w.t_end] for w in source.windows(now)]
    states.append(json.loads(json.dumps(source.capabilities.states)))
print(json.dumps({"samples": samples, "windows": found, "states": states,
                  "devices": [[d.uuid, d.name] for d in source.devices()]}))
"""
"""Ten readings a second of the sensors' own time, as fast as they come."""


def by_the_clock(library, ticks, **extra):
    done = subprocess.run([sys.executable, "-c", BY_THE_CLOCK, str(ticks)], env=environment(library, **extra),
                          capture_output=True, text=True, check=True)  # fmt: skip
    return json.loads(done.stdout)


def test_an_energy_counter_that_stands_still_is_stale_and_null_until_it_goes_on(library, tmp_path):
    work = tmp_path / "work"
    work.write_text("0 0 1000 0.5 300\n")
    got = by_the_clock(library, 60, FAKE_NVML_WORK=str(work), FAKE_NVML_TICK="5")
    energy = {t: joules for t, device, _, joules in got["samples"] if device == "GPU-0000-0"}
    assert {joules for t, joules in energy.items() if t <= 3.0} == {1234.5}
    assert {joules for t, joules in energy.items() if 3.0 < t < 5.0} == {None}
    assert {joules for t, joules in energy.items() if t >= 5.0} == {1234.5 + 5 * 300}
    states = [state["GPU-0000-0"]["energy_joules"] for state in got["states"]]
    assert states == ["ok"] * 31 + ["stale"] * 19 + ["ok"] * 10


def test_a_gpu_that_is_lost_when_the_sampler_starts_is_found_later(library, withstood):
    got = by_the_clock(library, 30, FAKE_NVML_LOST="0,1", FAKE_NVML_MIG="1")
    assert [device for device, _ in got["devices"]] == ["GPU-0000-0", "MIG-0000-0", "GPU-0000-1"]
    first = [t for t, device, _, _ in got["samples"] if device == "GPU-0000-0"]
    assert 1.0 <= first[0] <= 2.0
    assert len([t for t, device, _, _ in got["samples"] if device == "GPU-0000-1"]) == 30
    assert got["states"][0]["GPU 0"] == {"all": "lost"}
    assert "GPU 0" not in got["states"][-1]
    assert got["states"][-1]["MIG-0000-0"]["gpm"] == "ok"
    withstood("GPU lost when the sampler starts", lost="its samples until a second after it is back")


def test_a_gpu_that_is_lost_at_the_start_does_not_end_the_list_of_visible_ones(library):
    got = by_the_clock(library, 30, FAKE_NVML_LOST="0,1", FAKE_NVML_GPUS="3", CUDA_VISIBLE_DEVICES="0,GPU-0000-2")
    assert {device for t, device, _, _ in got["samples"] if t < 1.0} == {"GPU-0000-2"}
    assert [device for device, _ in got["devices"]] == ["GPU-0000-0", "GPU-0000-2"]


def test_counters_of_a_lost_gpu_and_its_instance_start_anew(library):
    """Lost between two snapshots, of which the first is at 1.0 s: a difference across the loss means nothing."""
    got = by_the_clock(library, 40, FAKE_NVML_LOST="1.15,1.25", FAKE_NVML_MIG="1")
    for device in ("GPU-0000-0", "MIG-0000-0"):
        ends = [(a, b) for own, metric, a, b in got["windows"] if (own, metric) == (device, "sm_activity")]
        assert (0.5, 1.0) in ends
        assert not [(a, b) for a, b in ends if a < 1.25 < b]
        assert ends[-1] == (3.0, 3.5)
        assert got["states"][-1][device]["gpm"] == "ok"


def test_a_counter_that_answers_with_no_number_is_left_out(monkeypatch):
    def answer(asked):
        asked.metrics[0].value, asked.metrics[1].value = float("nan"), 50.0

    monkeypatch.setattr(gpm.nvml, "nvmlGpmQueryDeviceSupport", lambda handle: SimpleNamespace(isSupportedDevice=1))
    monkeypatch.setattr(gpm.nvml, "nvmlGpmSampleAlloc", lambda: None)
    monkeypatch.setattr(gpm.nvml, "nvmlGpmSampleGet", lambda handle, into: None)
    monkeypatch.setattr(gpm.nvml, "nvmlGpmMetricsGet", answer)
    counters = gpm.Counters(None, None, links=False)
    assert counters.read("GPU", 0.0) == []
    found = {window.metric: window.value for window in counters.read("GPU", 0.5)}
    assert "sm_activity" not in found
    assert found["sm_occupancy"] == 0.5


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0])
def test_a_clock_that_is_set_loses_no_more_than_the_windows_that_nobody_can_place(
    library, tmp_path, step_s, withstood
):
    work = tmp_path / "work"
    work.write_text("0 0 20000 0.5 300\n")
    clock = {"FAKE_NVML_CLOCK": f"10002.1,{step_s}"}  # between the fourth reading and the fifth
    got = over_time(library, clock_step_s=step_s, turns=8, FAKE_NVML_WORK=str(work), **clock)
    ring = [w for w in got["windows"] if w[:2] == ["GPU-0000-0", "utilisation"]]
    assert all(-0.01 <= w[2] < w[3] <= got["end"] and w[3] - w[2] < 1.6 for w in ring)
    assert ring[0][2] < 1.0
    assert ring[-1][3] > 3.5  # goes on after the step
    assert {w[4] for w in ring} == {0.5}
    withstood("wall clock set, under the sampler", lost="sensor windows across the jump")


def test_a_reading_that_was_held_up_is_no_step_of_the_clock(library, tmp_path):
    """Between the sampler's look at its clock and the source's at the wall clock, as on a busy machine."""
    work = tmp_path / "work"
    work.write_text("0 0 1000 0.5 300\n")
    code = (
        "import time\nfrom profiling.sources.nvml import NvmlSource\n"
        "source, zero = NvmlSource(), time.perf_counter()\nsource.windows(0.0)\ntime.sleep(1.5)\n"
        "now = time.perf_counter() - zero\ntime.sleep(0.1)\nprint(len(source.windows(now)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=environment(library, FAKE_NVML_WORK=str(work), CUDA_VISIBLE_DEVICES="0"))  # fmt: skip
    assert int(done.stdout) >= 8


def test_cuda_visible_devices_chooses_by_index_or_uuid(library):
    assert [s["device"] for s in read(library, CUDA_VISIBLE_DEVICES="1")["samples"]] == ["GPU-0000-1"]
    handles = [(Device(f"GPU-{c}", "x", i), None) for i, c in enumerate("abc")]
    assert [d.index for d, _ in visible(handles, "GPU-c,0")] == [2, 0]
    assert visible(handles, "") == []
    assert [d.index for d, _ in visible(handles, "1,9,2")] == [1]  # CUDA stops at the first unknown one
    assert visible(handles, None) == handles
    nothing = read(library, CUDA_VISIBLE_DEVICES="")
    assert nothing == {"no driver": "CUDA_VISIBLE_DEVICES leaves none of 2 GPUs"}


def test_indices_that_cuda_may_count_otherwise_are_noted(library):
    code = "from profiling.sampler import open_sources; print(open_sources(False)[1])"

    def note(**extra):
        own = environment(library, **extra)
        return subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=True).stdout

    told = note(FAKE_NVML_OTHER="1", CUDA_VISIBLE_DEVICES="1")
    assert "CUDA counts the fastest first, NVML by PCI bus" in told
    assert "use UUIDs, or CUDA_DEVICE_ORDER=PCI_BUS_ID" in told
    assert note(CUDA_VISIBLE_DEVICES="1") == "None\n"
    devices = [Device("GPU-a", "x", 0), Device("GPU-b", "y", 1)]
    for settings in ({}, {"CUDA_VISIBLE_DEVICES": "GPU-b"},
                     {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}):  # fmt: skip
        assert order_note(devices, settings) is None


def test_the_sampler_writes_gpu_and_host_samples(library, tmp_path):
    code = (
        "import time\nfrom profiling import Profiler\n"
        f"with Profiler({str(tmp_path / 'run')!r}, sampler_interval_s=0.1):\n    time.sleep(0.4)\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(library), check=True)
    from profiling.reader import Run

    run = Run(tmp_path / "run")
    assert set(run.devices.device) == {"GPU-0000-0", "GPU-0000-1", "host"}
    assert [device["uuid"] for device in run.trailer["sampler"]["devices"]][:2] == ["GPU-0000-0", "GPU-0000-1"]
    gpu = run.devices[run.devices.device == "GPU-0000-0"]
    assert gpu.energy_joules[gpu.t < gpu.t.min() + 3].eq(1234.5).all()  # then it is stale
    assert {device["name"] for device in run.trailer["sampler"]["devices"][:2]} == {"simulated sensor"}
    host = run.devices[run.devices.device == "host"]
    assert host.t.min() <= gpu.t.nsmallest(2).max()  # at the first of two or more readings
    assert host.t.max() >= gpu.t.max() - 0.1  # at stop, though it is read once a second
    assert host.memory_bytes.notna().all()
    assert not [record for record in run.trace if record["type"] == "note"]


def test_the_profile_of_a_command_names_its_gpus_beside_their_uuids(library, tmp_path):
    command = [sys.executable, "-m", "tppo", "profile", "--output", str(tmp_path / "run"), "--", "sleep", "0.3"]
    done = subprocess.run(command, env=environment(library), capture_output=True, text=True, check=True)
    assert "GPU-0000-1 (simulated sensor)" in done.stdout


def test_each_gpu_of_a_sweep_has_the_time_of_its_own_reading(library, tmp_path):
    """Four GPUs, calls of 5 ms: the last of them is read tens of milliseconds after the first."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom profiling.sampler import Sampler\n"
        "s = Sampler(Path(sys.argv[1]), 1.0, 0.0)\ns.tick()\n"
        "print([t for t, sample in s.rows if sample.device.startswith('GPU')])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True,
                          env=environment(library, FAKE_NVML_GPUS="4", FAKE_NVML_CALL_US="5000"))  # fmt: skip
    times = json.loads(done.stdout)
    assert len(times) == 4
    assert all(later - earlier >= 0.005 for earlier, later in pairwise(times))
