import json

import pytest

from profiling.errors import ConfigError, DataError
from tppo.data.dataset import DatasetTask
from tppo.data.problem import Problem, prompt_ids
from tppo.data.prompts import prompter_of
from tppo.data.tasks import problems_of
from tppo.data.tokenizer import character_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chatting_tokenizer(template=CHAT):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def data_config(make_config, tmp_path):
    """A run on a file of problems "p0", "p1", ...; keyword arguments replace sections' fields."""

    def make(problems=20, rows=None, data=None, **sections):
        path = tmp_path / "problems.jsonl"
        rows = rows or [{"question": f"p{i}", "answer": i} for i in range(problems)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        chosen = {"task": "dataset", "path": str(path), **(data or {})}
        return make_config("run", data=chosen, **{"evaluation": {"every": 2, "problems": 5}, **sections})

    return make


def prompts(problems):
    return [problem.prompt for problem in problems]


def test_a_chat_template_is_applied_where_there_is_one():
    messages = [{"role": "system", "content": "old"}, {"role": "user", "content": "1+1"}]
    plain, chatting = character_tokenizer(), chatting_tokenizer()
    assert prompter_of(chatting, "", "{problem}", "auto").prompt("1+1") == "<user>1+1<assistant>"
    assert (
        prompter_of(chatting, "S", "Q: {problem} {}!", "always").prompt("1+1")
        == "<system>S<user>Q: 1+1 {}!<assistant>"
    )
    assert prompter_of(chatting, "", "{problem}", "auto").prompt(messages) == "<system>old<user>1+1<assistant>"
    assert prompter_of(chatting, "S", "{problem}", "auto").prompt(messages) == "<system>S<user>1+1<assistant>"
    assert prompter_of(chatting, "S", "{problem}?", "never").prompt("1+1") == "S\n\n1+1?"
    assert prompter_of(plain, "", "{problem}", "auto").prompt("1+1") == "1+1"


def test_a_chat_template_that_is_not_there_or_fails_is_one_line():
    with pytest.raises(ConfigError, match=r'data.chat_template = "always": the tokenizer of model.path has none'):
        prompter_of(character_tokenizer(), "", "{problem}", "always")
    failing = chatting_tokenizer("{{ raise_exception('no system message') }}")
    with pytest.raises(ConfigError, match=r"data.chat_template: .* no system message; set data.system_prompt"):
        prompter_of(failing, "S", "{problem}", "auto").prompt("1+1")


def test_a_template_that_wrote_special_tokens_gets_no_second_ones(data_config):
    templated = problems_of(data_config(), chatting_tokenizer())
    assert not templated.task.problem(0).special_tokens
    assert problems_of(data_config(), character_tokenizer()).task.problem(0).special_tokens
    assert len(prompt_ids(chatting_tokenizer(), templated.task.problem(0))) <= templated.task.longest_prompt_tokens


def test_every_epoch_is_a_permutation_of_its_own_and_of_nothing_but_seed_and_epoch():
    problems = [Problem(str(i), "") for i in range(50)]

    def epoch(number, seed=0, shuffle=True):
        task = DatasetTask(problems, seed, shuffle, 1)
        return [task.problem(50 * number + i).prompt for i in range(50)]

    first, second = epoch(0), epoch(1)
    assert sorted(first, key=int) == sorted(second, key=int) == prompts(problems)
    assert len({tuple(each) for each in (first, second, epoch(0, seed=1), prompts(problems))}) == 4
    assert epoch(1) == second  # also where the first epoch was never asked for
    assert epoch(0, shuffle=False) == epoch(1, shuffle=False) == prompts(problems)
    task = DatasetTask(problems, 0, True, 1)
    assert [task.problem(i).prompt for i in (49, 50, 3, 99)] == [first[49], second[0], first[3], second[49]]


def test_prompts_that_are_too_long_are_left_out_and_counted_with_their_template(data_config):
    rows = [{"question": "a" * n, "answer": 1} for n in (1, 2, 3, 4, 5, 6)]
    config = data_config(rows=rows, data={"max_prompt_tokens": 6, "prompt_template": "{problem}=="},
                         evaluation={"every": 0})  # fmt: skip
    problems = problems_of(config, character_tokenizer())
    assert sorted(prompts(problems.task.problems)) == ["a==", "aa==", "aaa==", "aaaa=="]
    assert problems.task.longest_prompt_tokens == 6
    assert len(problems.notes) == 1
    assert problems.notes[0].endswith("of 6 rows 2 have prompts of more than 6 tokens; these do not train")


def test_held_out_problems_are_never_trained_on(data_config):
    problems = problems_of(data_config(), character_tokenizer())
    assert len(problems.held_out) == 5
    assert len(problems.task.problems) == 15
    assert not set(prompts(problems.held_out)) & set(prompts(problems.task.problems))
    again = problems_of(data_config(), character_tokenizer())
    assert again.held_out == problems.held_out
    other = problems_of(data_config(evaluation={"every": 2, "problems": 5, "seed": 7}), character_tokenizer())
    assert other.held_out != problems.held_out
    assert other.fingerprint != problems.fingerprint == again.fingerprint
    assert "of 20 rows 5 are held out" in problems.notes[0]


def test_further_columns_stay_with_a_problem_for_a_function_of_ones_own(data_config):
    rows = [{"question": "p", "answer": 1, "level": 5, "extra": {"split": "train"}, "prompt": "not the problem"}]
    own = {"evaluation": {"every": 0}, "reward": {"kind": "python", "function": "mine:f"}}
    (problem,) = problems_of(data_config(rows=rows, **own), character_tokenizer()).task.problems
    assert json.loads(problem.columns) == {"level": 5, "extra": {"split": "train"}}
    (problem,) = problems_of(data_config(rows=rows, evaluation={"every": 0}), character_tokenizer()).task.problems
    assert problem.columns == "{}"


def test_without_evaluations_nothing_is_held_out(data_config):
    problems = problems_of(data_config(evaluation={"every": 0}), character_tokenizer())
    assert (len(problems.held_out), len(problems.task.problems), problems.notes) == (0, 20, [])


def test_another_data_set_can_be_evaluated_on_and_what_it_shares_does_not_train(data_config, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"problem": "p3", "answer": "3"}\n{"problem": "a much longer new one", "answer": "1"}\n')
    evaluation = {"every": 2, "problems": 100, "path": str(other)}
    problems = problems_of(data_config(evaluation=evaluation), character_tokenizer())
    assert prompts(problems.held_out) == ["p3", "a much longer new one"]
    assert len(problems.task.problems) == 19
    assert "p3" not in prompts(problems.task.problems)
    assert problems.task.longest_prompt_tokens == len("a much longer new one")


def test_a_problem_is_recognised_in_another_layout_and_inside_the_instruction_that_comes_with_it(
    data_config, tmp_path
):
    template = "Solve it.\n\n{problem}\n\nAnswer:"
    rows = [
        {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": template.replace("{problem}", p)}],
         "reward_model": {"ground_truth": "1"}} for p in ("What is  X?", "and y?", "held in?")
    ]  # fmt: skip
    rows.append({"prompt": [{"role": "user", "content": "and Z?"}], "reward_model": {"ground_truth": "1"}})
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"problem": p, "answer": "1"}) + "\n" for p in ("what is X?", "and z?")))
    evaluation = {"every": 2, "problems": 100, "path": str(other)}
    problems = problems_of(data_config(rows=rows, evaluation=evaluation), character_tokenizer())
    assert (len(problems.task.problems), prompts(problems.held_out)) == (3, ["what is X?", "and z?"])
    evaluation["prompt_template"] = template
    problems = problems_of(data_config(rows=rows, evaluation=evaluation), character_tokenizer())
    assert prompts(problems.held_out) == ["Solve it.\n\nwhat is X?\n\nAnswer:", "Solve it.\n\nand z?\n\nAnswer:"]
    assert prompts(problems.task.problems) == [f"S\n\nSolve it.\n\n{p}\n\nAnswer:" for p in ("and y?", "held in?")]
    assert "of 4 rows 2 are held out" in problems.notes[0]


