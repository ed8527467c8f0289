import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from profiling.reader import Run
from profiling.schema import EVALUATIONS
from tppo.cli import main
from tppo.commands.eval import Flags, config_of
from tppo.data.problem import Problem
from tppo.evaluation.graded import Graded
from tppo.evaluation.per_problem import hardest_first
from tppo.evaluation.source import Source, find_source, kept_settings
from tppo.start import train

DATA = ["--data.median_steps", "1", "--data.sigma", "0.3", "--data.max_steps", "2"]


def config_for(model, output, **evaluation):
    """A run of two steps with evaluations of four samples."""
    return {
        "output": str(output),
        "model": {"path": str(model)},
        "data": {"median_steps": 1, "sigma": 0.3, "max_steps": 2},
        "rollout": {"prompts_per_step": 8, "max_response_tokens": 16, "window": 8},
        "value": {"pretrain_rows": 0},
        "train": {"steps": 2, "checkpoint_every": 1},
        "evaluation": {"every": 1, "problems": 24, "samples": 4, **evaluation},
        "profile": {"sampler": False},
    }


@pytest.fixture(scope="module")
def run_directory(answering_model, tmp_path_factory):
    from tppo.config import RunConfig

    output = tmp_path_factory.mktemp("runs") / "run"
    train(RunConfig.model_validate(config_for(answering_model, output)), show_progress=False)
    return output


