"""Needs an NVIDIA driver; skipped visibly without one."""

import pytest

from profiling.sources.nvml import NoDriver, NvmlSource

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
    for sample in source.read():
        assert sample.device.startswith("GPU-")
        assert sample.utilisation is None or 0 <= sample.utilisation <= 1
        assert sample.power_watts is None or 5 < sample.power_watts < 2000
        assert sample.memory_bytes is None or sample.memory_bytes > 0


def test_the_energy_counter_never_runs_backwards(source):
    readings = [source.read()[0].energy_joules for _ in range(3)]
    known = [value for value in readings if value is not None]
    assert known == sorted(known)
