"""Rewards that are not ours: a user's function, a service."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from profiling.errors import ConfigError
from tppo.data.problem import Problem
from tppo.data.tokenizer import character_tokenizer
from tppo.rewards.http import HttpReward
from tppo.rewards.make import WithoutEnd, reward_of
from tppo.rewards.protocol import Grade, RewardError

FUNCTIONS = """
import os, sys, time
import numpy as np

print("printing does no harm")

def overlap(prompt, response, answer):
    print("nor here")
    return np.float32(len(response) / 4 + (answer in response) + (prompt == "p"))

def says_nothing(prompt, response, answer): pass
def says_nan(prompt, response, answer): return float("nan")
def says_text(prompt, response, answer): return "0.5"
def raises(prompt, response, answer): return 1 / 0
def leaves(prompt, response, answer): sys.exit("bye")
def dies(prompt, response, answer): os._exit(3)
def hangs(prompt, response, answer): time.sleep(1000)

class Graders:
    @staticmethod
    def by_level(prompt, response, answer, *, level=1): return level

    class Inner:
        any_column = staticmethod(lambda p, r, a, **columns: columns["level"] + 10 * len(columns))

def by_position(level, response, answer, extra_info=None): return len(level) + len(extra_info["split"])
"""


@pytest.fixture
def function_reward(tmp_path, monkeypatch, make_config):
    """A context with the reward of one of the functions above, in the working directory's module `mine`."""
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)

    def make(name, **settings):
        settings = {"kind": "python", "function": f"mine:{name}", "timeout_s": 20, "workers": 1, **settings}
        return reward_of(make_config("run", reward=settings), character_tokenizer())

    return make


def test_a_function_grades_with_prompt_response_and_answer(function_reward):
    # "ab": 2/4 + 1 + 0;  "b$", less its end: 1/4 + 0 + 1
    with function_reward("overlap", right_above=1.4, function="mine.overlap") as reward:
        grades = reward.grade([Problem("q", "a"), Problem("p", "x")], ["ab", "b$"])
    assert grades == [Grade(1.5, True), Grade(1.25, False)]


@pytest.mark.parametrize(
    ("function", "reward"),
    [("mine:Graders.by_level", 5), ("mine.Graders.by_level", 5), ("mine:Graders.Inner.any_column", 25),
     ("mine.Graders.Inner.any_column", 25), ("mine:by_position", 6), ("mine:overlap", 2.25)],
)  # fmt: skip
def test_a_function_may_stand_inside_a_class_and_gets_the_columns_that_its_signature_names(
    function_reward, function, reward
):
    # by_position: level is its first argument, the prompt: 1 + 5; overlap: 1/4 + 1 + 1
    problem = Problem("p", "a", columns='{"level": 5, "extra_info": {"split": "train"}}')
    with function_reward("", function=function) as made:
        assert [grade.reward for grade in made.grade([problem], ["a"])] == [reward]


@pytest.mark.parametrize(
    ("name", "fault"),
    [("says_nothing", "returned None, not a number"), ("says_nan", "returned nan, not a finite number"),
     ("says_text", "returned '0.5', not a number"), ("raises", "ZeroDivisionError: division by zero"),
     ("leaves", "SystemExit: bye"), ("dies", "ended its process or took longer than reward.timeout_s = 20")],
)  # fmt: skip
def test_a_function_that_gives_no_reward_is_one_line_with_its_name_and_the_problem(function_reward, name, fault):
    with function_reward(name) as reward, pytest.raises(RewardError) as raised:
        reward.grade([Problem("What is 1+1?", "2")], ["2"])
    assert f"reward.function = 'mine:{name}': {fault}" in str(raised.value)
    assert "on the problem 'What is 1+1?' with the answer '2'" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_function_that_never_returns_is_cut_short(function_reward, withstood):
    start = time.monotonic()
    with (
        function_reward("hangs", timeout_s=1) as reward,
        pytest.raises(RewardError, match=r"reward.timeout_s = 1, on"),
    ):
        reward.grade([Problem("p", "2")], ["2"])
    assert time.monotonic() - start < 200  # it would be 1000
    withstood("reward function that never returns", lost="nothing: the step under way is done again")


