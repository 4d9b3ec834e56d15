"""Where a command writes: a place that holds nothing of anyone else's."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import read_object
from jaxdyn.storage.files import is_unfinished, require_writable, write_files

BLOCKS = "blocks"
"""Where long work keeps what is finished: it is there from a command's start to its end."""


def refuse_others(output: Path, ours: Set[str]) -> None:
    """JaxdynError if `output` is a file, cannot be written, or holds anything but our `ours`."""
    if output.exists() and not output.is_dir():
        raise JaxdynError(f"{output} is not a directory; choose another output")
    if others := sorted(_names(output) - ours):
        raise JaxdynError(f"{output} already holds {others[0]}; choose another output")
    require_writable(output)


def refuse_finished(output: Path, ours: Set[str]) -> None:
    """As `refuse_others`; and what is ours only where the command did not come to its end."""
    begun = BLOCKS in _names(output)
    refuse_others(output, ours | {BLOCKS} if begun else set())


def refuse_another(path: Path, what: str, is_own: Callable[[Set[str]], bool]) -> None:
    """JaxdynError if a JSON file cannot be written, or another is there; `is_own` knows its names.

    Args:
      what: what it is, in a word.
    """
    require_writable(path.parent)
    if not path.exists():
        return
    with contextlib.suppress(JaxdynError):
        if is_own(read_object(path).keys()):
            return
    raise JaxdynError(f"{path} already exists and is no {what}; choose another --json")


def is_finished(path: Path, options: Any, read: Callable[[Path], dict[str, Any]]) -> bool:
    """Whether a file is there, of the same options: the command was killed when it tidied up.

    Args:
      read: a file's description, which has the options under "config".

    Raises:
      JaxdynError: for a file of other options, or none of ours.
    """
    if not path.exists():
        return False
    if read(path).get("config") != json.loads(json.dumps(dataclasses.asdict(options))):
        raise JaxdynError(f"{path.parent} already holds {path.name}; choose another output")
    return True


def finish(output: Path, files: Mapping[Path, bytes | str]) -> None:
    """Write a command's files, of which the last is the sign of its end, and tidy up."""
    write_files(files)
    tidy(output)


def tidy(output: Path) -> None:
    """Remove the blocks of finished work."""
    shutil.rmtree(output / BLOCKS, ignore_errors=True)


def _names(output: Path) -> set[str]:
    """What is in a directory, but for what is unfinished there."""
    return {path.name for path in output.glob("*") if not is_unfinished(path)}
