"""Reading one field of a `config.json`; every refusal names the field, its value and the choice."""

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

from jaxdyn.storage.reading import shown
from jaxdyn.types import JaxdynError

REQUIRED = object()
"""The default of a field that has none."""

MOST_SIZE, MOST_NUMBER, MOST_LAYERS = 2**31 - 1, 1e30, 10_000
"""The largest whole number, other number and number of layers."""


def refuse(name: str, value: Any, supported: str) -> NoReturn:
    said = f"config.json: {name} = {shown(value)} is not supported; supported: {supported}"
    raise JaxdynError(said)


def get(data: dict[str, Any], name: str, default: Any) -> Any:
    """A field's value; absent and null both mean the default. Dots reach into nested objects."""
    value: Any = data
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if value is None and default is REQUIRED:
        raise JaxdynError(f"config.json has no {name}")
    return default if value is None else value


def size(data: dict[str, Any], name: str, default: Any = REQUIRED, most: int = MOST_SIZE) -> Any:
    value = get(data, name, default)
    if value is not default and (type(value) is not int or not 1 <= value <= most):
        refuse(name, value, f"a whole number from 1 to {most}")
    return value


def layers(data: dict[str, Any], name: str, default: Any = REQUIRED) -> Any:
    return size(data, name, default, MOST_LAYERS)


def number(data: dict[str, Any], name: str, default: Any = REQUIRED) -> float:
    value = get(data, name, default)
    if type(value) not in (int, float) or not 0 < value <= MOST_NUMBER:
        refuse(name, value, f"a number above 0, up to {MOST_NUMBER:g}")
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
