"""How a kernel is asked to run: its options, one spelling everywhere."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax

from jaxdyn.types import JaxdynError

DEFAULT_BUDGET = 4 * 2**30
"""Bytes that a kernel may use beside the parameters and its result, where the caller names none."""

METHODS = ("auto", "plain", "gram")


class Execution(TypedDict, total=False):
    """How to compute a kernel; none of it changes the result beyond rounding.

    Sketches and products with a field take some of these alone, and refuse the others.

    method: "plain" forms every row's whole gradient, "gram" never does, "auto" (the default) is
      plain where the gradients are tiny.
    memory_budget: bytes beside the parameters (twice, under a preconditioner) and the result, on
      each device; 4 GiB by default.
    devices: the devices to use; each holds a copy of the parameters and takes tiles of its own. By
      default the one that holds the parameters.
    progress: called with the number of finished tiles and of all, as each finishes.
    blocks: a directory that keeps finished tiles: the same call takes up those it finds there, a
      call for another kernel refuses it.
    """

    method: str
    memory_budget: int
    devices: Sequence[jax.Device]
    progress: Callable[[int, int], None]
    blocks: Path


def require_options(execution: Execution, *used: str) -> None:
    """Refuse options that a function does not know or has no use for; without `used` it takes all.

    Raises:
      TypeError: if an option is unknown, as for any other keyword argument.
      JaxdynError: if it is one of other functions.
    """
    for name in execution:
        if name not in Execution.__annotations__:
            raise TypeError(f"unexpected keyword argument {name!r}")
        if used and name not in used:
            raise JaxdynError(f"{name} has no use here: the options are {' and '.join(used)}")


def budget_of(execution: Execution) -> int:
    """The caller's memory budget, or the default."""
    return execution.get("memory_budget", DEFAULT_BUDGET)


def platform_of(execution: Execution, operands: Any) -> str:
    """That of the caller's devices, or of those that hold the operands."""
    held = (x.devices() for x in jax.tree.leaves(operands) if isinstance(x, jax.Array))
    return next(iter(execution.get("devices") or next(held, jax.devices()))).platform


def method_of(execution: Execution) -> str:
    """The caller's method, or "auto".

    Raises:
      JaxdynError: if it is none of the three.
    """
    method = execution.get("method", "auto")
    if method not in METHODS:
        raise JaxdynError(f"method must be 'auto', 'plain' or 'gram', got {method!r}")
    return method
