import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from tests.waiting import alive, until, until_gone
from tppo.data.problem import Problem
from tppo.evaluation.statistics import majority_at_k
from tppo.evaluation.votes import votes
from tppo.rewards.form import FormReward
from tppo.rewards.math import MathReward, certain
from tppo.rewards.pool import TIMED_OUT, WorkerPool
from tppo.rewards.protocol import Grade, grade_metrics

HANGS = r"\boxed{10^{10^{10^{10}}}}"
BACKTRACKS = "a" * 40 + "b"
PATTERN = r"(a+)+\Z"


@pytest.fixture(scope="module")
def workers():
    pool = WorkerPool({"math": True, "pattern": PATTERN, "function": None}, workers=2, timeout_s=60)
    with contextlib.closing(pool):
        yield pool


@pytest.fixture
def pool(workers):
    """Its time limit is none that an answer of milliseconds could reach, however busy the machine is."""
    workers.timeout_s = 60
    return workers


@pytest.fixture
def impatient(workers):
    """For what never ends. What is checked beside it must be done in this time."""
    workers.timeout_s = 5
    return workers


def graded(reward, *pairs):
    return reward.grade([Problem("p", answer) for answer, _ in pairs], [response for _, response in pairs])


@pytest.mark.parametrize(
    ("answer", "response", "correct"),
    [("1/2", r"so $\boxed{0.5}$", True), (r"\frac{3}{4}", "The answer is 0.75", True), ("x+1", r"\boxed{1+x}", True),
     ("33", r"\boxed{033}", True), ("033", "Answer: 33", True), ("34", "Answer: 35", False),
     ("34", r"34, no: \boxed{35}", False), ("7", r"\boxed{7} or \boxed{8}", False),
     ("8", r"\boxed{7}, \boxed{8}", True),
     (r"\text{(B)}", r"\boxed{B}", True), ("(1,2)", r"\boxed{(2,1)}", False), ("5", r"\boxed{x = 5}", True)],
)  # fmt: skip
def test_answers_are_compared_as_mathematics(pool, answer, response, correct):
    assert graded(MathReward(pool), (answer, response)) == [
        Grade(1.0 if correct else -1.0, correct, timed_out=False, unparsed=False)
    ]


def test_a_response_without_an_answer_is_wrong_and_counted(pool):
    grades = graded(MathReward(pool, right=2.0, wrong=-0.5), ("5", "I do not know"), ("5", ""), ("5", r"\boxed{5}"))
    assert grades == [Grade(-0.5, False, False, True), Grade(-0.5, False, False, True), Grade(2.0, True, False, False)]


def vote(pool, gold, responses):
    """The responses' share of right ones, what they vote for, and maj@n."""
    reward = MathReward(pool)
    grades = graded(reward, *[(gold, response) for response in responses])
    correct = np.array([[grade.correct for grade in grades]])
    answers = votes([reward.answers(responses)], correct, reward)
    return correct.mean(), answers[0], majority_at_k(correct, answers, len(responses)).tolist()


def test_answers_without_a_box_vote_as_they_are_graded(pool):
    assert vote(pool, "34", ["...\nAnswer: 34"] * 7 + [r"\boxed{5}"]) == (7 / 8, ["34"] * 7 + ["5"], [1.0])
    assert vote(pool, "34", ["it is **034**", r"\boxed{34}", "I do not know"]) == (2 / 3, ["34", "34", None], [1.0])


def test_equal_answers_vote_together_however_they_are_written(pool):
    right = [r"\boxed{0.5}", r"\boxed{1/2}", r"\boxed{\frac12}"] * 2
    assert vote(pool, "1/2", [*right, *[r"\boxed{3}"] * 3]) == (6 / 9, ["0.5"] * 6 + ["3"] * 3, [1.0])
    # wrong ones too: 4 of 7 for sqrt(18)
    wrong = [r"\boxed{\sqrt{18}}", r"\boxed{3\sqrt{2}}"] * 2
    assert vote(pool, "7", [*[r"\boxed{7}"] * 3, *wrong]) == (3 / 7, ["7"] * 3 + [r"\sqrt{18}"] * 4, [0.0])


@pytest.mark.slow
def test_answers_whose_comparison_takes_too_long_differ_as_their_texts_do_and_the_right_ones_are_still_one(impatient):
    pool = impatient
    assert MathReward(pool).alike([["1/2", "10^{10^{10^{10}}}", "0.5"], ["1/3", r"\frac{1}{3}"], ["7", "8"], []]) == [
        ["1/2", "10^{10^{10^{10}}}", "0.5"], ["1/3", "1/3"], ["7", "8"], [],
    ]  # fmt: skip
    responses = [r"\boxed{1/2}", r"\boxed{0.5}", HANGS]
    assert vote(pool, "1/2", responses)[1:] == (["1/2", "1/2", "10^{10^{10^{10}}}"], [1.0])


@pytest.mark.parametrize(
    ("gold", "given", "verdict"),
    [("33", "033", True), ("33", "34", False), ("-1", "-1", True), (" x ", "x", True), ("1/2", "0.5", None),
     ("1,234", "1234", None), ("5", "5.0", None), ("5", "٥", None)],
)  # fmt: skip
def test_only_certain_answers_skip_the_comparison(gold, given, verdict):
    assert certain(gold, given) is verdict


