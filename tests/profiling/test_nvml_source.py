"""The NVML source against a stand-in library that nvidia-ml-py really loads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    samples = [asdict(sample) for sample in source.read()]
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
        "energy_joules": 1234.5, "sm_clock_mhz": 1980.0, "temperature_c": 41.0, "event_reasons": 4,
    }  # fmt: skip
    assert set(got["states"]["GPU-0000-0"].values()) == {"ok"}


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


def test_a_library_without_a_driver_means_no_gpu(library):
    assert "no driver" in read(library, "nvmlInitWithFlags=9")


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
