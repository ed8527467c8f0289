"""AMD GPUs against a stand-in for amdsmi with its names and answers; no AMD GPU was at hand."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from profiling.sources.amd import AmdSource

STAND_IN = """
NOW = 1e9
class AmdSmiException(Exception): pass
class AmdSmiLibraryException(AmdSmiException):
    def __init__(self, code): super().__init__(f"error {code}"); self.code = code
    def get_error_code(self): return self.code
class AmdSmiMemoryType: VRAM = 0
class AmdSmiClkType: GFX = 0
class AmdSmiTemperatureType: HOTSPOT = 1
class AmdSmiTemperatureMetric: CURRENT = 0
HANDLES = ["a", "b"]
def amdsmi_init(): pass
def amdsmi_shut_down(): pass
def amdsmi_get_processor_handles(): return HANDLES
def amdsmi_get_gpu_device_uuid(h): return f"uuid-{h}"
def amdsmi_get_gpu_asic_info(h): return {"market_name": "AMD Instinct MI300X"}
def amdsmi_get_gpu_activity(h): return {"gfx_activity": 40, "umc_activity": 10, "mm_activity": "N/A"}
def amdsmi_get_power_info(h): return {"current_socket_power": 500, "average_socket_power": "N/A"}
def amdsmi_get_energy_count(h):
    if h == "b": raise AmdSmiLibraryException(10)
    return {"energy_accumulator": int(1e6 * 500 * NOW / 15.259) , "counter_resolution": 15.259, "timestamp": 1}
def amdsmi_get_gpu_memory_usage(h, kind): return 2**30
def amdsmi_get_clock_info(h, kind): raise AmdSmiLibraryException(2)
"""
READ = """
import json, sys
from dataclasses import asdict
from profiling.sampler import open_sources
sources, note = open_sources(False)
first = [asdict(sample) for sample in sources[0].read(0.0)]
if amdsmi := sys.modules.get("amdsmi"):
    amdsmi.NOW += 0.2
second = [asdict(sample) for sample in sources[0].read(0.2)]
print(json.dumps({"samples": [first, second], "states": sources[0].capabilities.states, "note": note,
                  "devices": [device.name for device in sources[0].devices()]}))
"""


def read(tmp_path, stand_in):
    (tmp_path / "amdsmi.py").write_text(stand_in)
    paths = f"{tmp_path}:{Path(__file__).parents[2]}"
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": paths, "PATH": ""})  # fmt: skip
    return json.loads(done.stdout)


def test_every_metric_is_read_in_its_unit_and_what_is_missing_is_null(tmp_path):
    got = read(tmp_path, STAND_IN)
    if got["note"] is None and got["devices"][0].startswith("NVIDIA"):
        pytest.skip("this host has an NVIDIA GPU, which comes first")
    first, second = got["samples"]
    assert got["devices"] == ["AMD Instinct MI300X"] * 2
    assert [sample["device"] for sample in first] == ["uuid-a", "uuid-b"]
    assert first[0]["utilisation"] == pytest.approx(0.4)
    assert (first[0]["power_watts"], first[0]["power_instant_watts"]) == (None, 500.0)
    assert (first[0]["memory_bytes"], second[0]["memory_bytes"]) == (2**30, None)  # once a second
    assert first[0]["sm_clock_mhz"] is first[0]["temperature_c"] is first[1]["energy_joules"] is None
    joules = second[0]["energy_joules"] - first[0]["energy_joules"]
    assert joules == pytest.approx(500 * 0.2, rel=1e-3)
    states = got["states"]["uuid-a"]
    assert states["energy_joules"] == "ok"
    assert states["power_watts"] == states["sm_clock_mhz"] == "not supported"
    assert states["temperature_c"] == "missing symbol"
    assert got["states"]["uuid-b"]["energy_joules"] == "no permission"


def test_an_energy_counter_that_stands_still_is_stale_and_null(monkeypatch):
    amdsmi = ModuleType("amdsmi")
    exec(STAND_IN, amdsmi.__dict__)
    amdsmi.amdsmi_get_energy_count = lambda h: {"energy_accumulator": 2, "counter_resolution": 1e6}
    monkeypatch.setitem(sys.modules, "amdsmi", amdsmi)
    source = AmdSource()
    assert [next(iter(source.read(t))).energy_joules for t in (0.0, 3.0, 3.1)] == [2.0, 2.0, None]
    assert source.capabilities.states["uuid-a"]["energy_joules"] == "stale"


@pytest.mark.parametrize(
    ("stand_in", "reason"),
    [
        ("raise KeyError('ROCM_PATH')", "ROCM_PATH"),
        (STAND_IN.replace('HANDLES = ["a", "b"]', "HANDLES = []"), "amdsmi: no GPU"),
        (
            STAND_IN.replace("def amdsmi_init(): pass", "def amdsmi_init(): raise AmdSmiLibraryException(34)"),
            "error 34",
        ),
    ],
)
def test_without_a_gpu_that_answers_the_note_says_why(tmp_path, stand_in, reason):
    got = read(tmp_path, stand_in)
    if got["note"] is None:
        pytest.skip("this host has a GPU")
    assert reason in got["note"]
