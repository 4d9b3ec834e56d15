"""Where a command writes: a place that holds nothing of anyone else's."""

from collections.abc import Set
from pathlib import Path

from jaxdyn.errors import JaxdynError


def refuse_others(output: Path, ours: Set[str]) -> None:
    """JaxdynError if `output` is a file, or holds anything but this command's own `ours`."""
    if output.exists() and not output.is_dir():
        raise JaxdynError(f"{output} is not a directory; choose another output")
    names = {path.name for path in output.glob("*")}
    if others := sorted(names - ours):
        raise JaxdynError(f"{output} already holds {others[0]}; choose another output")