def evaluate(capsys, *words):
    assert main(["eval", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(capsys, *words):
    """Exit code and the one line on standard error."""
    code = main(["eval", *map(str, words)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


def everything_in(directory):
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in directory.rglob("*")}  # fmt: skip


def test_a_runs_newest_checkpoint_is_evaluated_and_the_run_stays_as_it_was(capsys, run_directory):
    before = everything_in(run_directory)
    result = evaluate(capsys, run_directory)
    assert everything_in(run_directory) == before
    assert (result["step"], result["problems"], result["samples"]) == (2, 24, 32)
    metrics = result["metrics"]
    assert list(metrics) == ["avg@32", *(f"pass@{2**i}" for i in range(6)), *(f"maj@{2**i}" for i in range(1, 6))]
    for estimate in metrics.values():
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
    chances = [metrics[f"pass@{2**i}"]["value"] for i in range(6)]
    assert chances == sorted(chances)
    assert 0 < chances[0] < chances[-1]


def test_it_repeats_an_evaluation_of_training(capsys, run_directory):
    rows = Run(run_directory).metrics.set_index("step")
    for step in (1, 2):
        seed = 1_000_003 + step  # evaluation.seed + step
        result = evaluate(capsys, run_directory, "--checkpoint", f"step-{step:06d}", "--samples", 4, "--seed", seed)
        assert result["step"] == step
        for name, estimate in result["metrics"].items():
            assert estimate["value"] == rows.loc[step, f"val/{name}"]
        assert result["standard_error"] == rows.loc[step, "val/accuracy_stderr"]
        assert result["mean_response_tokens"] == rows.loc[step, "val/response_length/mean"]


def test_a_seed_gives_the_same_numbers_twice_and_another_seed_others(capsys, run_directory):
    first = evaluate(capsys, run_directory, "--samples", 8, "--seed", 3)
    assert first == evaluate(capsys, run_directory, "--samples", 8, "--seed", 3)
    other = evaluate(capsys, run_directory, "--samples", 8, "--seed", 4)
    assert other["metrics"]["avg@8"] != first["metrics"]["avg@8"]


def test_a_checkpoint_folder_and_a_model_are_evaluated_too(capsys, run_directory, answering_model):
    folder = run_directory / "checkpoints" / "step-000001"
    words = ("--samples", 4, "--seed", 1)
    of_folder = evaluate(capsys, folder, *words)
    of_run = evaluate(capsys, run_directory, "--checkpoint", folder.name, *words)
    assert (of_folder["metrics"], of_folder["step"]) == (of_run["metrics"], 1)
    model = (*DATA, "--rollout.max_response_tokens", 16, "--rollout.prompts_per_step", 8, "--problems", 24)
    of_policy = evaluate(capsys, folder / "policy", *words, *model)
    assert (of_policy["metrics"], of_policy["step"]) == (of_run["metrics"], None)
    at_first = ("--samples", 4, "--seed", 1_000_003, "--data", "arithmetic")
    start = evaluate(capsys, answering_model, *at_first, *model)
    assert start["metrics"]["avg@4"]["value"] == Run(run_directory).metrics["val/accuracy"].iloc[0]


def test_the_responses_and_the_result_are_written_once(capsys, run_directory, tmp_path):
    output = tmp_path / "new" / "result"
    words = ["eval", str(run_directory), "--samples", "4", "--problems", "6", "--output", str(output), "--per-problem"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "avg@4" in printed
    assert "hardest first" in printed
    result = json.loads((output / "evaluation.json").read_text())
    table = pq.read_table(output / "evaluations.parquet")
    assert table.schema.equals(EVALUATIONS)
    rows = table.to_pandas()
    assert len(rows) == 6 * 4
    assert (rows.step == 2).all()
    assert rows.correct.mean() == result["metrics"]["avg@4"]["value"]
    of_problem = {row["problem"]: row for row in result["per_problem"]}
    assert rows.groupby("problem").correct.sum().to_dict() == {p: row["correct"] for p, row in of_problem.items()}
    shares = [row["correct"] for row in result["per_problem"]]
    assert shares == sorted(shares)
    before = everything_in(output)
    code, line = error_of(capsys, *words[1:])
    assert (code, "already holds evaluation.json" in line) == (2, True)
    assert everything_in(output) == before


def test_greedy_takes_one_sample_and_one_problem_has_no_interval(capsys, run_directory):
    result = evaluate(capsys, run_directory, "--temperature", 0, "--problems", 1)
    assert (result["samples"], result["problems"], result["temperature"]) == (1, 1, 0)
    assert result["metrics"]["avg@1"]["low"] is None
    assert result == evaluate(capsys, run_directory, "--temperature", 0, "--problems", 1)
    assert main(["eval", str(run_directory), "--problems", "1", "--samples", "2"]) == 0
    assert "all problems alike" in capsys.readouterr().out


def test_options_reach_the_sampling(capsys, run_directory):
    words = ("--samples", 2, "--temperature", 0.5, "--top-p", 0.7, "--top-k", 3, "--max-response-tokens", 4)
    result = evaluate(capsys, run_directory, *words, "--problems", 5)
    assert [result[name] for name in ("temperature", "top_p", "top_k", "max_response_tokens")] == [0.5, 0.7, 3, 4]
    assert result["mean_response_tokens"] <= 4
    assert result["clip_ratio"] > 0
    narrow = evaluate(capsys, run_directory, "--samples", 2, "--problems", 5, "--rollout.max_rows_per_engine", 3)
    assert narrow["samples"] == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--samples", "0"], "tppo eval: samples = 0: input should be greater than or equal to 1"),
        (["--samples", "999999999999"], "tppo eval: samples = 999999999999: input should be less than or equal to"),
        (["--samples", "many"], "invalid int value: 'many'"),
        (["--problems", "0"], "tppo eval: problems = 0"),
        (["--temperature", "-1"], "tppo eval: temperature = -1.0"),
        (["--temperature", "nan"], "tppo eval: temperature = nan"),
        (["--temperature", "0", "--samples", "2"], "at evaluation.temperature = 0 all are the same"),
        (["--top-p", "0"], "tppo eval: top_p = 0.0"),
        (["--seed", "-1"], "tppo eval: seed = -1"),
        (["--engine", "sglang"], "tppo eval: engine = 'sglang': input should be 'torch' or 'vllm'"),
        (["--max-response-tokens", "500"], "rollout.max_response_tokens = 500"),
        (["--checkpoint", "step-000007"], "has step-000001, step-000002; or write best or last"),
        (["--data", "math.jsonl"], "evaluation.path = 'math.jsonl': no such file or folder"),
        (["--evaluation.seeds", "3"], "unknown key 'evaluation.seeds'; did you mean 'evaluation.seed'?"),
        (["--sampels", "3"], "unknown key 'sampels'"),
        (["more"], "more: not an option"),
        (["--data.max_steps", "1000"], "max_steps = 1000: must lie between 1 and 107"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(capsys, run_directory, words, expected):
    code, line = error_of(capsys, run_directory, *words)
    assert (code, line) == (2, line)
    assert expected in line


def test_what_cannot_be_evaluated_is_named(capsys, run_directory, answering_model, tmp_path):
    def fault(source, *words):
        code, line = error_of(capsys, source, *words)
        assert code == 2, line
        assert str(source) in line
        return line

    assert "no such directory" in fault(tmp_path / "nothing")
    file = tmp_path / "file.txt"
    file.write_text("no run")
    assert "no run directory (config.toml, checkpoints/), no checkpoint" in fault(file)
    (tmp_path / "empty").mkdir()
    assert "no run directory" in fault(tmp_path / "empty")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run_directory, unfinished, ignore=shutil.ignore_patterns("checkpoints"))
    assert "has no checkpoint; one is written at the end" in fault(unfinished)
    assert "is no run directory; leave it out" in fault(answering_model, "--checkpoint", "last")
    assert "a model alone does not say what to ask it; add --data" in fault(answering_model)
    assert "no model can be loaded from it" in fault("nobody/nothing", "--data", "arithmetic")
    hollow = tmp_path / "hollow" / "checkpoints" / "step-000001"
    hollow.mkdir(parents=True)
    assert "manifest.json is missing" in fault(hollow.parent.parent)


def test_a_model_without_its_tokenizer_is_one_line(capsys, answering_model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(answering_model, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*", "*.jinja"))
    code, line = error_of(capsys, bare, *DATA)
    assert code == 2, line
    assert str(bare) in line


def test_an_output_that_cannot_be_made_is_refused_before_the_work(capsys, run_directory, tmp_path, monkeypatch):
    monkeypatch.setattr("tppo.models.policy.load_policy", None)
    file = tmp_path / "file"
    file.write_text("")
    code, line = error_of(capsys, run_directory, "--output", file / "below")
    assert (code, "cannot be created" in line) == (2, True)


def test_a_run_of_another_recipe_and_engine_is_evaluated_by_what_matters():
    tables = {
        "output": "runs/x",
        "model": {"path": "m"},
        "data": {"max_steps": 3},
        "algorithm": {"name": "dapo", "no_longer_there": 1},
        "rollout": {"schedule": "asynchronous", "compile": True, "window": 7, "temperature": 0.8, "top_p": 0.9},
        "evaluation": {"problems": 9},
    }
    source = Source("m/policy", 3, kept_settings(tables))
    config = config_of(source, Flags(engine="vllm"), None, {}, where="runs/x")
    assert (config.rollout.engine, config.rollout.schedule, config.rollout.compile) == ("vllm", "recipe", False)
    assert (config.model.path, config.data.max_steps, config.evaluation.problems) == ("m/policy", 3, 9)
    assert (config.evaluation.temperature, config.evaluation.top_p, config.evaluation.samples) == (0.8, 0.9, 32)


def test_evaluation_goes_before_rollout_and_a_flag_before_both():
    tables = {"rollout": {"temperature": 0.8, "top_p": 0.9}, "evaluation": {"top_p": 0.7, "samples": 4}}
    source = Source("m", 1, kept_settings(tables))
    config = config_of(source, Flags(top_k=5), None, {"evaluation.problems": 3}, where="r")
    own = config.evaluation
    assert (own.temperature, own.top_p, own.top_k, own.problems, own.samples) == (0.8, 0.7, 5, 3, 32)
    assert config_of(source, Flags(problems=2), None, {"evaluation.problems": 3}, where="r").evaluation.problems == 2
    assert config_of(source, Flags(), None, {"evaluation.samples": 6}, where="r").evaluation.samples == 6


def test_a_data_set_is_asked_whole_and_graded_by_its_reward(run_directory, tmp_path, capsys):
    rows = [{"problem": f"a{i}b{i}=", "answer": str(2 * i)} for i in range(5)]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["eval", str(run_directory), "--data", str(file), "--samples", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["problems"], result["samples"]) == (5, 2)
    assert result["data"]["task"] == "dataset"
    assert result["metrics"]["avg@2"]["value"] == 0.0  # no response boxes an answer
    assert main(["eval", str(run_directory), "--data", str(file), "--problems", "3", "--samples", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == 3
    assert main(["eval", str(run_directory), "--data", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_a_name_that_is_no_directory_may_be_on_the_hub():
    assert find_source("Qwen/Qwen2.5-0.5B") == Source("Qwen/Qwen2.5-0.5B")
    assert find_source("gpt2") == Source("gpt2")


def test_problems_are_listed_hardest_first():
    # 0: one of two right, votes 7 and 3 tie, the first given is named; 1: none right, short; 2: none right, long,
    # and without an answer
    problems = [Problem("p0", "7"), Problem("p1", "1"), Problem("p2", "2")]
    correct = np.array([[True, False], [False, False], [False, False]])
    tokens = np.array([[4, 4], [2, 4], [9, 8]])
    cut = np.array([[False, False], [False, False], [True, False]])
    rows = hardest_first(problems, Graded(tokens, ~cut, cut, correct, [["7", "3"], ["3", "3"], [None, None]]))
    assert [row.problem for row in rows] == [2, 1, 0]
    assert (rows[0].vote, rows[0].votes, rows[0].mean_tokens, rows[0].clipped) == (None, 0, 8.5, 1)
    assert rows[1] == replace(rows[0], problem=1, prompt="p1", answer="1", vote="3", votes=2, mean_tokens=3.0,
                              clipped=0)  # fmt: skip
    assert (rows[2].correct, rows[2].vote, rows[2].votes) == (1, "7", 1)
