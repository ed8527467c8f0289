import json
import resource
import subprocess
import sys

import pytest

from tppo.cli import main
from tppo.trainer import Outcome


def test_help_is_quick_and_does_not_import_torch():
    code = (
        "import sys\nfrom tppo.cli import main\n"
        "try:\n    main(['--help'])\nfinally:\n    print('torch' in sys.modules)"
    )
    seconds = []
    for _ in range(3):
        before = cpu_s_of_children()  # others may have the cores
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(cpu_s_of_children() - before)
    assert done.stdout.endswith("False\n")
    assert min(seconds) < 0.5
    for command in ("demo", "train", "profile", "calibrate", "simulate", "plot", "report"):
        assert command in done.stdout


def cpu_s_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def error_of(capsys, *argv):
    """Exit code and the one line on standard error."""
    code = main(list(argv))
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


@pytest.fixture
def config(tmp_path, tiny_model):
    path = tmp_path / "run.toml"
    path.write_text(f'output = "{tmp_path / "run"}"\n[model]\npath = "{tiny_model}"\n')
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rollout.windw", "8"], "unknown key 'rollout.windw'; did you mean 'rollout.window'?"),
        (["--rolout.window", "8"], "unknown key 'rolout'; did you mean 'rollout'?"),
        (["--rollout.window", "0"], "rollout.window = 0: input should be greater than 0"),
        (["--rollout.window", "wide"], "rollout.window = 'wide': input should be a valid integer"),
        (["--rollout.window"], "--rollout.window: a value is missing"),
        (["--train.mini_batches", "5"], "32 rows cannot be divided into train.mini_batches = 5; change one of them"),
        (["--algorithm.name", "grpo"], "algorithm.name = 'grpo': input should be 'ppo', 'ppo-ewma', 'geppo'"),
        (["--model.path", "nowhere/at-all"], "no such folder, and as a name on the hub no model"),
        (["--data.max_steps", "1000"], "max_steps = 1000: must lie between 1 and 107"),
        (["--evaluation.seed", "0"], "evaluation.seed equals data.seed"),
        (["extra"], "extra: not an option"),
    ],
)
def test_bad_values_are_one_line_and_exit_code_2(capsys, config, words, expected):
    code, line = error_of(capsys, "train", str(config), *words)
    assert code == 2
    assert expected in line
    assert line.startswith("tppo: ")
    assert not (config.parent / "run").exists()


def test_broken_files_are_named(capsys, tmp_path):
    assert error_of(capsys, "train", str(tmp_path / "no.toml")) == (2, f"tppo: {tmp_path}/no.toml: no such file")
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    code, line = error_of(capsys, "train", str(broken))
    assert code == 2
    assert "not valid TOML" in line
    broken.write_bytes(b"\xff\xfe\x00")
    assert "broken.toml" in error_of(capsys, "train", str(broken))[1]
    assert error_of(capsys, "train")[0] == 2
    assert "no such run directory" in error_of(capsys, "report", str(tmp_path / "nothing"))[1]
    assert "it has no trace.jsonl" in error_of(capsys, "calibrate", str(tmp_path))[1]


def test_unknown_commands_and_options_are_one_line(capsys):
    assert error_of(capsys, "trian")[0] == 2
    assert "--colour" in error_of(capsys, "plot", "run", "--figure", "roofline", "--colour")[1]


def test_a_window_above_the_maximum_trains(capsys, config):
    words = ["--rollout.window", "90", "--rollout.max_response_tokens", "12", "--rollout.prompts_per_step", "4",
             "--train.steps", "1", "--value.pretrain_rows", "0", "--evaluation.every", "0",
             "--profile.sampler", "false",
             "--data.max_steps", "6"]  # fmt: skip
    assert main(["train", str(config), *words]) == 0
    assert "finished after 1 steps" in capsys.readouterr().out
    code, line = error_of(capsys, "train", str(config), *words)
    assert code == 2
    assert "already holds a run" in line


