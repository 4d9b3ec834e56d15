"""Reading one field of a `config.json`; every refusal names the field, its value and the choice."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NoReturn

from jaxdyn.types import JaxdynError

REQUIRED = object()
"""The default of a field that has none."""


def refuse(name: str, value: Any, supported: str) -> NoReturn:
    raise JaxdynError(f"config.json: {name} = {value!r} is not supported; supported: {supported}")


def get(data: dict[str, Any], name: str, default: Any) -> Any:
    """A field's value; absent and null both mean the default. Dots reach into nested objects."""
    value: Any = data
    for key in name.split("."):
        value = value.get(key)
    if value is None and default is REQUIRED:
        raise JaxdynError(f"config.json has no {name}")
    return default if value is None else value


def size(data: dict[str, Any], name: str, default: Any = REQUIRED) -> Any:
    value = get(data, name, default)
    if value is not default and (type(value) is not int or value < 1):
        refuse(name, value, "a whole number from 1")
    return value


def number(data: dict[str, Any], name: str, default: Any = REQUIRED) -> float:
    value = get(data, name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        refuse(name, value, "a number above 0")
    return float(value)


def flag(data: dict[str, Any], name: str, default: bool) -> bool:
    value = get(data, name, default)
    if type(value) is not bool:
        refuse(name, value, "true or false")
    return value


# Hugging Face has several names for SiLU and for the tanh approximation of GELU.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def activation(data: dict[str, Any], name: str, default: str) -> str:
    return _ACTIVATIONS[one_of(data, name, default, _ACTIVATIONS)]


def one_of(data: dict[str, Any], name: str, default: Any, choices) -> str:
    value = get(data, name, default)
    if not isinstance(value, str) or value not in choices:
        refuse(name, value, ", ".join(choices))
    return value


@dataclasses.dataclass(frozen=True)
class Field:
    """`theirs` in config.json is `ours` in ModelConfig; one of theirs may stand for two of ours."""

    theirs: str
    ours: str
    read: Callable[[dict[str, Any], str, Any], Any] = size
    default: Any = REQUIRED
    write: Callable[[Any], Any] = lambda value: value
