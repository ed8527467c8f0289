"""Sweeps: every combination, in parallel here and on Ray, continued after a stop."""

import json
import sys

import pandas as pd
import pytest

import simulator.sweep as sweep
from simulator import load_experiment, simulate
from simulator.sweep import cells_of, parse_vary, run_cells
from tppo.cli import main
from tppo.cluster.session import joined_cluster

TOML = """
[workload]
steps = 3
prompts_per_step = 8
max_response_tokens = 40
response_tokens = { kind = "lognormal", mean = 12.0, sigma = 0.8 }
[schedule]
kind = "truncated"
window = 10
[cluster]
trainer = "none"
[cost]
decode_base_s = 0.01
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(TOML)
    return path


def swept(experiment, directory, words, **options):
    seen = []
    cells = cells_of(experiment, {}, parse_vary(words))
    table = run_cells(cells, directory, lambda: seen.append(1), **options)
    assert len(seen) == len(cells)
    return table


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_is_what_simulate_gives(experiment, tmp_path, jobs):
    table = swept(experiment, tmp_path / "s", ["schedule.window=5,40", "cluster.engines=1,2"], jobs=jobs)
    assert table["schedule.window"].tolist() == [5, 5, 40, 40]
    assert table["cluster.engines"].tolist() == [1, 2, 1, 2]
    for row in table.to_dict("records"):
        own = {name: row[name] for name in ("schedule.window", "cluster.engines")}
        expected = simulate(load_experiment(experiment, own)).summary()
        assert row["wall_seconds"] == expected["wall_seconds"]
        assert row["ledger.decode_useful"] == expected["ledger"]["decode_useful"]
    assert pd.read_parquet(tmp_path / "s" / "sweep.parquet").equals(table)


def test_a_second_run_plays_only_what_is_missing(experiment, tmp_path, monkeypatch):
    first = swept(experiment, tmp_path / "s", ["schedule.window=5,10"], jobs=1)
    played = []
    original = sweep.play
    monkeypatch.setattr(sweep, "play", lambda text: played.append(text) or original(text))
    again = swept(experiment, tmp_path / "s", ["schedule.window=5,10,20"], jobs=1)
    assert [json.loads(text)["schedule"]["window"] for text in played] == [20]
    assert again.iloc[:2].drop(columns="simulator_seconds").equals(first.drop(columns="simulator_seconds"))
    experiment.write_text(TOML.replace("mean = 12.0", "mean = 13.0"))  # another experiment: nothing is taken over
    swept(experiment, tmp_path / "s", ["schedule.window=5"], jobs=1)
    assert len(played) == 2


def test_a_cell_that_fails_is_reported_and_the_others_finish(experiment, tmp_path, monkeypatch, capsys):
    def sometimes(text):
        if json.loads(text)["schedule"]["window"] == 10:
            raise MemoryError("out of memory")
        return {"wall_seconds": 1.0}

    monkeypatch.setattr(sweep, "play", sometimes)
    words = [
        "sweep",
        str(experiment),
        "--vary",
        "schedule.window=5,10,0",
        "--output",
        str(tmp_path / "s"),
        "--jobs",
        "1",
    ]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "failed: schedule.window = 10: MemoryError: out of memory" in error
    assert "failed: schedule.window = 0: " in error
    assert "schedule.window = 0: input should be greater than 0" in error
    table = pd.read_parquet(tmp_path / "s" / "sweep.parquet")
    assert table.status.tolist() == ["ok", "failed", "failed"]
    monkeypatch.setattr(sweep, "play", lambda text: {"wall_seconds": 2.0})
    assert main(words) == 1  # the cell that failed is played again, the refused one is refused again
    assert pd.read_parquet(tmp_path / "s" / "sweep.parquet").wall_seconds.tolist()[:2] == [1.0, 2.0]


def test_a_broken_cell_file_is_played_again(experiment, tmp_path):
    swept(experiment, tmp_path / "s", ["schedule.window=5"], jobs=1)
    file = next((tmp_path / "s" / "cells").glob("*.json"))
    file.write_text("{torn")
    assert swept(experiment, tmp_path / "s", ["schedule.window=5"], jobs=1).status.tolist() == ["ok"]


@pytest.mark.slow
def test_a_local_ray_head_gives_the_same_table(experiment, tmp_path):
    pytest.importorskip("ray", reason="needs the extra ray")
    words = ["schedule.window=5,40", "cluster.engines=1,2"]
    here = swept(experiment, tmp_path / "here", words, jobs=1)
    with joined_cluster("local") as cluster:
        there = swept(experiment, tmp_path / "there", words, ray=cluster)
    assert there.drop(columns="simulator_seconds").equals(here.drop(columns="simulator_seconds"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing varies"),
        (["--vary", "schedule.window"], "--vary schedule.window: write --vary section.key=value,value"),
        (["--vary", "schedule.window=5,,6"], "write --vary section.key=value,value"),
        (["--vary", "schedule.window=5", "--vary", "schedule.window=6"], "given twice"),
        (["--vary", "schedule.window=0,-1"], "schedule.window = 0"),
        (["--vary", "cluster.enginse=1,2"], "unknown key 'cluster.enginse'; did you mean 'cluster.engines'"),
        (["--vary", "schedule.window=5", "--jobs", "0"], "--jobs 0: must be at least 1"),
    ],
)
def test_bad_sweeps_are_one_line(experiment, tmp_path, capsys, words, message):
    assert main(["sweep", str(experiment), "--output", str(tmp_path / "s"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_ray_that_is_not_there_is_one_line(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["--vary", "schedule.window=5", "--ray", "auto"]
    assert main(["sweep", str(experiment), "--output", str(tmp_path / "s"), *words]) == 2
    assert "--ray: Ray is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:port"])
def test_a_ray_address_where_nobody_answers_is_one_line(experiment, tmp_path, capsys, address):
    pytest.importorskip("ray", reason="needs the extra ray")
    words = ["--vary", "schedule.window=5", "--ray", address]
    assert main(["sweep", str(experiment), "--output", str(tmp_path / "s"), *words]) == 2
    assert f"--ray {address}: no Ray cluster answers there" in capsys.readouterr().err