def test_certain_answers_start_no_process():
    pool = WorkerPool({"math": True, "pattern": None, "function": None}, workers=1, timeout_s=1)
    assert [grade.correct for grade in graded(MathReward(pool), ("7", r"\boxed{7}"), ("7", r"\boxed{8}"))] == [
        True,
        False,
    ]
    assert pool.pids == []


def test_an_answer_that_hangs_is_wrong_and_the_others_are_graded(impatient, withstood):
    pool = impatient
    pool.start()
    before, start = pool.pids, time.monotonic()
    grades = graded(MathReward(pool), ("1/2", r"\boxed{0.5}"), ("2", HANGS), *[("1/2", r"\boxed{0.50}")] * 20)
    assert time.monotonic() - start < 60  # 5 s for the answer, the rest for another process on a busy machine
    assert [grade.correct for grade in grades] == [True, False, *[True] * 20]
    assert [grade.timed_out for grade in grades] == [False, True, *[False] * 20]
    replaced = set(before) - set(pool.pids)
    assert len(replaced) == 1
    assert not psutil.pid_exists(replaced.pop())
    assert len(pool.pids) == 2
    withstood("answer whose check never ends", lost="that answer, which counts as wrong")


def test_a_pattern_that_backtracks_for_years_is_cut_short_and_counted(impatient):
    reward = FormReward(MathReward(impatient), impatient, extra=0.25)
    grades = graded(reward, ("5", r"\boxed{5} aaa"), ("5", r"\boxed{5} b"), ("5", r"\boxed{5} " + BACKTRACKS))
    assert [grade.reward for grade in grades] == [1.25, 1.0, 1.0]
    assert [grade.well_formed for grade in grades] == [True, False, None]
    assert grade_metrics(grades) == {"reward/timeouts": 1, "reward/unparsed": 0, "reward/format_share": 0.5}


def test_metrics_without_a_meaning_are_null():
    assert set(grade_metrics([Grade(1.0, True)]).values()) == {None}
    assert set(grade_metrics([]).values()) == {None}


def test_a_worker_that_was_killed_between_two_calls_is_replaced(pool, withstood):
    pool.start()
    pid = pool.pids[0]
    psutil.Process(pid).kill()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, and still the pool's to collect
    assert [grade.correct for grade in graded(MathReward(pool), *[("1/2", r"\boxed{0.5}")] * 4)] == [True] * 4
    withstood("SIGKILL of a reward process")


def test_no_worker_imports_torch_and_ctrl_c_reaches_none(pool):
    pool.start()
    for pid in pool.pids:
        assert not [m.path for m in psutil.Process(pid).memory_maps() if "torch" in m.path]
        assert os.getpgid(pid) != os.getpgid(0)


def test_closing_ends_every_worker_also_in_the_middle_of_a_call():
    pool = WorkerPool({"math": False, "pattern": PATTERN, "function": None}, workers=2, timeout_s=600)
    pool.start()
    pids = pool.pids
    busy_from = {pid: cpu_s(pid) + 0.2 for pid in pids}

    def interrupt(number, frame):
        raise KeyboardInterrupt

    def interrupt_the_call():
        while any(cpu_s(pid) < busy_from[pid] for pid in pids):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGALRM)

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        threading.Thread(target=interrupt_the_call, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            pool.run([{"kind": "format", "text": BACKTRACKS}] * 2)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert not any(map(psutil.pid_exists, pids))
    assert pool.run([{"kind": "format", "text": "aa"}]) == [{"match": True}]  # it can be used again
    pool.close()
    pool.close()
    assert pool.pids == []


def cpu_s(pid):
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def test_results_come_in_the_order_of_the_jobs(impatient):
    pool = impatient
    texts = ["a", "b", "ba", "ab"] * 25
    expected = [True, False, True, False] * 25
    assert [r["match"] for r in pool.run([{"kind": "format", "text": text} for text in texts])] == expected
    big = pool.run([{"kind": "format", "text": "b" * 3_000_000}, {"kind": "format", "text": BACKTRACKS}])
    assert big == [{"match": False}, TIMED_OUT]


ORPHANS = """
import sys, threading
from tppo.rewards.pool import WorkerPool

searching = WorkerPool({"math": True, "pattern": "(a+)+$", "function": None, "limit_s": 3}, workers=2, timeout_s=600)
sleeping = WorkerPool({"math": False, "pattern": None, "function": "mine:sleep", "sys_path": [sys.argv[1]]},
                      workers=1, timeout_s=600)
searching.start(), sleeping.start()
print(*searching.pids, *sleeping.pids, flush=True)
job = {"kind": "function", "prompt": "", "response": "", "answer": "", "columns": "{}"}
threading.Thread(target=sleeping.run, args=([job],)).start()
searching.run([{"kind": "format", "text": "a" * 40 + "b"}])
"""


def test_a_killed_trainer_leaves_no_worker(tmp_path, withstood):
    """One worker idles, one sleeps, one is in a call that lets no thread run."""
    (tmp_path / "mine.py").write_text("import time\ndef sleep(prompt, response, answer): time.sleep(1000)\n")
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 3
    started = [cpu_s(pid) for pid in pids]
    until(lambda: any(cpu_s(pid) >= before + 0.3 for pid, before in zip(pids, started, strict=True)))
    assert all(map(alive, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for pid in pids:
        until_gone(pid)  # after 5 s of CPU time
    withstood("SIGKILL of a trainer with reward processes", lost="nothing: no process stays")
