import pytest

from tests.analysis.made_runs import SCHEDULES, measured_runs, simulated_run


@pytest.fixture
def runs(tmp_path):
    return measured_runs(tmp_path)


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    """Name -> a small simulated run under each schedule: same lengths, same cluster, costs from data sheets."""
    folder = tmp_path_factory.mktemp("simulated")
    return {name: simulated_run(folder / name, changes) for name, changes in SCHEDULES.items()}
