import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profiling.errors import DataError
from tppo.config import SourceConfig
from tppo.data.boxed import last_boxed
from tppo.data.dataset import read_entries
from tppo.data.prompts import prompter_of
from tppo.data.tokenizer import character_tokenizer
from tppo.rewards.golds import unreadable


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, max_prompt_tokens=200, unreadable=lambda answers: set(), **settings):
    """(prompt, answer) of every problem, and the counts of what was left out."""
    prompter = prompter_of(character_tokenizer(), "", "{problem}", "auto")
    source = SourceConfig(path=str(path), **settings)
    entries, counts = read_entries(source, prompter, max_prompt_tokens, key="data", unreadable=unreadable)
    return [(entry.problem.prompt, entry.problem.answer) for entry in entries], counts


VERL_ROW = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "Solve. 1+1?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": "a"},
}


@pytest.mark.parametrize("layout", ["auto", "gsm8k"])
def test_gsm8k_answers_stand_behind_the_hashes(tmp_path, layout):
    path = write_lines(tmp_path / "a.jsonl", [
        {"question": "How many?", "answer": "One <<1+0=1>>1, two.\n#### 1,234"},
        {"question": "And now?", "answer": "#### -5 "},
    ])  # fmt: skip
    assert read(path, layout=layout)[0] == [("How many?", "1234"), ("And now?", "-5")]


def test_math_answers_are_the_last_box_of_the_solution(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [
        {"problem": "P", "level": "Level 5", "type": "Algebra",
         "solution": r"First \boxed{1}, so $\boxed{\frac{1}{\sqrt{2}}}$."},
        {"problem": "Q", "level": "Level 1", "type": "Algebra", "solution": "nothing is boxed"},
    ])  # fmt: skip
    problems, counts = read(path)
    assert problems == [("P", r"\frac{1}{\sqrt{2}}")]
    assert (counts.rows, counts.unanswered) == (2, 1)
    assert read(path, layout="math")[0] == problems


def test_math_500_has_a_column_of_answers(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"problem": "P", "solution": r"\boxed{9}", "answer": "3", "level": 2}])
    assert read(path)[0] == [("P", "3")]
    assert read(path, layout="math")[0] == [("P", "3")]


@pytest.mark.parametrize("layout", ["auto", "dapo-math-17k", "aime-2024"])
def test_dapo_math_repeats_its_problems_and_each_is_taken_once(tmp_path, layout):
    other = {**VERL_ROW, "prompt": [{"role": "user", "content": "2+2?"}], "reward_model": {"ground_truth": "4"}}
    path = tmp_path / "dapo.parquet"
    rows = [VERL_ROW, other] * 100
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    problems, counts = read(path, layout=layout)
    assert problems == [("Solve. 1+1?", "2"), ("2+2?", "4")]
    assert (counts.rows, counts.repeated) == (200, 198)
    assert "of 200 rows 198 repeat an earlier problem" in counts.line("data", 200)


@pytest.mark.parametrize(
    ("row", "layout"),
    [({"id": 60, "problem": "P", "solution": r"\boxed{9}", "answer": "025", "url": "", "year": 2024}, "aime-2024"),
     ({"ID": "2024-I-1", "Problem": "P", "Solution": "s", "Answer": 25}, "aime-2024"),
     ({"question": "P", "answer": "025"}, "aime-2025"),
     ({"problem": "P", "answer": 25, "problem_idx": 1}, "aime-2025")],
)  # fmt: skip
def test_aime_in_its_layouts(tmp_path, row, layout):
    path = write_lines(tmp_path / "a.jsonl", [row])
    for name in ("auto", layout):
        ((prompt, answer),) = read(path, layout=name)[0]
        assert prompt == "P"
        assert int(answer) == 25


