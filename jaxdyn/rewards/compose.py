"""Several weighted reward functions as one, built in or the user's own."""

import dataclasses
import difflib
import importlib
import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxdyn.grammar import MOST, finite
from jaxdyn.rewards import verifiable
from jaxdyn.rewards.learned import LearnedReward
from jaxdyn.rewards.mathematics import MathVerify
from jaxdyn.rewards.verifiable import RewardFunction, Texts
from jaxdyn.types import JaxdynError


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What completions are rewarded for.

    The last fields are the table of built-in functions, each with its own options.

    Attributes:
      functions: built in (exact_match, numeric_match, anagram, contains_words, regex_match, length,
        finished, math_verify), a reward model (model, judge), or your own by path:
        package.module:function.
      weights: a weight for each function; 1 each if empty.
    """

    functions: tuple[str, ...] = ("anagram",)
    weights: tuple[float, ...] = ()
    exact_match: verifiable.ExactMatch = verifiable.ExactMatch()
    numeric_match: verifiable.NumericMatch = verifiable.NumericMatch()
    anagram: verifiable.Anagram = verifiable.Anagram()
    contains_words: verifiable.ContainsWords = verifiable.ContainsWords()
    regex_match: verifiable.RegexMatch = verifiable.RegexMatch()
    length: verifiable.Length = verifiable.Length()
    finished: verifiable.Finished = verifiable.Finished()
    math_verify: MathVerify = MathVerify()
    model: LearnedReward = LearnedReward()
    judge: LearnedReward = LearnedReward()

    def __post_init__(self):
        if not self.functions:
            raise JaxdynError("reward.functions must name at least one, got ()")
        finite(self, "reward", "weights")
        if self.weights and len(self.weights) != len(self.functions):
            raise JaxdynError(
                f"reward.weights must be as many as reward.functions ({len(self.functions)}), "
                f"got {len(self.weights)}"
            )


BUILT_IN = tuple(f.name for f in dataclasses.fields(RewardConfig) if callable(f.default))
"""The names of the built-in functions."""

LEARNED = tuple(
    f.name for f in dataclasses.fields(RewardConfig) if isinstance(f.default, LearnedReward)
)
"""The names of reward models; who has loaded one gives it to `make_reward`."""


@dataclasses.dataclass(frozen=True)
class RewardOutput:
    """Rewards of B completions: the weighted total, and each function's own.

    total = sum over functions of weight * value. A value is nan where the function could not
    score the completion, and then so is the total if that function has a weight: a sum without one
    of its terms cannot be compared with sums that have it. No mean counts a nan.
    """

    total: Float[np.ndarray, " B"]
    values: dict[str, Float[np.ndarray, " B"]]

    @property
    def means(self) -> dict[str, float]:
        """Each function's mean over the completions it scored; nan if there are none."""
        scored = {name: value[~np.isnan(value)] for name, value in self.values.items()}
        return {name: float(v.mean()) if v.size else math.nan for name, v in scored.items()}


Reward = Callable[[Sequence[str], Sequence[str], dict[str, list]], RewardOutput]


def make_reward(config: RewardConfig, scorers: Mapping[str, RewardFunction] = {}) -> Reward:
    """The config's reward as one function of (prompts, completions, columns).

    `scorers` are functions that exist already, such as one that holds a model's parameters: a name
    found there comes before a built-in one or a path.

    Raises JaxdynError for a name that is none of these, and for a built-in function without an
    option that it needs. The function made raises it for a reward that fails, returns another
    number of values than there are completions, or a value that is neither a finite number nor
    None: it names the reward and the example.
    """
    functions: dict[str, RewardFunction] = {}
    for path in config.functions:
        name, function = (path, scorers[path]) if path in scorers else _resolve(path, config)
        if name in functions:
            raise JaxdynError(f"reward.functions names {name!r} twice")
        functions[name] = function
    weights = dict(zip(functions, config.weights or (1.0,) * len(functions), strict=True))

    def reward(
        prompts: Sequence[str], completions: Sequence[str], columns: dict[str, list]
    ) -> RewardOutput:
        prompts, completions = list(prompts), list(completions)
        # Columns of these names would stand in the way of the two arguments.
        columns = {k: v for k, v in columns.items() if k not in ("prompts", "completions")}
        values = {
            name: _evaluate(name, function, prompts, completions, columns)
            for name, function in functions.items()
        }
        total = np.zeros(len(completions))
        for name, weight in weights.items():
            total += weight * values[name] if weight else 0.0
        if np.any(np.abs(total) > MOST):
            index = int(np.argmax(np.abs(total) > MOST))
            raise JaxdynError(
                f"the rewards' weighted sum is {total[index]:g}{_example(index, prompts)}, which "
                f"is beyond {MOST:g}; smaller reward.weights would help"
            )
        return RewardOutput(total, values)

    return reward


