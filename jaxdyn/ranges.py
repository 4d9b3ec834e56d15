"""Checks of a configuration's fields, for `__post_init__`; all raise `JaxdynError` in one style.

    at_least(1, self, "train", "num_prompts")      train.num_prompts must be at least 1, got 0

A field may be a number or a tuple of numbers; None was not given and passes. NaN and infinity pass
no check of a range. A section of "" is the top level.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

from jaxdyn.errors import JaxdynError


def at_least(least: int | float, config: Any, section: str, *names: str) -> None:
    """Each field is finite and x >= least."""
    _check(lambda x: x >= least, f"be at least {least}", config, section, names)


def above(bound: int | float, config: Any, section: str, *names: str) -> None:
    """Each field is finite and x > bound."""
    wanted = f"be above {bound}" if bound else "be positive"
    _check(lambda x: x > bound, wanted, config, section, names)


def between(
    low: int | float, high: int | float, config: Any, section: str, *names: str, ends: str = "[]"
) -> None:
    """Each field lies between the two; `ends` says, as an interval does, which belong to it."""
    lower = lambda x: x >= low if ends[0] == "[" else x > low
    upper = lambda x: x <= high if ends[1] == "]" else x < high
    wanted = f"lie in {ends[0]}{low}, {high}{ends[1]}"
    _check(lambda x: lower(x) and upper(x), wanted, config, section, names)


def finite(config: Any, section: str, *names: str) -> None:
    """Each field is neither infinite nor NaN."""
    _check(lambda x: True, "be finite", config, section, names)


def one_of(choices: Iterable[Any], config: Any, section: str, *names: str) -> None:
    """Each field is one of the choices; None only if it is among them."""
    choices = list(choices)
    for name in names:
        if getattr(config, name) not in choices:
            known = [choice for choice in choices if choice is not None]
            _refuse(section, name, f"be one of {known}", repr(getattr(config, name)))


def _check(
    holds: Callable[[float], bool], wanted: str, config: Any, section: str, names: Iterable[str]
) -> None:
    for name in names:
        value = getattr(config, name)
        for x in value if isinstance(value, tuple) else (value,):
            if x is not None and not math.isfinite(x):
                _refuse(section, name, "be finite", x)
            if x is not None and not holds(x):
                _refuse(section, name, wanted, x)


def _refuse(section: str, name: str, wanted: str, got: Any) -> None:
    raise JaxdynError(f"{section}{'.' if section else ''}{name} must {wanted}, got {got}")
