import numpy as np
import pytest

from profiling.phases import Profiler
from profiling.reader import Run
from profiling.schema import DEVICES
from profiling.summary import write_totals
from profiling.writer import RunWriter
from tests.profiling.test_energy_alarms_watch import samples_of
from tppo.parallel.clocks import Offset, notes_of
from tppo.run_records import header_of
from tppo.start import schedule_of


@pytest.mark.parametrize(("uncertainty_s", "joules"), [(0.0, 400.0), (1e-4, None)], ids=["one host", "two hosts"])
def test_energy_is_null_where_another_host_takes_part_whose_gpus_nobody_samples(
    make_config, uncertainty_s, joules, tmp_path
):
    config = make_config("run")
    writer = RunWriter(tmp_path / "run", header=header_of(schedule_of(config), config, 2), config_toml="")
    profiler = Profiler(writer=writer, sampler_interval_s=None)
    for note in notes_of([Offset(0.0, 0.0), Offset(3.0, uncertainty_s)]):
        assert note["text"].endswith("its GPUs are not sampled, and joules of the run are null")
        profiler.trace(note)
    t = np.arange(0.05, 4.1, 0.5)
    samples = samples_of(t, 100 * t)
    writer.table("devices", 0, {name: samples[name].to_list() for name in DEVICES.names})
    profiler.finish("finished")
    write_totals(writer, 4.0)
    assert Run(writer.path).summary["energy_joules"] == (joules and pytest.approx(joules))
