import importlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from profiling.errors import ConfigError
from profiling.reader import Run
from tests.tppo import forked
from tests.waiting import until
from tppo.start import train
from tppo.tracking import packages, to_mlflow, to_wandb, tracker
from tppo.tracking.scalars import scalars_of
from tppo.tracking.settings import LoggingConfig
from tppo.tracking.to_mlflow import metric_name
from tppo.tracking.to_wandb import check_wandb_key
from tppo.tracking.tracker import Tracker, Worker

ALL = {"tensorboard": True, "wandb": True, "mlflow": True, "samples_every": 2, "samples": 3}
TIMES = ("time", "timing", "clock", "perf/throughput")


def run(config, **options):
    train(config, show_progress=False, **options)
    return Run(config.output)


def without_times(run_):
    rows = [json.loads(line) for line in (run_.path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def test_a_row_becomes_numbers_and_what_is_unmeasured_is_left_out():
    row = {"step": 3, "a": 1, "b": 0.5, "c": None, "d": float("nan"), "e": "text", "guards/x": True}
    assert scalars_of(row) == {"a": 1.0, "b": 0.5, "guards/x": 1.0}


def test_names_that_mlflow_does_not_take():
    assert metric_name("val/pass@4") == "val/pass_4"
    assert metric_name("critic/score/mean") == "critic/score/mean"


def scalars_in(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found, [(event.step, event.value) for event in found.Scalars(name)]


@pytest.fixture
def patient(monkeypatch):
    """Trackers may take as long as they need on a busy machine: what they hold is looked at."""
    monkeypatch.setattr(tracker, "CLOSE_S", 500.0)
    monkeypatch.setattr(to_wandb, "INIT_S", 200.0)
    monkeypatch.setattr(to_wandb, "FINISH_S", 200.0)


@pytest.mark.usefixtures("patient")
def test_every_tracker_holds_what_metrics_jsonl_holds_and_training_is_the_same(make_config):
    plain = run(make_config("plain", logging={"samples_every": 0}))
    done = run(make_config("tracked", logging=ALL))
    assert without_times(done) == without_times(plain)
    ends = [torch.load(r.path / "checkpoints" / "step-000004" / "random.pt", weights_only=True) for r in (plain, done)]
    assert torch.equal(ends[0]["rollout_generator"], ends[1]["rollout_generator"])
    losses = [(row["step"], row["actor/pg_loss"]) for row in without_times(done)[1:]]

    board, found = scalars_in(done.path / "tensorboard", "actor/pg_loss")
    assert [step for step, _ in found] == [1, 2, 3, 4]
    assert [value for _, value in found] == pytest.approx([loss for _, loss in losses])
    assert [event.step for event in board.Tensors("samples/text_summary")] == [2, 4]

    from tests.tppo.wandb_file import history_of, records_of

    (file,) = (done.path / "wandb").rglob("*.wandb")
    rows = history_of(file)
    assert [(r["step"], r["actor/pg_loss"]) for r in rows if "actor/pg_loss" in r] == losses
    assert [r["step"] for r in rows if "samples/path" in r] == [2, 4]
    own = next(record.run for record in records_of(file) if record.HasField("run"))
    assert own.run_id == json.loads((done.path / "tracking" / "wandb.json").read_text())["id"]
    assert own.display_name == "tracked"

    client, known = mlflow_of(done.path)
    history = client.get_metric_history(known.info.run_id, "actor/pg_loss")
    assert [(m.step, m.value) for m in history] == losses
    assert known.info.status == "FINISHED"
    assert known.data.params["rollout.window"] == "10"
    assert not list((plain.path).glob("wandb*")) + list(plain.path.glob("tracking"))


def mlflow_of(path):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=str(path / "mlflow"))
    return client, client.get_run(json.loads((path / "tracking" / "mlflow.json").read_text())["id"])


@pytest.mark.usefixtures("patient")
def test_a_resumed_run_goes_on_under_the_same_ids_and_events_after_the_checkpoint_are_purged(make_config):
    done = run(make_config("run", train={"steps": 4, "checkpoint_every": 2}, logging=ALL))
    before = {name: (done.path / "tracking" / f"{name}.json").read_text() for name in ("wandb", "mlflow")}
    import shutil

    shutil.rmtree(done.path / "checkpoints" / "step-000004")
    again = run(make_config("run", train={"steps": 5, "checkpoint_every": 2}, logging=ALL), resume=True)
    assert {n: (again.path / "tracking" / f"{n}.json").read_text() for n in before} == before
    _, found = scalars_in(again.path / "tensorboard", "actor/pg_loss")
    assert [step for step, _ in found] == [1, 2, 3, 4, 5]

    from tests.tppo.wandb_file import history_of, records_of

    files = sorted((again.path / "wandb").rglob("*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == 2
    steps = [[r["step"] for r in history_of(file) if "actor/pg_loss" in r] for file in files]
    assert steps == [[1, 2, 3, 4], [3, 4, 5]]
    ids = {record.run.run_id for file in files for record in records_of(file) if record.HasField("run")}
    assert ids == {json.loads(before["wandb"])["id"]}
    client, known = mlflow_of(again.path)
    assert [m.step for m in client.get_metric_history(known.info.run_id, "actor/pg_loss")] == [1, 2, 3, 4, 3, 4, 5]
    assert known.info.status == "FINISHED"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_missing_is_one_line_before_anything_is_written(make_config, monkeypatch, name):
    monkeypatch.setattr(packages, "find_spec", lambda wanted: None)
    config = make_config("run", logging={name: True})
    with pytest.raises(ConfigError) as fault:
        train(config, show_progress=False)
    assert str(fault.value) == (
        f"logging.{name}: needs the package {name}; pip install 'tppo[{name}]', or leave it out"
    )
    assert not config.output.exists()


def test_online_without_a_key_is_one_line_and_no_question(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    netrc.touch(mode=0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with pytest.raises(ConfigError, match=r"no API key for api.wandb.ai; run `wandb login` or set WANDB_API_KEY"):
        tracker.check_trackers(LoggingConfig(wandb=True, wandb_mode="online"))
    tracker.check_trackers(LoggingConfig(wandb=True))
    netrc.write_text("machine api.wandb.ai login user password key\n")
    check_wandb_key()
    netrc.write_text("")
    monkeypatch.setenv("WANDB_API_KEY", "key")
    check_wandb_key()


class Listener:
    def __init__(self, fails_at=None):
        self.steps, self.fails_at, self.status = [], fails_at, None

    def metrics(self, step, unix_s, values):
        if step == self.fails_at:
            raise OSError("the disk\nis full")
        self.steps.append(step)

    def samples(self, step, rows):
        pass

    def close(self, status):
        self.status = status


def test_a_tracker_that_raises_is_switched_off_with_one_warning_and_the_others_go_on(capsys):
    broken, whole, notes = Listener(fails_at=2), Listener(), []
    workers = [Worker("wandb", lambda: broken), Worker("mlflow", lambda: whole)]
    tracking = Tracker(workers, notes.append)
    for step in (1, 2):
        tracking.metrics({"step": step, "x": 1.0})
    until(lambda: workers[0].fault)
    for step in (3, 4):
        tracking.metrics({"step": step, "x": 1.0})
    tracking.finish("finished")
    tracking.finish("failed")
    assert broken.steps == [1]
    assert (whole.steps, whole.status) == ([1, 2, 3, 4], "finished")
    text = "logging.wandb is switched off: OSError: the disk; metrics.jsonl goes on"
    assert notes == [text]
    assert capsys.readouterr().err == f"tppo: warning: {text}\n"


def test_a_tracker_that_hangs_costs_a_run_no_time_but_a_bounded_wait_at_the_end(capsys, monkeypatch):
    monkeypatch.setattr(tracker, "CLOSE_S", 0.2)
    held = threading.Event()
    hanging = Worker("wandb", lambda: held.wait() and Listener())
    tracking = Tracker([hanging])
    start = time.monotonic()
    for step in range(tracker.BEHIND + 10):
        tracking.metrics({"step": step})
    assert time.monotonic() - start < 15
    assert hanging.fault == "256 records behind"
    slow = Tracker([Worker("mlflow", lambda: held.wait() and Listener())])
    start = time.monotonic()
    slow.finish("finished")
    assert 0.1 < time.monotonic() - start < 15
    held.set()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[2].strip() for line in lines] == [
        "logging.wandb is switched off", "logging.mlflow is switched off"
    ]  # fmt: skip
    assert "has not taken everything in time" in lines[1]


def test_a_tracker_that_cannot_open_does_not_stop_a_run(make_config, monkeypatch, capsys):
    def refused(about):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(tracker.SINKS, "mlflow", refused)
    done = run(make_config("run", train={"steps": 2}, logging={"mlflow": True}))
    assert done.trailer["status"] == "finished"
    assert "logging.mlflow is switched off: ConnectionError: no route to host" in capsys.readouterr().err
    assert any("logging.mlflow is switched off" in r["text"] for r in done.trace if r["type"] == "note")


def test_threads_of_trackers_draw_from_no_global_random_state(tmp_path):
    """In a process of its own: threads that other tests left behind may draw. MLflow draws for an id that would begin
    with zeros, which is made so here, and all of them before they try again."""
    (tmp_path / "run").mkdir()

    def work():
        import mlflow.utils.name_utils

        from tppo.tracking.protocol import About

        mlflow.utils.name_utils.uuid = SimpleNamespace(uuid4=lambda: SimpleNamespace(int=10**40 + 7))
        settings = LoggingConfig(wandb=True, mlflow=True, tensorboard=True)
        state = random.getstate()
        tracking = Tracker.of(About(tmp_path / "run", settings, {"a": 1}), note=print)
        tracking.metrics({"step": 1, "x": 1.0})
        tracking.finish("finished")
        for name in (*to_mlflow.DRAWS, *to_wandb.DRAWS):
            assert 0 <= importlib.import_module(name).random.random() < 1
        assert random.getstate() == state

    child = forked.start(work)
    child.join()
    assert child.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_dead_network_neither_stops_nor_slows_a_run(make_config, tmp_path, name, withstood):
    """In a process of its own: what its trackers have left must not hold its end either. Port 9 refuses."""
    own = {
        "wandb": {"wandb": True, "wandb_mode": "online"},
        "mlflow": {"mlflow": True, "mlflow_uri": "http://127.0.0.1:9"},
    }
    from profiling.settings import to_toml

    config = make_config("run", train={"steps": 3}, logging=own[name])
    (tmp_path / "run.toml").write_text(to_toml(config.model_dump(mode="json")))
    environment = os.environ | {
        "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tppo", "train", str(tmp_path / "run.toml")], env=environment, capture_output=True,
        text=True, timeout=500, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    ended = time.time()
    assert done.returncode == 0, done.stderr
    trained = (config.output / "summary.json").stat().st_mtime  # imports before it may take a minute
    assert ended - trained < tracker.CLOSE_S + 20
    found = Run(config.output)
    assert found.metrics.step.max() == 3
    assert found.trailer["t"] < 30  # the run's own time
    assert f"logging.{name} is switched off" in done.stderr
    withstood("network of a tracker dead", lost="what the tracker would have got")
