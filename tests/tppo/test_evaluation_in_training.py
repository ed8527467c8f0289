import json
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from profiling.errors import ConfigError
from profiling.reader import Run
from profiling.schema import EVALUATIONS
from profiling.settings import check_settings
from tppo.config import RunConfig
from tppo.data.arithmetic import ArithmeticTask
from tppo.data.problem import Problem
from tppo.data.tokenizer import character_tokenizer
from tppo.evaluation.evaluate import evaluate, evaluation_slots
from tppo.evaluation.graded import validation_metrics
from tppo.models.policy import load_policy
from tppo.rewards.final_answer import FinalAnswer
from tppo.rewards.protocol import Grade
from tppo.rollout.protocol import Completion, Sampling
from tppo.rollout.torch_engine import TorchEngine
from tppo.start import train, trainer_for

TIMES = ("time", "clock", "perf/throughput", "timing")


def run(config, **options):
    train(config, show_progress=False, **options)
    return Run(config.output)


def weights_of(run_):
    (last,) = (run_.path / "checkpoints").iterdir()
    return {**load_file(last / "policy" / "model.safetensors"), **load_file(last / "value_model.safetensors")}


def trained_rows(run_):
    rows = [json.loads(line) for line in (run_.path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith((*TIMES, "val/"))} for row in rows if row["step"]]


@pytest.mark.parametrize("settings", [{"algorithm": "tppo"}, {"algorithm": "ppo", "schedule": "asynchronous"}])
def test_a_run_is_the_same_to_the_last_bit_with_evaluations_and_without(make_config, settings):
    sections = {
        "algorithm": {"name": settings["algorithm"]},
        "rollout": {"schedule": settings.get("schedule", "recipe")},
    }
    without = run(make_config("without", **sections, evaluation={"every": 0}))
    often = {"every": 1, "samples": 3, "temperature": 0.7, "top_p": 0.9}
    evaluated = run(make_config("evaluated", **sections, evaluation=often))
    assert trained_rows(without) == trained_rows(evaluated)
    first, second = weights_of(without), weights_of(evaluated)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_evaluation_leaves_every_random_state_as_it_was(make_config):
    with trainer_for(make_config("states", evaluation={"samples": 2})) as trainer:

        def states():
            return [
                random.getstate(), torch.get_rng_state().tolist(), trainer.state.generator.get_state().tolist(),
                trainer.state.rollout_generator.get_state().tolist(), np.random.get_state()[1].tolist(),  # noqa: NPY002
            ]  # fmt: skip

        before = states()
        graded, metrics = trainer.evaluate(step=0)
        assert graded.correct.shape == (8, 2)
        assert metrics["val/accuracy"] == graded.mean
        assert states() == before


def test_metrics_and_the_table_of_responses_say_the_same(make_config):
    config = make_config("several", evaluation={"samples": 4, "problems": 5, "every": 2})
    run_ = run(config)
    assert [path.name for path in sorted((run_.path / "evaluations").iterdir())] == [
        "step-000000.parquet", "step-000002.parquet", "step-000004.parquet",
    ]  # fmt: skip
    table = run_.evaluations
    assert list(table.columns) == EVALUATIONS.names
    rows = run_.metrics.set_index("step")
    for step, of_step in table.groupby("step"):
        assert of_step[["problem", "sample"]].to_numpy().tolist() == [[p, s] for p in range(5) for s in range(4)]
        row = rows.loc[step]
        assert row["val/accuracy"] == row["val/avg@4"] == row["val/pass@1"] == of_step.correct.mean()
        assert row["val/pass@4"] == of_step.groupby("problem").correct.any().mean()
        assert row["val/response_length/mean"] == of_step.tokens.mean()
        # no engine of these gave a response up: what did not finish hit the maximum
        assert row["val/response_length/clip_ratio"] == (~of_step.finished).mean()
        assert (of_step[~of_step.finished].tokens == config.rollout.max_response_tokens).all()
    between = rows.loc[[1, 3], [name for name in rows.columns if name.startswith("val/")]]
    assert len(between.columns) == 10
    assert between.isna().all(axis=None)


def test_a_run_directory_without_evaluations_is_read_as_before(make_config):
    run_ = run(make_config("older"))
    assert len(run_.evaluations) == 3 * 8
    shutil.rmtree(run_.path / "evaluations")
    older = Run(run_.path)
    assert older.evaluations.empty
    assert list(older.evaluations.columns) == EVALUATIONS.names
    assert older.summary == run_.summary


def test_a_resumed_run_has_the_evaluations_of_one_that_was_never_stopped(make_config):
    sections = {"train": {"steps": 4, "checkpoint_every": 2}, "evaluation": {"every": 1, "samples": 2}}
    whole = run(make_config("whole", **sections))
    again = make_config("again", **sections)
    run(again)
    for later in ("step-000003", "step-000004"):
        shutil.rmtree(again.output / "checkpoints" / later, ignore_errors=True)
    first_steps = again.model_copy(update={"train": again.train.model_copy(update={"steps": 3})})
    resumed = run(first_steps, resume=True)
    assert resumed.evaluations.step.max() == 3  # those after the checkpoint went, and one came again
    assert resumed.evaluations.equals(whole.evaluations[whole.evaluations.step <= 3])