@pytest.mark.parametrize(
    ("function", "fault"),
    [("mine:absent", "AttributeError: module 'mine' has no attribute 'absent'"),
     ("mine.absent", "AttributeError: module 'mine' has no attribute 'absent'"),
     ("mine:Graders.absent", "AttributeError: type object 'Graders' has no attribute 'absent'"),
     ("nowhere.at_all:f", "ModuleNotFoundError: No module named 'nowhere'"),
     ("nowhere.at_all.f", "ModuleNotFoundError: No module named 'nowhere'"),
     ("nowhere.f", "ModuleNotFoundError: No module named 'nowhere'"),
     ("mine:np", "TypeError: mine:np is not a function")],
)  # fmt: skip
def test_a_function_that_is_not_there_is_told_before_the_run_starts(function_reward, function, fault):
    with pytest.raises(ConfigError) as raised, function_reward("", function=function):
        pass
    assert f"reward.function = {function!r}: {fault}; name a function that imports" in str(raised.value)


def test_a_form_adds_to_any_reward(make_config):
    settings = {"format_pattern": r"\A.#\d\$\Z", "format_reward": 0.5, "right": 2.0, "wrong": 0.0}
    with reward_of(make_config("run", reward=settings), character_tokenizer()) as reward:
        grades = reward.grade([Problem("p", "3")] * 3, ["a#3$", "a#4$", "aa#3$"])
    assert [grade.reward for grade in grades] == [2.5, 0.5, 2.0]
    assert [grade.well_formed for grade in grades] == [True, True, False]


def test_the_token_that_ended_a_response_is_not_graded():
    seen = []

    class Sees:
        def grade(self, problems, responses):
            seen.extend(responses)
            return []

        def close(self):
            pass

    WithoutEnd(Sees(), ["<end>", "", "|"]).grade([], ["a<end>", "b|", "c", "d<end><end>", "<end>e"])
    assert seen == ["a", "b", "c", "d<end>", "<end>e"]


