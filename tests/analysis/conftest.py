import json

import pandas as pd
import pytest

from tests.analysis.made_runs import RISING, SCHEDULES, make_run, simulated_run, with_gpu


@pytest.fixture
def runs(tmp_path):
    found = []
    for seed in range(3):
        slow = make_run(tmp_path / f"ppo-s{seed}", accuracies=RISING, seconds_per_step=4.0 + seed)
        fast = make_run(tmp_path / f"tppo-s{seed}", accuracies=RISING, seconds_per_step=2.0, batch=4)
        found += [with_gpu(slow, seconds_per_step=4.0 + seed), with_gpu(fast)]
    hardware = {"name": "test CPU", "peak_flops": 1e9, "memory_bytes_per_s": 1e9, "measured": True}
    (tmp_path / "hardware.json").write_text(json.dumps(hardware))
    rows = [
        {"target": f"tppo-s{seed}", "calibrated_on": "ppo", "kind": kind, "drift_corrected": corrected,
         "quantity": "training_seconds", "unit": "s", "predicted": 10 + seed, "measured": 10.0, "error": seed / 10}
        for seed in range(3) for kind in ("forecast", "replay") for corrected in (False, True)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "predictions.csv", index=False)
    return found


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    """Name -> a small simulated run under each schedule: same lengths, same cluster, costs from data sheets."""
    folder = tmp_path_factory.mktemp("simulated")
    return {name: simulated_run(folder / name, changes) for name, changes in SCHEDULES.items()}
