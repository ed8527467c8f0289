"""`train` with a data set and a reward that checks answers, end to end."""

import json

import psutil
import pytest

from profiling.errors import ConfigError, RunError
from profiling.reader import Run
from tppo.collect import StepTimes
from tppo.data.problem import Problem
from tppo.rewards.protocol import RewardError
from tppo.start import train, trainer_for
from tppo.state import Ahead

MINE = """
import pathlib
calls = pathlib.Path("calls")

def letters(prompt, response, answer):
    return float(response.count("a") > response.count("b"))

def fails_later(prompt, response, answer):
    if pathlib.Path("fail").exists():
        raise ValueError("no more")
    return letters(prompt, response, answer)
"""


@pytest.fixture
def data_config(make_config, tmp_path, monkeypatch):
    path = tmp_path / "problems.jsonl"
    rows = [{"question": f"a{i % 10}b{i // 10}=", "answer": f"work #### {i}"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)

    def make(name="run", **sections):
        base = {
            "data": {"task": "dataset", "path": str(path), "seed": 5},
            "reward": {"workers": 1, "timeout_s": 60},
            "evaluation": {"every": 2, "problems": 4},
            "train": {"steps": 3},
            "value": {"pretrain_rows": 4},
        }
        merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {**base, **sections}}
        return make_config(name, **merged)

    return make


def children():
    return {child.pid for child in psutil.Process().children()}


def prompts_by_row(run):
    checkpoint = sorted((run.path / "checkpoints").glob("step-*"))[-1]
    progress = json.loads((checkpoint / "progress.json").read_text())
    return {row["row"]: row["problem"]["prompt"] for row in (progress["rows"][place] for place in progress["carried"])}


def run(config, **options):
    train(config, show_progress=False, **options)
    return Run(config.output)


@pytest.mark.slow
def test_a_data_set_trains_and_a_resumed_run_has_the_same_rows(data_config, capsys):
    before = children()
    whole = run(data_config("whole", train={"steps": 4}))
    assert children() <= before
    assert "of 30 rows 4 are held out; these do not train" in capsys.readouterr().err
    metrics = whole.metrics.query("step >= 1")
    assert metrics["reward/timeouts"].tolist() == [0, 0, 0, 0]
    assert metrics["reward/unparsed"].between(0, metrics["training/finished_rows"]).all()
    assert metrics["reward/unparsed"].sum() > 0  # a random model writes nonsense
    assert metrics["reward/format_share"].isna().all()
    assert set(whole.rollouts.query("finished").reward) <= {1.0, -1.0}
    run(data_config("parted", train={"steps": 2}))
    parted = run(data_config("parted", train={"steps": 4}), resume=True)
    times = ["t_start", "t_end"]
    assert parted.rollouts.drop(columns=times).equals(whole.rollouts.drop(columns=times))
    assert len(prompts_by_row(whole)) > 0
    assert prompts_by_row(parted) == prompts_by_row(whole)


def test_a_second_epoch_has_every_problem_again_and_none_that_is_held_out(data_config):
    with trainer_for(data_config()) as trainer:
        first = [trainer.collector.fresh_row(number).problem for number in range(26)]
        second = [trainer.collector.fresh_row(number).problem for number in range(26, 52)]
        held_out = list(trainer.held_out)
    assert first != second
    by_prompt = {problem.prompt: problem.answer for problem in first}
    assert len(by_prompt) == 26
    assert by_prompt == {problem.prompt: problem.answer for problem in second}
    assert by_prompt["a7b1="] == "17" or Problem("a7b1=", "17") in held_out
    assert len(held_out) == 4
    assert not {problem.prompt for problem in held_out} & set(by_prompt)