@contextlib.contextmanager
def service(*replies, tokens=None):
    """A server that gives `replies`, (status, body), one after the other and the last for ever; yields its url and
    the bodies that it got. A body of None: it hangs up. tokens: a list that gets what came as X-Token."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.headers["Content-Type"] == "application/json"
            if tokens is not None:
                tokens.append(self.headers["X-Token"])
            status, body = replies[min(len(got), len(replies) - 1)]
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if body is None:
                return
            if callable(body):
                body = body(got[-1])
            self.send_response(status)
            if status == 302:
                self.send_header("Location", body.decode())
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            tokens.append(self.headers["X-Token"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/grade", got
        finally:
            server.shutdown()
            thread.join()


def lengths(batch):
    return json.dumps({"rewards": [len(item["response"]) - 1 for item in batch]}).encode()


def grade(url, rows=3, **settings):
    pauses = []
    reward = HttpReward(url, timeout_s=60, sleep=pauses.append, **settings)
    problems = [Problem(f"p{i}", f"a{i}") for i in range(rows)]
    return reward.grade(problems, ["x" * i for i in range(rows)]), pauses


def test_a_service_that_fails_twice_and_then_works_has_graded():
    with service((503, b"busy"), (200, None), (200, lengths)) as (url, got):
        grades, pauses = grade(url)
    assert grades == [Grade(-1.0, False), Grade(0.0, False), Grade(1.0, True)]
    assert pauses == [1.0, 2.0]
    assert got[0] == got[2] == [{"prompt": f"p{i}", "response": "x" * i, "answer": f"a{i}"} for i in range(3)]


def test_responses_go_in_batches_and_come_back_in_order():
    with service((200, lengths)) as (url, got):
        grades, _ = grade(url, rows=5, batch_rows=2, right_above=2.5)
    assert sorted(len(batch) for batch in got) == [1, 2, 2]
    assert [(g.reward, g.correct) for g in grades] == [(-1, False), (0, False), (1, False), (2, False), (3, True)]


def test_several_requests_are_under_way_at_once_and_come_back_in_order():
    together = threading.Barrier(3, timeout=50)

    def wait(batch):
        together.wait()
        return lengths(batch)

    with service((200, wait)) as (url, _):
        grades, _ = grade(url, rows=6, batch_rows=2, concurrency=3, retries=0)
    assert [grade.reward for grade in grades] == [-1, 0, 1, 2, 3, 4]


def test_a_header_has_the_value_of_an_environment_variable_which_nothing_shows(make_config, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "Bearer s3cret")
    settings = {"kind": "http", "header": "X-Token", "header_env": "REWARD_TOKEN", "retries": 0}
    tokens = []
    with service((200, b"<Bearer s3cret>"), (200, b'["Bearer s3cret"]'), (403, b""), tokens=tokens) as (url, _):
        config = make_config("run", reward={**settings, "url": url})
        with reward_of(config, character_tokenizer()) as reward:
            for fault in (r"not JSON: b'<\*\*\*>'", r"'\*\*\*', which is not", "refuses the request: HTTP 403"):
                with pytest.raises(RewardError, match=fault) as raised:
                    reward.grade([Problem("p", "a")], ["x"])
                assert "s3cret" not in str(raised.value)
    assert tokens == ["Bearer s3cret"] * 3
    assert "s3cret" not in config.model_dump_json()


def test_a_header_does_not_follow_a_redirect_elsewhere():
    tokens = []
    with (
        service((200, b""), tokens=tokens) as (elsewhere, _),
        service((302, elsewhere.encode()), tokens=tokens) as (url, _),
        pytest.raises(RewardError),
    ):
        grade(url, header=("X-Token", "s3cret"))
    assert tokens == ["s3cret", None]


@pytest.mark.parametrize("value", [None, "", "two\nlines", "ü"])
def test_a_variable_that_makes_no_header_is_one_line_before_the_run_starts(make_config, monkeypatch, value):
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("REWARD_TOKEN", value)
    config = make_config("run", reward={"kind": "http", "url": "http://127.0.0.1:1", "header_env": "REWARD_TOKEN"})
    with pytest.raises(ConfigError, match=r"reward.header_env = 'REWARD_TOKEN': .*export it") as raised:  # noqa: SIM117
        with reward_of(config, character_tokenizer()):
            pass
    assert "\n" not in str(raised.value)


def test_a_service_that_never_recovers_is_one_line_after_the_last_try():
    with service((500, b"")) as (url, got), pytest.raises(RewardError) as raised:
        grade(url, retries=2)
    assert len(got) == 3
    assert f"reward.url = '{url}': no reply after 3 tries: HTTP 500 Internal Server Error" in str(raised.value)
    with pytest.raises(RewardError, match=r"no reply after 1 tries: .*refused"):
        grade(url, retries=0)  # nobody listens any more


def test_a_request_that_is_refused_is_not_made_again():
    with service((404, b"")) as (url, got), pytest.raises(RewardError, match=r"refuses the request: HTTP 404"):
        grade(url)
    assert len(got) == 1


@pytest.mark.parametrize(
    ("body", "fault"),
    [(b"<html>", "its reply is not JSON: b'<html>'"), (b"{}", "neither a list nor"), (b"7", "neither a list nor"),
     (b"[1, 2]", "2 rewards to 3 responses"), (b"[1, 2, NaN]", "nan, which is not a finite number"),
     (b'[1, 2, "3"]', "'3', which is not a finite number"), (b"[1, 2, true]", "True, which is not"),
     (b"[1, 2, null]", "None, which is not")],
)  # fmt: skip
def test_a_reply_that_is_not_rewards_is_one_line(body, fault):
    with service((200, body)) as (url, got), pytest.raises(RewardError) as raised:
        grade(url)
    assert fault in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(got) == 1
