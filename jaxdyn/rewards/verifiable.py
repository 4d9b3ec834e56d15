"""Rewards that a program can check: pure functions of the texts.

Each function here returns a reward function with the signature the peers share,

    fn(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]

where the columns are the examples' (an answer, words to use, ...), one entry a completion, and
None marks a completion that cannot be scored.
"""

import math
import re
from collections.abc import Callable
from typing import Any, Literal

from jaxdyn.types import JaxdynError

RewardFunction = Callable[..., list[float | None]]

# A sign counts only where it does not follow an operand: the last number of `8-5` is 5.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-+])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]+)?"
)


def exact_match(answer: str = "answer") -> RewardFunction:
    """1 where the completion is the example's `answer`, spaces around either ignored, else 0."""

    def score(completion: str, wanted: Any) -> float:
        return float(completion.strip() == str(wanted).strip())

    return _by_column(score, answer)


def numeric_match(answer: str = "answer", tolerance: float = 1e-6) -> RewardFunction:
    """1 where the completion's last number x equals the answer's last number y, else 0.

    |x - y| <= tolerance * max(1, |y|). Thousands separators, signs, decimals and exponents are
    read; an answer in the style of GSM8K ends in `#### 72`. None where the answer has no number.
    """

    def score(completion: str, wanted: Any) -> float | None:
        x, y = last_number(completion), last_number(str(wanted))
        if y is None:
            return None
        return float(x is not None and abs(x - y) <= tolerance * max(1.0, abs(y)))

    return _by_column(score, answer)


def anagram(letters: str = "letters") -> RewardFunction:
    """1 where the completion is the example's `letters` in some order, each once, else 0.

    Spaces around the completion are ignored.
    """

    def score(completion: str, wanted: Any) -> float:
        return float(sorted(completion.strip()) == sorted(wanted))

    return _by_column(score, letters)


def contains_words(words: str = "words", all_or_nothing: bool = False) -> RewardFunction:
    """The share of the example's `words` that the completion has as whole words, in any case.

    With `all_or_nothing`, 1 for all of them and else 0. None where the example lists no word.
    """

    def score(completion: str, wanted: str | list[str]) -> float | None:
        wanted = [wanted] if isinstance(wanted, str) else wanted
        if not wanted:
            return None
        found = sum(
            re.search(rf"(?<!\w){re.escape(word)}(?!\w)", completion, re.IGNORECASE) is not None
            for word in wanted
        )
        return float(found == len(wanted)) if all_or_nothing else found / len(wanted)

    return _by_column(score, words)


def regex_match(pattern: str) -> RewardFunction:
    """1 where the regular expression is found anywhere in the completion, else 0."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise JaxdynError(f"not a regular expression: {pattern!r} ({error})") from error

    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]:
        return [float(compiled.search(completion) is not None) for completion in completions]

    return reward


def length(
    minimum: int = 0,
    maximum: int | None = None,
    slack: int = 0,
    unit: Literal["characters", "tokens"] = "characters",
) -> RewardFunction:
    """1 for a length in [minimum, maximum], falling linearly to 0 at slack + 1 beyond it.

    max(0, 1 - d / (slack + 1)) for a length d outside the range; minimum = maximum makes it a
    penalty on the distance from a target. Tokens include the stop token.
    """
    if minimum < 0 or slack < 0 or (maximum is not None and maximum < minimum):
        raise JaxdynError(
            "length: wanted 0 <= minimum <= maximum and slack >= 0, "
            f"got minimum {minimum}, maximum {maximum} and slack {slack}"
        )

    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]:
        measured = completions if unit == "characters" else _column(columns, "completion_ids")
        lengths = [len(completion) for completion in measured]
        upper = math.inf if maximum is None else maximum
        return [max(0.0, 1 - max(minimum - n, n - upper, 0) / (slack + 1)) for n in lengths]

    return reward


def finished() -> RewardFunction:
    """1 where the completion ended by a stop token rather than at the length limit, else 0."""

    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]:
        return [float(stopped) for stopped in _column(columns, "finished")]

    return reward


def last_number(text: str) -> float | None:
    """The last number in a text, or None.

    >>> last_number("about 1,234.5 apples")
    1234.5
    >>> last_number("none") is None
    True
    """
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _by_column(score: Callable[[str, Any], float | None], name: str) -> RewardFunction:
    """A reward of each completion and its example's entry in a column; None without an entry."""

    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]:
        pairs = zip(completions, _column(columns, name), strict=True)
        return [None if wanted is None else score(text, wanted) for text, wanted in pairs]

    return reward


def _column(columns: dict[str, list], name: str) -> list:
    if name not in columns:
        have = ", ".join(columns) or "none"
        raise JaxdynError(f"needs the column {name!r}; the examples have: {have}")
    return columns[name]