def _evaluate(
    name: str,
    function: RewardFunction,
    prompts: Texts,
    completions: Texts,
    columns: dict[str, list],
) -> Float[np.ndarray, " B"]:
    """One function's values, nan for None."""
    try:
        returned = call(function, prompts, completions, columns)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit(0) too must not end the run as if it were done
        where, cause = _first_failure(function, prompts, completions, columns) or ("", error)
        raise JaxdynError(f"reward {name!r} failed{where}: {_one_line(cause)}") from error
    try:
        returned = list(returned)
    except Exception as error:
        kind = type(returned).__name__
        raise JaxdynError(f"reward {name!r} returned {kind}, wanted a list of numbers") from error
    if len(returned) != len(completions):
        raise JaxdynError(
            f"reward {name!r} returned {len(returned)} values for {len(completions)} completions, "
            f"the first{_example(0, prompts)}"
        )
    values = np.empty(len(returned))
    for index, value in enumerate(returned):
        values[index] = math.nan if value is None else _float(value)
        if value is not None and not math.isfinite(values[index]):
            raise JaxdynError(
                f"reward {name!r} returned {_shown(value)}{_example(index, prompts)}, "
                "wanted a finite number or None"
            )
        if abs(values[index]) > MOST:
            raise JaxdynError(
                f"reward {name!r} returned {value!r:.60}{_example(index, prompts)}, which is "
                f"beyond {MOST:g}: sums of it would not be finite"
            )
    return values


def _first_failure(
    function: RewardFunction, prompts: Texts, completions: Texts, columns: dict[str, list]
) -> tuple[str, BaseException] | None:
    """The first example that fails by itself, and how; None if all of them fail only together."""
    for i in range(len(completions)):
        try:
            row = {key: column[i : i + 1] for key, column in columns.items()}
            call(function, prompts[i : i + 1], completions[i : i + 1], row)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return _example(i, prompts), error
    return None


def call(
    function: RewardFunction, prompts: Texts, completions: Texts, columns: dict[str, list]
) -> Any:
    """Call a reward with copies of what it is given, and keep what it says of warnings to itself:
    neither is anybody else's to find changed."""
    with warnings.catch_warnings():
        own = {name: copied(column) for name, column in columns.items()}
        returned = function(list(prompts), list(completions), **own)
        return list(returned) if isinstance(returned, Iterator) else returned  # it runs here


_PLAIN = frozenset((str, int, float, bool, type(None)))


def copied(x: Any) -> Any:
    """A copy of lists and objects of JSON, all the way down."""
    if type(x) is list:
        return [v if type(v) in _PLAIN else copied(v) for v in x]
    if type(x) is dict:
        return {k: v if type(v) in _PLAIN else copied(v) for k, v in x.items()}
    return x


def _resolve(path: str, config: RewardConfig) -> tuple[str, RewardFunction]:
    """The name in the metrics and the function, of a built-in name or a dotted path."""
    if path in BUILT_IN:
        function = getattr(config, path)
        for option, value in vars(function).items():
            if value == "":
                raise JaxdynError(f"reward.{path}.{option} must be set, got ''")
        return path, function
    if path in LEARNED:
        raise JaxdynError(f"the reward {path!r} is a model, which is not loaded here")
    module_name, _, name = path.rpartition(":" if ":" in path else ".")
    if not module_name:
        nearest = difflib.get_close_matches(path, (*BUILT_IN, *LEARNED), n=1, cutoff=0.0)[0]
        raise JaxdynError(
            f"unknown reward {path!r}: did you mean {nearest!r}? "
            "Your own is given as package.module:function"
        )
    here = os.getcwd()
    if added := here not in sys.path:  # a console script does not look in the working directory
        sys.path.append(here)
    try:
        require_outside_runs(path, module_name.partition(".")[0])
    finally:
        if added and run_around(Path(here)):  # nor is anything else to be found in a run
            sys.path.remove(here)
    try:
        with warnings.catch_warnings():
            function = getattr(importlib.import_module(module_name), name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise JaxdynError(f"cannot import the reward {path!r}: {_one_line(error)}") from error
    if not callable(function):
        raise JaxdynError(f"the reward {path!r} is a {type(function).__name__}, not a function")
    return name, function


def require_outside_runs(path: str, module: str) -> None:
    """Refuse code that lies in a run's directory: whoever looks at a stranger's run from inside it
    would run the stranger's.

    Raises:
      JaxdynError: naming the run's directory.
    """
    if module in sys.modules:
        return
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        return  # the import says so
    for place in (found.origin, *(found.submodule_search_locations or ())):
        if place and (folder := run_around(Path(place).absolute().parent)):
            raise JaxdynError(
                f"the reward {path!r} lies in the run {folder}, and a run's code is not imported; "
                "start from elsewhere, or move the file out"
            )


def run_around(folder: Path) -> Path | None:
    """The run's directory that a folder is or lies in, if it does."""
    is_run = lambda x: (x / "config.json").exists() and (x / "checkpoints").is_dir()
    return next(filter(is_run, (folder, *folder.parents)), None)


def _float(value: Any) -> float:
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:  # an object of the user's may raise anything
        return math.nan


def _example(index: int, prompts: Texts) -> str:
    return f" for example {index} ({prompts[index][:40]!r})" if index < len(prompts) else ""


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except Exception:
        return type(value).__name__


def _one_line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    if isinstance(error, JaxdynError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