def test_columns_named_by_the_user_win_and_may_step_into_a_column(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", [{"question": "no", "answer": "no", "text": "P", "meta": {"x": {"y": 7}}}]
    )
    assert read(path, prompt_column="text", answer_column="meta.x.y")[0] == [("P", "7")]


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [({"text": "a", "label": "b"}, {}, "no known layout; its columns are text, label; set data.prompt_column and"),
     ({"text": "a", "label": "b"}, {"layout": "gsm8k"}, "not in data.layout = 'gsm8k'; its columns are text, label"),
     ({"text": "a", "label": "b"}, {"prompt_column": "txt", "answer_column": "label"},
      "data.prompt_column = 'txt': no such column; its columns are text, label"),
     ({"text": "a", "label": "b"}, {"prompt_column": "text", "answer_column": "x.y"},
      "data.answer_column = 'x.y': no such column"),
     ({"text": "a", "label": "b"}, {"prompt_column": "text"}, "data.answer_column is missing; its columns are text"),
     ({"text": "a", "label": "b"}, {"layout": "columns"}, "data.prompt_column is missing; its columns are text")],
)  # fmt: skip
def test_missing_columns_are_one_line_that_names_file_columns_and_key(tmp_path, columns, settings, message):
    path = write_lines(tmp_path / "a.jsonl", [columns])
    with pytest.raises(DataError) as fault:
        read(path, **settings)
    assert str(fault.value).startswith(f"{path}: ")
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("solution", "column", "there"),
    [({"final": "1", "steps": 2}, "sol.nope", "in row 1 sol has final, steps, and sol.nope is wanted"),
     ({}, "sol.nope", "in row 1 sol has no keys, and"), ("text", "sol.nope", "in row 1 sol is 'text', and sol.nope"),
     ({"a": {"b": "1"}}, "sol.a.c", "in row 1 sol.a has b, and"), (None, "sol", "in row 1 sol is None, and sol is"),
     ({"a": [1]}, "sol.a", "in row 1 sol.a is [1], and")],
)  # fmt: skip
def test_a_column_without_answers_is_told_with_what_it_holds(tmp_path, solution, column, there):
    path = write_lines(tmp_path / "a.jsonl", [{"q": f"p{i}", "sol": solution} for i in range(3)])
    with pytest.raises(DataError) as fault:
        read(path, prompt_column="q", answer_column=column)
    assert f"none is left; {there}" in str(fault.value)
    assert "data.answer_column" in str(fault.value)


def test_answers_that_cannot_be_read_are_left_out_and_counted(tmp_path, make_config):
    golds = [r"\frac{1}{", "who knows ??", "1/2", "034", "Monday"]
    config = make_config("run", data={"task": "dataset", "path": "x"}, reward={"workers": 1})
    bad = unreadable(golds, config)
    assert bad == {r"\frac{1}{", "who knows ??"}
    path = write_lines(tmp_path / "a.jsonl", [{"question": str(i), "answer": gold} for i, gold in enumerate(golds)])
    problems, counts = read(path, unreadable=lambda answers: bad & set(answers))
    assert [answer for _, answer in problems] == ["1/2", "034", "Monday"]
    assert counts.line("data", 9) == (
        "data: of 5 rows 2 have an answer that math-verify cannot read; these do not train"
    )
    with pytest.raises(DataError, match=r"5 have an answer that math-verify cannot read .*set reward.kind"):
        read(path, unreadable=set)
    function = make_config("run", data={"task": "dataset", "path": "x"}, reward={"kind": "python", "function": "a.b"})
    assert unreadable(golds, function) == set()


def test_every_kind_of_local_file_gives_the_same_problems(tmp_path):
    rows = [{"question": "a, b", "answer": 1}, {"question": 'with "quotes"\nand a line', "answer": 72}]
    write_lines(tmp_path / "a.jsonl", rows)
    write_lines(tmp_path / "lines.json", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('question,answer\n"a, b",1\n"with ""quotes""\nand a line",72\n')
    expected = [("a, b", "1"), ('with "quotes"\nand a line', "72")]
    for name in ("a.jsonl", "lines.json", "list.json", "a.parquet", "a.csv"):
        assert read(tmp_path / name)[0] == expected, name


def test_a_folder_is_read_by_split_and_subset(tmp_path):
    for name, answer in (("main/train-00000-of-00002", 1), ("main/train-00001-of-00002", 2),
                         ("main/test-00000-of-00001", 3), ("socratic/train-00000-of-00001", 4)):  # fmt: skip
        write_lines(tmp_path / f"{name}.jsonl", [{"question": name, "answer": answer}])
    write_lines(tmp_path / ".cache" / "train.jsonl", [{"question": "hidden", "answer": 9}])
    answers = lambda **settings: [int(answer) for _, answer in read(tmp_path, **settings)[0]]  # noqa: E731
    assert answers(subset="main") == [1, 2]
    assert answers(subset="main", split="test") == [3]
    assert answers(subset="socratic") == [4]
    with pytest.raises(DataError, match=r"data.split = 'dev': .* has no such split; there are test, train"):
        answers(split="dev")
    with pytest.raises(DataError, match=r"data.subset = 'x': no file of .* is named so; there are main/test-"):
        answers(subset="x")


def test_the_bundled_problems_need_no_file():
    assert len(read("original", max_prompt_tokens=1000)[0]) == 64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.jsonl", b'{"question": "a", "answer": 1}\n{"que', "a.jsonl: line 2: not JSON"),
     ("a.jsonl", b"[1]\n", "a.jsonl: line 1: not a JSON object"),
     ("a.json", b"[1, 2]", "a.json: not a list of JSON objects"),
     ("a.json", b"nonsense", "a.json: not JSON"),
     ("a.parquet", b"nonsense", "a.parquet: not a readable Parquet file"),
     ("a.csv", b"\xff\xfe\xff", "a.csv: not UTF-8"),
     ("a.txt", b"x", "known endings are .jsonl, .json, .parquet, .csv"),
     ("a.jsonl", b"", "a.jsonl"),
     ("a.csv", b"question,answer\n", "a.csv', split 'train': holds no rows"),
     ("a.jsonl", b'{"question": 5, "answer": 1}', "a.jsonl: row 1: a problem is text or a list of"),
     ("a.jsonl", b'{"question": "", "answer": 1}\n{"question": "a", "answer": null}', "of 2 rows 2 lack a problem"),
     ("a.jsonl", b'{"question": "aaaaaaaaaaa", "answer": 1}', "prompts of more than data.max_prompt_tokens = 5")],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_one_line_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as fault:
        read(tmp_path / name, max_prompt_tokens=5)
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)


