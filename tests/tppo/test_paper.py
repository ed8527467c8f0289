import json
from pathlib import Path

import pandas as pd
import pytest

from profiling.reader import Run
from simulator import load_experiment
from tests.analysis.made_runs import EXPERIMENT, RISING, make_run
from tppo.cli import main
from tppo.commands import paper
from tppo.paper import SETTINGS, experiments_of, load_paper

ROOT = Path(__file__).parents[2]
TINY = """
experiment = "tiny.toml"
rated_steps = 1
windows = [1024]
assumed = "Assumed: little."
[[published]]
figure = "speedup"
label = "theirs"
value = 2.5
source = "a paper"
[not_shown.roofline]
simulated = "Evidence about the GPU."
"""


@pytest.fixture
def settings(tmp_path):
    tiny = EXPERIMENT.replace('kind = "synchronous"', 'kind = "truncated"\nwindow = 512')
    tiny = tiny.replace("prompts_per_step = 16", "prompts_per_step = 4")
    (tmp_path / "tiny.toml").write_text(tiny)
    (tmp_path / "set.toml").write_text(TINY)
    return tmp_path / "set.toml"


def call(*words):
    return main(["paper", *map(str, words)])


@pytest.mark.slow
def test_the_set_is_drawn_from_simulations_and_says_how_to_get_what_must_be_measured(settings, tmp_path, capsys):
    output = tmp_path / "out"
    words = ("--output", output, "--demo", tmp_path / "none", "--settings", settings, "--jobs", 1)
    assert call(*words) == 0
    for name in ("roofline", "idle_ledger", "engine_timeline", "batch_occupancy", "speedup"):
        for form in ("pdf", "png", "csv"):
            assert (output / "simulated" / f"{name}.{form}").stat().st_size > 100
    text = (output / "CAPTIONS.md").read_text()
    assert "(simulated)" in text
    assert "**Does not show.** Evidence about the GPU." in text
    assert "Model: Qwen2.5-0.5B. Hardware: H100-SXM; 2 GPUs. Seed: 7." in text
    assert "**Published, not ours.** theirs: 2.5 (a paper)." in text
    assert (
        f"- accuracy_time (demo): {tmp_path / 'none'} holds no finished measured run; run `tppo demo --output" in text
    )
    again = "`tppo plot runs/synchronous runs/truncated runs/window-1024 --figure speedup --style paper --format pdf`"
    assert f"**Again, from this folder.** {again}" in text
    assert f"tppo paper --output {output} --demo {tmp_path / 'none'} --settings {settings}" in text
    assert "left out: accuracy_time (demo)" in capsys.readouterr().out
    before = (output / "runs" / "truncated" / "trace.jsonl").stat().st_mtime_ns
    assert call(*words) == 0
    assert (output / "runs" / "truncated" / "trace.jsonl").stat().st_mtime_ns == before  # kept


def test_runs_of_which_nothing_can_be_drawn_are_an_error(settings, tmp_path, capsys, monkeypatch):
    unreadable = paper.Drawn("roofline", paper.SIMULATED, [], reason="its trace is cut off")
    monkeypatch.setattr(paper, "_draw", lambda *asked: unreadable)
    words = ("--output", tmp_path / "out", "--demo", tmp_path / "none", "--settings", settings, "--jobs", 1)
    assert call(*words) == 2
    assert f"{tmp_path / 'out'}: no figure can be drawn; remove {tmp_path / 'out' / 'runs'}" in capsys.readouterr().err


@pytest.mark.slow
def test_measured_figures_come_from_the_demo_s_runs(settings, tmp_path):
    demo = tmp_path / "demo"
    for name in ("ppo-s0", "tppo-s0"):
        make_run(demo / name, accuracies=RISING)
    hardware = {"name": "test CPU", "peak_flops": 1e9, "memory_bytes_per_s": 1e9, "measured": True}
    (demo / "hardware.json").write_text(json.dumps(hardware))
    assert call("--output", tmp_path / "out", "--demo", demo, "--settings", settings, "--jobs", 1) == 0
    drawn = pd.read_csv(tmp_path / "out" / "demo" / "accuracy_time.csv")
    assert drawn[drawn.part == "evaluations"].accuracy.to_list() == RISING * 2
    assert "Hardware: test CPU; 1 host. Seed: 0." in (tmp_path / "out" / "CAPTIONS.md").read_text()


def test_windows_share_the_synchronous_twin_and_every_schedule_starts_up_before_it_counts(settings):
    found = experiments_of(load_paper(settings))
    # 2,048 tokens: 4 visits of 512, 2 of 1,024; twice as many start-up steps, then one that counts
    assert {name: own.workload.steps for name, own in found.items()} == {
        "synchronous": 9, "truncated": 9, "window-1024": 5,
    }  # fmt: skip


def test_bad_settings_are_named_with_a_remedy(settings, tmp_path, capsys):
    (tmp_path / "tiny.toml").write_text(EXPERIMENT)
    assert call("--output", tmp_path / "out", "--settings", settings) == 2
    assert "tiny.toml: schedule.kind = 'synchronous': the set compares" in capsys.readouterr().err
    settings.write_text(TINY.replace("rated_steps", "rated_stepps"))
    assert call("--output", tmp_path / "out", "--settings", settings) == 2
    assert "unknown key 'rated_stepps'; did you mean 'rated_steps'" in capsys.readouterr().err
    assert call("--output", tmp_path / "out", "--settings", settings, "--jobs", 0) == 2
    assert "--jobs 0: must be at least 1" in capsys.readouterr().err


def test_a_directory_with_other_runs_is_not_overwritten(settings, tmp_path, capsys):
    taken = tmp_path / "out" / "runs" / "truncated"
    taken.mkdir(parents=True)
    assert call("--output", tmp_path / "out", "--settings", settings, "--jobs", 1) == 2
    assert "truncated: holds something else than this set's run; choose another --output" in capsys.readouterr().err


def test_what_configs_shows_is_what_the_package_ships():
    shipped = sorted(path.name for path in SETTINGS.parent.glob("*.toml"))
    shown = sorted(path.name for path in (ROOT / "configs" / "paper").glob("*.toml"))
    assert shipped == shown == ["figures.toml", "ppo-32b.toml", "tppo-32b.toml"]
    for name in shipped:
        assert (ROOT / "configs" / "paper" / name).read_text() == (SETTINGS.parent / name).read_text()
    assert len(experiments_of(load_paper())) == 2 + 3 + 2 * 2 + 2 * 2


@pytest.mark.slow
def test_the_configuration_that_a_simulated_run_writes_reads_back_as_the_experiment(settings, tmp_path):
    experiment = experiments_of(load_paper(settings))["truncated"]
    assert call("--output", tmp_path / "out", "--settings", settings, "--demo", tmp_path, "--jobs", 1) == 0
    run = Run(tmp_path / "out" / "runs" / "truncated")
    assert load_experiment(run.path / "config.toml") == experiment
    assert run.config["workload"]["response_tokens"]["sigma"] == 0.9
