import numpy as np
import pytest

from profiling.phases import Profiler
from profiling.reader import Run
from profiling.schema import DEVICES
from profiling.summary import write_totals
from profiling.writer import RunWriter
from tests.profiling.test_energy_alarms_watch import samples_of
from tppo.parallel.clocks import Offset, note_of
from tppo.run_records import header_of
from tppo.start import schedule_of


@pytest.mark.parametrize(("elsewhere", "joules"), [(False, 400.0), (True, None)], ids=["one host", "two hosts"])
def test_energy_is_null_where_another_host_takes_part_whose_gpus_nobody_samples(
    make_config, elsewhere, joules, tmp_path
):
    config = make_config("run")
    writer = RunWriter(tmp_path / "run", header=header_of(schedule_of(config), config, 2), config_toml="")
    profiler = Profiler(writer=writer, sampler_interval_s=None)
    if elsewhere:
        profiler.trace(note_of("rank", 1, "far", Offset(3.0, 1e-4), "rank 0"))
    t = np.arange(0.05, 4.1, 0.5)
    samples = samples_of(t, 100 * t)
    writer.table("devices", 0, {name: samples[name].to_list() for name in DEVICES.names})
    profiler.finish("finished")
    write_totals(writer, 4.0)
    assert Run(writer.path).summary["energy_joules"] == (joules and pytest.approx(joules))
