"""Options from the words of a command line; a complaint is one line, and names the nearest."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import load_config, nearest


def parse(
    program: str, arguments: list[str], kind: type, presets: dict[str, Any] | None = None
) -> Any:
    """The options of `kind`; with presets, from one of them or from a file, and then overridden.

    Raises:
      JaxdynError: for what is not understood or does not go together, and a preset or a file that
        is not there.
    """
    start: dict[str, Any] = {}
    if presets is not None:
        start["default"], arguments = take_start(kind, presets, arguments)
        what = (kind.__doc__ or "").split("\n\n")[0]
        start["description"] = (
            f"{what}\n\n--preset NAME starts from a preset ({', '.join(presets)}), --config FILE "
            "from a run's config.json; the options below override either."
        )
    with complaining_in_a_line(helping=bool({"-h", "--help"} & set(arguments))):
        return tyro.cli(kind, prog=program, args=arguments, **start)


def take_start(kind: type, presets: dict[str, Any], arguments: list[str]) -> tuple[Any, list[str]]:
    """What `--preset NAME` or `--config FILE` says, or the defaults; and the other arguments."""
    from jaxdyn.presets import preset

    name, arguments = take_option(arguments, "--preset")
    path, arguments = take_option(arguments, "--config")
    if name and path:
        raise JaxdynError("give --preset or --config, not both")
    if path:
        return load_config(kind, Path(path)), arguments
    return preset(presets, name) if name else kind(), arguments


def take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `name VALUE` or `name=VALUE`, and the arguments without it."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1], arguments[:i] + arguments[i + 1 :]
        if argument == name:
            if i + 1 == len(arguments):
                raise JaxdynError(f"{name} needs a value")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
    return None, arguments


@contextlib.contextmanager
def complaining_in_a_line(helping: bool) -> Iterator[None]:
    """What tyro complains of in a box is raised as a JaxdynError; the box is wide, so that the
    line is whole."""
    said, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = columns or "100" if helping else "1000"
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise JaxdynError(one_line(said.getvalue())) from None
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def one_line(box: str) -> str:
    """What a boxed message says: its first paragraph, and the nearest option if it names some."""
    rows = [row.strip("│╭╮╰╯ ").removeprefix("─ ") for row in box.splitlines()]
    rows = [row for row in rows if row.strip("─-")]  # rules are of dashes where a box is ASCII
    said = rows[1] if len(rows) > 1 else " ".join(rows)
    if said.endswith(":") and len(rows) > 2:
        said += f" {rows[2]}"
    options = [row.split()[0] for row in rows[2:] if row.startswith("--")]
    if "nrecognized" in said and options:
        unknown = next((word.strip(",") for word in said.split() if word.startswith("--")), "")
        said += nearest(unknown, options)
    return said
