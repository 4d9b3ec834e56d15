"""Rewards that a program can check: pure functions of the texts.

A reward is called as the peers' are,

    reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]

where the columns are the examples' (an answer, words to use, ...), one entry a completion, and
None marks a completion that cannot be scored. Here each is a frozen dataclass: its fields are its
options, the section `reward.NAME` of a configuration, and it is the function itself. A new one is a
class here and a field of `RewardConfig`.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Literal

from jaxdyn.grammar import at_least
from jaxdyn.types import JaxdynError

Texts = list[str]
Scores = list[float | None]
RewardFunction = Callable[..., Scores]

# A sign counts only where it does not follow an operand: the last number of `8-5` is 5.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-+])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]+)?"
)


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """1 where the completion is the example's answer, spaces around either ignored, else 0.

    Attributes:
      answer: the column with the answer.
    """

    answer: str = "answer"

    def __call__(self, prompts: Texts, completions: Texts, **columns: list) -> Scores:
        equal = lambda text, wanted: float(text.strip() == str(wanted).strip())
        return _by_entry(equal, completions, column_of(columns, self.answer))


@dataclasses.dataclass(frozen=True)
class NumericMatch:
    """1 where the completion's last number x equals the answer's last number y, else 0.

    |x - y| <= tolerance * max(1, |y|). Thousands separators, signs, decimals and exponents are
    read; an answer in the style of GSM8K ends in `#### 72`. None where the answer has no number.

    Attributes:
      answer: the column with the answer.
      tolerance: relative above 1, absolute below.
    """

    answer: str = "answer"
    tolerance: float = 1e-6

    def __post_init__(self):
        at_least(0, self, "reward.numeric_match", "tolerance")

    def __call__(self, prompts: Texts, completions: Texts, **columns: list) -> Scores:
        def score(text: str, wanted: Any) -> float | None:
            x, y = last_number(text), last_number(str(wanted))
            if y is None:
                return None
            return float(x is not None and abs(x - y) <= self.tolerance * max(1.0, abs(y)))

        return _by_entry(score, completions, column_of(columns, self.answer))


@dataclasses.dataclass(frozen=True)
class Anagram:
    """1 where the completion is the example's letters in some order, each once, else 0.

    Spaces around the completion are ignored.

    Attributes:
      letters: the column with the letters.
    """

    letters: str = "letters"

    def __call__(self, prompts: Texts, completions: Texts, **columns: list) -> Scores:
        rearranged = lambda text, wanted: float(sorted(text.strip()) == sorted(wanted))
        return _by_entry(rearranged, completions, column_of(columns, self.letters))


@dataclasses.dataclass(frozen=True)
class ContainsWords:
    """The share of the example's words that the completion has as whole words, in any case.

    None where the example lists no word.

    Attributes:
      words: the column with the words.
      all_words: reward all of the words or nothing, rather than the share of them.
    """

    words: str = "words"
    all_words: bool = False

    def __call__(self, prompts: Texts, completions: Texts, **columns: list) -> Scores:
        def score(text: str, wanted: str | list[str]) -> float | None:
            wanted = [wanted] if isinstance(wanted, str) else wanted
            if not wanted:
                return None
            found = sum(
                re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None
                for word in wanted
            )
            return float(found == len(wanted)) if self.all_words else found / len(wanted)

        return _by_entry(score, completions, column_of(columns, self.words))


@dataclasses.dataclass(frozen=True)
class RegexMatch:
    """1 where the regular expression is found anywhere in the completion, else 0.

    Attributes:
      pattern: the regular expression to find.
    """

    pattern: str = ""

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise JaxdynError(
                "reward.regex_match.pattern must be a regular expression, got "
                f"{self.pattern!r} ({error})"
            ) from error

    def __call__(self, prompts: Texts, completions: Texts, **columns: list) -> Scores:
        return [float(re.search(self.pattern, text) is not None) for text in completions]


@dataclasses.dataclass(frozen=True)
class Length:
    """1 for a length in [minimum, maximum], falling linearly to 0 at slack + 1 beyond it.

    max(0, 1 - d / (slack + 1)) for a length d outside the range; minimum = maximum makes it a
    penalty on the distance from a target.

    Attributes:
      minimum: the shortest completion with full reward.
      maximum: the longest completion with full reward; None for no limit.
      slack: how far outside the range the reward is still above 0.
      unit: what is counted; tokens include the stop token.
    """

    minimum: int = 0
    maximum: int | None = None
    slack: int = 0
    unit: Literal["characters", "tokens"] = "characters"

    def __post_init__(self):
        at_least(0, self, "reward.length", "minimum", "slack")
        at_least(self.minimum, self, "reward.length", "maximum")

    def __call__(self, prompts: Texts, completions: Texts, **columns: list) -> Scores:
        tokens = self.unit == "tokens"
        measured = column_of(columns, "completion_ids") if tokens else completions
        upper = math.inf if self.maximum is None else self.maximum
        outside = [max(self.minimum - len(x), len(x) - upper, 0) for x in measured]
        return [max(0.0, 1 - distance / (self.slack + 1)) for distance in outside]


@dataclasses.dataclass(frozen=True)
class Finished:
    """1 where the completion ended by a stop token rather than at the length limit, else 0."""

    def __call__(self, prompts: Texts, completions: Texts, **columns: list) -> Scores:
        return [float(stopped) for stopped in column_of(columns, "finished")]


def last_number(text: str) -> float | None:
    """The last number in a text, or None.

    >>> last_number("about 1,234.5 apples")
    1234.5
    >>> last_number("none") is None
    True
    """
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _by_entry(
    score: Callable[[str, Any], float | None], completions: Texts, column: list
) -> Scores:
    """Each completion scored with its example's entry in a column; None without an entry."""
    pairs = zip(completions, column, strict=True)
    return [None if wanted is None else score(text, wanted) for text, wanted in pairs]


def column_of(columns: dict[str, list], name: str) -> list:
    """The examples' entries; JaxdynError, with the names that there are, for another column."""
    if name not in columns:
        have = ", ".join(columns) or "none"
        raise JaxdynError(f"needs the column {name!r}; the examples have: {have}")
    return columns[name]
