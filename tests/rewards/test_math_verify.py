"""math-verify as a reward: without it, a line; with it, in a process that can be lost."""

import threading

import pytest

from jaxdyn.rewards import MathVerify, RewardConfig, make_reward
from jaxdyn.rewards import mathematics as room
from jaxdyn.types import JaxdynError

STAND_IN = '''
"""Stands for math-verify: numbers between dollars, and texts on which it hangs or dies."""
import os, time

def parse(text, parsing_timeout):
    print("it talks")
    if "hang" in text:
        time.sleep(60)
    if "die" in text:
        os._exit(1)
    return [part for part in text.replace("$", " ").split() if part.isdigit()]

def verify(gold, target, timeout_seconds):
    assert timeout_seconds == 1
    return gold[-1:] == target[-1:]
'''


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """The reward beside a stand-in for the package."""
    (tmp_path / "math_verify.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(room, "GRACE", 20.0)
    monkeypatch.setattr(room, "JUDGE", room.Judge())
    yield MathVerify(timeout=1)
    room.JUDGE.stop()


def test_completions_are_judged_one_by_one_and_a_lost_process_is_a_wrong_answer(judge):
    completions = ["it is $4$", "$5$", "", "$4$", "die $4$", "$4$"]
    answers = ["4", "4", "4", "no number", "4", "$4$"]
    reward = make_reward(RewardConfig(("math_verify",), math_verify=judge))
    scores = reward([""] * 6, completions, {"answer": answers}).values["math_verify"].tolist()
    assert scores[:3] == [1, 0, 0] and scores[3] != scores[3] and scores[4:] == [0, 1]


def test_what_hangs_is_stopped_and_the_next_is_judged(judge, monkeypatch):
    assert judge([""], ["$4$"], answer=["4"]) == [1]
    monkeypatch.setattr(room, "GRACE", -2.0)  # a second in all
    assert judge([""], ["hang $4$"], answer=["4"]) == [0]
    assert room.JUDGE._process is None
    monkeypatch.setattr(room, "GRACE", 20.0)
    assert judge([""], ["$4$"], answer=["4"]) == [1]


def test_a_package_that_cannot_be_imported_is_no_wrong_answer(judge, tmp_path):
    (tmp_path / "math_verify.py").write_text("import absent_module")
    with pytest.raises(JaxdynError, match="math-verify does not start: try python -c"):
        judge([""], ["$4$"], answer=["4"])


def test_it_works_in_a_thread(judge):
    found = []
    ask = lambda: found.extend(judge([""], ["$4$"], answer=["4"]))
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [1]


def test_without_it_the_run_says_what_to_install(monkeypatch):
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    reward = make_reward(RewardConfig(("math_verify",)))
    with pytest.raises(JaxdynError, match=r"needs math-verify: pip install 'jaxdyn\[math\]'"):
        reward([""], ["4"], {"answer": ["4"]})


def test_a_timeout_is_positive():
    with pytest.raises(JaxdynError, match=r"reward\.math_verify\.timeout must be positive, got 0"):
        MathVerify(timeout=0)


@pytest.mark.parity
def test_what_the_package_itself_says():
    pytest.importorskip("math_verify")
    judged = [
        ("1/2", "so it is $\\frac{2}{4}$.", 1),
        ("$x^2+2x+1$", "\\boxed{(x+1)^2}", 1),
        ("72", "The answer is 72.", 1),
        ("72", "The answer is 71.", 0),
        ("\\{1, 2\\}", "$\\{2, 1\\}$", 1),
        ("3", "I do not know", 0),
    ]
    answers, completions, wanted = map(list, zip(*judged, strict=True))
    assert MathVerify()([""] * len(judged), completions, answer=answers) == wanted
    # Its own limit, in a process whose main thread is free; the same process goes on.
    process = room.JUDGE._process
    endless = ["$9^{9^{9^9}}$", "$4$"]
    assert MathVerify(timeout=1)(["", ""], endless, answer=["4", "4"]) == [0, 1]
    assert room.JUDGE._process is process
    room.JUDGE.stop()
