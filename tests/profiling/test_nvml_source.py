"""The NVML source against a stand-in library that nvidia-ml-py really loads."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from profiling.schema import WINDOW_METRICS
from profiling.sources import Device
from profiling.sources.nvml import visible

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
import json, sys, time
from profiling.sources.nvml import NvmlSource
source = NvmlSource(links=True)
real, step_s, zero = time.time, float(sys.argv[1]), time.perf_counter()
found, states = [], []
for turn in range(int(sys.argv[2])):
    if turn == 4:
        time.time = lambda: real() + step_s
    now = time.perf_counter() - zero
    samples = list(source.read(now))
    found += source.windows(now)
    states.append(source.capabilities.states[samples[0].device]["energy_joules"])
    time.sleep(0.6)
print(json.dumps({"windows": [[w.device, w.metric, w.t_begin, w.t_end, w.value] for w in found], "states": states,
                  "processes": source.processes(), "end": time.perf_counter() - zero}))
"""


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
    assert first[3] - first[2] == pytest.approx(0.6, abs=0.2)
    assert [p["memory_bytes"] for p in got["processes"]["GPU-0000-1"]] == [2**30]
    assert "GPU-0000-0" not in got["processes"]


def test_pcie_traffic_without_gpm_is_read_from_its_counters(library):
    got = over_time(library, turns=2, FAKE_NVML_FAULTS=";nvmlGpmQueryDeviceSupport=3;")
    values = {w[1]: w[4] for w in got["windows"]}
    assert values == {"pcie_sent_bytes_per_s": 1000 * 1024, "pcie_received_bytes_per_s": 1001 * 1024}


def test_an_energy_counter_that_stands_still_is_stale(library):
    assert over_time(library, turns=7)["states"][::6] == ["ok", "stale"]


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0])
def test_a_clock_that_is_set_loses_no_more_than_the_windows_that_nobody_can_place(
    library, tmp_path, step_s, withstood
):
    work = tmp_path / "work"
    work.write_text("0 0 1000 0.5 300\n")
    clock = {"FAKE_NVML_CLOCK": f"2.1,{step_s}"}  # between the fourth reading and the fifth
    got = over_time(library, clock_step_s=step_s, turns=8, FAKE_NVML_WORK=str(work), **clock)
    ring = [w for w in got["windows"] if w[:2] == ["GPU-0000-0", "utilisation"]]
    assert all(-0.01 <= w[2] < w[3] <= got["end"] and w[3] - w[2] < 1.6 for w in ring)
    assert ring[0][2] < 1.0
    assert ring[-1][3] > 3.5  # goes on after the step
    assert {w[4] for w in ring} == {0.5}
    withstood("wall clock set, under the sampler", lost="sensor windows across the jump")


def test_cuda_visible_devices_chooses_by_index_or_uuid(library):
    assert [s["device"] for s in read(library, CUDA_VISIBLE_DEVICES="1")["samples"]] == ["GPU-0000-1"]
    handles = [(Device(f"GPU-{c}", "x", i), None) for i, c in enumerate("abc")]
    assert [d.index for d, _ in visible(handles, "GPU-c,0")] == [2, 0]
    assert visible(handles, "") == []
    assert [d.index for d, _ in visible(handles, "1,9,2")] == [1]  # CUDA stops at the first unknown one
    assert visible(handles, None) == handles


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
    assert gpu.energy_joules.eq(1234.5).all()
    assert not [record for record in run.trace if record["type"] == "note"]


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
