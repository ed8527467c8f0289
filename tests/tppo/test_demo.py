"""The whole loop, with a model and runs of a few seconds: what `make demo` does."""

import json
import os
import signal

import pandas as pd
import pytest

from profiling.console import PlainConsole, table_console
from profiling.errors import ConfigError
from profiling.reader import Run
from tests.tppo.ranks import when
from tppo.commands import demo
from tppo.data.arithmetic import ArithmeticTask, careless_solution, verify, worked_solution
from tppo.data.tokenizer import character_tokenizer
from tppo.regimes import load_regime


@pytest.fixture
def tiny_regime(monkeypatch):
    regime = load_regime("short")
    small = regime.model_copy(
        update={
            "warm_start": regime.warm_start.model_copy(update={"steps": 30, "hidden_size": 48, "layers": 1}),
            "data": regime.data.model_copy(update={"max_steps": 8, "median_steps": 3.0}),
            "rollout": regime.rollout.model_copy(
                update={"prompts_per_step": 8, "window": 12, "max_response_tokens": 48}
            ),
            "value": regime.value.model_copy(update={"pretrain_rows": 8}),
            "train": regime.train.model_copy(update={"steps": 6}),
            "evaluation": regime.evaluation.model_copy(update={"every": 2, "problems": 16}),
        }
    )
    monkeypatch.setattr(demo, "load_regime", lambda name: small)
    return small


@pytest.mark.slow
def test_the_whole_loop_trains_predicts_and_reports(tiny_regime, tmp_path, capsys):
    runs = demo.run_demo(tmp_path / "demo", regime="short", seeds=range(2))
    assert len(runs) == 6
    predictions = pd.read_csv(tmp_path / "demo" / "predictions.csv")
    assert set(predictions.calibrated_on) == {"ppo", "tppo"}
    assert set(predictions.kind) == {"forecast", "replay"}
    assert set(predictions.target) == {f"{arm}-s{seed}" for arm in ("ppo", "tppo", "tppo-full") for seed in range(2)}
    # Runs of a second on a machine that others use: how good a prediction is, the recorded demo shows. Here no unit
    # is wrong, nor, by the medians, a count: a single run may have been stopped for longer than it takes.
    found = predictions[predictions.quantity.isin(("training_seconds", "waiting_or_unfilled_share"))]
    assert len(found) == 2 * 2 * 2 * 6  # quantities, kinds, drift corrected or not, targets
    assert found.error.between(-0.98, 49.0).all(), found
    assert found.groupby("quantity").error.median().between(-0.8, 4.0).all(), found
    text = (tmp_path / "demo" / "report.html").read_text()
    assert "T-PPO, predicted from PPO alone" in text
    assert text.count("<figure>") >= 6
    assert "cannot be drawn" not in text  # left out for a reason, or drawn
    assert "advice.json" in {path.name for path in (tmp_path / "demo" / "tppo-s0").iterdir()}
    run = Run(tmp_path / "demo" / "tppo-s0")
    assert run.trailer["sampler"]["ticks"] >= 2
    assert len(run.probes) == 4
    hardware = json.loads((tmp_path / "demo" / "hardware.json").read_text())
    assert hardware["peak_flops"] > 1e8

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").glob("*-s*/metrics.jsonl")}
    demo.run_demo(tmp_path / "demo", regime="short", seeds=range(2))  # the second time trains nothing
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "Predicted against measured" in capsys.readouterr().out


def test_numbers_of_a_table_are_not_cut_off_in_a_narrow_window_and_a_file_has_it_wide(capsys):
    frame = pd.DataFrame({f"forecast error {place}": [0.1234567] for place in range(9)})
    demo.print_frame(PlainConsole(width=80), "narrow", frame)
    narrow = capsys.readouterr().out
    assert "…" not in narrow
    assert narrow.count("+12.3") == 9
    demo.print_frame(table_console(), "wide", frame)
    assert capsys.readouterr().out.count("+12.3%") == 9


def test_the_task_has_verifiable_answers_and_a_long_tail():
    regime = load_regime("short")
    task = regime.task(seed=0)
    tokenizer = character_tokenizer()
    lengths = []
    for number in range(2000):
        problem, operands = task.problem(number), task.operands(number)
        solution = worked_solution(operands)
        assert verify(problem, solution)
        assert not verify(problem, solution[:-2] + str((sum(operands) + 1) % 10) + "$")
        lengths.append(len(tokenizer(solution)["input_ids"]))
    lengths = pd.Series(lengths)
    assert 33 <= lengths.median() <= 48
    assert lengths.max() >= 192
    assert lengths.max() >= 4 * lengths.median()
    assert lengths.max() <= regime.rollout.max_response_tokens


def test_working_by_hand():
    # a4 b7 c9: 4 + 7 = 11 -> 1; 1 + 9 = 10 -> 0
    task = ArithmeticTask(median_steps=2, sigma=0, max_steps=2, seed=0)
    assert worked_solution([4, 7, 9]) == "b7:1;c9:0;#0$"
    assert task.problem(3) == ArithmeticTask(median_steps=2, sigma=0, max_steps=2, seed=0).problem(3)
    assert task.max_response_tokens == len("b7:1;c9:0;#0$")


def test_the_careless_pupil_slips_on_an_eighth_of_the_pairs_only():
    import numpy as np

    rng = np.random.default_rng(0)
    slips = 0
    for total in range(10):
        for operand in range(10):
            wrong = careless_solution([total, operand], 1.0, rng) != worked_solution([total, operand])
            assert wrong == ((3 * total + 7 * operand) % 8 == 0)
            slips += wrong
    assert slips in (12, 13)
    assert careless_solution([0, 0], 0.0, rng) == worked_solution([0, 0])


def test_the_tokenizer_is_a_real_one_and_round_trips(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "a4b7я9=b7:1;#0$"
    assert again.decode(again(text)["input_ids"]) == text
    assert len(again(text)["input_ids"]) == len(text)
    assert again.eos_token == "$"
    assert again.pad_token_id != again.eos_token_id


def test_a_run_that_was_interrupted_goes_on_and_is_not_taken_for_a_finished_one(make_config):
    from tppo.start import train

    config = make_config("run", train={"steps": 10_000})
    when(config.output / "rollouts" / "step-000001.parquet", lambda: os.kill(os.getpid(), signal.SIGINT))
    stopped = train(config, show_progress=False)
    assert (config.output / "summary.json").exists()
    more = config.model_copy(update={"train": config.train.model_copy(update={"steps": stopped.steps + 2})})
    assert demo.train_config(more).trailer["status"] == "finished"
    assert len(Run(config.output).metrics.query("step >= 1")) == stopped.steps + 2


def test_the_demo_never_touches_a_directory_that_is_not_its_own_run(make_config):
    config = make_config("notes")
    config.output.mkdir()
    (config.output / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not a run"):
        demo.train_config(config)
    assert (config.output / "notes.txt").read_text() == "mine"


def test_the_demo_does_not_take_a_run_with_other_settings_for_its_own(make_config):
    demo.train_config(make_config("run"))
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        demo.train_config(make_config("run", rollout={"window": 11}))
