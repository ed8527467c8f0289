"""What hostile hands have found, beside the generated files: links, pipes, escape sequences, odd flags."""

import json
import os
import re

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import figures
from profiling.console import printable
from profiling.errors import ConfigError, DataError, RunError
from profiling.reader import Run
from profiling.schema import fault_in, fault_in_summary
from profiling.watch import serve
from profiling.writer import write_atomically
from simulator.logs import read_log
from tests.analysis.made_runs import RISING, make_run
from tests.fuzz.checkpoint_files import with_checksums
from tests.fuzz.oracle import write_files
from tests.fuzz.trained_files import FOLDER, PLACE, QUICK, RUN, model, trained
from tppo.cli import main
from tppo.data import tables
from tppo.data.tables import open_tables


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "ppo-s0", accuracies=RISING[:3]).path


@pytest.fixture
def trained_run(tmp_path):
    write_files(tmp_path, trained())
    return tmp_path / RUN


def change_json(path, change):
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def change_header(run, **values):
    first, *rest = (run / "trace.jsonl").read_text().splitlines()
    (run / "trace.jsonl").write_text("\n".join([json.dumps({**json.loads(first), **values}), *rest]) + "\n")


def one_line(capsys, words, code=2):
    """tppo WORDS ends with the code and one line, which is returned."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1
    assert "--debug" not in line
    return line


def test_a_link_under_the_temporary_name_leads_nothing_elsewhere(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".own.json.tmp").symlink_to(victim)
    write_atomically(tmp_path / "own.json", b"{}")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "own.json").is_symlink()
    with pytest.raises(RunError, match="name a file"):
        write_atomically(tmp_path.__class__(""), b"")


@pytest.mark.parametrize("name", ["rollouts", "metrics.jsonl", ".config.toml.tmp", "rollouts/step-000009.parquet",
                                  "checkpoints"])  # fmt: skip
def test_a_run_with_links_does_not_go_on(trained_run, tmp_path, capsys, name):
    """With --output its rows go elsewhere, and it is only read."""
    place = trained_run / name
    if place.exists():
        place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with_checksums(trained_run / FOLDER)
    line = one_line(capsys, ["train", "--resume", trained_run, "--train.steps", 2])
    assert str(place) in line or "has no checkpoint" in line


def test_an_address_that_is_none_is_not_every_network(run):
    with pytest.raises(ConfigError, match="--bind: names no address"):
        serve(run, 0, "")
    with pytest.raises(ConfigError, match="cannot listen"):
        serve(run, 0, "a..b")


@pytest.mark.parametrize("name", ["config.toml", "summary.json", "trace.jsonl"])
def test_a_pipe_in_a_run_is_not_waited_for(run, capsys, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    line = one_line(capsys, ["compare", run, run])
    assert f"{run}/{name}" in line or "not a run directory" in line


def test_a_pipe_among_data_is_not_waited_for(tmp_path):
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs" / "events.out.tfevents.1")
    os.mkfifo(tmp_path / "logs" / "train.jsonl")
    with pytest.raises(DataError, match=r"tfevents.1: not a regular file"):
        read_log("verl", tmp_path / "logs")
    with pytest.raises(DataError, match="holds no"):
        open_tables(str(tmp_path / "logs"), split="train", subset="", key="data")
    os.mkfifo(tmp_path / "verl.log")
    with pytest.raises(DataError, match="not a regular file"):
        read_log("verl", tmp_path / "verl.log")


def test_a_text_that_many_rows_share_is_not_unfolded_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_BYTES_AT_ONCE", 2**22)
    path, rows = tmp_path / "d.parquet", 1000
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * 200_000]))
    pq.write_table(pa.table({"question": shared, "answer": ["1"] * rows}), path)
    assert path.stat().st_size < 100_000
    (table,) = open_tables(str(path), split="train", subset="", key="data")
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    read = table.rows(["question"])
    assert len(next(read)["question"]) == 200_000
    assert pool.bytes_allocated() - before < 20e6  # all rows: 200 MB
    assert sum(1 for _ in read) == rows - 1


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**31 - 1], pa.date32()),
        pa.Array.from_buffers(pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1],
                                               pa.py_buffer(b"\xff\xfe")]),
    ],
    ids=["a day after the last", "a text that is none"],
)  # fmt: skip
def test_a_column_that_python_cannot_hold_is_named(tmp_path, column):
    pq.write_table(pa.table({"question": column}), tmp_path / "d.parquet")
    (table,) = open_tables(str(tmp_path / "d.parquet"), split="train", subset="", key="data")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(table.rows(["question"]))


def test_nobodys_home_is_one_line():
    with pytest.raises(DataError, match=r"data.path = '~nobody-of-this-name/x.jsonl'"):
        open_tables("~nobody-of-this-name/x.jsonl", split="train", subset="", key="data")


def test_more_problems_than_memory_holds_are_refused(capsys):
    model()
    words = ["eval", f"{PLACE.name}/model", "--data", "arithmetic", *QUICK, "--problems", 10**11]
    assert "evaluation.problems = 100000000000: more than 1,000,000" in one_line(capsys, words)


def test_nothing_that_a_run_says_steers_a_terminal(run, capsys):
    (run / "config.toml").write_text('x = "\\u001b]0;owned\\u0007"\n')
    change_header(run, host="\x1b[2J", devices=[{"name": "\x1b[31m"}])
    other = make_run(run.with_name("ppo-s1"), accuracies=RISING[:3]).path
    assert main(["compare", str(run), str(other)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\x07" not in text
    assert "\ufffd" in text
    assert printable("a\nb\x1b") == "a\nb\ufffd"


HEADERS = [
    {"devices": [3]}, {"versions": [1]}, {"versions": "x"}, {"schedule": {"kind": ["x"]}}, {"schedule": {}},
    {"startup_steps": "x"}, {"startup_steps": -1},
]  # fmt: skip


@pytest.mark.parametrize("values", HEADERS, ids=map(str, HEADERS))
def test_a_header_of_the_wrong_form_is_refused(run, capsys, values):
    change_header(run, **values)
    assert f"header.{next(iter(values))}" in one_line(capsys, ["compare", run, run])


@pytest.mark.slow
def test_versions_may_be_null(run, tmp_path):
    change_header(run, versions=None)
    assert main(["report", str(run), "--output", str(tmp_path / "r.html")]) == 0


SUMMARIES = [
    {"startup_steps": "x"}, {"startup_steps": [1]}, {"joules_per_step": "x"}, {"length_bias": [1]}, {"steps": -1},
    {"seconds_per_finished_row": 1e308}, {"steps": True}, {"ledger": 3},
]  # fmt: skip


@pytest.mark.parametrize("values", SUMMARIES, ids=map(str, SUMMARIES))
def test_a_summary_of_the_wrong_form_is_refused(run, values):
    summary = {**Run(run).summary, **values}
    assert fault_in_summary(summary).startswith(next(iter(values)))
    change_json(run / "summary.json", values)
    with pytest.raises(DataError, match="not a summary of a run"):
        _ = Run(run).summary


@pytest.mark.parametrize("values", [{"steps": 0}, {"steps": None}, {"rollout_seconds": None}])
def test_a_run_without_steps_has_a_report_without_their_rates(run, tmp_path, values):
    change_json(run / "summary.json", values)
    assert main(["report", str(run), "--output", str(tmp_path / "r.html")]) == 0


def test_a_sampler_that_missed_less_than_nothing_is_refused():
    trailer = {"type": "trailer", "t": 1.0, "status": "finished", "sampler": {"ticks": 10, "missed_ticks": -10}}
    assert "missed_ticks = -10" in fault_in(trailer)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = [1979-05-27]\n", ["compare", "RUN", "OTHER"]),
        ("rollout = 1\n", ["plot", "RUN", "--figure", "length_distribution"]),
        pytest.param("workload = 1\ncluster = 2\ncost = 3\nray = 4\n", ["report", "RUN"], marks=pytest.mark.slow),
    ],
)
def test_settings_of_any_form_are_shown(run, tmp_path, text, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = make_run(tmp_path / "ppo-s1", accuracies=RISING[:3]).path
    (run / "config.toml").write_text(text)
    known = {"RUN": str(run), "OTHER": str(other)}
    assert main([known.get(word, word) for word in words]) == 0


@pytest.mark.slow
def test_a_dollar_in_a_name_begins_no_formula(tmp_path):
    run = make_run(tmp_path / "$x^{$-s0", accuracies=RISING[:3])
    for name in ("idle_ledger", "accuracy_time"):
        assert main(["plot", str(run.path), "--figure", name, "--output", str(tmp_path)]) == 0
    assert main(["report", str(run.path), "--output", str(tmp_path / "r.html")]) == 0


@pytest.mark.slow
def test_a_name_that_is_no_text_is_written_as_bytes(tmp_path, capsys):
    run = make_run(tmp_path / os.fsdecode(b"\xff-s0"), accuracies=RISING[:3])
    assert main(["report", str(run.path), "--output", str(tmp_path / "r.html")]) == 0
    assert main(["compare", str(run.path), str(run.path)]) == 0
    assert main(["plot", str(run.path), "--figure", "idle_ledger", "--output", str(tmp_path)]) == 0


def test_an_occupancy_without_engine_records_is_named(run):
    for part in (run / "engine").iterdir():
        if part.name != "step-000001.parquet":
            part.unlink()
    with pytest.raises(DataError, match="no engine has a record of step"):
        figures.batch_occupancy([Run(run)])


def test_metrics_and_torch_traces_of_odd_values_are_exported_or_refused(run, tmp_path, capsys):
    (run / "torch").mkdir()
    (run / "torch" / "steps-1.json").write_text('{"traceEvents": ["x", {"ts": 1, "pid": 1}]}')
    assert main(["export", str(run), "--output", str(tmp_path / "t.json")]) == 0
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines + '{"step": 9, "x": true}\n')
    words = ["export", run, "--format", "parquet", "--output", tmp_path / "p"]
    assert "x = True is neither a number nor null" in one_line(capsys, words)
    (run / "metrics.jsonl").write_text(re.sub(r'"time_s": ?[0-9.e-]+', '"time_s": null', lines))
    assert main(["export", str(run), "--format", "tensorboard", "--output", str(tmp_path / "tb")]) == 0


def test_cells_of_a_sweep_that_are_not_ours_are_simulated_again(tmp_path):
    experiment = tmp_path / "e.toml"
    experiment.write_text(
        "[workload]\nsteps = 2\nprompts_per_step = 4\nmax_response_tokens = 40\n"
        'response_tokens = { kind = "fixed", value = 12 }\n[schedule]\nkind = "synchronous"\n'
        '[cluster]\ntrainer = "none"\n[cost]\ndecode_base_s = 0.01\n'
    )
    words = ["sweep", str(experiment), "--vary", "cluster.engines=1,2", "--jobs", "1", "--output", str(tmp_path / "s")]
    assert main(words) == 0
    expected = pd.read_parquet(tmp_path / "s" / "sweep.parquet")
    first, second = sorted((tmp_path / "s" / "cells").iterdir())
    change_json(first, {"wall_seconds": [1], "cluster.engines": 1000})
    change_json(second, {"cluster.engines": 1000})
    assert main(words) == 0
    found = pd.read_parquet(tmp_path / "s" / "sweep.parquet")
    assert found["cluster.engines"].tolist() == [1, 2]
    assert found.wall_seconds.tolist() == expected.wall_seconds.tolist()


FLAGS = [
    ("compare RUN RUN --target nan", "--target nan"),
    ("compare RUN RUN --target inf --json", "--target inf"),
    ("export RUN --steps " + "9" * 5000, "--steps 999"),
    ("plan --model Qwen2.5-0.5B --gpu H100-SXM --gpus 8 --steps 2 --mtbf-hours 1e308", "--mtbf-hours"),
    ("profile --interval 1e-300 --output OUT -- true", "--interval 1e-300: must be from 0.001"),
    ("watch RUN --prometheus 0 --bind a..b", "cannot listen"),
    ("simulate RUN/config.toml --output EMPTY", "--output: names nothing"),
    ("train RUN/config.toml --output=", "--output: names nothing"),
]


@pytest.mark.parametrize(("words", "expected"), FLAGS, ids=[words[:40] for words, _ in FLAGS])
def test_flags_beyond_all_bounds_are_one_line(run, tmp_path, capsys, words, expected):
    known = {"RUN": run, "OUT": tmp_path / "out", "EMPTY": "", "RUN/config.toml": run / "config.toml"}
    assert expected in one_line(capsys, [known.get(word, word) for word in words.split()])
    assert not (tmp_path / "out").exists()