def test_an_empty_folder_and_a_file_that_is_not_there_are_one_line(tmp_path):
    with pytest.raises(DataError, match=r"holds no .jsonl, .json, .parquet, .csv file"):
        read(tmp_path)
    for path in (tmp_path / "absent.jsonl", "absent.jsonl", "gsm8k"):
        with pytest.raises(DataError, match=r"no such file or folder, and not a name on the hub"):
            read(path)


def test_a_hub_name_without_a_network_is_one_line_at_once():
    import datasets  # noqa: F401 - which takes seconds of its own

    start = time.monotonic()
    with pytest.raises(DataError, match=r"'nobody/nothing', split 'train': .* HF_HUB_OFFLINE is set") as fault:
        read("nobody/nothing")
    assert "\n" not in str(fault.value)
    assert time.monotonic() - start < 10


def test_a_hub_that_does_not_answer_is_one_line_at_once(monkeypatch):
    import datasets
    from huggingface_hub import HfApi, constants

    class ConnectError(Exception):
        """As of an HTTP library that we do not know."""

    def refuse(*arguments, **options):
        assert options["timeout"] <= 10
        raise ConnectError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(DataError, match=r"the hub cannot be reached: Name or service not known; check the network"):
        read("nobody/nothing")


def test_a_hub_that_refuses_or_lacks_the_split_is_one_line(monkeypatch):
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def info(*arguments, **options):
        raise HFValidationError("Repo id must use alphanumeric chars")

    monkeypatch.setattr(HfApi, "dataset_info", info)
    with pytest.raises(DataError, match=r"'a b/c': not a name on the hub: Repo id must use"):
        read("a b/c")

    def absent(*arguments, **options):
        error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # its own wants a response of some library
        Exception.__init__(error, "Repository Not Found\nmore")
        raise error

    monkeypatch.setattr(HfApi, "dataset_info", absent)
    with pytest.raises(DataError, match=r"and the hub refuses it: Repository Not Found; check the name, and HF_TOKEN"):
        read("owner/name")

    def load(name, subset, split):
        raise ValueError("Unknown split \"train\". Should be one of ['test'].\nmore")

    monkeypatch.setattr(HfApi, "dataset_info", lambda *arguments, **options: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"Should be one of \['test'\].; see data.split and data.subset$"):
        read("owner/name")


def test_the_rows_of_a_hub_data_set_are_read_as_those_of_a_file(monkeypatch):
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, subset, split: datasets.Dataset.from_list([VERL_ROW] * 1500)
    )
    problems, counts = read("owner/name")
    assert problems == [("Solve. 1+1?", "2")]
    assert (counts.rows, counts.repeated) == (1500, 1499)


@pytest.mark.parametrize(
    ("text", "answer"),
    [(r"\boxed{a{b}c} end", "a{b}c"), (r"\boxed{1} then \fbox{2}", "2"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
     (r"so \boxed 7.", "7"), (r"$\boxed{ 5 }$", "5"), (r"\boxed{never closed", None), ("none", None),
     (r"\boxed{}", None)],
)  # fmt: skip
def test_the_last_box_is_read_with_its_braces_balanced(text, answer):
    assert last_boxed(text) == answer


def test_every_bundled_answer_is_what_its_check_computes():
    import itertools
    from importlib.resources import files

    import sympy

    names = {name: getattr(sympy, name) for name in dir(sympy) if not name.startswith("_")}
    names |= {"permutations": itertools.permutations, "product": itertools.product, "x": sympy.Symbol("x"),
              "y": sympy.Symbol("y"), "minimum": sympy.calculus.util.minimum}  # fmt: skip
    lines = (files("tppo.data") / "problems" / "original.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["problem"] for row in rows}) == len(rows) == 64
    for row in rows:
        computed = sympy.sympify(str(eval(row["check"], dict(names))))  # the checks are ours
        assert computed == sympy.sympify(row["answer"]), row["problem"]