def test_problems_that_have_changed_are_not_resumed_upon(data_config, tmp_path):
    done = run(data_config(train={"steps": 1}))
    before = {p: p.read_bytes() for p in done.path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="the problems are not those that the run was started with"):
        train(data_config(evaluation={"problems": 5}), resume=True, show_progress=False)
    (tmp_path / "problems.jsonl").write_text('{"question": "a1=", "answer": "#### 1"}\n' * 3)
    with pytest.raises(ConfigError):
        train(data_config(evaluation={"every": 0}), resume=True, show_progress=False)
    assert {p: p.read_bytes() for p in done.path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("schedule", ["recipe", "asynchronous"])
def test_a_reward_that_fails_leaves_a_checkpoint_from_which_the_run_goes_on_as_if_it_had_not(
    data_config, tmp_path, monkeypatch, schedule
):
    own = {"algorithm": {"name": "tppo" if schedule == "recipe" else "ppo"}, "rollout": {"schedule": schedule}}
    own |= {"reward": {"kind": "python", "function": "mine:fails_later"}, "evaluation": {"every": 0}}
    whole = run(data_config("whole", **own))
    before = children()
    config = data_config("failing", **own)
    with (
        pytest.raises(RunError, match=r"ValueError: no more.* with --resume \S+ --reward.function mine:fails_later$"),
        trainer_for(config) as trainer,
    ):
        step = trainer.train_step

        def train_step(number):
            if number == 2:
                (tmp_path / "fail").touch()
            return step(number)

        monkeypatch.setattr(trainer, "train_step", train_step)
        trainer.run(False)
    assert children() <= before
    (tmp_path / "fail").unlink()
    assert json.loads((config.output / "trace.jsonl").read_text().splitlines()[-1])["status"] == "failed"
    assert sorted(p.name for p in (config.output / "checkpoints").iterdir()) == ["step-000001"]
    resumed = run(config, resume=True)
    times = ["t_start", "t_end"]
    assert resumed.rollouts.drop(columns=times).equals(whole.rollouts.drop(columns=times))
    rewards = whole.rollouts.query("finished").reward
    assert 0 < rewards.mean() < 1


def test_rows_that_only_waited_keep_their_windows_when_the_grading_of_rows_rolled_out_ahead_fails(data_config):
    config = data_config(algorithm={"name": "ppo"}, rollout={"schedule": "asynchronous"}, evaluation={"every": 0})
    with trainer_for(config) as trainer:
        state, collector = trainer.state, trainer.collector
        waiting, graded = collector.fresh_row(100), collector.fresh_row(101)
        waiting.response_ids, waiting.log_probs = [5, 6, 7], [-1.0, -1.0, -1.0]  # window_start is 0
        graded.response_ids, graded.finished = [5], True
        state.carried, state.ahead = [waiting], Ahead([graded], [])

        class Fails:
            def grade(self, problems, responses):
                raise RewardError("broken")

        collector.reward = Fails()
        with pytest.raises(RewardError):
            collector.collect(StepTimes(trainer.profiler, 1))
        collector.undo()
        assert state.carried[0].response_ids == [5, 6, 7]
        assert state.ahead.rows == [graded]


def test_a_reward_that_fails_in_an_evaluation_saves_its_step_and_ends_its_processes(data_config, monkeypatch):
    config = data_config(train={"steps": 3, "checkpoint_every": 1})
    before = children()
    ends = pytest.raises(RunError, match="broken; the checkpoint of step 2 holds every unfinished row")
    with ends, trainer_for(config) as trainer:
        evaluate = trainer.evaluate

        def broken(step, **options):
            if step == 2:
                raise RewardError("broken")
            return evaluate(step, **options)

        monkeypatch.setattr(trainer, "evaluate", broken)
        trainer.run(False)
    assert children() <= before
    assert sorted(p.name for p in (config.output / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert run(config, resume=True).summary["steps"] == 3


def test_a_prompt_template_of_several_lines_survives_the_run_directory(data_config):
    template = 'a"b\\boxed{}\n{problem}\tc\x7f'
    done = run(data_config(train={"steps": 1}, data={"prompt_template": template, "max_prompt_tokens": 40}))
    assert done.config["data"]["prompt_template"] == template


def test_the_arithmetic_task_has_no_reward_metrics_and_starts_no_process(make_config):
    before = children()
    with trainer_for(make_config("run", train={"steps": 1})) as trainer:
        assert children() <= before
        trainer.run(False)
    row = Run(trainer.writer.path).metrics.query("step == 1").iloc[0]
    assert row[["reward/timeouts", "reward/unparsed", "reward/format_share"]].isna().all()