def test_a_data_set_too_small_to_hold_out_of_is_one_line(data_config):
    with pytest.raises(ConfigError, match=r"evaluation.problems = 5: .* has 5 problems, and none would be left"):
        problems_of(data_config(problems=5), character_tokenizer())
    with pytest.raises(ConfigError, match=r"all of its problems are in evaluation.path"):
        config = data_config(problems=3)
        shared = {"every": 2, "problems": 100, "path": config.data.path}
        problems_of(data_config(problems=3, evaluation=shared), character_tokenizer())


def test_a_fault_of_the_evaluation_data_names_its_own_keys(data_config, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "p3"}\n')
    evaluation = {"every": 2, "problems": 100, "path": str(other)}
    with pytest.raises(DataError, match=r"set evaluation.prompt_column and evaluation.answer_column"):
        problems_of(data_config(evaluation=evaluation), character_tokenizer())


@pytest.mark.parametrize(
    ("sections", "message"),
    [({"data": {"task": "dataset"}}, "data.path: missing"),
     ({"data": {"path": "original"}}, 'belong to data.task = "dataset"'),
     ({"data": {"task": "dataset", "path": "original", "prompt_template": "x"}}, "put {problem} into it"),
     ({"data": {"task": "dataset", "path": "original"}, "evaluation": {"path": "original", "prompt_template": "x"}},
      "evaluation.prompt_template = 'x': put {problem} into it"),
     ({"data": {"task": "dataset", "path": "original"}, "reward": {"kind": "final_answer"}}, "the arithmetic task"),
     ({"reward": {"kind": "python", "function": "nothing"}}, "write package.module:function"),
     ({"reward": {"kind": "http", "url": "file:///etc/passwd"}}, "write http://HOST"),
     ({"reward": {"format_pattern": "("}}, "reward.format_pattern = '\\('")],
)  # fmt: skip
def test_settings_that_do_not_fit_together_are_refused(make_config, sections, message):
    with pytest.raises(ValueError, match=message):
        make_config("run", **sections)