def answers(tiny_model, slots, samples, seed=0):
    policy, tokenizer = load_policy(str(tiny_model))
    task = ArithmeticTask(median_steps=2, sigma=0.5, max_steps=6, seed=5)
    engine = TorchEngine(
        policy, slots=slots, max_tokens=task.longest_prompt(tokenizer) + 24, pad_token_id=tokenizer.pad_token_id,
        generator=torch.Generator(), clock=lambda: 0.0,
    )  # fmt: skip
    ended = []
    graded = evaluate(
        engine, Sampling(stop_token_ids=(tokenizer.eos_token_id,), seed=seed), tokenizer,
        [task.problem(number) for number in range(5)], FinalAnswer(), max_response_tokens=24, samples=samples,
        on_end=lambda count, of: ended.append(count),
    )  # fmt: skip
    assert sum(ended) == 5 * samples
    return graded


class ScriptedEngine:
    """Ends rows two at a time, the last first, with the tokens of a script."""

    def __init__(self, completions):
        self.left = completions

    def submit(self, requests, sampling):
        assert [request.row for request in requests] == sorted(done.row for done in self.left)

    def run_until_a_row_ends(self):
        ended, self.left = self.left[-2:], self.left[:-2]
        return sorted(ended, key=lambda done: done.row)

    def take_records(self):
        return []


def test_each_response_is_graded_against_its_own_problem():
    # problem 0 (answer 3): "#3$" right, "#7$" wrong; problem 1 (answer 7): "#7$" right, given up after "b";
    # problem 2 (answer 3): cut after "#3", "#3$" right
    tokenizer = character_tokenizer()
    script = [("#3$", "stop"), ("#7$", "stop"), ("#7$", "stop"), ("b", "failed"), ("#3", "budget"), ("#3$", "stop")]
    engine = ScriptedEngine([
        Completion(row, tokenizer(text)["input_ids"], [], reason, 0, 0.0, 0.0)
        for row, (text, reason) in enumerate(script)
    ])  # fmt: skip
    problems = [Problem("a1b2=", "3"), Problem("a3b4=", "7"), Problem("a0b3=", "3")]
    graded = evaluate(engine, Sampling(), tokenizer, problems, FinalAnswer(), max_response_tokens=3, samples=2)
    assert graded.correct.tolist() == [[True, False], [True, False], [False, True]]
    assert graded.answers == [["3", "7"], ["7", None], [None, "3"]]
    assert graded.tokens.tolist() == [[3, 3], [3, 1], [2, 3]]
    assert graded.finished.tolist() == [[True, True], [True, False], [False, True]]
    assert graded.cut.tolist() == [[False, False], [False, False], [True, False]]
    assert graded.columns(5)["answer"] == ["3", "7", "7", None, None, "3"]


def test_a_reward_that_reads_no_answers_leaves_the_votes_null():
    class OnlyGrades:
        def grade(self, problems, responses):
            return [Grade(1.0, True) for _ in responses]

    tokenizer = character_tokenizer()
    tokens = tokenizer("#3$")["input_ids"]
    engine = ScriptedEngine([Completion(row, tokens, [], "stop", 0, 0.0, 0.0) for row in range(2)])
    problems = [Problem("a1b2=", "3")]
    graded = evaluate(engine, Sampling(), tokenizer, problems, OnlyGrades(), max_response_tokens=3, samples=2)
    assert (graded.estimates["pass@2"].value, graded.estimates["maj@2"]) == (1.0, None)
    assert validation_metrics(graded)["val/maj@2"] is None


def test_more_responses_than_slots_wait_for_their_turn(tiny_model):
    graded = answers(tiny_model, slots=3, samples=7)
    assert graded.correct.shape == graded.tokens.shape == graded.finished.shape == (5, 7)
    assert ((graded.tokens >= 1) & (graded.tokens <= 24)).all()
    assert (graded.finished ^ graded.cut).all()
    assert len({tuple(row) for row in graded.tokens.tolist()}) > 1  # samples differ


def test_a_seed_decides_the_responses(tiny_model):
    first, second = answers(tiny_model, 4, 3), answers(tiny_model, 4, 3)
    assert (first.tokens == second.tokens).all()
    assert first.answers == second.answers
    assert (first.tokens != answers(tiny_model, 4, 3, seed=1).tokens).any()


def test_slots_are_bounded_by_problems_or_a_rollout(make_config):
    # 8 problems, 8 rows a step: one response of each problem at once, however many samples
    assert evaluation_slots(make_config("a", evaluation={"samples": 1}), 8) == 8
    assert evaluation_slots(make_config("b", evaluation={"samples": 32}), 8) == 8
    assert evaluation_slots(make_config("c", evaluation={"samples": 32}, rollout={"prompts_per_step": 64}), 8) == 64
    assert evaluation_slots(make_config("d", evaluation={"samples": 2}, rollout={"prompts_per_step": 64}), 8) == 16
    # more problems than rows of a step: as many slots as problems, so that one sample each is drawn as ever
    assert evaluation_slots(make_config("e", evaluation={"samples": 1}), 200) == 200


def test_several_greedy_samples_are_refused():
    with pytest.raises(ConfigError, match=r"evaluation.samples = 4: at evaluation.temperature = 0 all are the same"):
        check_settings({"evaluation": {"samples": 4, "temperature": 0}}, RunConfig, where="run.toml")


def test_a_greedy_evaluation_runs(make_config):
    run_ = run(make_config("greedy", evaluation={"temperature": 0.0}, train={"steps": 2}))
    assert run_.metrics["val/accuracy"].notna().sum() == 2
