import json
import shutil

import pytest
from rich.console import Console

from profiling.reader import Run
from tppo.cli import main
from tppo.commands.samples import run_samples, shortened
from tppo.data.problem import Problem
from tppo.rewards.protocol import RewardError
from tppo.rollout.rows import Row
from tppo.samples import chosen, sample_records
from tppo.start import train


def row(number, tokens=1, reward=0.0, finished=True):
    return Row(number, number, Problem("p", "1"), [1], response_ids=[2] * tokens, finished=finished,
               reward=reward if finished else None)  # fmt: skip


def numbers(rows, count):
    return [r.row for r in chosen(rows, count)]


def test_the_first_the_longest_the_best_and_the_worst_are_shown_in_turn():
    rows = [row(3), row(1, tokens=2), row(2, reward=1.0), row(4, tokens=9), row(5, reward=-1.0), row(6, reward=0.5)]
    # first: 1 2 3 ..; longest: 4 1 2 ..; best: 2 6 1 ..; worst: 5 1 3 ..
    assert numbers(rows, 4) == [1, 4, 2, 5]
    assert numbers(rows, 5) == [1, 4, 2, 5, 6]
    assert numbers(rows, 50) == [1, 4, 2, 5, 6, 3]
    assert numbers(list(reversed(rows)), 4) == [1, 4, 2, 5]  # not the order in which they came


def test_unfinished_rows_are_shown_only_where_too_few_finished():
    rows = [row(1, finished=False), row(2), row(3, finished=False)]
    assert numbers(rows, 1) == [2]
    assert numbers(rows, 2) == [2, 1]
    assert numbers([], 4) == []


class Letters:
    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


class Dying:
    def grade(self, problems, responses):
        return []

    def answers(self, responses):
        raise RewardError("the checker died")

    def close(self):
        pass


def test_a_reward_that_cannot_read_answers_costs_the_column_and_not_the_run():
    (record,) = sample_records(7, [row(4, tokens=2, reward=0.5)], Letters(), Dying())
    assert record == {
        "step": 7, "row": 4, "prompt": "a", "response": "bb", "answer": None, "reward": 0.5, "correct": None,
        "tokens": 2, "finished": True, "policy_version": 0,
    }  # fmt: skip


def test_a_run_keeps_tables_of_samples_and_resuming_drops_later_ones(make_config):
    config = make_config("run", train={"steps": 4, "checkpoint_every": 2}, logging={"samples_every": 1, "samples": 5})
    train(config, show_progress=False)
    done = Run(config.output)
    assert done.samples.groupby("step").size().to_dict() == {1: 5, 2: 5, 3: 5, 4: 5}
    shown = done.samples.merge(done.rollouts, on=["step", "row"])
    assert len(shown) == len(done.samples)
    assert (shown.tokens_x == shown.context_before - shown.prompt_tokens + shown.tokens_y).all()
    ended = shown[shown.finished_x]
    assert ended.reward_x.tolist() == ended.reward_y.tolist()
    assert shown[~shown.finished_x].reward_x.isna().all()
    first = done.samples
    shutil.rmtree(done.path / "checkpoints" / "step-000004")
    train(make_config("run", train={"steps": 2, "checkpoint_every": 2}), show_progress=False, resume=True)
    again = Run(config.output).samples
    assert again.equals(first[first.step <= 2])


def test_samples_are_off_at_0(make_config):
    config = make_config("run", train={"steps": 1}, logging={"samples_every": 0})
    train(config, show_progress=False)
    assert Run(config.output).samples.empty
    assert not (config.output / "samples").exists()


@pytest.fixture
def run_with_samples(make_config):
    config = make_config("run", train={"steps": 2}, logging={"samples_every": 1, "samples": 3})
    train(config, show_progress=False)
    return config.output


def test_the_command_shows_a_step_as_a_table_or_whole_as_json(run_with_samples, capsys):
    assert main(["samples", str(run_with_samples), "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["step"] for record in records] == [2, 2, 2]
    assert main(["samples", str(run_with_samples), "--step", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["step"] == 1
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    run_samples(run_with_samples, step=2, as_json=False, console=console)
    text = console.export_text()
    console.file.close()
    assert "run, step 2" in text
    assert all(str(record["row"]) in text for record in records)
    assert main(["samples", str(run_with_samples), "--step", "9"]) == 2
    assert "has no samples of step 9; the nearest step that has some is 2" in capsys.readouterr().err
    shutil.rmtree(run_with_samples / "samples")
    assert main(["samples", str(run_with_samples)]) == 2
    assert "has no sample generations; train with logging.samples_every above 0" in capsys.readouterr().err


def test_a_long_text_keeps_its_ends_and_no_character_steers_the_terminal():
    text = shortened("a" * 300 + "b" * 500)
    assert text.startswith("a" * 200 + " [... 200 characters ...] ")
    assert text.endswith("b" * 400)
    assert shortened("x\x1b[31m\ny") == "x\\x1b[31m\ny"