def test_every_field_has_help(capsys):
    assert main(["train", "--fields"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, text in zip(lines[::2], lines[1::2], strict=True):
        assert name.startswith("--")
        assert len(text.split("[")[0].strip()) > 10, name


def test_simulate_prints_json_that_adds_up(capsys, tmp_path):
    experiment = tmp_path / "e.toml"
    experiment.write_text(
        "[workload]\nsteps = 2\nprompts_per_step = 4\nmax_response_tokens = 50\n"
        'response_tokens = {kind = "lognormal", mean = 20.0, sigma = 1.0}\n'
        '[schedule]\nkind = "truncated"\nwindow = 10\n[cost]\ndecode_base_s = 0.01\n'
    )
    assert main(["simulate", str(experiment), "--json", "--output", str(tmp_path / "sim")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert sum(summary["ledger"].values()) == pytest.approx(summary["gpu_seconds"], rel=1e-9)
    assert main(["simulate", str(experiment)]) == 0
    assert main(["report", str(tmp_path / "sim"), "--output", str(tmp_path / "r.html")]) == 0
    code, line = error_of(capsys, "simulate", str(experiment), "--schedule.windw", "3")
    assert "unknown key 'schedule.windw'; did you mean 'schedule.window'?" in line
    assert code == 2


def test_a_truncated_run_directory_is_reported_by_file_and_line(capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "trace.jsonl").write_text('{"type": "phase"}\n')
    assert "trace.jsonl: line 1: phase.name is missing" in error_of(capsys, "calibrate", str(run))[1]


def test_the_algorithm_has_a_short_option_that_keeps_the_files_other_settings(config, monkeypatch):
    seen = {}
    done = Outcome("finished", 1, None)
    monkeypatch.setattr("tppo.start.train", lambda config, resume: seen.update(config=config) or done)
    config.write_text(config.read_text() + "\n[algorithm]\ntrailing_tokens = 3\n")
    assert main(["train", str(config), "--algorithm", "ppo-ewma"]) == 0
    assert (seen["config"].algorithm.name, seen["config"].algorithm.trailing_tokens) == ("ppo-ewma", 3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--algorithm", "dapo"], "rollout.samples_per_prompt = 1: dapo compares the answers to one prompt"),
        (["--algorithm", "geppo", "--rollout.prompts_per_step", "5", "--train.mini_batches", "1"], "make it even"),
        (["--algorithm", "vapo", "--algorithm.prefix", "detached"], "the language-model loss trains earlier windows"),
        (["--algorithm.ewma_beta", "1"], "algorithm.ewma_beta = 1"),
        (
            ["--data.max_steps", "6", "--rollout.max_response_tokens", "9", "--value.path", "nowhere"],
            "holds no value model for this policy",
        ),
    ],
)
def test_settings_that_an_algorithm_cannot_run_with_are_one_line(capsys, config, words, expected):
    code, line = error_of(capsys, "train", str(config), *words)
    assert code == 2
    assert expected in line


def test_overrides_may_stand_anywhere_and_never_become_the_file(config, monkeypatch, capsys):
    seen = {}
    done = Outcome("finished", 1, None)
    monkeypatch.setattr("tppo.start.train", lambda config, resume: seen.update(config=config) or done)
    assert main(["train", "--rollout.window", "5", str(config), "--train.steps", "6"]) == 0
    assert (seen["config"].rollout.window, seen["config"].train.steps) == (5, 6)
    (config.parent / "config.toml").write_text(config.read_text())
    assert main(["train", "--resume", str(config.parent), "--train.steps", "7", "--algorithm", "ppo"]) == 0
    assert (seen["config"].train.steps, seen["config"].algorithm.name) == (7, "ppo")


@pytest.mark.parametrize("words", [["--seed=-1"], ["--seeds", "0"], ["--seeds=-2"]])
def test_an_impossible_demo_is_refused_before_it_starts(capsys, words, tmp_path):
    code, line = error_of(capsys, "demo", "--output", str(tmp_path / "d"), *words)
    assert (code, "need a seed of at least 0 and one run" in line) == (2, True)
    assert not (tmp_path / "d").exists()


def test_an_infinite_setting_is_refused(capsys, config):
    code, line = error_of(capsys, "train", str(config), "--optimizer.policy_lr", "inf")
    assert code == 2
    assert "optimizer.policy_lr = inf" in line
