"""tests/gpu's own NVML tests, run on the stand-in library (`simulated sensor`): nobody else runs them without one."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.profiling.test_nvml_source import environment, library  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_nvml_test_for_a_gpu_passes_on_a_simulated_sensor(library, tmp_path):  # noqa: F811
    """Kernels alone need CUDA. The load changes every third of a second, between 40 and 90 % busy."""
    work = tmp_path / "work"
    work.write_text("".join(f"0 {n / 3} {(n + 1) / 3} {0.4 + 0.1 * (5 * n % 6)} 300\n" for n in range(1000)))
    own = environment(library, FAKE_NVML_WORK=str(work), FAKE_NVML_WINDOW="0.5", TPPO_GPU_RECORD=str(tmp_path),
                      CUDA_VISIBLE_DEVICES="0")  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={tmp_path / 'out.xml'}",
               "tests/gpu/test_nvml_on_a_gpu.py"]  # fmt: skip
    done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True)
    cases = ElementTree.parse(tmp_path / "out.xml").getroot().iter("testcase")
    outcomes = {case.get("name"): next((e.tag for e in case if e.tag != "properties"), "passed") for case in cases}
    on_kernels = outcomes.pop("test_phases_on_the_gpu_end_after_the_host_has_left_them")
    assert len(outcomes) == 7
    assert set(outcomes.values()) == {"passed"}, done.stdout
    assert on_kernels in ("passed", "skipped")
    found = json.loads((tmp_path / "nvml.json").read_text())
    assert found["devices"] == ["simulated sensor"]
    assert found["ring_cadence_s"] == pytest.approx(1 / 6, abs=0.001)
    assert found["utilisation_window_s"] == pytest.approx(0.5, abs=0.05)
    assert found["energy_tick_s"] == pytest.approx(0.1, abs=0.05)
    assert 0.4 <= found["gpm"]["sm_activity"] <= 0.9
    assert found["reading_ms"]["median"] > 0
