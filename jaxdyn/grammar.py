"""The grammar of configurations: frozen dataclasses to JSON and back, every refusal by name.

Their `__post_init__` checks fields in one style, each raising `JaxdynError`:

    at_least(1, self, "train", "num_prompts")      train.num_prompts must be at least 1, got 0

A field may be a number or a tuple of numbers; None was not given and passes, as does a name that
may stand for a number. NaN and infinity pass no check of a range, and every range has an end: where
a field has none of its own, it is `MOST_WHOLE` of whole numbers and `MOST` of others. A section of
"" is the top level.

Imports no JAX, so that options can be read and refused before anything heavy is.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxdyn.errors import JaxdynError
from jaxdyn.storage.files import write_file
from jaxdyn.storage.paths import AnyPath, require_name
from jaxdyn.storage.reading import read_object, shown

Config = TypeVar("Config")

MOST_WHOLE, MOST = 10**9, 1e30
"""The largest numbers of fields without a bound of their own: a float32 has room for their sums."""

LARGEST_SEED = 2**32 - 1
"""Beyond it `jax.random.key` begins again at 0."""

MOST_ROWS, MOST_TOKENS = 10**6, 10**7
"""The most prompts, or completions of one, that are held at once, and tokens of a text."""


def save_config(config: Any, path: Path) -> None:
    """Write the configuration as JSON."""
    write_file(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load_config(kind: type[Config] | Mapping[str, type[Config]], path: AnyPath) -> Config:
    """Read a configuration back.

    Args:
      kind: its class, or the classes by what a file's `kind` may be: the first where it has none.

    Raises:
      JaxdynError: for a file that is not one, naming the field.
    """
    if not path.exists():
        raise JaxdynError(f"no such configuration file: {path}")
    data = read_object(path)
    if isinstance(kind, Mapping):
        kind = kind.get(str(data.get("kind")), next(iter(kind.values())))
    return from_dict(kind, data, where=str(path))


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest known name, for error messages; empty if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def from_dict(kind: type[Config], data: Any, where: str = "config") -> Config:
    """Build a configuration from plain data, refusing unknown fields and wrong types by name."""
    if not isinstance(data, dict):
        raise JaxdynError(f"{where}: expected an object with fields, got {shown(data)}")
    fields = {f.name: f.type for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            raise JaxdynError(f"{where}: unknown field {name!r:.60}{nearest(name, fields)}")
    hints = typing.get_type_hints(kind)
    return kind(**{n: _value(hints[n], v, f"{where}: {n}") for n, v in data.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` checked against a field's type: dataclass, Literal, optional, tuple or plain."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _value(inner, value, where)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise JaxdynError(f"{where}: expected one of {arguments}, got {shown(value)}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise JaxdynError(f"{where}: expected {len(kinds)} values, got {shown(value)}")
        pairs = zip(kinds, value, strict=True)
        return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(pairs))
    if hint is float and type(value) is int:
        if abs(value) > MOST:
            raise JaxdynError(f"{where} must lie in [{-MOST:g}, {MOST:g}], got {shown(value)}")
        return float(value)
    kind = getattr(hint, "__name__", str(hint))
    if origin is not None or not isinstance(value, hint) or type(value) is bool is not hint:
        raise JaxdynError(f"{where}: expected {kind}, got {shown(value)}")
    return require_name(value, where) if isinstance(value, str) else value


# -- checks of fields ----------------------------------------------------------------------------


def at_least(
    least: int | float, config: Any, section: str, *names: str, most: int | float | None = None
) -> None:
    """Each field is finite and x >= least, and at most `most`."""
    _check(lambda x: x >= least, f"be at least {least}", config, section, names, most)


def above(
    bound: int | float, config: Any, section: str, *names: str, most: int | float | None = None
) -> None:
    """Each field is finite and x > bound, and at most `most`."""
    wanted = f"be above {bound}" if bound else "be positive"
    _check(lambda x: x > bound, wanted, config, section, names, most)


def between(
    low: int | float, high: int | float, config: Any, section: str, *names: str, ends: str = "[]"
) -> None:
    """Each field lies between the two; `ends` says, as an interval does, which belong to it."""
    lower = lambda x: x >= low if ends[0] == "[" else x > low
    upper = lambda x: x <= high if ends[1] == "]" else x < high
    wanted = f"lie in {ends[0]}{low}, {high}{ends[1]}"
    _check(lambda x: lower(x) and upper(x), wanted, config, section, names, high)


def finite(config: Any, section: str, *names: str) -> None:
    """Each field is neither infinite nor NaN, and -MOST <= x <= MOST."""
    _check(lambda x: x >= -MOST, f"be at least {-MOST:g}", config, section, names)


def one_of(choices: Iterable[Any], config: Any, section: str, *names: str) -> None:
    """Each field is one of the choices; None only if it is among them."""
    choices = list(choices)
    for name in names:
        if getattr(config, name) not in choices:
            known = [choice for choice in choices if choice is not None]
            _refuse(section, name, f"be one of {known}", repr(getattr(config, name)))


def _check(
    holds: Callable[[float], bool],
    wanted: str,
    config: Any,
    section: str,
    names: Iterable[str],
    most: int | float | None = None,
) -> None:
    for name in names:
        value = getattr(config, name)
        for x in value if isinstance(value, tuple) else (value,):
            if x is None or isinstance(x, str):
                continue
            if isinstance(x, float) and not math.isfinite(x):
                _refuse(section, name, "be finite", x)
            if not holds(x):
                _refuse(section, name, wanted, shown(x))
            end = most if most is not None else MOST if isinstance(x, float) else MOST_WHOLE
            if x > end:
                _refuse(section, name, f"be at most {end}", shown(x))


def _refuse(section: str, name: str, wanted: str, got: Any) -> None:
    raise JaxdynError(f"{section}{'.' if section else ''}{name} must {wanted}, got {got}")
