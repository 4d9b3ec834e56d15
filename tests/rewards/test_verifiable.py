import math

import pytest

from jaxdyn.rewards import (
    Anagram,
    ContainsWords,
    ExactMatch,
    Finished,
    Length,
    NumericMatch,
    RegexMatch,
    last_number,
)
from jaxdyn.types import JaxdynError


def score(reward, completions, **columns):
    return reward(["?"] * len(completions), completions, **columns)


def test_exact_match():
    completions = ["yes", " yes\n", "Yes", "yes.", "7", "yes"]
    answers = ["yes", "yes", "yes", "yes", 7, None]
    assert score(ExactMatch(), completions, answer=answers) == [1, 1, 0, 0, 1, None]
    assert score(ExactMatch("label"), ["a"], label=["a"], answer=["b"]) == [1]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so #### 72", 72),
        ("#### 1,234", 1234),
        ("1,234,567.50 dollars", 1234567.5),
        ("pay $18.", 18),
        ("first 3 then -4", -4),
        ("8-5", 5),
        ("x=-5", -5),
        ("(3)-5", 5),
        ("1,2345", 2345),
        ("1,2,3", 3),
        (".5", 0.5),
        ("-.5", -0.5),
        ("3.", 3),
        ("2e3", 2000),
        ("1.5E-3", 0.0015),
        ("50%", 50),
        ("+7", 7),
        ("9" * 5000, math.inf),
        ("none", None),
        ("", None),
        ("٣", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_numeric_match():
    completions = ["it is 72", "#### 1000", "72.1", "no number", "70 or 72", "5"]
    answers = ["a\n#### 72", "1,000.0", "72", "72", "72", "unknown"]
    assert score(NumericMatch(), completions, answer=answers) == [1, 1, 0, 0, 1, None]
    close = ["100.9", "101.1", "0.9", "0.5"]
    # Relative above 1, absolute below it.
    assert score(NumericMatch(tolerance=0.01), close, answer=[100, 100, 1, 0.495]) == [1, 0, 0, 1]


def test_anagram():
    completions = ["cab", "abc", " bca\n", "ab", "abcc", "aab", "abd", "ABC", "a b c", "", "cab"]
    expected = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, None]
    letters = ["abc"] * 10 + [None]
    assert score(Anagram(), completions, letters=letters) == expected
    # A letter that the prompt has twice is wanted twice.
    assert score(Anagram("bag"), ["oto", "ot"], bag=["too", "too"]) == [1, 0]


def test_contains_words():
    completions = ["The Ball was happy.", "She saw a balloon.", "happy-go-lucky", "", "a b", "ball"]
    words = [["ball", "happy"]] * 4 + [[], "ball"]
    assert score(ContainsWords(), completions, words=words) == [1, 0, 0.5, 0, None, 1]
    strict = ContainsWords(all_words=True)
    assert score(strict, completions, words=words) == [1, 0, 0, 0, None, 1]
    # Words are text, not patterns.
    assert score(ContainsWords(), ["axb", "a.b"], words=[["a.b"]] * 2) == [0, 1]


def test_regex_match():
    assert score(RegexMatch(r"^\d+$"), ["12", "12a", ""]) == [1, 0, 0]
    with pytest.raises(JaxdynError, match=r"^reward.regex_match.pattern must be .*, got '\('"):
        RegexMatch("(")


def test_length():
    texts = ["", "ab", "abcd", "abcdef", "abcdefgh"]
    assert score(Length(2, 4), texts) == [0, 1, 1, 0, 0]
    # Length 6 is 2 too long, 8 is 4 too long, 0 is 2 too short; a slack of 3 reaches 0 at 4.
    assert score(Length(2, 4, slack=3), texts) == [0.5, 1, 1, 0.5, 0]
    assert score(Length(4, 4, slack=3), texts) == [0, 0.5, 1, 0.5, 0]
    assert score(Length(3), texts) == [0, 0, 1, 1, 1]
    tokens = Length(2, 2, unit="tokens")
    assert score(tokens, ["long text", "x"], completion_ids=[[1, 2], [1, 2, 3]]) == [1, 0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Length(5, 4), "length.maximum must be at least 5, got 4"),
        (lambda: Length(-1), "length.minimum must be at least 0, got -1"),
        (lambda: Length(slack=-2), "length.slack must be at least 0, got -2"),
        (lambda: NumericMatch(tolerance=math.nan), "numeric_match.tolerance must be finite, got"),
    ],
)
def test_options_out_of_range_are_refused(make, words):
    with pytest.raises(JaxdynError, match=rf"^reward\.{words}"):
        make()


def test_finished():
    assert score(Finished(), ["a", "b"], finished=[True, False]) == [1, 0]


def test_a_missing_column_is_named():
    with pytest.raises(JaxdynError, match="needs the column 'answer'; the examples have: words"):
        score(ExactMatch(), ["a"], words=[["a"]])
